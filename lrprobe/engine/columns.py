"""Turns figures into columns, on the host: merges parameters into rows, then finishes each row.

A row of the parameter level is a merge of one parameter, so every level uses the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.buffers import SUMS, Arrived
from lrprobe.engine.distribution import (
    Bins,
    Bools,
    Floats,
    Ints,
    constant_bins,
    histograms,
    quantiles,
)
from lrprobe.engine.figures import STATES
from lrprobe.engine.levels import Parameter, levels_of, strings
from lrprobe.record import (
    ELEMENT_COLUMNS,
    FIGURES,
    LEVELS,
    QUANTILES,
    Columns,
    Level,
    Record,
    frame_columns,
)


@dataclass(slots=True)
class Row:
    """One parameter of the frame.

    Attributes:
        name, group, group_name: as in the frame.
        shape: of the whole parameter (complex: with a last dimension of 2).
        rule: name of its rule; ``measured`` if there is none.
        tolerance: reconstruction error above which the rule does not explain a step.
        tracked: flat positions of tracked elements, or None.
        shared_rate: whether, by its rule, all its elements share one rate.
        bad_steps: consecutive recorded steps that the rule did not explain.
    """

    name: str
    group: int
    group_name: str
    shape: tuple[int, ...]
    rule: str
    tolerance: float
    tracked: Tensor | None = None
    shared_rate: bool = False
    bad_steps: int = 0

    @property
    def numel(self) -> int:
        """Number of real elements."""
        return math.prod(self.shape)


def slots_of(rows: Sequence[Row]) -> tuple[dict[int, Tensor], int]:
    """Row index to positions of its tracked values: (4, elements); and the total of values."""
    slots: dict[int, Tensor] = {}
    end = 0
    for at, row in enumerate(rows):
        if row.tracked is not None:
            count = len(row.tracked)
            slots[at] = torch.arange(end, end + 4 * count).view(4, count)
            end += 4 * count
    return slots, end


@dataclass(slots=True)
class StepInfo:
    """What the hooks know about a step without reading from the device.

    Attributes:
        step: its number; decremented if an earlier step turns out to be a dummy step.
        time, optimizer, samples, run: as in the record.
        recorded: whether it is recorded.
        attempt: set when the figures are passed on.
    """

    step: int
    time: float
    optimizer: str
    samples: float
    run: Mapping[str, Any]
    recorded: bool = True
    attempt: int = 0


RAISED = -1.0
"""Instead of a reconstruction error: the rule raised an exception."""


def rule_errors(arrived: Arrived) -> list[float]:
    """Per row (and step), the reconstruction error; NaN where nothing was reconstructed."""
    with np.errstate(all="ignore"):
        moved = np.maximum(arrived.sum("intended"), arrived.sum("observed"))
        error = np.sqrt(arrived.sum("residual") / moved)
    # A rule that gives NaN for an actual step does not explain it.
    error = np.where(np.isnan(error) & (arrived.sum("observed") > 0), np.inf, error)
    error[arrived.sum("pieces") <= 0] = np.nan
    error[arrived.maximum("failed") > 0] = RAISED
    found: list[float] = error.tolist()
    return found


def judge_rules(rows: Sequence[Row], errors: Sequence[float]) -> dict[int, str]:
    """Turn rows whose rule does not explain their steps to ``measured``; return them and why.

    All ranks see the same figures, so all come to the same result.
    """
    failed: dict[int, str] = {}
    for at, (row, error) in enumerate(zip(rows, errors, strict=True)):
        if row.rule == "measured" or math.isnan(error):
            continue
        if error == RAISED:
            failed[at] = "it raised an error"
        elif error <= row.tolerance:
            row.bad_steps = 0
        else:
            row.bad_steps += 1
            if row.bad_steps >= 2:
                failed[at] = f"reconstruction error {error:.2g}"
    for at in failed:
        rows[at].rule = "measured"
    return failed


@dataclass(frozen=True, slots=True)
class Summary:
    """What a record says about the parameters in one step.

    Attributes:
        values: columns that figures determine, for the rows of all levels.
        spans: the rows of each level.
        edges, counts: as in the record.
        elements: columns of the tracked elements, except those that ``StepInfo`` determines.
    """

    values: Columns
    spans: Mapping[Level, slice]
    edges: Sequence[Floats]
    counts: Sequence[Ints]
    elements: Columns


def summaries_of(
    rows: Sequence[Row], rules: Sequence[str], arrived: Arrived, steps: int = 1
) -> list[Summary]:
    """Summarize some steps of an optimizer.

    Args:
        rows: the parameters of the frame.
        rules: names of their rules during these steps.
        arrived: their figures, step by step: ``steps`` times as many rows.
        steps: number of steps.
    """
    found = _Figures(rows, rules, arrived, steps)
    values = _columns(found)
    edges, counts = histograms(found.bins, found.stepped)
    elements = _elements(found)  # of the only step, if there are any
    figures = np.stack([values.pop(name) for name in _FIGURES])
    count = found.levels.count // steps
    result = []
    for k in range(steps):  # with copies, since a record that is kept must not keep all others
        lines = slice(k * count, (k + 1) * count)
        own = {name: values[name][lines].copy() for name in values}
        own |= zip(_FIGURES, figures[:, lines].copy(), strict=True)
        members = slice(k * len(rows), (k + 1) * len(rows))
        ends = [array.copy() for array in edges[members]]
        counted = [array.copy() for array in counts[members]]
        result.append(Summary(own, found.levels.spans, ends, counted, elements))
    return result


def record_of(summary: Summary, info: StepInfo) -> Record:
    """Create the record of a step."""
    columns, elements = _with_info(summary.values, info), _with_info(summary.elements, info)
    return Record(
        step=info.step,
        time=info.time,
        attempt=info.attempt,
        optimizer=info.optimizer,
        tables={
            level: {name: columns[name][span] for name in _NAMES[level]}
            for level, span in summary.spans.items()
        },
        edges=summary.edges,
        counts=summary.counts,
        elements={name: elements[name] for name in ELEMENT_COLUMNS},
        run=info.run,
    )


def _with_info(found: Columns, info: StepInfo) -> Columns:
    """Add the columns that ``StepInfo`` determines."""
    count = len(found["group"])
    known = {
        "step": np.full(count, info.step, np.int64),
        "time": np.full(count, info.time),
        "attempt": np.full(count, info.attempt, np.int64),
        "optimizer": strings([info.optimizer] * count),
    }
    if "stepped" in found:
        known["samples"] = np.where(found["stepped"], info.samples, np.nan)
        known["lr_per_sample"] = found["lr"] / known["samples"]
    return {**found, **known}


_OF_INFO = ("step", "time", "attempt", "optimizer", "samples", "lr_per_sample")
"""Columns that ``StepInfo`` determines."""
_NAMES = {level: frame_columns(level) for level in LEVELS}
_FIGURES = [name for name in FIGURES if name not in _OF_INFO]
_AT = {name: at for at, name in enumerate(SUMS)}

_MEASURED = {
    "moving": "changed",
    "update_square": "observed",
    "moved_square": "observed",
    "direction_square": "sample_grad_square",
    "update_grad": "observed_grad",
    "grad_square": "sample_grad_square",
}
"""Sums that need a rule, and the sums that replace them if the rate is measured."""
_RULED, _STAND_INS = (
    np.array([_AT[name] for name in names]) for names in zip(*_MEASURED.items(), strict=True)
)
_SIGNS = np.array([-1.0 if name == "update_grad" else 1.0 for name in _MEASURED])


class _Figures:
    """Figures of the parameters in some steps; parameter i in step k is k · len(rows) + i."""

    def __init__(
        self, rows: Sequence[Row], rules: Sequence[str], arrived: Arrived, steps: int
    ) -> None:
        self.rows = rows
        self.arrived = arrived
        failed = (arrived.maximum("failed") > 0).tolist()
        named = zip([*rules] * steps, failed, strict=True)
        self.rules = ["measured" if bad else rule for rule, bad in named]
        self.measured = np.array([rule == "measured" for rule in self.rules], dtype=np.bool_)
        self.levels = levels_of(
            tuple([Parameter(row.name, row.group, row.group_name, row.numel) for row in rows]),
            steps,
        )
        self.with_grad = arrived.sum("with_grad") > 0
        self.stepped = arrived.sum("pieces") > 0
        self.unused = self.with_grad & ~self.stepped
        self.low, self.high = -arrived.maximum("rate_min"), arrived.maximum("rate_max")
        self.bins = self._bins()

    def _bins(self) -> Bins:
        """Distributions, scaled to the number of moving elements; one bin for a shared rate."""
        moving = np.where(self.measured, self.arrived.sum("elements"), self.arrived.sum("moving"))
        total = np.where(self.stepped, moving, 0.0)
        constant = np.flatnonzero((self.low == self.high) & self.stepped & ~self.measured)
        if not len(constant):
            return self.arrived.bins.scaled(total)
        others = np.arange(len(self.low))
        others[constant] = -1
        shared = constant_bins(constant, self.low[constant], total[constant])
        return Bins.joined([self.arrived.bins.merged(others).scaled(total), shared])


def _columns(summary: _Figures) -> dict[str, NDArray[Any]]:
    """The columns that figures determine, for the rows of all levels."""
    arrived, levels = summary.arrived, summary.levels
    stepped = levels.reduced(np.logical_or, summary.stepped)
    values: dict[str, NDArray[Any]] = {**levels.keys, **_finished(summary)}
    values["lr"] = levels.same(arrived.maximum("lr"))
    values["initial_lr"] = levels.same(arrived.maximum("initial_lr"))
    values["decay"] = levels.same(np.where(summary.stepped, arrived.maximum("decay"), np.nan))
    if not stepped.all():
        for name in FIGURES:
            if name not in (*_OF_INFO, "lr", "param_norm"):
                values[name] = np.where(stepped, values[name], np.nan)
        _add_unused_gradients(summary, values, stepped)
    values["stepped"] = stepped
    values["rule"] = _rules(summary)
    return values


def _finished(summary: _Figures) -> dict[str, Floats]:
    """The figures of each row, merged from its parameters."""
    arrived, measured, levels = summary.arrived, summary.measured, summary.levels
    sums = np.where(summary.stepped[:, None], arrived.sums, 0.0)
    plain = levels.reduced(np.add, sums)
    merged = plain
    if measured.any():
        sums[np.ix_(measured, _RULED)] = sums[np.ix_(measured, _STAND_INS)] * _SIGNS
        merged = levels.reduced(np.add, sums)

    def summed(name: str) -> Floats:
        """A sum; for measured parameters, its replacement in ``_MEASURED``."""
        return merged[:, _AT[name]]

    # fmin and fmax ignore NaN, but the sum of the rates does not.
    low = levels.reduced(np.fmin, np.where(summary.stepped, summary.low, np.nan))
    high = levels.reduced(np.fmax, np.where(summary.stepped, summary.high, np.nan))
    with np.errstate(all="ignore"):
        n, moving, total = summed("elements"), summed("moving"), summed("rate")
        spoilt = np.isnan(total)
        low, high = np.where(spoilt, np.nan, low), np.where(spoilt, np.nan, high)
        constant = low == high
        mean = np.where(constant, low, (total / moving).clip(low, high))
        variance = summed("rate_square") / moving - mean * mean
        log = np.exp2(summed("rate_log2") / moving).clip(low, high)
        update = np.sqrt(summed("update_square"))
        applied = np.sqrt(summed("moved_square") / summed("direction_square"))
        sampled = np.sqrt(summed("sample_grad_square") * summed("previous_square"))
        moved = np.maximum(summed("intended"), summed("observed"))
        # The norm of a parameter is known whether or not it stepped.
        param_norm = np.sqrt(levels.reduced(np.add, arrived.sum("param_square")))
        figures = {
            "effective_lr_mean": mean,
            "effective_lr_gmean": np.where(constant, low, np.where(low < 0, np.nan, log)),
            "effective_lr_std": np.where(constant, 0.0, np.sqrt(variance.clip(min=0))),
            "effective_lr_min": low,
            "effective_lr_max": high,
            "effective_lr_applied": np.where(constant & ~np.isnan(applied), low, applied),
            "idle_fraction": 1 - moving / n,
            "update_norm": update,
            "update_ratio": np.where(param_norm == 0, np.nan, update / param_norm),
            "update_grad_cosine": summed("update_grad") / (update * np.sqrt(summed("grad_square"))),
            "param_norm": param_norm,
            "grad_norm": np.sqrt(plain[:, _AT["grad_square"]]),
            "zero_grad_fraction": summed("zeros") / n,
            "grad_persistence": summed("persistence") / sampled,
            "rms_grad_mean": summed("rms_grad") / n,
            "rms_update_mean": summed("rms_update") / n,
            "eps_fraction": summed("below_eps") / moving,
            "nonfinite": summed("nonfinite"),
            "lost_fraction": summed("lost") / n,
            "reconstruction_error": np.sqrt(summed("residual") / moved),
            "state_error": _state_error(summed),
        }
    shares = quantiles(levels.distributions(summary.bins, summary.stepped), low, high)
    shares[spoilt & ~levels.reduced(np.logical_or, measured & summary.stepped)] = np.nan
    figures |= {f"effective_lr_{s}": shares[:, at] for at, s in enumerate(QUANTILES)}
    return figures


def _state_error(summed: Callable[[str], Floats]) -> Floats:
    """The largest error of the state entries that ``Rule.advance`` computes."""
    errors = []
    for i in range(STATES):
        residual, change = summed(f"state{i}_residual"), summed(f"state{i}_change")
        errors.append(np.where(change > 0, np.sqrt(residual / change), np.nan))
        errors[-1] = np.where((change == 0) & (residual > 0), np.inf, errors[-1])
    worst: Floats = np.fmax.reduce(errors)
    return worst


def _add_unused_gradients(
    summary: _Figures, values: dict[str, NDArray[Any]], stepped: Bools
) -> None:
    """Add norm and nonfinite count of unused gradients to rows without a step."""
    if not summary.unused.any():
        return
    arrived, unused, levels = summary.arrived, summary.unused, summary.levels
    squares = levels.reduced(np.add, np.where(unused, arrived.sum("grad_square"), 0.0))
    bad = levels.reduced(np.add, np.where(unused, arrived.sum("nonfinite"), 0.0))
    some = levels.reduced(np.logical_or, unused) & ~stepped
    values["grad_norm"] = np.where(some, np.sqrt(squares), values["grad_norm"])
    values["nonfinite"] = np.where(some, bad, values["nonfinite"])


def _rules(summary: _Figures) -> NDArray[Any]:
    """The rule that all parameters of a row share, else ``mixed``."""
    numbers: dict[str, int] = {}
    number = np.array([numbers.setdefault(rule, len(numbers)) for rule in summary.rules], np.int64)
    low = summary.levels.reduced(np.minimum, number)
    high = summary.levels.reduced(np.maximum, number)
    names = strings([*numbers, "mixed"])
    found: NDArray[Any] = names[np.where(low == high, low, len(numbers))]
    return found


def _elements(summary: _Figures) -> Columns:
    """The tracked elements of the step; several steps are summarized together only without any."""
    columns = {name: kind for name, kind in ELEMENT_COLUMNS.items() if name not in _OF_INFO}
    pieces: dict[str, list[Any]] = {name: [] for name in columns}
    start = 0
    for at, row in enumerate(summary.rows):
        if row.tracked is None:
            continue
        n = len(row.tracked)
        values = summary.arrived.tracked[start : start + 4 * n].reshape(4, n)
        start += 4 * n
        if not summary.with_grad[at]:
            continue
        rate, update, grad, param = values
        if not summary.stepped[at]:
            rate = update = np.full(n, np.nan)
        for name, key in zip(columns, (row.group, row.group_name, row.name), strict=False):
            pieces[name] += [key] * n
        pieces["element"] += row.tracked.tolist()
        for name, column in (
            ("effective_lr", rate), ("update", update), ("grad", grad), ("param", param)
        ):  # fmt: skip
            pieces[name] += column.tolist()
    return {
        name: strings(pieces[name]) if kind == "str" else np.array(pieces[name], dtype=kind)
        for name, kind in columns.items()
    }
