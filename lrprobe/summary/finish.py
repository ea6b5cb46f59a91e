"""Figures to columns, on the host: merge what the parameters have, then finish each row.

The parameter's own row is a merge of one, so that every level goes through the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    quantiles: Floats | None = None
    """Of the values."""


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
    _binned: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)

    def binned(self, i: int) -> tuple[Ints, Floats]:
        """Fine bins of a parameter's rates, and their counts, computed once."""
        if i not in self._binned:
            constant = float(self.parts[i, PARTS.index("rate_mean")])
            self._binned[i] = binned(self.rates[i], constant, int(self.numel[i]))
        return self._binned[i]

    def part(self, name: str) -> Floats:
        """One column of ``parts``."""
        return self.parts[:, PARTS.index(name)]

    def check(self, name: str) -> Floats:
        """One column of ``checks``."""
        return self.checks[:, CHECKS.index(name)]


def columns(summary: Summary, label: Ints, rows: int) -> dict[str, Floats]:
    """The figures of each row, merged from the parameters with its label.

    Args:
        summary: the parameters' figures.
        label: row of each parameter: (parameters,), from 0 to ``rows`` − 1.
        rows: number of rows.

    Returns:
        Column name to (rows,): all figures but the learning rate, decay and samples.
    """
    # Parameters that stepped, those of one row side by side.
    order = np.flatnonzero(summary.stepped)
    order = order[np.argsort(label[order], kind="stable")]
    found, starts = np.unique(label[order], return_index=True)
    with np.errstate(all="ignore"):
        terms = _terms(summary, order)
        mean = terms.pop("mean")
        low, high = terms.pop("low"), terms.pop("high")
        if len(order):
            low = np.minimum.reduceat(low, starts)
            high = np.maximum.reduceat(high, starts)
            summed = np.add.reduceat(np.stack(list(terms.values())), starts, axis=1)
            total = dict(zip(terms, summed, strict=True))
            n = total["n"]
            constant = low == high
            center = np.where(constant, low, total["n_mean"] / n)
            members = np.diff(starts, append=len(order))
            away = terms["n"] * (mean - np.repeat(center, members)) ** 2
            total["m2"] += np.add.reduceat(away, starts)
            figures = _finished(total, n, constant, low, high, center)
        else:
            figures = dict.fromkeys(_MERGED, low)
        result = {name: _spread(figures[name], found, rows) for name in _MERGED}
        # The norm of a parameter is known, whether it stepped or not.
        squares = np.zeros(rows)
        np.add.at(squares, label, summary.part("pp"))
        result["param_norm"] = np.sqrt(squares)
        result["update_ratio"] = result["update_norm"] / result["param_norm"]
    lows, highs = result["effective_lr_min"], result["effective_lr_max"]
    quantiles = np.full((rows, len(QUANTILES)), np.nan)
    ends = [*starts[1:].tolist(), len(order)][: len(starts)]
    for row, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True):
        low_high = float(lows[row]), float(highs[row])
        quantiles[row] = _row_quantiles(summary, order[start:end], *low_high)
    for at, suffix in enumerate(QUANTILES):
        result[f"effective_lr_{suffix}"] = quantiles[:, at]
    return result


def _terms(summary: Summary, order: Ints) -> dict[str, Floats]:
    """What adds up, for the chosen parameters; a measured one from its sample."""
    part = dict(zip(PARTS, summary.parts[order].T, strict=True))
    check = dict(zip(CHECKS, summary.checks[order].T, strict=True))
    measured = summary.measured[order]
    n = summary.numel[order].astype(np.float64)
    scale = n / check["checked"]
    decay = part["decay"]
    observed = check["observed"] * scale
    # ‖Δθ‖² and −Δθ·g, where Δθ = −(e⊙d + decay·θ_after)/(1 − decay).
    update = part["ee"] + 2 * decay * part["ep"] + decay**2 * part["pp"]
    update = (update / (1 - decay) ** 2).clip(min=0)
    descent = (part["eg"] + decay * part["pg"]) / (1 - decay)
    sampled = check["sample_gg"] * scale
    return {
        "mean": part["rate_mean"],
        "low": part["rate_min"],
        "high": part["rate_max"],
        "n": n,
        "n_mean": n * part["rate_mean"],
        "m2": part["rate_m2"],
        "log": part["rate_log"],
        "ee": np.where(measured, observed, part["ee"]),
        "dd": np.where(measured, sampled, part["dd"]),
        "update": np.where(measured, observed, update),
        "descent": np.where(measured, -check["sample_og"] * scale, descent),
        "gg": part["gg"],
        "seen_gg": np.where(measured, sampled, part["gg"]),
        "zeros": part["zeros"],
        "rms_grad": part["rms_grad"],
        "rms_update": part["rms_update"],
        "below_eps": part["below_eps"],
        "nonfinite": part["nonfinite"],
        "lost": check["lost"] * scale,
        "residual": check["residual"] * scale,
        "intended": check["intended"] * scale,
        "observed": observed,
    }


def _finished(
    total: dict[str, Floats],
    n: Floats,
    constant: NDArray[np.bool_],
    low: Floats,
    high: Floats,
    mean: Floats,
) -> dict[str, Floats]:
    update = np.sqrt(total["update"])
    moved = np.sqrt(np.maximum(total["intended"], total["observed"]))
    applied = np.sqrt(total["ee"] / total["dd"])
    return {
        "effective_lr_mean": mean,
        "effective_lr_gmean": np.where(constant, low, np.exp(total["log"] / n)),
        "effective_lr_std": np.where(constant, 0.0, np.sqrt(total["m2"] / n)),
        "effective_lr_min": low,
        "effective_lr_max": high,
        "effective_lr_applied": np.where(constant & ~np.isnan(applied), low, applied),
        "update_norm": update,
        "update_grad_cosine": total["descent"] / (update * np.sqrt(total["seen_gg"])),
        "grad_norm": np.sqrt(total["gg"]),
        "zero_grad_fraction": total["zeros"] / n,
        "rms_grad_mean": total["rms_grad"] / n,
        "rms_update_mean": total["rms_update"] / n,
        "eps_fraction": total["below_eps"] / n,
        "nonfinite": total["nonfinite"],
        "lost_fraction": total["lost"] / n,
        "reconstruction_error": np.sqrt(total["residual"]) / moved,
    }


_MERGED = (
    "effective_lr_mean",
    "effective_lr_gmean",
    "effective_lr_std",
    "effective_lr_min",
    "effective_lr_max",
    "effective_lr_applied",
    "update_norm",
    "update_grad_cosine",
    "grad_norm",
    "zero_grad_fraction",
    "rms_grad_mean",
    "rms_update_mean",
    "eps_fraction",
    "nonfinite",
    "lost_fraction",
    "reconstruction_error",
)
_SHARES = np.array(list(QUANTILES.values()))


def _spread(values: Floats, found: Ints, rows: int) -> Floats:
    result = np.full(rows, np.nan)
    result[found] = values
    return result


def _row_quantiles(summary: Summary, inside: Ints, low: float, high: float) -> Floats:
    """Quantiles of the rates of the parameters of one row: (QUANTILES,)."""
    if low == high:
        return np.full(len(_SHARES), low)
    measured = bool(summary.measured[inside].any())
    if np.isnan(low) and not measured:
        return np.full(len(_SHARES), np.nan)
    if len(inside) == 1:
        only = summary.rates[inside[0]]
        if only is not None and only.quantiles is not None:
            known: Floats = only.quantiles
            return known
        bins, counts = summary.binned(int(inside[0]))
        return bin_quantiles(bins, counts, low, high)
    numel = summary.numel[inside].tolist()
    rates = [summary.rates[i] for i in inside]
    if sum(numel) <= WHOLE:
        constants = summary.part("rate_mean")[inside].tolist()
        values = [
            np.full(n, c) if r is None or r.values is None else r.values
            for r, c, n in zip(rates, constants, numel, strict=True)
        ]
        one: Floats = exact_quantiles(np.concatenate(values)[None])[0]
        return one
    each = [summary.binned(i) for i in inside.tolist()]
    bins, counts = _counted(*(np.concatenate(pieces) for pieces in zip(*each, strict=True)))
    return bin_quantiles(bins, counts, low, high)


def exact_quantiles(values: Floats) -> Floats:
    """NumPy's quantiles of each row of values, NaN being none: (rows, QUANTILES)."""
    missing = np.isnan(values)
    with np.errstate(invalid="ignore"):  # between two infinite rates
        if not missing.any():
            quantiles: Floats = np.quantile(values, _SHARES, axis=1).T
            return quantiles
        result = np.full((len(values), len(_SHARES)), np.nan)
        for row, (each, none) in enumerate(zip(values, missing, strict=True)):
            if not none.all():
                result[row] = np.quantile(each[~none], _SHARES)
    return result


def binned(rates: Rates | None, constant: float, numel: int) -> tuple[Ints, Floats]:
    """The distribution as fine bins, ascending, and counts that add up to the elements with a rate.

    Args:
        rates: what is known of it; None where ``constant`` is the rate of all.
        constant: that rate.
        numel: number of elements.
    """
    if rates is not None and rates.bins is not None and rates.counts is not None:
        return rates.bins, rates.counts * (numel / rates.counts.sum())
    values = np.array([constant]) if rates is None or rates.values is None else rates.values
    finite = values[~np.isnan(values)]
    if not len(finite):
        return np.zeros(0, np.int64), np.zeros(0)
    with np.errstate(over="ignore", under="ignore"):
        bits = finite.astype(np.float32).view(np.int32) >> SHIFT
    bins, counts = _counted(bits.clip(0, BINS - 1), None)
    return bins, counts * (numel / len(values))


def _counted(bins: NDArray[Any], weights: Floats | None) -> tuple[Ints, Floats]:
    """Bins that occur, ascending, and how often (or their summed weights)."""
    if not len(bins):
        return np.zeros(0, np.int64), np.zeros(0)
    first = int(bins.min())
    dense = np.bincount(bins - first, weights)
    there = np.flatnonzero(dense)
    return there + first, dense[there].astype(np.float64)


def bin_quantiles(bins: Ints, counts: Floats, low: float, high: float) -> Floats:
    """Quantiles of fine bins, each within 1 % of a value of its rank: (QUANTILES,).

    Args:
        bins: ascending numbers of bins.
        counts: what is in them.
        low: the least, which bounds the quantiles; NaN where unknown.
        high: the largest, likewise.
    """
    if not len(bins):
        return np.full(len(_SHARES), np.nan)
    upto = np.cumsum(counts)
    rank = _SHARES * upto[-1]
    at = np.minimum(np.searchsorted(upto, rank), len(bins) - 1)
    left, right = _EDGES[bins[at]], _EDGES[bins[at] + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (rank - (upto[at] - counts[at])) / counts[at]
        value = left + inside.clip(0, 1) * (right - left)
        # Wherever in the bin the true value lies, this is within 1 % of it.
        value = value.clip(np.minimum(0.9901 * right, 1.0099 * left), 1.0099 * left)
    value = np.where(bins[at] >= _INFINITE, np.inf, value)
    bounds = (low, high) if not np.isnan(low) else (-np.inf, np.inf)
    return value.clip(*bounds)


def histogram(bins: Ints, counts: Floats) -> tuple[Floats, Ints]:
    """A histogram to keep: (edges (n + 1,), counts (n,)); a run of empty bins is one wide bin.

    Args:
        bins: ascending numbers of fine bins.
        counts: what is in them.
    """
    keep = bins < _INFINITE
    coarse, summed = _counted(bins[keep] >> _COARSE, counts[keep])
    if not len(coarse):
        return np.zeros(0), np.zeros(0, np.int64)
    whole = np.diff(np.rint(np.cumsum(summed)), prepend=0.0).astype(np.int64)
    # An edge at the start of each bin, and where none follows it at once, at its end.
    last = np.append(np.diff(coarse) > 1, True)
    at = np.arange(len(coarse)) + np.append(0, np.cumsum(last[:-1]))
    edges = np.empty(len(coarse) + int(last.sum()), np.int64)
    edges[at] = coarse
    edges[at[last] + 1] = coarse[last] + 1
    result = np.zeros(len(edges) - 1, np.int64)
    result[at] = whole
    return _EDGES[edges << _COARSE], result


def merged_numbers(values: Floats, label: Ints, rows: int) -> Floats:
    """A hyperparameter of each row: NaN where its parameters differ: (rows,).

    Parameters that have none (NaN) do not count.
    """
    has = ~np.isnan(values)
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(low, label[has], values[has])
    np.maximum.at(high, label[has], values[has])
    return np.where(low == high, low, np.nan)


def labels(keys: Sequence[str | int]) -> tuple[Ints, list[str | int]]:
    """Row of each parameter, and the key of each row, in order of first appearance."""
    order: dict[str | int, int] = {}
    label = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    return label, list(order)
