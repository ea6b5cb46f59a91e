"""The distribution of the rates: counts in logarithmic bins.

The upper bits of a float32 identify its bin: its sign, its exponent and six bits of its fraction,
so there are 64 bins per octave. Counts add up over blocks, parameters, modules, ranks and time.
The host computes quantiles and recorded histograms from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.record import QUANTILES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SHIFT = 17
BINS = 1 << 15
"""Number of bins, in the order of their values: negative rates first."""
ZERO = BINS // 2
"""The bin of the rate 0."""

EXACT = 1 << 16
"""Moving elements of a piece up to which every rate is counted."""
STRIDE = 11
"""Beyond ``EXACT``, one rate in so many is counted: 0, 12, 24, …, 120 of each 121, so that the
sample does not align with the rows of a matrix."""

OCTAVES, FINE = 512, 4096
FOLDED = OCTAVES + FINE
"""Length of a folded table: counts by octave, and by bin modulo 64 octaves.

Few parameters have rates 64 octaves apart; their folded counts are split in proportion to the
counts of the octaves.
"""
_INFINITE = int(np.float32(np.inf).view(np.int32)) >> SHIFT
_DENSE = 16
"""Size of a table per entry up to which counts are added up in the table, without sorting."""
_COARSE = 3
"""log₂ of the bins in one bin of a recorded histogram, which has 8 bins per octave."""
_SHARES = np.array(list(QUANTILES.values()))


# ---- counting -----------------------------------------------------------------------------------


@dataclass(slots=True)
class RateCounts:
    """Counts of the rates of one piece, on the device of its tensors.

    Attributes:
        table: the counts, int64: (BINS,).
        seen: moving elements so far; on the host only.
    """

    table: Tensor
    seen: int = 0


def count_rates(rate: Tensor, moves: Any, counts: RateCounts | None) -> RateCounts:
    """Count the rates of the elements that move, and add them to earlier counts.

    ``moves`` is True if all elements move.
    """
    host = rate.device.type == "cpu"
    if counts is None:
        counts = RateCounts(torch.zeros(BINS, dtype=torch.int64, device=rate.device))
    weight = 1
    if host:
        seen = counts.seen
        counts.seen += len(rate) if moves is True else int(moves.sum().numpy())
        if seen >= EXACT:
            rate, moves, weight = _thinned(rate), moves is True or _thinned(moves), STRIDE
    bits = rate.to(torch.float32).contiguous().view(torch.int32)
    first = ZERO if host and len(bits) and bits.amin().numpy() >= 0 else 0  # no rate is negative
    at = bits >> SHIFT if first else ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT) + ZERO
    if host:
        length = BINS - first
        at = at if moves is True else torch.where(moves, at, length)
        found = torch.bincount(at, minlength=length + 1)[:length]
        counts.table[first:].add_(found, alpha=weight)
    else:  # `bincount` would wait for the device
        counts.table.index_add_(0, at.long(), moves.long())
    return counts


def _thinned(values: Tensor) -> Tensor:
    """One value in ``STRIDE``."""
    period = STRIDE * STRIDE
    whole = len(values) // period * period
    return values[:whole].view(-1, period)[:, :: STRIDE + 1].reshape(-1)


def fold(table: Tensor) -> Tensor:
    """Fold counts for the copy to the host or the all-reduce: (..., BINS) to (..., FOLDED)."""
    octaves = table.reshape(*table.shape[:-1], OCTAVES, -1).sum(-1)
    fine = table.reshape(*table.shape[:-1], -1, FINE).sum(-2)
    return torch.cat([octaves, fine], -1).double()


# ---- on the host --------------------------------------------------------------------------------


@dataclass(slots=True)
class Bins:
    """Counts of several owners, sorted by owner and bin.

    Attributes:
        owner: (entries,), ascending.
        bins: from −ZERO to ZERO − 1: (entries,).
        counts: (entries,).
    """

    owner: Ints
    bins: Ints
    counts: Floats

    @classmethod
    def empty(cls) -> Bins:
        """Create an instance without counts."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    @classmethod
    def of(cls, owner: int, counts: RateCounts) -> Bins:
        """Create from the counts of one owner, made on the host."""
        table = counts.table.numpy()
        found = np.flatnonzero(table)
        return cls(np.full(len(found), owner), found - ZERO, table[found].astype(np.float64))

    @classmethod
    def joined(cls, each: Sequence[Bins]) -> Bins:
        """Join several instances; counts of the same owner and bin add up."""
        if not each:
            return cls.empty()
        if len(each) == 1:
            return each[0]
        found = cls(
            np.concatenate([one.owner for one in each]),
            np.concatenate([one.bins for one in each]),
            np.concatenate([one.counts for one in each]),
        )
        return found.merged(np.arange(int(found.owner.max(initial=-1)) + 1))

    def merged(self, label: Ints) -> Bins:
        """Merge owners that have the same label; a negative label leaves an owner out."""
        if not len(self.owner):
            return self
        low = int(self.bins.min())
        width = int(self.bins.max()) - low + 1
        key: Ints = label[self.owner] * width + (self.bins - low)
        counts = self.counts
        if key.min() < 0:
            kept = key >= 0
            key, counts = key[kept], counts[kept]
        if (key[1:] > key[:-1]).all():
            pass  # every owner has a row of its own, in order
        elif int(key.max(initial=0)) < _DENSE * len(key):
            table: Any = np.bincount(key, counts)
            key = np.flatnonzero(table)
            counts = table[key]
        else:
            key, at = np.unique(key, return_inverse=True)
            counts = np.asarray(np.bincount(at, counts), np.float64)
        return Bins(key // width, key % width + low, counts)

    def scaled(self, total: Floats) -> Bins:
        """Scale the counts of each owner so that they add up to ``total``: (owners,)."""
        if not len(self.owner):
            return self
        now = np.bincount(self.owner, self.counts, len(total))
        return Bins(self.owner, self.bins, self.counts * total[self.owner] / now[self.owner])


def unfold(tables: NDArray[Any], owners: Sequence[int] | None = None) -> Bins:
    """Unfold tables (owners, FOLDED); the owners are 0, 1, … by default."""
    each = []
    for owner in np.flatnonzero(tables[:, :OCTAVES].any(axis=1)):
        octaves = tables[owner, :OCTAVES].astype(np.float64)
        folded = tables[owner, OCTAVES:].astype(np.float64).reshape(64, 64)
        found = np.flatnonzero(octaves)
        with np.errstate(all="ignore"):
            share = octaves[found] / folded.sum(1)[found % 64]
        counts = (folded[found % 64] * share[:, None]).reshape(-1)
        bins = ((found[:, None] - OCTAVES // 2) * 64 + np.arange(64)).reshape(-1)
        some = counts > 0
        each.append(Bins(np.full(int(some.sum()), owner), bins[some], counts[some]))
    bins_of = Bins.joined(each)
    if owners is not None and len(bins_of.owner):
        bins_of.owner = np.asarray(owners, np.int64)[bins_of.owner]
    return bins_of


def folded(bins: Bins, owners: int) -> Floats:
    """The inverse of ``unfold``: (owners, FOLDED)."""
    result = np.zeros((owners, FOLDED))
    np.add.at(result, (bins.owner, (bins.bins >> 6) + OCTAVES // 2), bins.counts)
    np.add.at(result, (bins.owner, OCTAVES + bins.bins % FINE), bins.counts)
    return result


def constant_bins(owners: Ints, rates: Floats, counts: Floats) -> Bins:
    """Bins of owners whose elements share one rate; ``owners`` is ascending."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        bits = rates.astype(np.float32).view(np.int32)
    bins = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT
    return Bins(owners.astype(np.int64), bins.astype(np.int64), counts)


def edges(bins: Ints) -> Floats:
    """The lower edge of each bin, which is the upper edge of the one before it."""
    bits = (np.minimum(np.abs(bins), _INFINITE) << SHIFT).astype(np.uint32)
    value: Floats = bits.view(np.float32).astype(np.float64)
    return np.where(bins < 0, -value, value)


def quantiles(bins: Bins, low: Floats, high: Floats) -> Floats:
    """``QUANTILES`` of each row, as NumPy's ``inverted_cdf`` within 1 %: (rows, QUANTILES).

    Args:
        bins: the distributions, with rows as owners, in any order of rows.
        low: each row's smallest rate; NaN if unknown.
        high: its largest rate; NaN if unknown.
    """
    result = np.full((len(low), len(_SHARES)), np.nan)
    if not len(bins.owner):
        return result
    starts = np.flatnonzero(np.append(True, bins.owner[1:] != bins.owner[:-1]))
    rows = bins.owner[starts]
    ends = np.append(starts[1:], len(bins.owner))
    upto = np.cumsum(bins.counts)
    before = upto[starts] - bins.counts[starts]
    total = upto[ends - 1] - before
    rank = before[:, None] + (_SHARES * (1 - 1e-9)) * total[:, None]
    at = np.searchsorted(upto, rank).clip(starts[:, None], ends[:, None] - 1)
    inside = bins.bins[at]
    value = (edges(inside) + edges(inside + 1)) / 2
    value = np.where(inside >= _INFINITE, np.inf, np.where(inside == 0, 0.0, value))
    lowest = np.where(np.isnan(low), -np.inf, low)[rows, None]
    highest = np.where(np.isnan(high), np.inf, high)[rows, None]
    result[rows] = np.fmax(np.fmin(value, highest), lowest)
    return result


def histograms(bins: Bins, owners: Bools) -> tuple[list[Floats], list[Ints]]:
    """The histogram of each owner, for the record: edges (n + 1,), counts (n,).

    Both are empty for an owner without rates, or for which ``owners`` is False; a run of empty
    bins becomes one wide bin.
    """
    count = len(owners)
    keep = np.abs(bins.bins) < _INFINITE
    coarse = Bins(bins.owner[keep], bins.bins[keep] >> _COARSE, bins.counts[keep])
    coarse = coarse.merged(np.where(owners, np.arange(count), -1))
    if not len(coarse.owner):
        return [np.zeros(0)] * count, [np.zeros(0, np.int64)] * count
    owner, found = coarse.owner, coarse.bins
    first = np.append(True, owner[1:] != owner[:-1])
    # Cumulative counts are rounded, so that the total of an owner is exact.
    upto = np.cumsum(coarse.counts)
    before = (upto - coarse.counts)[first][np.cumsum(first) - 1]
    rounded = np.rint(upto - before)
    whole = np.diff(rounded, prepend=0.0)
    whole[first] = rounded[first]
    # An edge at the start of each bin, and at its end unless the next bin is adjacent.
    last = np.append((np.diff(found) != 1) | first[1:], True)
    at = np.arange(len(found)) + np.append(0, np.cumsum(last[:-1]))
    ends_of = np.empty(len(found) + int(last.sum()), np.int64)
    ends_of[at] = found
    ends_of[at[last] + 1] = found[last] + 1
    filled = np.zeros(len(ends_of), np.int64)
    filled[at] = whole.astype(np.int64)
    ends = np.append(at[first][1:], len(ends_of))
    spans = dict(zip(owner[first].tolist(), np.stack([at[first], ends], 1).tolist(), strict=True))
    values = edges(ends_of << _COARSE)
    nothing = [0, 0]
    where = [spans.get(i, nothing) for i in range(count)]
    return (
        [values[a:b] for a, b in where],
        [filled[a : max(b - 1, a)] for a, b in where],
    )
