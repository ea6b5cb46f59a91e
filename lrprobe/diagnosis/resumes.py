"""Checks of resumed runs: state, learning rate and decay must continue where they were."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lrprobe.diagnosis.rates import second_moment_rate
from lrprobe.diagnosis.shared import (
    ADAM_FAMILY,
    FEW,
    Hit,
    group_figures,
    groups,
    matrices,
)
from lrprobe.series import Floats, Ints, Series, first, last, quantile

FRESH, FRESH_JUMP, SMALL_JUMP, FRESH_MOMENTUM = 1e-3, 3.0, 0.02, 0.01
OFF = 0.02
"""Relative difference of lr, or of a decay, that is allowed at a resume."""
STEADY, STALLED = 1.5, 2.0


def state_lost(series: Series) -> Iterator[Hit]:
    """Resumes that kept the parameters but lost the optimizer's state."""
    yield from _restarted(series)
    yield from _fresh_adadelta(series)
    yield from _fresh_moments(series)


def _restarted(series: Series) -> Iterator[Hit]:
    """Resumes whose step count started over while the parameters continued."""
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
            "the run resumed after step {reached:,.0f} with a parameter norm of {after:.4g} (it "
            "was {fresh:.4g} at the start), but the optimizer counts from step {step:,.0f} again",
            {
                "reached": before.steps[-1],
                "after": start[column],
                "fresh": fresh[column],
                "step": series.steps[0],
            },
        )


def _fresh_adadelta(series: Series) -> Iterator[Hit]:
    """Adadelta's mean of past updates is 0 again, as it should be only before the first step."""
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
            "the mean size of past updates was {before:.2g} and is 0 again",
            {"before": before},
            before,
        )


def _fresh_moments(series: Series) -> Iterator[Hit]:
    """Resumes at which the rates jump as never before, or the momentum is missing."""
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
            evidence = "across the resume, the effective rates changed {jump:.3g} times as much as "
            evidence += "between any two of the recorded steps before"
            values = {"jump": float(np.nanmax(jumps))}
            yield Hit(series.names[column], series.steps[row : row + 1], evidence, values)


def _jumps(series: Series, row: int) -> Floats:
    """Change of rate and spread of rates at a row, over their usual changes: (parameters,)."""
    largest = np.full(len(series.names), np.nan)
    columns = ("lr", *(f"effective_lr_{q}" for q in ("p05", "p50", "p95")))
    if not all(column in series for column in columns):
        return largest
    rate = second_moment_rate(series)
    spread = np.log10(series["effective_lr_p95"] / series["effective_lr_p05"])
    spread[np.isnan(rate)] = np.nan
    rate[series.ruled_by("adafactor")] = np.nan  # clipping changes it at every step
    for figure in (rate, spread):
        change = abs(np.diff(figure[max(0, row - 6) : row + 1], axis=0))
        usual = np.maximum(np.fmax.reduce(change[:-1], axis=0), SMALL_JUMP)
        largest = np.fmax(largest, change[-1] / usual)
    return largest


def _without_momentum(series: Series) -> Floats:
    """Relative difference of the update from rate times gradient: (steps, parameters).

    It is near 0 only without momentum.
    """
    if not all(name in series for name in ("effective_lr_applied", "update_norm", "grad_norm")):
        return np.full(series.shape, np.nan)
    alone = series["effective_lr_applied"] * series["grad_norm"]
    return np.where(alone > 0, abs(series["update_norm"] / alone - 1), np.nan)


# Checks of the learning rate and of the decay.


class _Resume(NamedTuple):
    """The rows around a resume in which a group's rate is known.

    Attributes:
        row: first row after the resume.
        before, after: rows before and after it.
    """

    row: int
    before: Ints
    after: Ints


def _resumes(series: Series, lr: Floats) -> Iterator[_Resume]:
    """The resumes at which a group's rate is known on both sides."""
    rows = np.flatnonzero(~np.isnan(lr))
    ends = [*series.resumes.tolist(), len(series.steps)]
    for row, end in pairwise(ends):
        before, after = rows[rows < row], rows[(rows >= row) & (rows < end)]
        if len(before) and len(after):
            yield _Resume(int(after[0]), before, after)


def lr_jumps(series: Series) -> Iterator[Hit]:
    """Groups whose rate does not continue the schedule at a resume."""
    names, rates = groups(series)
    _, bases = group_figures(series, "initial_lr")
    for column, name in enumerate(names):
        lr = rates[:, column]
        for resume in _resumes(series, lr):
            row, before = resume.row, int(resume.before[-1])
            values = {"before": lr[before], "after": lr[row], "step": series.steps[row]}
            expected = _recorded_before(series, name, resume, lr)
            if expected is not None:
                if expected == expected:  # noqa: PLR0124 - NaN if the rates agree
                    values["expected"] = expected
                    evidence = "lr is {after:.4g} at step {step:,.0f}; before the resume it was "
                    evidence += "{expected:.4g} there"
                    yield Hit(name, series.steps[row : row + 1], evidence, values)
            elif _off(series, lr, resume, bases[:, column]):
                evidence = (
                    "lr goes from {before:.4g} to {after:.4g} across the resume, which does not "
                )
                evidence += "fit the schedule so far"
                yield Hit(name, series.steps[row : row + 1], evidence, values)
            elif _new_base(series, lr, resume, bases[:, column]):
                values |= {"base": bases[before, column], "new": bases[row, column]}
                evidence = (
                    "the schedule continues from the base rate {new:.4g} instead of {base:.4g}"
                )
                yield Hit(name, series.steps[row : row + 1], evidence, values)


def _recorded_before(series: Series, name: str, resume: _Resume, lr: Floats) -> float | None:
    """The rate that a superseded attempt had at the steps after the resume, if it differs.

    None if no attempt has these steps; NaN if the rates agree.
    """
    for old in reversed(series.superseded):
        old_names, old_rates = groups(old)
        if name not in old_names:
            continue
        old_lr = old_rates[:, old_names.index(name)]
        known = ~np.isnan(old_lr)
        steps, old_lr = old.steps[known], old_lr[known]
        wrong, compared, expected = 0, 0, np.nan
        for row in resume.after.tolist():
            at = int(np.searchsorted(steps, series.steps[row]))
            if at >= len(steps):
                break
            # A rate between two recorded steps is assumed to lie between theirs.
            beside = (
                old_lr[at : at + 1] if steps[at] == series.steps[row] else old_lr[at - 1 : at + 1]
            )
            if not len(beside):
                continue
            margin = OFF * abs(beside).max()
            compared += 1
            if not beside.min() - margin <= lr[row] <= beside.max() + margin:
                wrong += 1
                expected = float(beside[0]) if np.isnan(expected) else expected
        if compared:
            return expected if wrong > compared / 2 else np.nan
    return None


def _off(series: Series, lr: Floats, resume: _Resume, base: Floats) -> bool:
    """Whether the rate jumps at a resume as it does nowhere else."""
    row, before = resume.row, int(resume.before[-1])
    old, new = lr[before], lr[row]
    gap = float(series.steps[row] - series.steps[before])
    slopes = [_slope(series, lr, rows) for rows in (resume.before[-4:], resume.after[:4])]
    largest = max(abs(old), abs(new))
    predicted = old + slopes[0] * gap
    tolerance = OFF * largest + 2 * gap * max(map(abs, slopes))
    if abs(new - predicted) <= tolerance or abs(new - old) <= OFF * largest:
        return False
    if old <= 0 or new <= 0:
        return True
    jump = np.log(new / old)
    known = np.concatenate([resume.before, resume.after])
    with np.errstate(all="ignore"):
        change = np.diff(np.log(lr[known]))
    flat = np.concatenate([[True], abs(change) < 1e-3, [True]])
    steps_down = change[flat[:-2] & flat[2:]]  # a change between constant rates, as by StepLR
    at = len(resume.before) - 1
    alike = abs(change - jump) < 0.25 * abs(jump)
    alike[at] = False
    # If recorded steps are far apart, no rate looks constant, but the same factor recurs.
    again = abs(change - jump) < 1e-6
    if (alike & flat[:-2] & flat[2:]).any() or again.sum() > 2:
        return False
    # A milestone of the schedule may coincide with the resume; then the base rate is unchanged.
    same_base = abs(base[row] / base[before] - 1) < OFF
    between_flats = bool(flat[at] and flat[at + 2]) and len(resume.before) > 1
    return not (jump < 0 and same_base and between_flats and len(steps_down) > 0)


def _slope(series: Series, lr: Floats, rows: Ints) -> float:
    """Change of a rate per step, over some rows."""
    if len(rows) < 2:
        return 0.0
    return float((lr[rows[-1]] - lr[rows[0]]) / (series.steps[rows[-1]] - series.steps[rows[0]]))


def _new_base(series: Series, lr: Floats, resume: _Resume, base: Floats) -> bool:
    """Whether the schedule took the rate at the resume as its base, and so falls more slowly."""
    row, before = resume.row, int(resume.before[-1])
    if len(resume.before) < FEW or len(resume.after) < FEW or not lr[before] > 0:
        return False
    changed = abs(base[row] / base[before] - 1) > OFF
    is_rate = abs(base[row] / lr[before] - 1) < 0.1
    slopes = [_slope(series, lr, rows) for rows in (resume.before[-FEW:], resume.after[:FEW])]
    span = float(series.steps[resume.after[-1]] - series.steps[row])
    matters = abs(slopes[0]) * span > OFF * lr[before]
    if not (changed and is_rate and matters):
        return False
    # The slope is proportional to the base rate.
    slower = slopes[1] / slopes[0] < np.sqrt(lr[before] / base[before])
    return bool(slower)


def schedule_stalled(series: Series) -> Iterator[Hit]:
    """Groups whose rate is constant since a resume although it kept changing before."""
    names, rates = groups(series)
    for column, name in enumerate(names):
        lr = rates[:, column]
        for resume in _resumes(series, lr):
            after, before = lr[resume.after], resume.before
            if len(after) < FEW or np.ptp(after) > 1e-6 * abs(after).max() or after[0] == 0:
                continue
            moved = before[1:][np.diff(lr[before]) != 0]  # rows in which the rate changed
            if len(moved) < FEW:
                continue
            usual = float(np.diff(series.steps[moved])[-FEW:].max())
            waited = float(series.steps[before[-1]] - series.steps[moved[-1]])
            span = float(series.steps[resume.after[-1]] - series.steps[resume.row])
            finished = abs(after[0]) <= 1e-3 * abs(lr[before]).max()
            if waited < STEADY * usual and span >= STALLED * usual and not finished:
                values = {"lr": after[0], "usual": usual, "span": span}
                evidence = (
                    "lr stays at {lr:.4g} for {span:,.0f} steps after the resume; before, it "
                )
                evidence += "changed at least every {usual:,.0f} steps"
                yield Hit(name, series.steps[resume.after], evidence, values)


def decay_jumps(series: Series) -> Iterator[Hit]:
    """Groups whose weight decay differs only in the first step after a resume."""
    names, _ = groups(series)
    for column, name in enumerate(names):
        decay = _weight_decay(series, column, int(name.split()[-1]))
        for resume in _resumes(series, decay):
            if len(resume.after) < 2:
                continue
            before, row, after = decay[[resume.before[-1], *resume.after[:2]]]
            tolerance = OFF * max(before, row, after) / 2 + 3 * abs(after - before)
            if abs(row - before) > tolerance and abs(row - after) > tolerance:
                values = {"before": before, "decay": row, "after": after}
                evidence = "the weight decay is {decay:.4g} in the first step of the resumed run, "
                evidence += "{before:.4g} before and {after:.4g} after it"
                steps = series.steps[resume.row : resume.row + 1]
                yield Hit(name, steps, evidence, values)


def _weight_decay(series: Series, column: int, group: int) -> Floats:
    """λ of a group in each step: decay over lr if it is decoupled, else from the description."""
    _, lr = groups(series)
    _, decay = group_figures(series, "decay")
    with np.errstate(all="ignore"):
        decoupled: Floats = decay[:, column] / lr[:, column]
    if np.nan_to_num(decay[:, column]).any():
        return np.where(np.isfinite(decoupled), decoupled, np.nan)
    result = np.full(len(series.steps), np.nan)
    for past in series.optimizer_about.get("history", ()):
        values = [each.get("weight_decay") for each in past["groups"]]
        since = (series.attempt > past["attempt"]) | (
            (series.attempt == past["attempt"]) & (series.steps >= past["step"])
        )
        if group < len(values) and isinstance(values[group], int | float):
            result[since] = values[group]
    return result
