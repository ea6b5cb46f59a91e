"""Checks of gradients: absent, zero, skipped, accumulated, clipped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrprobe.diagnosis.shared import FEW, Hit, lasting, matrices
from lrprobe.series import Bools, Floats, Series, last, peak, quantile

LASTING, VANISHED = 0.1, 0.07
SKIPPED_SHARE, SCALER_START = 0.02, 20
CLIPPED, CLIPPED_SHARE, CLIPPED_ROWS = 1e-3, 0.9, 5
ONGOING_ROWS = 20
ROWS_WITHOUT, ROWS_DECAYED = 0.5, 0.05


def no_steps(series: Series) -> Iterator[Hit]:
    """Yield a hit if the series has no steps."""
    if not len(series.steps):
        yield Hit("", series.steps, "no step was recorded", {})


def skipped(series: Series) -> Iterator[Hit]:
    """Steps that a fused optimizer skipped for a gradient scaler; an unfused skip runs no hook."""
    skipped = series.skipped
    late = series.steps > SCALER_START
    if skipped.all():  # then include the first steps, in which a scaler searches for its scale
        late[:] = True
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
        evidence += "; in {nonfinite:,.0f} of them this parameter's gradient was not finite"
    else:
        column = 0
    yield Hit(series.names[column], series.steps[skipped], evidence, values, share)


def never_steps(series: Series) -> Iterator[Hit]:
    """Parameters without a gradient in any step, or whose update is exactly 0 in all steps."""
    present = series.present & ~series.skipped[:, None]
    often = present.sum(axis=0) >= FEW
    without = often & ~series.stepped.any(axis=0)
    for column in np.flatnonzero(without):
        evidence = "no gradient in any of {count:,.0f} recorded steps"
        steps = series.steps[present[:, column]]
        yield Hit(series.names[column], steps, evidence, {"count": len(steps)}, 1.0)
    if "update_norm" not in series:
        return
    rated = series.stepped & (series["lr"] > 0)
    still = (rated.sum(axis=0) >= FEW) & ~(rated & (series["update_norm"] != 0)).any(axis=0)
    for column in np.flatnonzero(still):
        steps = series.steps[rated[:, column]]
        values = {"count": len(steps), "grad": float(np.nanmax(series["grad_norm"][:, column]))}
        evidence = "its update is exactly 0 in all {count:,.0f} recorded steps; its gradient norm "
        evidence += "is at most {grad:.2g}"
        yield Hit(series.names[column], steps, evidence, values)


def no_gradient(series: Series) -> Iterator[Hit]:
    """Matrices whose gradient is exactly 0 until the end, unless ``never_steps`` reports them."""
    rows = len(series.steps)
    moved = np.ones(series.shape[1], dtype=bool)
    if "update_norm" in series:
        moved = (series.stepped & (series["update_norm"] != 0)).any(axis=0)
    for column in np.flatnonzero(matrices(series) & moved):
        seen = lasting(series["grad_norm"][:, column] == 0, series.stepped[:, column])
        if len(seen) < max(FEW, LASTING * rows):
            continue
        evidence = "its gradient is exactly 0 in the last {count:,.0f} of {all:,.0f} recorded steps"
        values = {"count": len(seen), "all": rows}
        yield Hit(series.names[column], series.steps[seen], evidence, values, len(seen))


def decayed(series: Series) -> Iterator[Hit]:
    """Matrices with weight decay whose norm has fallen far below its peak."""
    norm = series["param_norm"]
    share = last(norm) / peak(norm)
    # No column has a coupled decay; it is only in the hyperparameters, if these are known.
    decays = np.max(np.nan_to_num(series["decay"]), axis=0) > 0
    decays |= weight_decay(series) > 0
    for column in np.flatnonzero(matrices(series) & decays & (share < VANISHED)):
        row = int(np.nanargmax(norm[:, column]))
        evidence = "its norm fell from {most:.3g} to {norm:.3g}, {share:.1%} of it"
        values = {
            "most": norm[row, column],
            "norm": last(norm)[column],
            "share": share[column],
        }
        yield Hit(series.names[column], series.steps[row:], evidence, values, 1 / share[column])


def weight_decay(series: Series) -> Floats:
    """λ of each parameter's group, 0 if unknown: (parameters,)."""
    given = series.option("weight_decay")
    return np.array([each if isinstance(each, int | float) else 0.0 for each in given])


def moves_without_gradient(series: Series) -> Iterator[Hit]:
    """Parameters that move although they, or most of their elements, have no gradient."""
    yield from _moves_at_zero(series)
    yield from _moves_without_stepping(series)
    yield from _rows_decay(series)


def _moves_at_zero(series: Series) -> Iterator[Hit]:
    """Parameters that move although their gradient is exactly 0 until the end."""
    count = len(series.steps)
    zero = np.logical_and(series["grad_norm"] == 0, series.stepped)
    moves = np.logical_and(zero, series["update_norm"] > 0)
    large = matrices(series)
    for column in np.flatnonzero(moves.any(axis=0)):
        seen = lasting(zero[:, column], series.stepped[:, column])
        needed = max(FEW, (LASTING if large[column] else 0.5) * count)
        if len(seen) < needed or moves[seen, column].mean() < 0.5:
            continue
        norms = series["param_norm"][seen, column]
        values = {"count": len(seen), "all": count, "from": norms[0], "to": norms[-1]}
        evidence = "its gradient is exactly 0 in the last {count:,.0f} of {all:,.0f} recorded "
        evidence += "steps, and its norm goes from {from:.4g} to {to:.4g}"
        decay = np.nan_to_num(series["decay"][seen, column]).max() if "decay" in series else 0
        if decay > 0 or weight_decay(series)[column] > 0:
            evidence += ", by weight decay"
        weight = abs(float(np.log(max(norms[-1], 1e-300) / max(norms[0], 1e-300))))
        yield Hit(series.names[column], series.steps[seen], evidence, values, 1 + weight)


def _moves_without_stepping(series: Series) -> Iterator[Hit]:
    """Parameters without a gradient that change although the optimizer skips them."""
    norm = series["param_norm"]
    without = series.present & ~series.with_gradient & ~series.skipped[:, None]
    next_step = (np.diff(series.steps) == 1)[:, None]
    moved = np.zeros(series.shape, dtype=bool)
    moved[1:] = without[1:] & next_step & (abs(norm[1:] / norm[:-1] - 1) > 1e-6)
    for column in np.flatnonzero(moved.sum(axis=0) >= max(FEW, LASTING * len(norm))):
        norms = norm[moved[:, column], column]
        values = {"count": len(norms), "from": norms[0], "to": norms[-1]}
        evidence = "its norm changes in {count:,.0f} recorded steps without a gradient, from "
        evidence += "{from:.4g} to {to:.4g}"
        yield Hit(series.names[column], series.steps[moved[:, column]], evidence, values)


def _rows_decay(series: Series) -> Iterator[Hit]:
    """Matrices that decay although most of their elements have no gradient in most steps."""
    if "zero_grad_fraction" not in series or "decay" not in series:
        return
    zero = np.where(series.stepped, series["zero_grad_fraction"], np.nan)
    decay = np.where(series.stepped, np.nan_to_num(series["decay"]), 0.0)
    coupled = weight_decay(series)
    span = np.diff(series.steps, prepend=series.steps[0] - 1)[:, None]
    lost = 1 - np.exp(-(decay * span).sum(axis=0))
    enough = (~np.isnan(zero)).sum(axis=0) >= FEW
    share = quantile(zero, 0.5)
    whole = np.logical_and(series["grad_norm"] == 0, series.stepped).any(axis=0)
    sparse = series.ruled_by("sparse_adam").any(axis=0)
    decays = (decay.max(axis=0) > 0) | (coupled > 0)
    where = matrices(series) & enough & (share > ROWS_WITHOUT) & decays & ~whole & ~sparse
    for column in np.flatnonzero(where):
        values = {"share": share[column], "lost": lost[column], "decay": coupled[column]}
        evidence = "in the median step, {share:.0%} of its elements have no gradient, "
        if decay[:, column].max() > 0:
            evidence += "and weight decay has shrunk them by {lost:.2%}"
        else:
            evidence += "and weight_decay={decay:.3g} gives them one"
        yield Hit(
            series.names[column],
            series.steps[zero[:, column] > ROWS_WITHOUT],
            evidence,
            values,
            lost[column],
            note=bool(lost[column] < ROWS_DECAYED),
        )


def always_clipped(series: Series) -> Iterator[Hit]:
    """A constant gradient norm: over all parameters, over a group, or of each parameter."""
    norms = series["grad_norm"]
    usable: Bools = np.asarray(series.stepped.any(axis=1) & ~np.isinf(norms).any(axis=1))
    enough = ONGOING_ROWS if series.ongoing else CLIPPED_ROWS
    if usable.sum() < enough:
        return
    squares = np.where(series.stepped & np.isfinite(norms), norms, 0.0) ** 2
    own = _spread(norms[usable])
    candidates = {"": np.ones(len(series.names), dtype=bool)}
    numbers = np.unique(series.group[~np.isnan(series.group)])
    if len(numbers) > 1:
        candidates |= {f"group {int(n)}": series.group == n for n in numbers}
    if len(series.siblings) > 1 and series.siblings[0] is series:
        yield from _clipped_together(series)
    for name, inside in candidates.items():
        total = np.sqrt(squares[:, inside].sum(axis=1))
        hit = _clipped(series, name or "all parameters", total, usable, own[inside])
        if hit is not None:
            yield hit
            return
    # Clipping per parameter: all matrices have the same constant norm.
    large = np.flatnonzero(matrices(series) & (own < CLIPPED))
    middle = quantile(norms[usable], 0.5)[large]
    if (
        len(large) >= 2
        and large.size == matrices(series).sum()
        and np.ptp(middle) < CLIPPED * middle[0]
    ):
        hit = _clipped(series, "each parameter", norms[:, large[0]], usable, np.array([1.0]))
        if hit is not None:
            yield hit


def _spread(figures: Floats) -> Floats:
    """Relative distance of the values from their median in most rows: (parameters,)."""
    return quantile(abs(figures / quantile(figures, 0.5) - 1), CLIPPED_SHARE)


def _clipped_together(series: Series) -> Iterator[Hit]:
    """A constant norm over the parameters of several optimizers that step together."""
    steps = series.steps
    for other in series.siblings[1:]:
        steps = np.intersect1d(steps, other.steps)
    if len(steps) < CLIPPED_ROWS:
        return
    total = np.zeros(len(steps))
    own = []
    for each in series.siblings:
        rows = np.isin(each.steps, steps)
        norms = np.where(each.stepped, each["grad_norm"], np.nan)[rows]
        total += np.nansum(norms**2, axis=1)
        own.append(_spread(norms))
    rows = np.isin(series.steps, steps)
    whole = np.full(len(series.steps), np.nan)
    whole[rows] = np.sqrt(total)
    hit = _clipped(series, "all parameters of all optimizers", whole, rows, np.concatenate(own))
    if hit is not None:
        yield hit


def _clipped(series: Series, name: str, norm: Floats, usable: Bools, own: Floats) -> Hit | None:
    """A hit if a norm is nearly always the same while the norms that it combines vary."""
    value = float(quantile(norm[usable, None], 0.5)[0])
    if not value > 0:
        return None
    same = usable & (abs(norm / value - 1) < CLIPPED)
    share = float(same.sum() / usable.sum())
    changes = np.diff(norm[usable]) / value
    drifts = abs(changes) > 1e-5
    one_way = drifts.any() and abs(np.sign(changes[drifts]).mean()) > 0.9
    # If the gradient itself hardly changes, the norms of its parts do not vary either.
    spread = max(1e-6, float(_spread(norm[usable, None])[0]))
    varies = len(own) == 1 or np.fmax.reduce(own) > 10 * spread
    if share < CLIPPED_SHARE or one_way or not varies:
        return None
    values = {"norm": value, "share": share}
    evidence = "the norm of the gradient is {norm:.4g} in {share:.0%} of the recorded steps"
    invariant = not series.ruled_by("sgd", "asgd").any()
    meaning = advice = ""
    if invariant:
        meaning = (
            "The clip value is below the norm of every gradient. This optimizer divides by the "
            "size of past gradients, so a constant factor cancels. Clipping only makes all steps "
            "count equally in its averages, which matters much less than for SGD."
        )
        advice = "Nothing, if it trains well; a larger value clips only outliers."
    return Hit(
        name, series.steps[same], evidence, values, note=invariant, meaning=meaning, advice=advice
    )
