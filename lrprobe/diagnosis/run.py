"""``diagnose``: runs the checks on a frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrprobe.about import KEY, description
from lrprobe.diagnosis.check import Check
from lrprobe.diagnosis.findings import Finding, Findings
from lrprobe.diagnosis.gradients import no_steps
from lrprobe.diagnosis.shared import FEW, MANY
from lrprobe.diagnosis.table import CHECKS
from lrprobe.series import Series, series_of
from lrprobe.text import counted

if TYPE_CHECKING:
    import pandas as pd


def diagnose(
    frame: pd.DataFrame,
    *,
    hyperparameters: Mapping[str, Mapping[str, Any]] | None = None,
    ongoing: bool = False,
) -> Findings:
    """Find out what is wrong with a run, from its frame.

    A check is skipped if the frame lacks what it needs, and :attr:`Findings.left_out` lists the
    skipped checks. A TensorBoard logdir has few columns, and a frame assembled by hand may lack
    ``attrs["lrprobe"]``, which holds the hyperparameters.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run or of several (with a column
            ``run``). A frame by parameter allows the most checks. For a resumed run, pass a frame
            read with ``attempts="all"``: steps that were recorded twice can then be compared.
        hyperparameters: options of each optimizer's groups, as torch names them, if the frame
            does not carry them: ``{"Adam": {"betas": (0.9, 0.95)}}``.
        ongoing: whether the run is still in progress. If it is, findings that the rest of the run
            may refute are withheld.

    Returns:
        Findings, most severe first, then notes: a sequence with a readable ``repr``.

    Raises:
        TypeError: if ``frame`` is not a DataFrame.
        ValueError: if it has no column ``step``.

    Example:
        >>> import torch, lrprobe
        >>> net = torch.nn.Linear(4, 2)
        >>> frozen = net.bias.requires_grad_(False)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> with lrprobe.attach(adam, net, every=1) as probe:
        ...     for _ in range(20):
        ...         adam.zero_grad()
        ...         net(torch.randn(8, 4)).square().sum().backward()
        ...         adam.step()
        >>> [(finding.code, finding.parameter) for finding in lrprobe.diagnose(probe.frame())]
        [('never-steps', 'bias')]
    """
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"frame must be a DataFrame from Probe.frame() or lrprobe.read(path); got a "
            f"{type(frame).__name__}"
        )
    if "step" not in frame:
        raise ValueError("this is not an lrprobe frame: it has no column 'step'")
    found: list[tuple[tuple[bool, int, str, str, float], Finding]] = []
    counts = []
    longest = 0
    every = list(series_of(frame))
    for series in every:
        _overlay(series, hyperparameters or {})
        series.ongoing = ongoing
        longest = max(longest, len(series.steps))
        counts.append(f"{len(series.steps):,} steps × {counted(len(series.names), series.key)}")
        found += _look(series, CHECKS)
    if not ongoing:
        found += _without_steps(frame, every)
    found.sort(key=lambda item: item[0])
    looked_at = "; ".join(
        f"{number} times {what}" if number > 1 else what
        for what, number in Counter(counts).most_common(3)
    )
    if len(set(counts)) > 3:
        looked_at += "; and others"
    left_out = (*_few_steps(longest), *_without_columns(frame), *_without_description(every))
    return Findings([finding for _, finding in found], looked_at, left_out)


def look(series: Series, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Findings of the given checks in a series, most severe first, then notes."""
    return [finding for _, finding in sorted(_look(series, checks), key=lambda item: item[0])]


def _look(
    series: Series, checks: Iterable[Check]
) -> Iterator[tuple[tuple[bool, int, str, str, float], Finding]]:
    for rank, check in enumerate(checks):
        if not all(column in series for column in check.needs):
            continue
        with np.errstate(all="ignore"):
            for hit in check.find(series):
                finding = check.finding(series, hit)
                note = finding.severity == "note"
                yield (note, rank, series.run, series.optimizer, -hit.weight), finding


def _overlay(series: Series, hyperparameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the caller's hyperparameters to those in the frame."""
    given = hyperparameters.get(series.optimizer)
    if given:
        about = dict(series.optimizer_about)
        groups = about.get("groups") or [{}]
        about["groups"] = [{**group, **given} for group in groups]
        optimizers = {**series.about.get("optimizers", {}), series.optimizer: about}
        series.about = {**series.about, "optimizers": optimizers}


def _without_steps(
    frame: pd.DataFrame, every: Sequence[Series]
) -> Iterator[tuple[tuple[bool, int, str, str, float], Finding]]:
    """Findings about optimizers in the run's description that have no recorded step."""
    runs = frame.attrs.get(KEY, {}).get("runs", {"": None})
    rank = next(at for at, check in enumerate(CHECKS) if check.find is no_steps)
    for run in runs:
        seen = {series.optimizer for series in every if run in ("", series.run)}
        names = list(description(frame, run).get("optimizers", {})) or ([] if seen else [""])
        for name in names:
            if name not in seen:
                nothing = Series(frame.iloc[:0], run, name)
                (hit,) = no_steps(nothing)
                yield (False, rank, run, name, 0.0), CHECKS[rank].finding(nothing, hit)


def _few_steps(longest: int) -> Iterator[str]:
    """A sentence that says for which checks there are too few recorded steps."""
    few = f"Only {counted(longest, 'step')} recorded" if longest else "Nothing was recorded"
    if longest < FEW:
        yield f"{few}: most checks need {FEW} steps"
    elif longest < MANY:
        yield f"{few}: it takes {MANY} to see rates collapse or explode"


def _without_columns(frame: pd.DataFrame) -> Iterator[str]:
    """A sentence that lists the checks whose columns are missing."""
    missing = {check.code: [c for c in check.needs if c not in frame] for check in CHECKS}
    codes = [code for code, columns in missing.items() if columns]
    if codes:
        columns = sorted({column for each in missing.values() for column in each})
        yield (
            f"Not checked, because these columns are missing: {', '.join(columns)} (a dataset and "
            f"probe.frame() have all columns, a logdir has few): {', '.join(codes)}"
        )


def _without_description(every: Sequence[Series]) -> Iterator[str]:
    """A sentence that lists the checks for which the run's description is incomplete."""
    unknown: dict[str, None] = {}
    for series in every:
        for check in CHECKS:
            if any(_unknown(series, key) for key in check.asks):
                unknown[check.code] = None
    if unknown:
        yield (
            "Not checked, or only in part, because the description of the run is missing (frames "
            "from Probe.frame() and lrprobe.read() have it in attrs['lrprobe']; some checks need "
            f"the model given to attach): {', '.join(unknown)}"
        )


def _unknown(series: Series, key: str) -> bool:
    if key == "groups":
        return not series.optimizer_about.get("groups")
    if key in series.about:
        return series.about[key] is None
    return key not in series.optimizer_about
