"""From a frame to findings."""

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
    """Say what a frame's figures point to.

    A check that needs what the frame does not have is left out, and :attr:`Findings.left_out` says
    so: a TensorBoard logdir has few columns, and a frame that was put together by hand may lack
    ``attrs["lrprobe"]``, which has the hyperparameters.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run or of several (a column
            ``run``). By parameter it tells most. With ``attempts="all"`` it tells most of a run
            that was resumed, since what was recorded twice can be compared.
        hyperparameters: per optimizer what torch calls its groups' options, as in
            ``{"Adam": {"betas": (0.9, 0.95)}}``, where the frame does not carry them.
        ongoing: the run still goes on: nothing is said of it that its end may change.

    Returns:
        Findings, most severe first, then notes: a sequence that prints well.

    Raises:
        TypeError: ``frame`` is no DataFrame.
        ValueError: it has no column ``step``.

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
            f"diagnose takes a DataFrame, as Probe.frame() or lrprobe.read(path) give; got a "
            f"{type(frame).__name__}"
        )
    if "step" not in frame:
        raise ValueError("this is no frame of lrprobe's: it has no column 'step'")
    found: list[tuple[tuple[bool, int, str, str, float], Finding]] = []
    counts = []
    most = 0
    every = list(series_of(frame))
    for series in every:
        _overlay(series, hyperparameters or {})
        series.ongoing = ongoing
        most = max(most, len(series.steps))
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
    left_out = (*_few_steps(most), *_without_columns(frame), *_without_description(every))
    return Findings([finding for _, finding in found], looked_at, left_out)


def look(series: Series, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """What some checks find in a series, most severe first, then notes."""
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
    """Add what the caller knows of hyperparameters to what the frame says of them."""
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
    """Optimizers that the frame is about and of which nothing was recorded."""
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


def _few_steps(most: int) -> Iterator[str]:
    """What the most recorded steps of a run are too few for."""
    few = f"Only {counted(most, 'step')} recorded" if most else "Nothing was recorded"
    if most < FEW:
        yield f"{few}: most checks need {FEW} steps"
    elif most < MANY:
        yield f"{few}: it takes {MANY} to see rates collapse or explode"


def _without_columns(frame: pd.DataFrame) -> Iterator[str]:
    """Checks for which columns are missing."""
    missing = {check.code: [c for c in check.needs if c not in frame] for check in CHECKS}
    codes = [code for code, columns in missing.items() if columns]
    if codes:
        columns = sorted({column for each in missing.values() for column in each})
        yield (
            f"Not looked for, since there is no {', '.join(columns)} (a logdir has few figures, a "
            f"dataset or probe.frame() all): {', '.join(codes)}"
        )


def _without_description(every: Sequence[Series]) -> Iterator[str]:
    """Checks for which the description of the run is missing, or a part of it."""
    unknown: dict[str, None] = {}
    for series in every:
        for check in CHECKS:
            if any(_unknown(series, key) for key in check.asks):
                unknown[check.code] = None
    if unknown:
        yield (
            "Not looked for, or not in full, since what describes the run is not known (a frame of "
            "Probe.frame() or lrprobe.read() has it in attrs['lrprobe'], names from the model "
            f"given to attach): {', '.join(unknown)}"
        )


def _unknown(series: Series, key: str) -> bool:
    if key == "groups":
        return not series.optimizer_about.get("groups")
    if key in series.about:
        return series.about[key] is None
    return key not in series.optimizer_about
