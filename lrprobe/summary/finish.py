"""Figures to columns, on the host: merge what the parameters have, then finish each row.

The parameter's own row is a merge of one, so that every level goes through the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrprobe.record import QUANTILES
from lrprobe.summary.figures import BINS, CHECKS, PARTS, SHIFT
from lrprobe.summary.reading import WHOLE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def _bin_edges() -> Floats:
    bits = (np.arange(BINS + 1, dtype=np.int64) << SHIFT).astype(np.uint32)
    with np.errstate(invalid="ignore"):  # the last bins are NaNs
        return bits.view(np.float32).astype(np.float64)


_EDGES = _bin_edges()
_INFINITE = int(np.float32(np.inf).view(np.int32)) >> SHIFT
_COARSE = 3
"""Fine bins in one bin of a recorded histogram, as a power of two: 8 bins an octave."""


@dataclass(slots=True)
class Rates:
    """The distribution of one parameter's rates: every value, or counts in fine bins."""

    values: Floats | None = None
    bins: Ints | None = None
    counts: Floats | None = None


@dataclass(slots=True)
class Summary:
    """Figures of the parameters in one step, on the host.

    Attributes:
        numel: elements of each parameter: (parameters,).
        stepped: whether it took the step: (parameters,).
        measured: whether its rate was measured for want of a rule: (parameters,).
        parts, checks: as ``figures.PARTS`` and ``figures.CHECKS``: (parameters, ·).
        rates: distribution of each parameter's rates; None where one number tells it, or nothing.
    """

    numel: Ints
    stepped: NDArray[np.bool_]
    measured: NDArray[np.bool_]
    parts: Floats
    checks: Floats
    rates: Sequence[Rates | None]

    def part(self, name: str) -> Floats:
        """One column of ``parts``."""
        return self.parts[:, PARTS.index(name)]

    def check(self, name: str) -> Floats:
        """One column of ``checks``."""
        return self.checks[:, CHECKS.index(name)]


def columns(summary: Summary, label: Ints, rows: int) -> dict[str, NDArray[np.float64]]:
    """The figures of each row, merged from the parameters with its label.

    Args:
        summary: the parameters' figures.
        label: row of each parameter: (parameters,), from 0 to ``rows`` − 1.
        rows: number of rows.

    Returns:
        Column name to (rows,): all figures but the learning rate and samples.
    """
    on = summary.stepped
    lab = label[on]
    n = summary.numel[on].astype(np.float64)

    def add(values: Floats) -> Floats:
        total = np.zeros(rows)
        np.add.at(total, lab, values[on])
        return np.where(some, total, np.nan)

    def extreme(values: Floats, how: np.ufunc) -> Floats:
        result = np.full(rows, np.inf if how is np.minimum else -np.inf)
        how.at(result, lab, values[on])
        return np.where(some, result, np.nan)

    some = np.zeros(rows, dtype=np.bool_)
    some[lab] = True
    count = np.zeros(rows)
    np.add.at(count, lab, n)
    weight = summary.numel.astype(np.float64)
    with np.errstate(all="ignore"):
        low, high = (
            extreme(summary.part("rate_min"), np.minimum),
            extreme(summary.part("rate_max"), np.maximum),
        )
        constant = low == high
        mean = np.where(constant, low, add(weight * summary.part("rate_mean")) / count)
        away = summary.part("rate_mean") - mean[label]
        m2 = add(summary.part("rate_m2") + np.where(weight > 0, weight * away**2, 0))
        gmean = np.where(constant, low, np.exp(add(summary.part("rate_log")) / count))
        scale = weight / summary.check("checked")
        decay = summary.part("decay")
        u2 = (
            summary.part("ee") + 2 * decay * summary.part("ep") + decay**2 * summary.part("pp")
        ) / (1 - decay) ** 2
        descent = (summary.part("eg") + decay * summary.part("pg")) / (1 - decay)
        measured = summary.measured
        observed = summary.check("observed") * scale
        u2 = np.where(measured, observed, u2.clip(min=0))
        descent = np.where(measured, -summary.check("sample_og") * scale, descent)
        dd = np.where(measured, summary.check("sample_gg") * scale, summary.part("dd"))
        ee = np.where(measured, observed, summary.part("ee"))
        update = np.sqrt(add(u2))
        grad = np.sqrt(add(summary.part("gg")))
        sampled_grad = np.where(measured, summary.check("sample_gg") * scale, summary.part("gg"))
        param2 = np.zeros(rows)
        np.add.at(param2, label, summary.part("pp"))
        param = np.sqrt(param2)
        intended = np.sqrt(add(summary.check("intended") * scale))
        moved = np.maximum(intended, np.sqrt(add(observed)))
        result = {
            "effective_lr_mean": mean,
            "effective_lr_gmean": gmean,
            "effective_lr_std": np.where(constant, 0.0, np.sqrt(m2 / count)),
            "effective_lr_min": low,
            "effective_lr_max": high,
            "effective_lr_applied": np.sqrt(add(ee) / add(dd)),
            "update_norm": update,
            "update_ratio": update / param,
            "update_grad_cosine": add(descent) / (update * np.sqrt(add(sampled_grad))),
            "param_norm": param,
            "grad_norm": grad,
            "zero_grad_fraction": add(summary.part("zeros")) / count,
            "rms_grad_mean": add(summary.part("rms_grad")) / count,
            "rms_update_mean": add(summary.part("rms_update")) / count,
            "eps_fraction": add(summary.part("below_eps")) / count,
            "nonfinite": add(summary.part("nonfinite")),
            "lost_fraction": add(summary.check("lost") * scale) / count,
            "reconstruction_error": np.sqrt(add(summary.check("residual") * scale)) / moved,
        }
        result["effective_lr_applied"] = np.where(
            constant & ~np.isnan(result["effective_lr_applied"]),
            low,
            result["effective_lr_applied"],
        )
    result |= _quantiles(summary, label, rows, low, high)
    return result


def _quantiles(
    summary: Summary, label: Ints, rows: int, low: Floats, high: Floats
) -> dict[str, Floats]:
    result = np.full((rows, len(QUANTILES)), np.nan)
    members: list[list[int]] = [[] for _ in range(rows)]
    for i in np.flatnonzero(summary.stepped):
        members[label[i]].append(int(i))
    shares = np.array(list(QUANTILES.values()))
    for row, inside in enumerate(members):
        if not inside:
            continue
        if low[row] == high[row]:
            result[row] = low[row]
        elif any(summary.measured[i] for i in inside) or not np.isnan(low[row]):
            result[row] = _row_quantiles(summary, inside, shares, low[row], high[row])
    return {f"effective_lr_{suffix}": result[:, at] for at, suffix in enumerate(QUANTILES)}


def _row_quantiles(
    summary: Summary, inside: list[int], shares: Floats, low: float, high: float
) -> Floats:
    numel = summary.numel[inside]
    rates = [summary.rates[i] for i in inside]
    if len(inside) == 1 and rates[0] is not None and rates[0].values is not None:
        return _exact(rates[0].values, shares, bool(summary.measured[inside[0]]))
    constants = [summary.part("rate_mean")[i] for i in inside]
    if numel.sum() <= WHOLE:
        pieces = [
            np.full(n, c) if r is None or r.values is None else r.values
            for r, c, n in zip(rates, constants, numel, strict=True)
        ]
        return _exact(np.concatenate(pieces), shares, bool(summary.measured[inside].any()))
    bins, counts = [], []
    for r, constant, n in zip(rates, constants, numel, strict=True):
        b, c = binned(r, constant, int(n))
        bins.append(b)
        counts.append(c)
    return bin_quantiles(np.concatenate(bins), np.concatenate(counts), shares, low, high)


def _exact(values: Floats, shares: Floats, measured: bool) -> Floats:
    if measured:
        values = values[~np.isnan(values)]
    if not len(values):
        return np.full(len(shares), np.nan)
    return np.quantile(values, shares)


def binned(rates: Rates | None, constant: float, numel: int) -> tuple[Ints, Floats]:
    """The distribution as fine bins and counts that add up to the elements that have a rate."""
    if rates is not None and rates.bins is not None and rates.counts is not None:
        return rates.bins, rates.counts * (numel / rates.counts.sum())
    values = np.array([constant]) if rates is None or rates.values is None else rates.values
    finite = values[~np.isnan(values)]
    if not len(finite):
        return np.zeros(0, np.int64), np.zeros(0)
    with np.errstate(over="ignore", under="ignore"):
        bits = finite.astype(np.float32).view(np.int32) >> SHIFT
    bins, counts = np.unique(bits.clip(0, BINS - 1), return_counts=True)
    return bins.astype(np.int64), counts * (numel / len(values))


def bin_quantiles(bins: Ints, counts: Floats, shares: Floats, low: float, high: float) -> Floats:
    """Quantiles of fine bins, each within 1 % of a value of its rank: (shares,)."""
    if not len(bins):
        return np.full(len(shares), np.nan)
    total = np.bincount(bins, weights=counts, minlength=BINS)
    upto = np.cumsum(total)
    rank = shares * upto[-1]
    at = np.minimum(np.searchsorted(upto, rank), int(bins.max()))
    left, right = _EDGES[at], _EDGES[at + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (rank - (upto[at] - total[at])) / total[at]
        value = left + inside.clip(0, 1) * (right - left)
        # Wherever in the bin the true value lies, this is within 1 % of it.
        value = value.clip(np.minimum(0.9901 * right, 1.0099 * left), 1.0099 * left)
    value = np.where(at >= _INFINITE, np.inf, value)
    bounds = (low, high) if not np.isnan(low) else (-np.inf, np.inf)
    return value.clip(*bounds)


def histogram(rates: Rates | None, constant: float, numel: int) -> tuple[Floats, Ints]:
    """A histogram to keep: (edges (n + 1,), counts (n,)); a run of empty bins is one wide bin."""
    bins, counts = binned(rates, constant, numel)
    keep = bins < _INFINITE
    coarse, where = np.unique(bins[keep] >> _COARSE, return_inverse=True)
    if not len(coarse):
        return np.zeros(0), np.zeros(0, np.int64)
    summed = np.bincount(where, weights=counts[keep])
    whole = np.diff(np.rint(np.cumsum(summed)), prepend=0.0).astype(np.int64)
    starts, ends = coarse, coarse + 1
    edges = np.union1d(starts, ends)
    result = np.zeros(len(edges) - 1, np.int64)
    result[np.searchsorted(edges, starts)] = whole
    return _EDGES[edges << _COARSE], result


def merged_numbers(values: Floats, label: Ints, rows: int) -> Floats:
    """A hyperparameter of each row: NaN where its parameters differ: (rows,)."""
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(low, label, values)
    np.maximum.at(high, label, values)
    return np.where(low == high, low, np.nan)


def labels(keys: Sequence[str | int]) -> tuple[Ints, list[str | int]]:
    """Row of each parameter, and the key of each row, in order of first appearance."""
    order: dict[str | int, int] = {}
    label = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    return label, list(order)
