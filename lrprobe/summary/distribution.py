"""Quantiles and histograms of the rates of many parameters at once, on the host.

A training waits while Python does this beside it, so that there is no loop over parameters in it
but for lists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrprobe.record import QUANTILES
from lrprobe.summary.figures import BINS, SHIFT
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
_SHARES = np.array(list(QUANTILES.values()))


@dataclass(slots=True)
class Rates:
    """The distribution of one parameter's rates: every value, or counts in fine bins.

    Attributes:
        values: every rate; NaN for an element that has none.
        bins: ascending fine bins.
        counts: elements in them.
        looked_at: elements that were looked at for the counts, where some of them have no rate.
    """

    values: Floats | None = None
    bins: Ints | None = None
    counts: Floats | None = None
    looked_at: float | None = None


@dataclass(slots=True)
class Binned:
    """Rates in fine bins, those of an owner side by side and ascending.

    Attributes:
        owner: a parameter, or a row: (entries,), ascending.
        bins: fine bins: (entries,).
        counts: what is in them: (entries,), adding up to the owner's elements that have a rate.
    """

    owner: Ints
    bins: Ints
    counts: Floats

    def merged(self, label: Ints) -> Binned:
        """Those of the rows with these labels, one an owner; a negative one is left out."""
        row = label[self.owner]
        key = row * BINS + self.bins
        order = np.argsort(key, kind="stable")
        order = order[np.searchsorted(row[order], 0) :]
        key = key[order]
        if not len(key):
            return Binned(key, key, np.zeros(0))
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
        counts = np.add.reduceat(self.counts[order], starts)
        return Binned(key[starts] // BINS, key[starts] % BINS, counts)


def binned(rates: Sequence[Rates | None], constants: Floats, numel: Ints) -> Binned:
    """The distributions of all parameters.

    Args:
        rates: what is known of each; None where one rate is all its elements'.
        constants: that rate; NaN where there is none: (parameters,).
        numel: number of elements: (parameters,).
    """
    owners: list[Ints] = []
    bins: list[Ints] = []
    counts: list[Floats] = []
    by_length: dict[int, list[int]] = defaultdict(list)
    shared = []
    for i, each in enumerate(rates):
        if each is None:
            shared.append(i)
        elif each.values is not None:
            by_length[len(each.values)].append(i)
        elif each.bins is not None and each.counts is not None:
            owners.append(np.full(len(each.bins), i))
            bins.append(each.bins)
            counts.append(each.counts * (numel[i] / (each.looked_at or each.counts.sum())))
    some = np.array([i for i in shared if not np.isnan(constants[i])], dtype=np.int64)
    tables = [(some, constants[some, None])]
    tables += [
        (np.array(alike), np.stack([_values(rates[i]) for i in alike]))
        for alike in by_length.values()
    ]
    for at, values in tables:
        if values.size:
            owner, found, count = _counted(values)
            owners.append(at[owner])
            bins.append(found)
            counts.append(count * (numel[at[owner]] / values.shape[1]))
    if not owners:
        return Binned(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return Binned(owner[order], np.concatenate(bins)[order], np.concatenate(counts)[order])


def _values(rates: Rates | None) -> Floats:
    return np.zeros(0) if rates is None or rates.values is None else rates.values


def _counted(values: Floats) -> tuple[Ints, Ints, Floats]:
    """Row, fine bin and count of what occurs in rows of values; NaN is none."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bits = values.astype(np.float32).view(np.int32) >> SHIFT
    bits = np.where(np.isnan(values), BINS, bits.clip(0, BINS - 1))
    bits.sort(axis=1)
    new = np.ones(bits.shape, np.bool_)
    np.not_equal(bits[:, 1:], bits[:, :-1], out=new[:, 1:])
    at = np.flatnonzero(new)
    found = bits.reshape(-1)[at]
    count = np.diff(at, append=bits.size)
    there = found < BINS
    return at[there] // values.shape[1], found[there].astype(np.int64), count[there].astype(float)


def quantiles(
    rates: Sequence[Rates | None],
    constants: Floats,
    numel: Ints,
    each: Binned,
    members: Sequence[Ints],
    measured: NDArray[np.bool_],
    low: Floats,
    high: Floats,
) -> Floats:
    """Quantiles of the rates of rows that are merged from parameters: (rows, QUANTILES).

    NumPy's (linear) where all values are known, else each within 1 % of a value of its rank.

    Args:
        rates: as for ``binned``.
        constants: likewise.
        numel: likewise.
        each: what ``binned`` says of them.
        members: the parameters of each row.
        measured: whether some of them are measured, so that NaN is an element without a rate;
            elsewhere a NaN makes all of them NaN.
        low: each row's least rate; NaN where unknown.
        high: its largest.
    """
    result = np.full((len(members), len(_SHARES)), np.nan)
    exact: dict[int, list[tuple[int, Floats]]] = defaultdict(list)
    label = np.full(len(numel), -1)
    sizes = numel.tolist()
    same = (low == high).tolist()
    unknown = (np.isnan(low) & ~measured).tolist()
    for row, inside in enumerate(members):
        at = inside.tolist()
        if same[row]:
            result[row] = low[row]
        elif unknown[row]:
            continue
        elif len(at) == 1 and (only := rates[at[0]]) is not None and only.values is not None:
            exact[len(only.values)].append((row, only.values))
        elif sum(sizes[i] for i in at) <= WHOLE and all(_has_values(rates[i]) for i in at):
            pieces = [_all_values(rates[i], constants[i], sizes[i]) for i in at]
            values = np.concatenate(pieces) if pieces else np.zeros(0)
            exact[len(values)].append((row, values))
        else:
            label[inside] = row
    for some in exact.values():
        result[[row for row, _ in some]] = exact_quantiles(np.stack([values for _, values in some]))
    merged = each.merged(label)
    if len(merged.owner):
        rows = np.unique(merged.owner)
        result[rows] = _bin_quantiles(merged, rows, low[rows], high[rows])
    return result


def _has_values(rates: Rates | None) -> bool:
    return rates is None or rates.values is not None


def _all_values(rates: Rates | None, constant: float, numel: int) -> Floats:
    return np.full(numel, constant) if rates is None or rates.values is None else rates.values


def exact_quantiles(values: Floats) -> Floats:
    """NumPy's quantiles of each row of values, NaN being none: (rows, QUANTILES)."""
    missing = np.isnan(values)
    result = np.full((len(values), len(_SHARES)), np.nan)
    whole = ~missing.any(axis=1)
    with np.errstate(invalid="ignore"):  # between two infinite rates
        if whole.any() and values.shape[1]:
            result[whole] = np.quantile(values[whole], _SHARES, axis=1).T
        for row in np.flatnonzero(~whole & ~missing.all(axis=1)):
            result[row] = np.quantile(values[row, ~missing[row]], _SHARES)
    return result


def _bin_quantiles(merged: Binned, rows: Ints, low: Floats, high: Floats) -> Floats:
    starts = np.searchsorted(merged.owner, rows)
    ends = np.append(starts[1:], len(merged.owner))
    upto = np.cumsum(merged.counts)
    before = upto[starts] - merged.counts[starts]
    rank = before[:, None] + _SHARES * (upto[ends - 1] - before)[:, None]
    at = np.searchsorted(upto, rank).clip(starts[:, None], ends[:, None] - 1)
    left, right = _EDGES[merged.bins[at]], _EDGES[merged.bins[at] + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (rank - (upto[at] - merged.counts[at])) / merged.counts[at]
        value = left + inside.clip(0, 1) * (right - left)
        # Wherever in the bin the true value lies, this is within 1 % of it.
        value = value.clip(np.minimum(0.9901 * right, 1.0099 * left), 1.0099 * left)
    value = np.where(merged.bins[at] >= _INFINITE, np.inf, value)
    bounded: Floats = value.clip(
        np.where(np.isnan(low), -np.inf, low)[:, None],
        np.where(np.isnan(high), np.inf, high)[:, None],
    )
    return bounded


def histograms(each: Binned, count: int) -> tuple[list[Floats], list[Ints]]:
    """A histogram of each of ``count`` owners to keep: edges (n + 1,), counts (n,).

    An owner without rates has empty ones; a run of empty bins is one wide bin.
    """
    keep = each.bins < _INFINITE
    coarse = Binned(each.owner[keep], each.bins[keep] >> _COARSE, each.counts[keep])
    coarse = coarse.merged(np.arange(count))
    if not len(coarse.owner):
        return [np.zeros(0)] * count, [np.zeros(0, np.int64)] * count
    owner, bins = coarse.owner, coarse.bins
    first = np.append(True, owner[1:] != owner[:-1])
    # Rounded so that the whole of an owner is right.
    upto = np.cumsum(coarse.counts)
    before = (upto - coarse.counts)[first][np.cumsum(first) - 1]
    rounded = np.rint(upto - before)
    whole = np.diff(rounded, prepend=0.0)
    whole[first] = rounded[first]
    # An edge at the start of each bin, and where none follows it at once, at its end.
    last = np.append((np.diff(bins) != 1) | first[1:], True)
    at = np.arange(len(bins)) + np.append(0, np.cumsum(last[:-1]))
    edges = np.empty(len(bins) + int(last.sum()), np.int64)
    edges[at] = bins
    edges[at[last] + 1] = bins[last] + 1
    filled = np.zeros(len(edges), np.int64)
    filled[at] = whole.astype(np.int64)
    ends = np.append(at[first][1:], len(edges))
    spans = dict(zip(owner[first].tolist(), np.stack([at[first], ends], 1).tolist(), strict=True))
    values = _EDGES[edges << _COARSE]
    nothing = [0, 0]
    where = [spans.get(i, nothing) for i in range(count)]
    return (
        [values[a:b] for a, b in where],
        [filled[a : max(b - 1, a)] for a, b in where],
    )
