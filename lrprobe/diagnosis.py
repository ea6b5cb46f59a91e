"""What is wrong with a training, as far as its frame tells, in plain words.

A check is one function and one row of ``CHECKS``. It looks at one optimizer of one run, as matrices
of recorded steps × parameters, and says where it finds what it looks for. Every threshold has a
name; ``docs/findings.md`` says how it was measured.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np

from lrprobe.series import Bools, Floats, Ints, Series, first, last, peak, quantile, series_of
from lrprobe.text import parts_of, shown

if TYPE_CHECKING:
    import pandas as pd

Severity: TypeAlias = Literal["finding", "note"]

PAGE = "docs/findings.md"
"""The page of the documentation that has a section for each code."""

_SHOWN = 3  # parameters of one finding that are printed


@dataclass(frozen=True, slots=True)
class Steps:
    """Recorded steps in which something was seen: the first, the last, and how many."""

    first: int
    last: int
    count: int

    def __str__(self) -> str:
        """As a sentence has it."""
        if self.first == self.last:
            return f"step {self.first:,}"
        return f"steps {self.first:,} to {self.last:,} ({self.count:,} recorded)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that one parameter's figures say.

    Attributes:
        severity: ``"finding"``, or ``"note"`` for what is no fault and good to know.
        code: what it is called, and the name of its section in ``docs/findings.md``.
        title: what it is, in a few words.
        run: name of the run; empty where the frame has no column ``run``.
        optimizer: name of the optimizer.
        parameter: name of the parameter; of the module or the group, where it is about those.
        steps: where it was seen.
        evidence: what was seen, in numbers.
        numbers: the same by name.
        meaning: what it usually means.
        advice: what to try.
    """

    severity: Severity
    code: str
    title: str
    run: str
    optimizer: str
    parameter: str
    steps: Steps
    evidence: str
    numbers: Mapping[str, float] = field(hash=False)
    meaning: str
    advice: str

    @property
    def link(self) -> str:
        """The section of the documentation about it."""
        return f"{PAGE}#{self.code}"

    def __str__(self) -> str:
        """One line."""
        where = ", ".join(
            shown(word) for word in (self.run, self.optimizer, self.parameter) if word
        )
        return f"{self.title}: {where}, {self.steps}: {self.evidence}"


class Findings(Sequence[Finding]):
    """Findings, most severe first, then notes. A sequence that prints well."""

    def __init__(
        self, found: Sequence[Finding], looked_at: str = "", left_out: Sequence[str] = ()
    ) -> None:
        self._found = tuple(found)
        self._looked_at = looked_at
        self._left_out = tuple(left_out)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those that are no notes."""
        return tuple(each for each in self if each.severity == "finding")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is no fault and good to know."""
        return tuple(each for each in self if each.severity == "note")

    @property
    def looked_at(self) -> str:
        """What the findings are about, in words: how many steps of how many parameters."""
        return self._looked_at

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was not looked for, and why, a sentence each."""
        return self._left_out

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Finding]: ...
    def __getitem__(self, index: int | slice) -> Finding | Sequence[Finding]:
        return self._found[index]

    def to_frame(self) -> pd.DataFrame:
        """One row for each, with the columns of :class:`Finding`; steps in three columns."""
        import pandas as pd

        kinds = dict.fromkeys(
            ("severity", "code", "title", "run", "optimizer", "parameter"), "str"
        ) | dict.fromkeys(("first", "last", "count"), "int64")
        kinds |= dict.fromkeys(("evidence", "meaning", "advice", "link"), "str")
        rows = [
            {
                **{name: getattr(each, name) for name in kinds if hasattr(each, name)},
                **asdict(each.steps),
            }
            for each in self
        ]
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)

    def grouped(self) -> Iterator[list[Finding]]:
        """Those that say the same of several parameters, together."""
        for _, same in groupby(self, lambda each: (each.code, each.run, each.optimizer)):
            yield list(same)

    def summary(self) -> str:
        """How many there are, in a line."""
        groups = list(self.grouped())
        notes = sum(same[0].severity == "note" for same in groups)
        found = len(groups) - notes
        text = f"{_count(found, 'finding')}, {_count(notes, 'note')}" if groups else "No findings"
        return f"{text} ({self._looked_at})" if self._looked_at else text

    def __repr__(self) -> str:
        lines = [self.summary(), *self.left_out]
        for same in self.grouped():
            head = same[0]
            where = " of ".join(shown(word) for word in (head.optimizer, head.run) if word)
            lines += ["", f"{head.severity.upper()} {head.title}  [{head.code}]  {where}".rstrip()]
            lines += [
                f"  {shown(each.parameter)}, {each.steps}: {each.evidence}"
                for each in same[:_SHOWN]
            ]
            if len(same) > _SHOWN:
                lines.append(f"  and {len(same) - _SHOWN} more")
            lines += [f"  Usually: {head.meaning}", f"  Try: {head.advice}", f"  See {head.link}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.summary())}</b></p>"]
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in self.left_out]
        for same in self.grouped():
            head = same[0]
            where = " of ".join(word for word in (head.optimizer, head.run) if word)
            parts.append(f'<section class="lrprobe-{head.severity}"><h4>')
            parts.append(f"{head.severity.capitalize()}: {html.escape(head.title)}")
            parts.append(f" <small>{html.escape(where)}</small></h4><ul>")
            parts += [
                f"<li><code>{html.escape(shown(each.parameter))}</code>, "
                f"{html.escape(f'{each.steps}: {each.evidence}')}</li>"
                for each in same[:_SHOWN]
            ]
            if len(same) > _SHOWN:
                parts.append(f"<li>and {len(same) - _SHOWN} more</li>")
            parts.append(f"</ul><p>Usually: {html.escape(head.meaning)}</p>")
            parts.append(f"<p>Try: {html.escape(head.advice)}</p>")
            parts.append(f"<p>See <code>{html.escape(head.link)}</code></p></section>")
        return "".join(parts)


def diagnose(
    frame: pd.DataFrame, *, hyperparameters: Mapping[str, Mapping[str, Any]] | None = None
) -> Findings:
    """Say what a frame's figures point to.

    Checks whose columns the frame does not have are left out: a TensorBoard logdir has few.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run or of several (a column
            ``run``). By parameter it tells most. With ``attempts="all"`` a resume that lost the
            optimizer's state is seen even where the steps were counted from 1 again.
        hyperparameters: per optimizer what torch calls its groups' options, as in
            ``{"Adam": {"betas": (0.9, 0.95)}}``: only the note on warmup asks for them. By default
            torch's defaults.

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
    found: list[tuple[tuple[int, str, str, float], Finding]] = []
    counts = []
    most = 0
    for series in series_of(frame):
        most = max(most, len(series.steps))
        counts.append(f"{len(series.steps):,} steps × {_count(len(series.names), series.key)}")
        series.options.update((hyperparameters or {}).get(series.optimizer, {}))
        for rank, check in enumerate(CHECKS):
            if all(column in series for column in check.needs):
                with np.errstate(all="ignore"):
                    for hit in check.find(series):
                        key = (rank, series.run, series.optimizer, -hit.weight)
                        found.append((key, check.finding(series, hit)))
    found.sort(key=lambda item: item[0])
    looked_at = "; ".join(
        f"{number} times {what}" if number > 1 else what
        for what, number in Counter(counts).most_common(3)
    )
    if len(set(counts)) > 3:
        looked_at += "; and others"
    left_out = tuple(_left_out(frame, most))
    return Findings([finding for _, finding in found], looked_at, left_out)


def _left_out(frame: pd.DataFrame, most: int) -> Iterator[str]:
    """What was not looked for, given the columns and the most recorded steps of a run."""
    missing = {check.code: [c for c in check.needs if c not in frame] for check in CHECKS}
    codes = [code for code, columns in missing.items() if columns]
    if codes:
        columns = sorted({column for each in missing.values() for column in each})
        yield (
            f"Not looked for, since there is no {', '.join(columns)} (a logdir has few figures, a "
            f"dataset or probe.frame() all): {', '.join(codes)}"
        )
    few = f"Only {_count(most, 'step')} recorded" if most else "Nothing was recorded"
    if most < FEW:
        yield f"{few}: most checks need {FEW} steps"
    elif most < MANY:
        yield f"{few}: it takes {MANY} to see rates collapse or explode"


# The checks, each for one series.


class Hit(NamedTuple):
    """Where a check found something.

    Attributes:
        parameter: its name.
        steps: the recorded steps in which it was seen.
        evidence: in numbers, as a sentence; the words in braces are names of ``numbers``.
        numbers: the same by name.
        weight: how grave, among hits of the same check.
    """

    parameter: str
    steps: Ints
    evidence: str
    numbers: Mapping[str, float]
    weight: float = 0.0


ADAM_FAMILY = ("adam", "nadam", "radam", "adamax", "sparse_adam")
FEW = 3
"""Recorded steps below which nothing is said to be always so."""
MANY = 10
"""Those below which nothing is said of how rates develop."""

# Measured over healthy runs on the digits: docs/findings.md has the margin to the worst of them.
EPS_SHARE = 0.5
LOST_SHARE = 0.5
ALIVE = 1e-5
RATIO_BAND = (2e-6, 0.1)
ADAM_BAND = (0.01, 2.0)
ADAM_START = 100
SKIPPED_SHARE, SCALER_START = 0.02, 20
RATE_DRIFT, RATE_JUMP = 2.0, 1.0
UNEXPLAINED, TURNED = 5e-2, 1e-2
FLAT, VARIED = 1.001, 1.5
ADAGRAD_DECAY = 0.1
LASTING, VANISHED = 0.1, 0.07
FRESH, FRESH_JUMP, SMALL_JUMP, FRESH_MOMENTUM = 1e-3, 3.0, 0.02, 0.01


def _nonfinite(series: Series) -> Iterator[Hit]:
    if "nonfinite" in series:
        bad = np.logical_and(series["nonfinite"] > 0, series.stepped)
    elif "update_norm" in series:  # of a logdir, which every step has, once there was one
        norm = series["update_norm"]
        known = np.maximum.accumulate(np.isfinite(norm), axis=0)
        bad = series.stepped & known & ~np.isfinite(norm)
    else:
        return
    if not bad.any():
        return
    row = int(bad.any(axis=1).argmax())
    column = int(bad[row].argmax())
    beside = int(bad[row].sum()) - 1
    values = {"beside": beside, "parameters": len(series.names), "all": bad.any(axis=0).sum()}
    if "nonfinite" in series:
        evidence = "{elements:,.0f} of {numel:,.0f} elements are NaN or infinite"
        values |= {"elements": series["nonfinite"][row, column], "numel": series.numel[column]}
    else:
        evidence = "the norm of its update is NaN or infinite"
    if beside:
        evidence += ", and {beside:,.0f} other of {parameters:,.0f} parameters have such at this "
        evidence += "recorded step, too: which came first is not known"
    else:
        evidence += "; it is the first of {parameters:,.0f}"
    yield Hit(
        series.names[column],
        series.steps[bad.any(axis=1)],
        evidence + "; in the end {all:,.0f} have",
        values,
    )


def _unexplained(series: Series) -> Iterator[Hit]:
    measured = series.ruled_by("measured")
    error = series["reconstruction_error"]
    ruled = series.present & ~measured
    large = np.logical_and(ruled, error > UNEXPLAINED)
    turned = np.logical_and(ruled.any(axis=0), measured.any(axis=0))
    most = np.fmax.reduce(np.where(ruled, error, np.nan), axis=0)
    for column in np.flatnonzero((turned & ~(most < TURNED)) | (large.sum(axis=0) >= 2)):
        wrong = large[:, column] if large[:, column].any() else measured[:, column]
        worst = float(most[column])
        evidence = "the rule's step and the one taken differ by up to {error:.2g} of the step"
        if turned[column]:
            evidence += "; its rate is measured since"
        yield Hit(series.names[column], series.steps[wrong], evidence, {"error": worst}, worst)


def _state_lost(series: Series) -> Iterator[Hit]:
    yield from _restarted(series)
    yield from _fresh_adadelta(series)
    yield from _fresh_moments(series)


def _restarted(series: Series) -> Iterator[Hit]:
    """The count began anew while the parameters went on."""
    counting = series.ruled_by(*ADAM_FAMILY, "adadelta", "rmsprop", "adafactor", "rprop", "asgd")
    if not series.superseded or "param_norm" not in series or not counting.any():
        return
    before = series.superseded[-1]
    if before.names != series.names or before.shape[0] < FEW:
        return
    start, fresh = first(series["param_norm"]), first(before["param_norm"])
    reached = before["param_norm"][1:]
    nearest = np.nanmin(abs(reached / start - 1), axis=0)
    away = abs(fresh / start - 1)
    moved = np.nanmax(abs(reached / fresh - 1), axis=0) > FRESH
    if series.steps[0] > before.steps[0] or not moved.any():
        return
    if np.median(away[moved]) > FRESH and (away > 5 * nearest)[moved].mean() > 0.5:
        column = int(np.where(moved, away, -1).argmax())
        yield Hit(
            series.names[column],
            series.steps[:1],
            "the run went on from step {reached:,.0f}, with the norm {after:.4g} (when it was new "
            "{fresh:.4g}), but the optimizer counts from step {step:,.0f} again",
            {
                "reached": before.steps[-1],
                "after": start[column],
                "fresh": fresh[column],
                "step": series.steps[0],
            },
        )


def _fresh_adadelta(series: Series) -> Iterator[Hit]:
    """Adadelta's mean of past updates is 0 before the first step only."""
    if "rms_update_mean" not in series:
        return
    mean = series["rms_update_mean"]
    seen = np.maximum.accumulate(np.nan_to_num(mean), axis=0) > 0
    again = seen & (mean == 0)
    for column in np.flatnonzero(again.any(axis=0)):
        steps = series.steps[again[:, column]]
        before = last(mean[: int(again[:, column].argmax())])[column]
        yield Hit(
            series.names[column],
            steps,
            "the mean size of past updates, {before:.2g} before, is 0 again",
            {"before": before},
            before,
        )


def _fresh_moments(series: Series) -> Iterator[Hit]:
    """Where an attempt goes on, the rates jump as they never did, or there is no momentum."""
    large = matrices(series)
    for row in (np.flatnonzero(np.diff(series.attempt) > 0) + 1).tolist():
        if row < FEW or not large.any():
            continue
        jumps = _jumps(series, row)
        without = _without_momentum(series)
        gone = (without[row] < FRESH_MOMENTUM) & (np.median(without[max(0, row - 5) : row]) > 0.1)
        jumps = np.where(gone, np.inf, jumps)[large]
        if not quantile(jumps[:, None], 0.5)[0] > FRESH_JUMP:
            continue
        column = int(np.flatnonzero(large)[np.nanargmax(jumps)])
        if gone[column]:
            evidence = "the first recorded update of the resumed run follows its gradient alone, "
            evidence += "as only a first step does"
            yield Hit(series.names[column], series.steps[row : row + 1], evidence, {})
        else:
            evidence = "between two recorded steps, over the resume, the second moment's rates "
            evidence += "changed {jump:.3g} times as much as before"
            values = {"jump": float(np.nanmax(jumps))}
            yield Hit(series.names[column], series.steps[row : row + 1], evidence, values)


def _jumps(series: Series, row: int) -> Floats:
    """How much rate and spread of rates change into a row, over their changes before: (p,)."""
    most = np.full(len(series.names), np.nan)
    columns = ("lr", *(f"effective_lr_{q}" for q in ("p05", "p50", "p95")))
    if not all(column in series for column in columns):
        return most
    rate = _rate(series)
    spread = np.log10(series["effective_lr_p95"] / series["effective_lr_p05"])
    spread[np.isnan(rate)] = np.nan
    rate[series.ruled_by("adafactor")] = np.nan  # whose clipping moves it from step to step
    for figure in (rate, spread):
        change = abs(np.diff(figure[max(0, row - 6) : row + 1], axis=0))
        usual = np.maximum(np.fmax.reduce(change[:-1], axis=0), SMALL_JUMP)
        most = np.fmax(most, change[-1] / usual)
    return most


def _without_momentum(series: Series) -> Floats:
    """How far the update is from rate times gradient, where the rule has momentum: (s, p)."""
    if not all(name in series for name in ("effective_lr_applied", "update_norm", "grad_norm")):
        return np.full(series.shape, np.nan)
    alone = series["effective_lr_applied"] * series["grad_norm"]
    return np.where(alone > 0, abs(series["update_norm"] / alone - 1), np.nan)


def _skipped(series: Series) -> Iterator[Hit]:
    with_grad: Bools = series.present & ~np.isnan(series["grad_norm"])
    skipped = np.logical_and(with_grad.any(axis=1), ~series.stepped.any(axis=1))
    late = series.steps > SCALER_START
    count, share = int((skipped & late).sum()), float(skipped[late].mean()) if late.any() else 0.0
    if count < FEW or share <= SKIPPED_SHARE:
        return
    values = {"share": share, "count": count, "recorded": late.sum()}
    evidence = "{count:,.0f} of {recorded:,.0f} recorded steps ({share:.0%}) were skipped"
    if "nonfinite" in series:
        bad = (series["nonfinite"] > 0) & skipped[:, None]
        often = bad.sum(axis=0)
        column = int(often.argmax())
        values["nonfinite"] = often[column]
        evidence += "; in {nonfinite:,.0f} of them its gradient was not finite"
    else:
        column = 0
    yield Hit(series.names[column], series.steps[skipped], evidence, values, share)


def _never_steps(series: Series) -> Iterator[Hit]:
    with_grad = np.isfinite(series["grad_norm"]).any(axis=1) if "grad_norm" in series else True
    skipped = np.logical_and(~series.stepped.any(axis=1), with_grad)
    there = series.present & ~skipped[:, None]
    often = there.sum(axis=0) >= FEW
    without = often & ~series.stepped.any(axis=0)
    for column in np.flatnonzero(without):
        evidence = "no gradient in any of {count:,.0f} recorded steps"
        steps = series.steps[there[:, column]]
        yield Hit(series.names[column], steps, evidence, {"count": len(steps)}, 1.0)
    if "update_norm" not in series:
        return
    rated = series.stepped & (series["lr"] > 0)
    still = (rated.sum(axis=0) >= FEW) & ~(rated & (series["update_norm"] != 0)).any(axis=0)
    for column in np.flatnonzero(still):
        steps = series.steps[rated[:, column]]
        values = {"count": len(steps), "grad": float(np.nanmax(series["grad_norm"][:, column]))}
        evidence = "its update is exactly 0 in all {count:,.0f} recorded steps; its gradient's "
        evidence += "norm is at most {grad:.2g}"
        yield Hit(series.names[column], steps, evidence, values)


def _no_gradient(series: Series) -> Iterator[Hit]:
    """Matrices whose gradient is exactly 0 up to the end; those that never moved are told above."""
    rows = len(series.steps)
    moved = np.ones(series.shape[1], dtype=bool)
    if "update_norm" in series:
        moved = (series.stepped & (series["update_norm"] != 0)).any(axis=0)
    for column in np.flatnonzero(matrices(series) & moved):
        seen = _lasting(series["grad_norm"][:, column] == 0, series.stepped[:, column])
        if len(seen) < max(FEW, LASTING * rows):
            continue
        evidence = "its gradient is exactly 0 in the last {count:,.0f} of {all:,.0f} recorded steps"
        values = {"count": len(seen), "all": rows}
        yield Hit(series.names[column], series.steps[seen], evidence, values, len(seen))


def _decayed(series: Series) -> Iterator[Hit]:
    norm = series["param_norm"]
    share = last(norm) / peak(norm)
    # A decay that is coupled is in no column, but in the hyperparameters, where they are known.
    decays = np.max(np.nan_to_num(series["decay"]), axis=0) > 0
    decays |= float(series.options.get("weight_decay") or 0) > 0
    for column in np.flatnonzero(matrices(series) & decays & (share < VANISHED)):
        row = int(np.nanargmax(norm[:, column]))
        evidence = "its norm fell from {most:.3g} to {norm:.3g}, {share:.1%} of it"
        values = {
            "most": norm[row, column],
            "norm": last(norm)[column],
            "share": share[column],
        }
        yield Hit(series.names[column], series.steps[row:], evidence, values, 1 / share[column])


def _lasting(where: Bools, known: Bools) -> Ints:
    """The last rows of those that are known, in all of which it is so."""
    rows = np.flatnonzero(known)
    result: Ints = rows[len(rows) - np.logical_and.accumulate(where[rows][::-1]).sum() :]
    return result


def _groups(series: Series) -> tuple[list[str], Floats]:
    """Names of the parameter groups, and the rate of each: (steps, groups)."""
    numbers = np.unique(series.group[~np.isnan(series.group)])
    rates = np.full((len(series.steps), len(numbers)), np.nan)
    for at, number in enumerate(numbers):
        rates[:, at] = np.fmax.reduce(series["lr"][:, series.group == number], axis=1)
    return [f"group {int(number)}" for number in numbers], rates


def _group_rate_zero(series: Series) -> Iterator[Hit]:
    names, rates = _groups(series)
    known = ~np.isnan(rates)
    for column in range(len(names)):
        count = int(known[:, column].sum())
        zero = _lasting(rates[:, column] == 0, known[:, column])
        if len(zero) < max(FEW, LASTING * count):
            continue
        evidence = "lr is 0 in all {steps:,.0f} recorded steps"
        if len(zero) < count:
            evidence = "lr is 0 in the last {count:,.0f} of {steps:,.0f} recorded steps"
        values = {"count": len(zero), "steps": count}
        yield Hit(names[column], series.steps[zero], evidence, values)


def _group_off_schedule(series: Series) -> Iterator[Hit]:
    names, rates = _groups(series)
    for column in range(len(names)):
        known = ~np.isnan(rates[:, column])
        own, others = rates[known, column], np.delete(rates[known], column, axis=1)
        if len(own) < FEW or not others.size or own.max() == 0 or own.max() > FLAT * own.min():
            continue
        high, low = peak(others), np.fmin.reduce(others, axis=0)
        varied = high > VARIED * low
        if varied.any():
            other = int(varied.argmax())
            yield Hit(
                names[column],
                series.steps[known],
                "lr stays {own:.3g} while that of {others:,.0f} other groups goes from {low:.3g} "
                "to {high:.3g}",
                {"own": own[0], "others": varied.sum(), "low": low[other], "high": high[other]},
            )


def _lost(series: Series) -> Iterator[Hit]:
    spread = series["grad_norm"] / np.sqrt(series.numel)
    alive = spread >= ALIVE * np.fmax.reduce(spread, axis=1)[:, None]
    # What moves without a gradient is what momentum has left over: too small to be missed.
    zero = series["zero_grad_fraction"]
    lost = (series["lost_fraction"] - zero) / (1 - zero)
    lost = np.where(series.near_peak & alive, lost, np.nan)
    early = quantile(lost[: (len(lost) + 1) // 2], 0.5) > LOST_SHARE  # not just when converged
    for column, share in _medians(lost, above=LOST_SHARE):
        if not early[column]:
            continue
        seen = lost[:, column] > LOST_SHARE
        yield Hit(
            series.names[column],
            series.steps[seen],
            "of the elements with a gradient, {share:.0%} did not change by one bit, in the median "
            "step",
            {"share": share},
            share,
        )


def _adam_scale(series: Series) -> Iterator[Hit]:
    family = _adam_family(series)
    if not family.any():
        return
    lr, root = series["lr"], np.sqrt(series.numel)
    scale = np.where(family & (lr > 0), series["update_norm"] / (lr * root), np.nan)
    own = scale
    if "decay" in series and "param_norm" in series:  # without the part that is weight decay's
        decay = np.nan_to_num(series["decay"])
        own = np.where(decay > 0, scale - decay * series["param_norm"] / (lr * root), scale)
    high = own > ADAM_BAND[1]
    start = (series.steps <= ADAM_START)[:, None]
    lasting = high.copy()
    lasting[2:] &= high[1:-1] & high[:-2]
    lasting[:2] = False
    for column in np.flatnonzero(((high & start) | lasting).any(axis=0)):
        most = float(np.nanmax(own[:, column]))
        evidence = "update_norm/(lr·√numel) reaches {scale:.2g}; Adam's is at most 1 in usual steps"
        steps = series.steps[high[:, column]]
        yield Hit(series.names[column], steps, evidence, {"scale": most}, most)
    if "zero_grad_fraction" not in series:
        return
    live = scale / np.sqrt(1 - series["zero_grad_fraction"])
    live = np.where(series.near_peak & matrices(series), live, np.nan)
    enough = (~np.isnan(live)).sum(axis=0) >= FEW
    mostly = quantile(live, 0.9)
    for column in np.flatnonzero(enough & (mostly > 0) & (mostly < ADAM_BAND[0])):
        evidence = "update_norm/(lr·√numel) is below {scale:.2g} in nine of ten steps"
        steps = series.steps[live[:, column] < ADAM_BAND[0]]
        most = float(mostly[column])
        yield Hit(series.names[column], steps, evidence, {"scale": most}, 1 / most)


def _eps_rules(series: Series) -> Iterator[Hit]:
    zero = series["zero_grad_fraction"]
    live = (series["eps_fraction"] - zero) / (1 - zero)
    where = series.near_peak & matrices(series) & ~series.ruled_by("adadelta")
    live = np.where(where, live, np.nan)
    early = quantile(live[: (len(live) + 1) // 2], 0.5) > EPS_SHARE
    for column, share in _medians(live, above=EPS_SHARE):
        if early[column]:
            yield Hit(
                series.names[column],
                series.steps[live[:, column] > EPS_SHARE],
                "ε outweighs the statistic it is added to in {share:.0%} of the elements with a "
                "gradient, in the median step",
                {"share": share},
                share,
            )


def _rate(series: Series) -> Floats:
    """log₁₀ of the median effective rate over lr, where it is the second moment's: (s, p)."""
    rate = np.log10(series["effective_lr_p50"] / series["lr"])
    codes, _ = series.rules
    fixed = series.ruled_by("sgd", "asgd", "rprop", "muon", "measured") | (codes < 0)
    plain = abs(rate) < 1e-6  # RAdam before its rectification
    return np.where(fixed | plain | ~np.isfinite(rate), np.nan, rate)


def _rate_changes(series: Series, sign: int) -> Iterator[Hit]:
    rate = _rate(series)
    count = len(rate)
    if count < MANY:
        return
    settled, base = max(2, count // 10), max(4, count // 4)
    change = rate - quantile(rate[settled:base], 0.5)
    ordered = np.sort(np.where(np.isnan(change), np.inf, abs(change)), axis=1)
    known = np.maximum(np.isfinite(ordered).sum(axis=1), 1)
    others = ordered[np.arange(count), (known - 1) // 2]  # the lower median: of two, the calmer
    own = abs(change) - others[:, None]
    far = (own > RATE_DRIFT) & (np.sign(change) == sign)
    far[:base] = False
    jump = np.full_like(rate, np.nan)
    jump[1:] = np.diff(rate, axis=0)
    sudden = sign * jump > RATE_JUMP
    sudden[:base] = False
    far[2:] &= far[1:-1] & far[:-2]
    wrong = (far | sudden) & matrices(series)
    for column in np.flatnonzero(wrong.any(axis=0)):
        row = int(np.where(wrong[:, column], sign * change[:, column], -np.inf).argmax())
        factor = float(10 ** abs(change[row, column]))
        yield Hit(
            series.names[column],
            series.steps[wrong[:, column]],
            "the median rate over lr " + ("rose" if sign > 0 else "fell") + " {factor:,.3g} times "
            "from its level of steps {start:,.0f} to {end:,.0f}, to {rate:.2g}",
            {
                "factor": factor,
                "start": series.steps[settled],
                "end": series.steps[base - 1],
                "rate": series["effective_lr_p50"][row, column],
            },
            factor,
        )


def _rate_collapses(series: Series) -> Iterator[Hit]:
    return _rate_changes(series, -1)


def _rate_explodes(series: Series) -> Iterator[Hit]:
    return _rate_changes(series, 1)


def _update_ratio(series: Series) -> Iterator[Hit]:
    where = series.near_peak & matrices(series) & ~series.ruled_by("measured")
    ratio = np.where(where & np.isfinite(series["update_ratio"]), series["update_ratio"], np.nan)
    low, high = RATIO_BAND
    enough = (~np.isnan(ratio)).sum(axis=0) >= FEW
    median, mostly = quantile(ratio, 0.5), quantile(ratio, 0.9)
    for column in np.flatnonzero(enough & ((median > high) | ((mostly > 0) & (mostly < low)))):
        middle = float(median[column])
        seen = ratio[:, column] > high if middle > high else ratio[:, column] < low
        yield Hit(
            series.names[column],
            series.steps[seen],
            "its update is {ratio:.2g} of its norm in the median step near the peak of lr; about "
            "1e-3 is usual",
            {"ratio": middle},
            abs(float(np.log10(max(middle, 1e-30) / 1e-3))),
        )


def _short_warmup(series: Series) -> Iterator[Hit]:
    family = series.ruled_by("adam", "nadam", "sparse_adam", "rmsprop")
    if not family.any():
        return
    beta = 0.99 if series.ruled_by("rmsprop").any() else 0.999
    beta = float(series.options.get("alpha", series.options.get("betas", (0, beta))[1]))
    known = "alpha" in series.options or "betas" in series.options
    memory = 1 / (1 - beta) if beta < 1 else np.inf
    lr = np.fmax.reduce(np.where(family, series["lr"], np.nan), axis=1)
    top = int((lr >= 0.99 * np.nanmax(lr)).argmax())
    rising = bool((np.diff(lr[: top + 1]) >= 0).all())
    if top < 2 or not rising or lr[0] > 0.2 * lr[top] or series.steps[top] >= memory:
        return
    if len(lr) < 1.2 * (top + 1) or series.steps[0] > 10:
        return
    yield Hit(
        series.names[int(family.any(axis=0).argmax())],
        series.steps[: top + 1],
        "lr was at its peak at step {warmup:,.0f}; the second moment remembers 1/(1−β₂) = "
        "{memory:,.0f} steps (β₂ = {beta:.4g}" + (")" if known else ", torch's default, assumed)"),
        {"warmup": series.steps[top], "memory": memory, "beta": beta},
    )


def _adagrad_decay(series: Series) -> Iterator[Hit]:
    adagrad = series.ruled_by("adagrad")
    if not adagrad.any() or len(series.steps) < FEW:
        return
    rate = np.where(adagrad & matrices(series), _rate(series), np.nan)
    for column in np.flatnonzero(~np.isnan(rate).all(axis=0)):
        share = float(10 ** (last(rate) - first(rate))[column])
        if share < ADAGRAD_DECAY:
            evidence = "the median rate over lr is {share:.1%} of what it was"
            values = {"share": share}
            yield Hit(series.names[column], series.steps, evidence, values, 1 / share)


def _adadelta_eps(series: Series) -> Iterator[Hit]:
    where = series.ruled_by("adadelta") & matrices(series) & series.near_peak
    share = np.where(where, series["eps_fraction"], np.nan)
    for column, median in _medians(share, above=EPS_SHARE):
        evidence = "ε outweighs E[g²] in {share:.0%} of the elements, in the median step"
        steps = series.steps[share[:, column] > EPS_SHARE]
        yield Hit(series.names[column], steps, evidence, {"share": median}, median)


# What several checks need.


def _medians(matrix: Floats, above: float) -> Iterator[tuple[int, float]]:
    """Parameters with at least ``FEW`` figures whose median is above a bound, and the median."""
    median = quantile(matrix, 0.5)
    enough = (~np.isnan(matrix)).sum(axis=0) >= FEW
    for column in np.flatnonzero(enough & (median > above)):
        yield int(column), float(median[column])


def _adam_family(series: Series) -> Bools:
    """Where a parameter is stepped by Adam or a relative: by its rule, or by its name."""
    family = series.ruled_by(*ADAM_FAMILY)
    rectifying = np.zeros_like(family)
    if "effective_lr_p50" in series:
        plain = abs(series["effective_lr_p50"] / series["lr"] - 1) < 1e-6
        rectifying = series.ruled_by("radam") & plain
    measured = series.ruled_by("measured")
    if re.search("adam(?!ax)", series.optimizer, re.IGNORECASE):
        family = family | measured
    family = family | (measured & family.any(axis=0))
    return family & series.stepped & ~rectifying


def matrices(series: Series) -> Bools:
    """Which parameters are matrices, as far as a name and a size tell: (parameters,).

    The frame has no shapes. A vector is called ``bias``, or is no larger than the bias beside it
    (the weight of a norm); where there are no names, it is small. Rows of modules and groups count.
    """
    if series.key != "parameter":
        return np.ones(len(series.names), dtype=bool)
    numel = dict(zip(series.names, series.numel, strict=True))
    result = np.zeros(len(series.names), dtype=bool)
    for at, (name, size) in enumerate(numel.items()):
        path, separator, own = parts_of(name)
        if re.fullmatch(r"group\d+\.param\d+", name):
            result[at] = size >= 1024
        else:
            beside = numel.get(f"{path}{separator}bias", 0.0)
            result[at] = not re.search(r"bias(_|$)", own) and not size <= beside
    return result


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table: what is looked for, and what it means."""

    severity: Severity
    code: str
    find: Callable[[Series], Iterator[Hit]]
    needs: tuple[str, ...]
    title: str
    meaning: str
    advice: str

    def finding(self, series: Series, hit: Hit) -> Finding:
        """The finding that a hit is."""
        numbers = {name: float(value) for name, value in hit.numbers.items()}
        seen = hit.steps if len(hit.steps) else series.steps
        return Finding(
            severity=self.severity,
            code=self.code,
            title=self.title,
            run=series.run,
            optimizer=series.optimizer,
            parameter=hit.parameter,
            steps=Steps(int(seen[0]), int(seen[-1]), len(seen)),
            evidence=hit.evidence.format(**numbers),
            numbers=numbers,
            meaning=self.meaning,
            advice=self.advice,
        )


CHECKS: tuple[Check, ...] = (
    Check(
        "finding",
        "nonfinite",
        _nonfinite,
        (),
        "Values that are not finite reached a step",
        "The loss or one layer overflowed; from then on NaN spreads to every parameter, and the "
        "run cannot recover.",
        "Go back to a checkpoint before the first of these steps. Clip the gradient, lower the "
        "peak of lr or lengthen its warmup; in float16 use a GradScaler, which skips such steps. "
        "Attach with every=1 around the step to see which layer came first.",
    ),
    Check(
        "finding",
        "unexplained",
        _unexplained,
        ("rule", "reconstruction_error"),
        "The rule does not explain the step that was taken",
        "The optimizer does not do what its class says: a subclass changes the step, something "
        "writes to the parameter between hooks (a clamp, a projection, an EMA swap), or its "
        "implementation is wrong, as torch 2.13's fused bfloat16 SGD on the CPU is "
        "(pytorch#191763).",
        "Compare a step with fused=False and foreach=False. If the optimizer is your own, give it "
        "a rule with lrprobe.register_rule and prove it with lrprobe.testing.check_rule.",
    ),
    Check(
        "finding",
        "state-lost",
        _state_lost,
        (),
        "The optimizer's state was lost when the run was resumed",
        "The parameters came from a checkpoint and the optimizer did not: its moments began at 0 "
        "again, so that the first steps are many times too long or point elsewhere.",
        "Save optimizer.state_dict() and load it after the optimizer is made, before the first "
        "step; check that the parameter groups are in the same order.",
    ),
    Check(
        "finding",
        "skipped-steps",
        _skipped,
        ("stepped", "grad_norm"),
        "Many steps are skipped by the gradient scaler",
        "The gradients overflow again and again. A healthy scaler tries a larger scale once in "
        "2,000 steps and so skips one in 2,000.",
        "Look at the layer whose gradient overflows; clip it, lower lr, or use bfloat16, which "
        "needs no scaler. See that scaler.update() is called once a step.",
    ),
    Check(
        "finding",
        "never-steps",
        _never_steps,
        ("stepped", "grad_norm", "lr"),
        "A parameter never moves",
        "It is frozen but still given to the optimizer, it is not used in the loss, or its output "
        "is detached; with a gradient of exactly 0, the units behind it are dead or masked.",
        "If it is frozen on purpose, do not give it to the optimizer. Else look for detach(), "
        "no_grad(), .data or an unused branch between it and the loss.",
    ),
    Check(
        "finding",
        "no-gradient",
        _no_gradient,
        ("grad_norm", "lr"),
        "A layer gets a gradient of exactly 0",
        "Its units, or those behind it, are dead (a ReLU that is never active, a saturated gate): "
        "often a few steps that were far too long killed them, early in the run. Or the loss does "
        "not depend on it any more, or is exactly 0.",
        "Look at update_ratio in the steps before, and lower lr or warm up where it is above 0.1; "
        "look at the activations. A masked or finished part of the net is no fault.",
    ),
    Check(
        "finding",
        "decayed-away",
        _decayed,
        ("param_norm", "decay"),
        "A layer's weights have decayed away",
        "Weight decay is stronger than the gradient: each step takes the share lr·λ of a weight "
        "away, so that after 1/(lr·λ) steps little is left.",
        "Lower weight_decay (0.01 to 0.1 is usual for AdamW), and give biases and norms none.",
    ),
    Check(
        "finding",
        "group-rate-zero",
        _group_rate_zero,
        ("group", "lr"),
        "A parameter group's rate is 0",
        "The group's lr was set to 0, or a scheduler multiplies by 0. Where it became 0 before the "
        "end: the schedule was made for fewer steps than are taken.",
        "Set the group's lr, or take the group out of the optimizer; give the scheduler as many "
        "steps as the training takes (batches, not epochs, where it is stepped for each batch).",
    ),
    Check(
        "finding",
        "group-off-schedule",
        _group_off_schedule,
        ("group", "lr"),
        "A parameter group does not follow the others' schedule",
        "Its lr is set by code that knows of the first group only (param_groups[0]), or its own "
        "function of a LambdaLR is constant. It is no fault where that is meant.",
        "Set lr in a loop over optimizer.param_groups; give each group the function that it is to "
        "follow.",
    ),
    Check(
        "finding",
        "lost-updates",
        _lost,
        ("lost_fraction", "zero_grad_fraction", "grad_norm", "numel", "lr"),
        "Updates are lost to rounding",
        "The update is smaller than half a unit in the last place of the parameter: in bfloat16, "
        "whatever is below 1/512 of it.",
        "Keep the parameters, or a master copy of them, in float32 (autocast for the rest), or "
        "round stochastically; a larger lr helps only as far as the training bears it.",
    ),
    Check(
        "finding",
        "adam-scale",
        _adam_scale,
        ("update_norm", "lr", "numel"),
        "Adam's steps do not have Adam's size",
        "An update of Adam is about lr in each element: at first 1·lr, later 0.1 to 0.3·lr. Above "
        "2·lr the bias correction is wrong: a step count that does not advance gives up to 2.2 "
        "with β = (0.9, 0.95). Below 0.01·lr the denominator is: ε, or a gradient that was huge "
        "once.",
        "See that state['step'] grows by one a step, also after a checkpoint is loaded and in a "
        "subclass; see eps and the history of grad_norm.",
    ),
    Check(
        "finding",
        "eps-rules",
        _eps_rules,
        ("eps_fraction", "zero_grad_fraction", "lr"),
        "ε rules the denominator",
        "The gradients are smaller than ε, so that the optimizer divides by a constant: it is SGD "
        "with momentum and the rate lr/ε, and what is adaptive about it is off.",
        "Lower eps (1e-8 is usual; with small gradients 1e-10 or less), or scale the loss: a mean "
        "over many tokens or a division by the accumulation steps made it small.",
    ),
    Check(
        "finding",
        "rate-collapsed",
        _rate_collapses,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's rate collapsed",
        "One huge gradient entered the second moment, which remembers it for 1/(1−β₂) steps: the "
        "layer stands still until it is forgotten.",
        "Clip the gradient before the step, look at the batch of that step, or lower β₂ (0.95) so "
        "that the optimizer forgets sooner.",
    ),
    Check(
        "finding",
        "rate-exploded",
        _rate_explodes,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's rate exploded",
        "The layer's gradients died away while those of others did not, and the second moment "
        "follows: the next gradient that is not small is multiplied by a huge rate.",
        "See why its gradient vanished (dead units, a mask, a saturated gate); raise eps, clip the "
        "update, or freeze the layer.",
    ),
    Check(
        "finding",
        "update-ratio",
        _update_ratio,
        ("update_ratio", "lr", "numel"),
        "A layer's updates are far off the usual size",
        "Near 1e-3 of the weights' norm a step is usual. Far above, the layer is rewritten every "
        "few steps; far below, it does not learn within the run.",
        "Change this layer's lr by about the factor that is missing (a parameter group of its "
        "own), or its initialisation; far above, warm up and clip.",
    ),
    Check(
        "note",
        "short-warmup",
        _short_warmup,
        ("rule", "lr"),
        "The warmup is shorter than the second moment's memory",
        "The peak of lr comes while the second moment is still an average of few gradients, which "
        "makes the first long steps noisy.",
        "If the loss spikes early: warm up for about 1/(1−β₂) to 2/(1−β₂) steps, or lower β₂.",
    ),
    Check(
        "note",
        "adagrad-decay",
        _adagrad_decay,
        ("rule", "effective_lr_p50", "lr", "numel"),
        "Adagrad's rate has fallen a long way",
        "Adagrad adds up all squared gradients, so that its rate falls as 1/√t and never rises. "
        "That is its design.",
        "If the loss stands still too early: a larger lr, or an average that forgets (RMSprop, "
        "Adam, Adadelta).",
    ),
    Check(
        "note",
        "adadelta-eps",
        _adadelta_eps,
        ("rule", "eps_fraction", "lr"),
        "In Adadelta, ε decides",
        "Gradients are below √ε, so that both roots are √ε and the rate goes to lr: Zeiler saw "
        "it too. It is SGD with the rate lr then.",
        "Nothing, if it trains well. A smaller eps keeps the rate adaptive, and makes the first "
        "steps shorter.",
    ),
)
"""Every check, most severe first."""
