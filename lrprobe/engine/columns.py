"""Figures to columns, on the host: merge what the parameters have, then finish each row.

The parameter's own row is a merge of one, so that every level goes through the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.buffers import Arrived
from lrprobe.engine.distribution import Bins, constant_bins, histograms, quantiles
from lrprobe.engine.figures import STATES
from lrprobe.names import module_of
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

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Row:
    """One parameter of the frame.

    Attributes:
        name, group, group_name: as in the frame.
        shape: of the whole parameter (complex: with a last dimension of 2).
        rule: name of its rule; ``measured`` where there is none.
        tolerance: error of a reconstruction above which the rule does not explain a step.
        tracked: flat positions of tracked elements, or None.
        shared_rate: whether all its elements share one rate, by its rule.
        bad_steps: recorded steps in a row that the rule did not explain.
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
        """Its real elements."""
        return math.prod(self.shape)


def slots_of(rows: Sequence[Row]) -> tuple[dict[int, Tensor], int]:
    """Number of a row to where its tracked elements go, and how many values there are in all."""
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
    """What the hooks know of a step without asking the device.

    Attributes:
        step: its number; one less where an earlier step turns out to have been none.
        time, optimizer, samples, run: as in the record.
        recorded: whether it is to be recorded.
        attempt: known when the figures are passed on.
    """

    step: int
    time: float
    optimizer: str
    samples: float
    run: Mapping[str, Any]
    recorded: bool = True
    attempt: int = 0


def judged(rows: Sequence[Row], arrived: Arrived) -> dict[int, str]:
    """Rows whose rule turns out not to explain their steps, and why; they are measured from then.

    All ranks come to the same, as they see the same figures.
    """
    with np.errstate(all="ignore"):
        moved = np.maximum(arrived.sum("intended"), arrived.sum("observed"))
        error = np.sqrt(arrived.sum("residual") / moved)
    # A rule that says NaN of a step that was taken does not explain it.
    error = np.where(np.isnan(error) & (arrived.sum("observed") > 0), np.inf, error)
    stepped = arrived.sum("pieces") > 0
    raised = arrived.most("failed") > 0
    failed = {}
    for at, row in enumerate(rows):
        if row.rule == "measured":
            continue
        if raised[at]:
            failed[at] = "it raised an error"
        elif stepped[at] and not np.isnan(error[at]):
            row.bad_steps = row.bad_steps + 1 if error[at] > row.tolerance else 0
            if row.bad_steps >= 2:
                failed[at] = f"error {error[at]:.2g} of the step really taken"
    for at in failed:
        rows[at].rule = "measured"
    return failed


def record_of(
    rows: Sequence[Row], rules: Sequence[str], arrived: Arrived, info: StepInfo
) -> Record:
    """One step as a record.

    Args:
        rows: of the frame.
        rules: names of their rules during that step.
        arrived: their figures.
        info: what else is known of the step.
    """
    summary = _Summary(rows, rules, arrived)
    tables = {level: _columns(summary, info, level) for level in LEVELS}
    known = np.where(summary.stepped, np.arange(len(rows)), -1)
    edges, counts = histograms(summary.bins.merged(known), len(rows))
    return Record(
        step=info.step,
        time=info.time,
        attempt=info.attempt,
        optimizer=info.optimizer,
        tables=tables,
        edges=edges,
        counts=counts,
        elements=_elements(summary, info),
        run=info.run,
    )


class _Summary:
    """Figures of the parameters in one step."""

    def __init__(self, rows: Sequence[Row], rules: Sequence[str], arrived: Arrived) -> None:
        self.rows = rows
        self.arrived = arrived
        failed = arrived.most("failed") > 0
        self.rules = ["measured" if bad else rule for rule, bad in zip(rules, failed, strict=True)]
        self.measured = np.array([rule == "measured" for rule in self.rules], dtype=np.bool_)
        self.numel = np.array([row.numel for row in rows], dtype=np.int64)
        self.with_grad = arrived.sum("with_grad") > 0
        self.stepped = arrived.sum("pieces") > 0
        self.unused = self.with_grad & ~self.stepped
        self.low, self.high = -arrived.most("rate_min"), arrived.most("rate_max")
        self.bins = self._bins()

    def _bins(self) -> Bins:
        """Counts that add up to the elements that move; of those of one rate, that rate."""
        moving = np.where(self.measured, self.arrived.sum("elements"), self.arrived.sum("moving"))
        total = np.where(self.stepped, moving, 0.0)
        constant = np.flatnonzero((self.low == self.high) & self.stepped & ~self.measured)
        others = np.arange(len(self.rows))
        others[constant] = -1
        shared = constant_bins(constant, self.low[constant], total[constant])
        return Bins.joined([self.arrived.bins.merged(others).scaled(total), shared])


def _columns(summary: _Summary, info: StepInfo, level: Level) -> Columns:
    rows, arrived = summary.rows, summary.arrived
    keys: Sequence[str | int]
    if level == "parameter":
        keys = range(len(rows))
    elif level == "module":
        keys = [module_of(row.name) for row in rows]
    elif level == "group":
        keys = [row.group for row in rows]
    else:
        keys = [0] * len(rows)
    label, order = _labels(keys)
    count = len(order)
    values: dict[str, NDArray[Any]] = dict(_finished(summary, label, count))
    stepped = np.zeros(count, np.bool_)
    np.logical_or.at(stepped, label, summary.stepped)
    values["lr"] = merged_numbers(arrived.most("lr"), label, count)
    values["initial_lr"] = merged_numbers(arrived.most("initial_lr"), label, count)
    decay = np.where(summary.stepped, arrived.most("decay"), np.nan)
    values["decay"] = merged_numbers(decay, label, count)
    values["samples"] = np.full(count, info.samples)
    values["lr_per_sample"] = values["lr"] / info.samples
    for name in FIGURES:
        if name not in ("lr", "param_norm"):
            values[name] = np.where(stepped, values[name], np.nan)
    _add_unused_gradients(summary, values, label, stepped)
    values["stepped"] = stepped
    values["numel"] = np.zeros(count, np.int64)
    np.add.at(values["numel"], label, summary.numel)
    values["rule"] = _merged_names(summary.rules, label, count)
    values["group"] = np.array([row.group for row in rows] if level == "parameter" else order)
    values["group_name"] = _strings([row.group_name for row in rows])
    values["parameter"] = _strings([row.name for row in rows])
    values["module"] = _strings([str(key) for key in order])
    values["step"] = np.full(count, info.step, np.int64)
    values["time"] = np.full(count, info.time)
    values["attempt"] = np.full(count, info.attempt, np.int64)
    values["optimizer"] = _strings([info.optimizer] * count)
    return {
        name: values[name] if kind == "str" else values[name].astype(kind)
        for name, kind in frame_columns(level).items()
    }


def _finished(summary: _Summary, label: Ints, count: int) -> dict[str, Floats]:
    """The figures of each row, merged from the parameters with its label."""
    arrived, measured = summary.arrived, summary.measured
    used = np.where(summary.stepped, label, -1)
    keep = used >= 0

    def add(values: Floats) -> Floats:
        result = np.zeros(count)
        np.add.at(result, label[keep], values[keep])
        return result

    def told(name: str, instead: str | None = None, sign: float = 1.0) -> Floats:
        """A sum; of measured parameters another one."""
        values = arrived.sum(name)
        if instead is not None:
            values = np.where(measured, sign * arrived.sum(instead), values)
        return add(values)

    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    # A NaN among the rates may leave either: that of both shows in their sum.
    known = keep & ~np.isnan(summary.low)
    np.minimum.at(low, label[known], summary.low[known])
    known = keep & ~np.isnan(summary.high)
    np.maximum.at(high, label[known], summary.high[known])
    low, high = np.where(low == np.inf, np.nan, low), np.where(high == -np.inf, np.nan, high)
    with np.errstate(all="ignore"):
        n, moving = add(arrived.sum("elements")), told("moving", "changed")
        total = add(arrived.sum("rate"))
        spoilt = np.isnan(total)
        low, high = np.where(spoilt, np.nan, low), np.where(spoilt, np.nan, high)
        constant = low == high
        mean = np.where(constant, low, (total / moving).clip(low, high))
        variance = add(arrived.sum("rate_square")) / moving - mean * mean
        log = add(arrived.sum("rate_log2")) / moving
        update = np.sqrt(told("update_square", "observed"))
        applied = np.sqrt(
            told("moved_square", "observed") / told("direction_square", "sample_grad_square")
        )
        sampled = np.sqrt(told("sample_grad_square"))
        figures = {
            "effective_lr_mean": mean,
            "effective_lr_gmean": np.where(
                constant, low, np.where(low < 0, np.nan, np.exp2(log).clip(low, high))
            ),
            "effective_lr_std": np.where(constant, 0.0, np.sqrt(variance.clip(min=0))),
            "effective_lr_min": low,
            "effective_lr_max": high,
            "effective_lr_applied": np.where(constant & ~np.isnan(applied), low, applied),
            "idle_fraction": 1 - moving / n,
            "update_norm": update,
            "update_grad_cosine": told("update_grad", "observed_grad", -1.0)
            / (update * np.sqrt(told("grad_square", "sample_grad_square"))),
            "grad_norm": np.sqrt(told("grad_square")),
            "zero_grad_fraction": told("zeros") / n,
            "grad_persistence": told("persistence") / (sampled * np.sqrt(told("previous_square"))),
            "rms_grad_mean": told("rms_grad") / n,
            "rms_update_mean": told("rms_update") / n,
            "eps_fraction": told("below_eps") / moving,
            "nonfinite": told("nonfinite"),
            "lost_fraction": told("lost") / n,
            "reconstruction_error": np.sqrt(
                told("residual") / np.maximum(told("intended"), told("observed"))
            ),
            "state_error": _state_error(told),
        }
        # The norm of a parameter is known, whether it stepped or not.
        squares = np.zeros(count)
        np.add.at(squares, label, arrived.sum("param_square"))
        figures["param_norm"] = np.sqrt(squares)
        ratio = figures["update_norm"] / figures["param_norm"]
        figures["update_ratio"] = np.where(figures["param_norm"] == 0, np.nan, ratio)
        has_measured = np.zeros(count, np.bool_)
        np.logical_or.at(has_measured, label[keep], measured[keep])
    shares = quantiles(summary.bins.merged(used), low, high)
    shares[spoilt & ~has_measured] = np.nan
    figures |= {f"effective_lr_{s}": shares[:, at] for at, s in enumerate(QUANTILES)}
    return figures


def _state_error(told: Any) -> Floats:
    """The largest error of the state entries that the rule speaks of."""
    errors = []
    for i in range(STATES):
        residual, change = told(f"state{i}_residual"), told(f"state{i}_change")
        errors.append(np.where(change > 0, np.sqrt(residual / change), np.nan))
        errors[-1] = np.where((change == 0) & (residual > 0), np.inf, errors[-1])
    worst: Floats = np.fmax.reduce(errors)
    return worst


def merged_numbers(values: Floats, label: Ints, rows: int) -> Floats:
    """A hyperparameter of each row: NaN where its parameters differ: (rows,).

    Parameters that have none (NaN) do not count.
    """
    has = ~np.isnan(values)
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(low, label[has], values[has])
    np.maximum.at(high, label[has], values[has])
    return np.where(low == high, low, np.nan)


def _labels(keys: Sequence[str | int]) -> tuple[Ints, list[str | int]]:
    """Row of each parameter, and the key of each row, in order of first appearance."""
    order: dict[str | int, int] = {}
    label = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    return label, list(order)


def _add_unused_gradients(
    summary: _Summary, values: dict[str, NDArray[Any]], label: Ints, stepped: Bools
) -> None:
    """Norm and nonfinite count of gradients that were not used, in rows without a step."""
    if not summary.unused.any():
        return
    arrived, unused = summary.arrived, summary.unused
    squares, bad = np.zeros(len(stepped)), np.zeros(len(stepped))
    np.add.at(squares, label[unused], arrived.sum("grad_square")[unused])
    np.add.at(bad, label[unused], arrived.sum("nonfinite")[unused])
    some = np.zeros(len(stepped), np.bool_)
    some[label[unused]] = True
    some &= ~stepped
    values["grad_norm"] = np.where(some, np.sqrt(squares), values["grad_norm"])
    values["nonfinite"] = np.where(some, bad, values["nonfinite"])


def _elements(summary: _Summary, info: StepInfo) -> Columns:
    pieces: dict[str, list[Any]] = {name: [] for name in ELEMENT_COLUMNS}
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
        constants = (info.step, info.time, info.attempt, info.optimizer)
        keys = (*constants, row.group, row.group_name, row.name)
        for name, key in zip(ELEMENT_COLUMNS, keys, strict=False):
            pieces[name] += [key] * n
        pieces["element"] += row.tracked.tolist()
        for name, column in (
            ("effective_lr", rate), ("update", update), ("grad", grad), ("param", param)
        ):  # fmt: skip
            pieces[name] += column.tolist()
    return {
        name: _strings(pieces[name]) if kind == "str" else np.array(pieces[name], dtype=kind)
        for name, kind in ELEMENT_COLUMNS.items()
    }


def _strings(values: Sequence[str]) -> NDArray[Any]:
    result = np.empty(len(values), dtype=object)
    result[:] = list(values)
    return result


def _merged_names(names: Sequence[str], label: Ints, rows: int) -> NDArray[Any]:
    """The name that all parameters of a row share, else ``mixed``."""
    result = np.empty(rows, dtype=object)
    for name, at in zip(names, label, strict=True):
        result[at] = name if result[at] in (None, name) else "mixed"
    return result
