"""Checks of the learning-rate schedules of parameter groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from lrprobe.diagnosis.shared import FEW, Hit, group_figures, groups, lasting
from lrprobe.series import Floats, Series, peak

LASTING = 0.1
FLAT, VARIED = 1.001, 1.5
ENDED, ENDED_SHARE, ENDED_ROWS = 1e-3, 0.5, 6
REACHED, REACHED_ROWS, REACHED_STEPS = 0.05, 5, 1000
TURNED = 2.0
SAME, SAME_SHARE = 1e-6, 0.9


def group_rate_zero(series: Series) -> Iterator[Hit]:
    """Groups whose rate is 0 in all steps, or from some step until the end."""
    names, rates = groups(series)
    known = ~np.isnan(rates)
    for column in range(len(names)):
        count = int(known[:, column].sum())
        zero = lasting(rates[:, column] == 0, known[:, column])
        if len(zero) < max(FEW, LASTING * count):
            continue
        evidence = "lr is 0 in all {steps:,.0f} recorded steps"
        if len(zero) < count:
            evidence = "lr is 0 in the last {count:,.0f} of {steps:,.0f} recorded steps"
        values = {"count": len(zero), "steps": count}
        yield Hit(names[column], series.steps[zero], evidence, values)


def group_off_schedule(series: Series) -> Iterator[Hit]:
    """Groups whose rate is constant while that of others changes."""
    names, rates = groups(series)
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
                "lr stays at {own:.3g}, while that of {others:,.0f} other groups varies between "
                "{low:.3g} and {high:.3g}",
                {"own": own[0], "others": varied.sum(), "low": low[other], "high": high[other]},
            )


def group_rate_overwritten(series: Series) -> Iterator[Hit]:
    """Groups that started at different rates but have the same rate in nearly all steps."""
    if series.key != "parameter":
        return
    names, rates = groups(series)
    _, bases = group_figures(series, "initial_lr")
    for column in range(1, len(names)):
        for other in range(column):
            both = (rates[:, column] > 0) & (rates[:, other] > 0)
            if both.sum() < FEW:
                continue
            own, its = rates[both, column], rates[both, other]
            base, its_base = bases[both, column][0], bases[both, other][0]
            same = abs(own / its - 1) < SAME
            apart = abs(base / its_base - 1) > 0.01
            # Schedules that anneal to one floor agree only at the end, where they are constant.
            moves = len(np.unique(own[same])) > 1 or same[1:].all()
            if apart and same.mean() >= SAME_SHARE and moves:
                yield Hit(
                    names[column],
                    series.steps[np.flatnonzero(both)[same]],
                    f"lr equals that of {names[other]} in "
                    "{count:,.0f} of {all:,.0f} recorded steps ({lr:.3g} in the last), although "
                    "the groups started at {base:.3g} and {other:.3g}",
                    {
                        "count": same.sum(),
                        "all": both.sum(),
                        "lr": own[-1],
                        "base": base,
                        "other": its_base,
                    },
                )
                break


def negative_rate(series: Series) -> Iterator[Hit]:
    """Groups with a negative rate, and parameters with a negative effective rate."""
    names, rates = groups(series)
    if not names:
        names, rates = series.names, series["lr"]
    for column in np.flatnonzero((rates < 0).any(axis=0)):
        seen = rates[:, column] < 0
        values = {"lr": np.nanmin(rates[:, column]), "count": seen.sum()}
        evidence = "lr is below 0 in {count:,.0f} recorded steps, down to {lr:.3g}"
        yield Hit(names[column], series.steps[seen], evidence, values, float(seen.sum()))
    figure = next((f for f in ("effective_lr_min", "effective_lr_p50") if f in series), None)
    if figure is None:
        return
    below = np.logical_and(series[figure] < 0, ~(series["lr"] < 0))
    for column in np.flatnonzero(below.any(axis=0)):
        seen = below[:, column]
        yield Hit(
            series.names[column],
            series.steps[seen],
            "an effective rate is below 0, down to {rate:.3g}, though lr is not",
            {"rate": np.nanmin(series[figure][seen, column])},
        )


def schedule_ends_early(series: Series) -> Iterator[Hit]:
    """Groups whose rate is a small fraction of its peak for more than half of the run."""
    names, rates = groups(series)
    for column, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(rates[:, column]))
        lr, steps = rates[rows, column], series.steps[rows]
        if len(rows) < ENDED_ROWS or not lr.max() > 0:
            continue
        top = int(lr.argmax())
        low = (lr < ENDED * lr[top]) & (lr >= 0)
        low[:top] = False
        span = np.diff(steps)  # steps since the previous recorded step
        share = float(span[low[1:]].sum() / span.sum())
        if share > ENDED_SHARE:
            yield Hit(
                name,
                steps[low],
                "lr is below a thousandth of its peak {peak:.3g} in {share:.0%} of the run, "
                "and {lr:.2g} at the end",
                {"peak": lr[top], "share": share, "lr": lr[-1]},
                share,
            )


def schedule_not_reached(series: Series) -> Iterator[Hit]:
    """Groups whose rate stays far below their base rate for the whole run."""
    names, rates = groups(series)
    if not names or series.key != "parameter":
        return
    _, bases = group_figures(series, "initial_lr")
    short = series.ongoing and series.steps[-1] - series.steps[0] < REACHED_STEPS
    gap = int(series.steps[1] - series.steps[0]) if len(series.steps) > 1 else 0
    if short or series.steps[0] > max(10, gap):
        return
    for column, name in enumerate(names):
        known = ~np.isnan(rates[:, column])
        lr, base = rates[known, column], peak(bases)[column]
        if len(lr) < REACHED_ROWS or not 0 < lr.max() < REACHED * base or lr[-1] < lr[0]:
            continue
        yield Hit(
            name,
            series.steps[known],
            "lr is at most {lr:.3g}, which is {share:.2%} of the group's own rate, {base:.3g}",
            {"lr": lr.max(), "share": lr.max() / base, "base": base},
        )


def schedule_cycles(series: Series) -> Iterator[Hit]:
    """Groups whose rate falls and rises again, other than at a resume."""
    names, rates = groups(series)
    for column, name in enumerate(names):
        lows: list[int] = []
        ends = [0, *series.resumes.tolist(), len(series.steps)]
        for start, end in pairwise(ends):
            lows += [start + low for low in _lows(rates[start:end, column])]
        if not lows:
            continue
        after = rates[lows[0] :, column]
        values = {
            "count": len(lows),
            "low": rates[lows[0], column],
            "high": np.nanmax(after),
        }
        evidence = "lr rises again from {low:.3g} to {high:.3g}"
        if len(lows) > 1:
            values["period"] = (series.steps[lows[-1]] - series.steps[lows[0]]) / (len(lows) - 1)
            evidence = "lr falls and rises again {count:,.0f} times, about every {period:,.0f} "
            evidence += "steps, between {low:.3g} and {high:.3g}"
        yield Hit(name, series.steps[lows], evidence, values, len(lows))


def _lows(lr: Floats) -> list[int]:
    """Rows of minima: the rate at least halved before, and at least doubled after."""
    floor = 1e-3 * np.nanmax(lr, initial=0.0)
    lows: list[int] = []
    high, low, falling = -1, -1, False
    for row in np.flatnonzero(~np.isnan(lr)).tolist():
        value = max(lr[row], floor)
        if falling:
            if value <= max(lr[low], floor):
                low = row
            elif value >= TURNED * max(lr[low], floor) and floor > 0:
                lows.append(low)
                high, falling = row, False
        elif high < 0 or value >= lr[high]:
            high = row
        elif value * TURNED <= lr[high]:
            low, falling = row, True
    return lows


def short_warmup(series: Series) -> Iterator[Hit]:
    """A warmup that is shorter than the memory of the second moment."""
    family = series.ruled_by("adam", "nadam", "sparse_adam", "rmsprop")
    columns = np.flatnonzero(family.any(axis=0))
    betas, alphas = series.option("betas"), series.option("alpha")
    seconds = {column: _second(betas[column], alphas[column]) for column in columns.tolist()}
    known = {column: beta for column, beta in seconds.items() if beta is not None}
    if not known:
        return
    column, beta = next(iter(known.items()))
    memory = 1 / (1 - beta) if beta < 1 else np.inf
    lr = np.fmax.reduce(np.where(family, series["lr"], np.nan), axis=1)
    top = int((lr >= 0.99 * np.nanmax(lr)).argmax())
    rising = bool((np.diff(lr[: top + 1]) >= 0).all())
    if top < 2 or not rising or lr[0] > 0.2 * lr[top] or series.steps[top] >= memory:
        return
    if len(lr) < 1.2 * (top + 1) or series.steps[0] > 10:
        return
    yield Hit(
        series.names[column],
        series.steps[: top + 1],
        "lr was at its peak at step {warmup:,.0f}; the second moment remembers 1/(1−β₂) = "
        "{memory:,.0f} steps (β₂ = {beta:.4g})",
        {"warmup": series.steps[top], "memory": memory, "beta": beta},
    )


def _second(betas: object, alpha: object) -> float | None:
    """β₂, or RMSprop's α."""
    if isinstance(betas, list | tuple) and len(betas) > 1 and isinstance(betas[1], int | float):
        return float(betas[1])
    return float(alpha) if isinstance(alpha, int | float) else None
