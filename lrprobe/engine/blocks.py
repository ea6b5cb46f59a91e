"""Triton functions that generated kernels call, and the kernels that are the same for all rules."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803, PLR0124, PLR0915, SIM108, SIM300 - Triton compiles these; they are not Python functions

import triton
import triton.language as tl

from lrprobe.engine import distribution

ROWS = tl.constexpr(128)
"""Threads of a program; each reads one row of adjacent elements."""
BINS, SHIFT, ZERO = map(tl.constexpr, (distribution.BINS, distribution.SHIFT, distribution.ZERO))
STRIDE = tl.constexpr(distribution.STRIDE)
FINE, OCTAVES = tl.constexpr(distribution.FINE), tl.constexpr(distribution.OCTAVES)
ALL = tl.constexpr(4 * distribution.EXACT)
"""Moving elements up to which every rate is counted. It is larger than on a CPU because rates of a
large tensor are subsampled by position among all elements, not among the moving ones."""

PIECES, ROUNDS, CHUNK, FULL_ROWS, WIDTH, FIRST, BEGIN, NUMEL, ADDRESSES, COLUMNS = map(
    tl.constexpr, range(10)
)
"""Fields of a table's header: numbers, then the offsets of its parts."""
HEAD = tl.constexpr(16)

SUM, MIN, MAX, NOTHING, SHARED, SHARED_MIN, SHARED_MAX, MEAN, SPREAD = map(tl.constexpr, range(9))
"""How a column of the result is made: from rows of sums, from nothing, from a scalar, or from means
and spreads."""


@triton.jit
def ordered(x):
    """Map a float to an integer with the same order; NaN is beyond all numbers."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key


@triton.jit
def extreme(TYPE: tl.constexpr, GREATEST: tl.constexpr):
    """An integer beyond the ``ordered`` integer of every number."""
    if TYPE == tl.float64:
        key = tl.full([], 0x7FFFFFFFFFFFFFFF if GREATEST else -0x8000000000000000, tl.int64)
    else:
        key = tl.full([], 0x7FFFFFFF if GREATEST else -0x80000000, tl.int32)
    return key


@triton.jit
def value_of(key):
    """The inverse of ``ordered``."""
    if key.dtype == tl.int64:
        value = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Round to the nearest number of a 16-bit type."""
    y = x.to(tl.float32)
    if TYPE == tl.float16:
        y = y.to(tl.float16).to(tl.float32)
    else:
        bits = y.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(y != y, y, near.to(tl.float32, bitcast=True))
    return y.to(x.dtype)


@triton.jit
def ulp(x, eps, smallest):
    """Distance from a non-negative float64 to the next number of a dtype with this ``eps``."""
    bits = x.to(tl.float64).to(tl.int64, bitcast=True)
    power = (bits & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.maximum(power * eps, smallest)


@triton.jit
def root(x):
    """Square root that is correct for denormals too."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def mean_and_spread(count, pivot, one, two):
    """The mean of all rows together, and the sum of squared distances to it.

    Each row gives its count, a pivot, and the sums of distances to the pivot and of their squares.
    """
    some = tl.maximum(count, 1.0)
    means = pivot + one / some
    mean = tl.sum(count * means) / tl.maximum(tl.sum(count), 1.0)
    far = means - mean
    return mean, tl.sum(two - one * one / some + count * far * far)


@triton.jit
def place(table, row, ANY: tl.constexpr, FULL: tl.constexpr):
    """Locate a row of sums: its number, its piece, its first element, and the elements left."""
    pieces = tl.load(table + PIECES)
    full = tl.load(table + FULL_ROWS)
    first = table + tl.load(table + FIRST)
    begin = table + tl.load(table + BEGIN)
    c = row
    if ANY:
        within = row < full
        c = tl.where(within, row, row - full)
    elif FULL:
        within = row >= 0
    else:
        within = row < 0
        row += full
    first += tl.where(within, 0, pieces + 1)
    low, high = pieces * 0, pieces
    for _ in range(tl.load(table + ROUNDS)):
        middle = (low + high) // 2
        there = tl.load(first + middle) <= c
        low = tl.where(there, middle, low)
        high = tl.where(there, high, middle)
    start = tl.where(within, 0, tl.load(begin + low))
    start += (c - tl.load(first + low)) * tl.load(table + CHUNK)
    return row, low, start, tl.load(table + tl.load(table + NUMEL) + low) - start


@triton.jit
def count(counts, rate, ok, at, start, numel, AGAIN: tl.constexpr):
    """Count rates. A large piece counts one in ``STRIDE``; ``AGAIN`` corrects that to all."""
    bins = (ordered(rate.to(tl.float32)) >> SHIFT) + ZERO
    met = at % STRIDE == (at // STRIDE + (start // 4096 % STRIDE).to(tl.int32)) % STRIDE
    if AGAIN:
        tl.atomic_add(counts + bins, tl.where(met, 1 - STRIDE, 1), mask=ok, sem="relaxed")
    else:
        weight = tl.where(numel > ALL, STRIDE, 1) + at * 0
        met |= at < tl.where(numel > ALL, 0, 0x7FFFFFFF)
        tl.atomic_add(counts + bins, weight, mask=ok & met, sem="relaxed")


@triton.jit
def combine(
    table,
    scalars,
    out,
    wide,
    counts,
    result,
    folded,
    columns,
    ONLY_WIDE: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Reduce rows of sums to figures in float64: one program per piece, more to fold its counts.

    The last value of a row of ``out`` says whether the row is sound; if not, ``wide`` has it.
    """
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) - 1
    if part < 0:
        about = table + tl.load(table + COLUMNS)
        width = tl.load(about)
        f = tl.arange(0, C)
        about += 1 + 3 * f
        kind = tl.load(about, mask=f < columns, other=NOTHING)
        at = tl.load(about + 1, mask=f < columns, other=0)
        moving = tl.load(about + 2, mask=f < columns, other=-1)
        place = tl.where(kind < NOTHING, at, tl.where(kind >= MEAN, at, 0))[None, :]
        below = tl.where(kind == SPREAD, at - 1, tl.where(kind == MEAN, at, 0))[None, :]
        counted = moving[None, :] >= 0
        first = table + tl.load(table + FIRST) + t
        pieces, full = tl.load(table + PIECES), tl.load(table + FULL_ROWS)
        total, moved = tl.zeros([C], tl.float64), tl.zeros([C], tl.float64)
        low = tl.full([N, C], float("inf"), tl.float64)
        high = tl.full([N, C], float("-inf"), tl.float64)
        for side in range(2):
            begin = tl.load(first + side * (pieces + 1)) + side * full
            end = tl.load(first + side * (pieces + 1) + 1) + side * full
            for b in range(begin, end, N):
                r = (b + tl.arange(0, N))[:, None]
                ok = (r < end) & (place >= 0)
                row = r * width
                if ONLY_WIDE:
                    x = tl.load(wide + row + place, mask=ok, other=0.0)
                    n = tl.load(wide + row + moving[None, :], mask=ok & counted, other=0.0)
                else:
                    sound = ok & (tl.load(out + row + width - 1 + place * 0, mask=ok, other=1) != 0)
                    bad = ok & (sound == 0)
                    x = tl.load(out + row + place, mask=sound, other=0.0).to(tl.float64)
                    m = tl.load(out + row + below, mask=sound, other=0.0).to(tl.float64)
                    n = tl.load(out + row + moving[None, :], mask=sound & counted, other=0.0)
                    n = n.to(tl.float64)
                    x = tl.where((kind == MEAN)[None, :], n * m, x)
                    x = tl.where((kind == SPREAD)[None, :], x + n * m * m, x)
                    x += tl.load(wide + row + place, mask=bad, other=0.0)
                    n += tl.load(wide + row + moving[None, :], mask=bad & counted, other=0.0)
                total += tl.sum(x, axis=0)
                moved += tl.sum(n, axis=0)
                low = tl.where(ok & ((x < low) | (x != x)), x, low)
                high = tl.where(ok & ((x > high) | (x != x)), x, high)
        lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
        lowest = tl.where(tl.max((low != low).to(tl.int32), axis=0) > 0, float("nan"), lowest)
        highest = tl.where(tl.max((high != high).to(tl.int32), axis=0) > 0, float("nan"), highest)
        value = tl.where(kind == MIN, lowest, tl.where(kind == MAX, highest, total))
        given = (kind > NOTHING) & (kind < MEAN)
        shared = tl.load(scalars + t * tl.load(table + WIDTH) + at, mask=given, other=float("nan"))
        numel = tl.load(table + tl.load(table + NUMEL) + t).to(tl.float64)
        n = tl.where(moving >= 0, moved, numel)
        none = tl.where(kind == SHARED_MIN, float("inf"), float("-inf"))
        none = tl.where(kind == SHARED, 0.0, none)
        shared = tl.where(n > 0, tl.where(kind == SHARED, n * shared, shared), none)
        value = tl.where(given, shared, tl.where(kind == NOTHING, float("nan"), value))
        tl.store(result + t * columns + f, value, mask=f < columns)
    else:
        source = counts + t * BINS
        inside = part * FINE + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        octaves = tl.sum(tl.load(source + inside).to(tl.uint32, bitcast=True).to(tl.int64), axis=1)
        target = folded + t * (OCTAVES + FINE)
        tl.store(target + part * 64 + tl.arange(0, 64), octaves.to(tl.float64))
        fine = tl.zeros([512], tl.int64)
        for b in range(0, BINS, FINE):
            found = tl.load(source + b + part * 512 + tl.arange(0, 512))
            fine += found.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(target + OCTAVES + part * 512 + tl.arange(0, 512), fine.to(tl.float64))


@triton.jit
def copy(table, buffer, N: tl.constexpr):
    """Copy the check sample of each tensor: a row is address, runs, run length, stride, target.

    Lengths, strides and targets are in units of two bytes.
    """
    about = table + tl.program_id(0) * 5
    source = tl.load(about).to(tl.pointer_type(tl.int16))
    run, stride = tl.load(about + 2), tl.load(about + 3)
    target, total = buffer + tl.load(about + 4), tl.load(about + 1) * run
    for b in range(0, total, N):
        i = b + tl.arange(0, N)
        found = tl.load(source + i // run * stride + i % run, mask=i < total, other=0)
        tl.store(target + i, found, mask=i < total)
