"""Large parameters, block by block: rule and figures of blocks that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Scalar, Slice, Update, Whole
from lrprobe.summary.figures import (
    ADDITIVE,
    BINS,
    PARTS,
    ROW,
    SHIFT,
    gradient,
    is_scalar,
    plain_figures,
    row_figures,
    scalar,
    state_like,
    suspicious,
)
from lrprobe.summary.fused import COLUMNS, ROWS, SUMS, kernel_for
from lrprobe.summary.reading import (
    BLOCK,
    blocks,
    is_flat,
    pieces,
    precision,
    spread,
    take_all,
    take_block,
    take_rows,
)

SAMPLE = 1 << 16
"""Elements of a large parameter whose rates are sorted into the fine histogram, at least."""
_PER_OCTAVE = 64
_CHUNK = 256
_STATE = "sum of "


def large_figures(
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule,
    pivots: Sequence[Tensor] | None,
    *,
    sample: int | None = None,
    compile: bool = False,  # noqa: A002 - as in `attach`
) -> tuple[Tensor, Tensor]:
    """PARTS (entries, ·), and fine histograms of a sample of the rates: (entries, BINS), int32.

    Args:
        entries: large parameters of one group and device.
        group: theirs.
        rule: theirs.
        pivots: a value among each one's rates, 0-dim; None where all its elements share a rate.
        sample: estimate the figures from that many elements, but for the norms of parameter and
            gradient, which stay exact.
        compile: with a compiled kernel where there can be one.
    """
    large = [i for i, e in enumerate(entries) if sample is None or sample >= e.param.numel()]
    few = [i for i in range(len(entries)) if i not in large]

    def figures(some: Sequence[int], *, exact: bool) -> tuple[Tensor, Tensor]:
        streams = [Stream(entries[i], group, rule, exact=exact) for i in some]
        for i, stream in zip(some, streams, strict=True):
            stream.read(None if pivots is None else pivots[i], compile=compile)
        counts = torch.stack([stream.rates.histogram() for stream in streams])
        return _finished(streams, counts), counts

    def estimates(some: Sequence[int], *, exact: bool) -> tuple[Tensor, Tensor]:
        return _estimated([entries[i] for i in some], group, rule, cast("int", sample), exact=exact)

    device = entries[0].param.device
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    on_host = device.type == "cpu"
    for function, some in ((figures, large), (estimates, few)):
        if some:
            # A device must not be asked what came out: there it is computed the sure way at once.
            found = function(some, exact=not on_host)
            rows |= zip(some, zip(*found, strict=True), strict=True)
            again = suspicious(found[0].numpy()).nonzero()[0].tolist() if on_host else []
            if again:
                at = [some[i] for i in again]
                rows |= zip(at, zip(*function(at, exact=True), strict=True), strict=True)
    parts, counts = zip(*(rows[i] for i in range(len(entries))), strict=True)
    return torch.stack(parts), torch.stack(counts)


def _estimated(
    entries: Sequence[Entry], group: Mapping[str, Any], rule: Rule, sample: int, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """PARTS (entries, ·) and histograms (entries, BINS) from a sample of each."""
    dtype = torch.float64 if exact else precision(entries[0].param)
    device = entries[0].param.device
    at = [spread(entry.param.numel(), sample, device) for entry in entries]
    rows: list[Tensor] = []
    counts: list[Tensor] = []
    for chosen in _alike([len(each) for each in at], max(1, BLOCK // sample)):
        some = [entries[i] for i in chosen]
        plain = plain_figures(some, counts=False)
        s = Slice(some, group, take_rows([at[i] for i in chosen], dtype))
        update = rule.update(s)
        found = histograms(update.effective_lr, s.param)
        log = None if dtype is torch.float64 else partial(log_sums, counts=found)
        parts = row_figures(s, update, [s[name] for name in state_like(some[0])], log)
        numel = torch.tensor([entry.param.numel() for entry in some], dtype=torch.float64)
        numel = numel.to(device, non_blocking=True)
        for name in ADDITIVE:
            parts[:, PARTS.index(name)] *= numel / s.param.shape[1]
        for name in ("pp",) if update.grad is not None else ("pp", "gg"):
            parts[:, PARTS.index(name)] = plain[name]
        bad = parts[:, PARTS.index("nonfinite")]
        parts[:, PARTS.index("nonfinite")] = bad.maximum(plain["nonfinite"])
        rows.append(parts)
        counts.append(found)
    return torch.cat(rows), torch.cat(counts)


def _alike(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Neighbours of one length, at most so many together."""
    start = 0
    for end in range(1, len(lengths) + 1):
        full = end - start == most
        if full or end == len(lengths) or lengths[end] != lengths[start]:
            yield range(start, end)
            start = end


def _finished(streams: Sequence[Stream], counts: Tensor) -> Tensor:
    """PARTS of streams that have been read: (streams, PARTS)."""
    found = {
        name: torch.stack([stream.total[name] for stream in streams])
        for name in streams[0].total
        if all(name in stream.total for stream in streams)
    }
    n = found["count"]
    nothing, absent = torch.zeros_like(n), torch.full_like(n, torch.nan)
    pivot = found["pivot"]
    if "rate_min" in found:
        # Σ(x−c) and Σ(x−c)² to mean and Σ(x−mean)².
        low, high, away = found["rate_min"], found["rate_max"], found["rate_away"]
        shift = away / n
        found["rate_m2"] = (found["rate_m2"] - shift * away).clamp(min=0)
        found["rate_mean"] = torch.where(high.isinf(), high, (pivot + shift).clamp(low, high))
        if streams[0].dtype is not torch.float64:
            found["rate_log"] = _logs(found["rate_log"], n, counts)
    else:  # one rate for all
        found |= dict.fromkeys(("rate_mean", "rate_min", "rate_max"), pivot)
        found["rate_m2"], found["rate_log"] = nothing, n * pivot.log()
        found["ee"] = pivot * pivot * found["dd"]
        found["ep"], found["eg"] = pivot * found.get("dp", nothing), pivot * found["dg"]
    for name in ("ep", "pg"):  # only a decay asks for them: zero times them
        found.setdefault(name, nothing)
    if not streams[0].exact:
        # 0, or NaN where a state is not finite; the rest shows in its products.
        states = [found[name] for name in found if name.startswith(_STATE)]
        found["nonfinite"] = sum(states, nothing) * 0
    return torch.stack([found.get(name, absent) for name in PARTS], dim=1)


class Stream:
    """One large parameter, read block by block.

    Attributes:
        total: sums, extremes and what else is known of it, 0-dim, float64: name to tensor.
        rates: a sample of its rates.
    """

    def __init__(
        self,
        entry: Entry,
        group: Mapping[str, Any],
        rule: Rule,
        *,
        exact: bool,
    ) -> None:
        """``exact`` computes in float64 and counts what is not finite.

        Else a row that float32 may have spoiled comes out ``suspicious``.
        """
        self.entry, self.group, self.rule, self.exact = entry, group, rule, exact
        self.dtype = torch.float64 if exact else precision(entry.param)
        self.numel = entry.param.numel()
        width = entry.param.shape[-1] if entry.param.dim() else 1
        self.rates = RateSample(stride_for(self.numel, width), entry.param.device)
        self.total: dict[str, Tensor] = {}
        self._scratch: Tensor | None = None

    def slices(self, start: int = 0) -> Iterator[Slice]:
        """All of it in order, of a ``flat`` entry from a flat position on."""
        memo: dict[Any, Any] = {}
        if is_flat(self.entry):
            take = take_all(self.dtype)
            for piece in pieces(self.entry, start):
                yield Slice([piece], self.group, take, memo=memo)
        else:
            for block in blocks(self.entry.param.shape):
                yield Slice([self.entry], self.group, take_block(block, self.dtype), memo=memo)

    def read(self, pivot: Tensor | None, *, compile: bool = False) -> None:  # noqa: A002
        """Fill ``total`` and ``rates``; ``pivot`` is any of the rates, None where there is one."""
        total: dict[str, Tensor] = {}
        start = 0
        decay: Scalar = 0.0
        rows = _Rows()
        if compile and pivot is not None and not self.exact:
            total, start, decay = self._read_compiled(pivot)
        names = list(state_like(self.entry))
        for s in self.slices(start):
            update = self.rule.update(s)
            decay = update.decay
            if pivot is None:
                pivot = scalar(update.effective_lr, s.param)
            rows.add(self._block(s, update, pivot, names))
            self.rates.add(update.effective_lr, start, s.param)
            start += s.param.shape[0]
        total = _together(total, rows.total())
        for name, value in (("count", start), ("decay", decay), ("pivot", pivot)):
            total[name] = scalar(cast("Scalar", value), self.entry.param).reshape(())
        self.total = total

    def _read_compiled(self, pivot: Tensor) -> tuple[dict[str, Tensor], int, Scalar]:
        """Whole rows of a compiled kernel: totals, elements that they took, the decay."""
        entry = self.entry
        kernel = kernel_for(entry, self.group, self.rule)
        whole = self.numel // COLUMNS * COLUMNS
        if kernel is None or not whole:
            return {}, 0, 0.0
        scalars, decay = kernel.scalars_of(entry, self.group["lr"])
        center = pivot.to(torch.float32)
        tensors = [entry.param, cast("Tensor", entry.grad)]
        tensors += [entry.state[name] for name in kernel.states]
        flat = [torch.split(t.view(-1)[:whole], ROWS * COLUMNS) for t in tensors]
        rows = _Rows()
        start = 0
        for param, grad, *states in zip(*flat, strict=True):
            sums, low, high, rate = kernel.run(param, grad, states, scalars, center)
            found = [*sums.sum(1).unbind(), low.amin(), high.amax()]
            rows.add(dict(zip((*SUMS, *_EXTREMES), found, strict=True)))
            self.rates.add(rate, start, rate)
            start += rate.shape[0]
        return rows.total(), whole, decay

    def _block(
        self, s: Slice, update: Update, pivot: Scalar, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The sums and extremes of one block."""
        p, g, d = s.param, gradient(s, update), update.direction
        rate: Any = update.effective_lr
        decays = isinstance(update.decay, Tensor) or update.decay != 0
        found = {"dd": self._square(d), "pp": self._square(p), "gg": self._square(g)}
        if is_scalar(rate, p):
            found["dg"] = self._dot(d, g)
            if decays:
                found["dp"] = torch.dot(d, p)
        else:
            found["rate_min"], found["rate_max"] = rate.amin(), rate.amax()
            found["rate_log"] = self._log_sum(rate)
            deviation = rate - pivot
            found["rate_away"] = deviation.sum()
            found["rate_m2"] = self._square(deviation)
            e = torch.mul(rate, d, out=deviation)
            found["ee"] = self._square(e)
            found["eg"] = self._dot(e, g)
            if decays:
                found["ep"] = torch.dot(e, p)
        if decays:
            found["pg"] = torch.dot(p, g)
        # A comparison into floats, and their sum, takes half the time of ``count_nonzero``.
        found["zeros"] = torch.eq(g, 0, out=self._room(g)).sum()
        if update.rms_grad is not None:
            found["rms_grad"] = update.rms_grad.sum()
        if update.rms_update is not None:
            found["rms_update"] = update.rms_update.sum()
        if update.eps is not None:
            found["below_eps"] = self._count_below(*update.eps)
        if self.exact:
            bad = ~(torch.isfinite(p) & torch.isfinite(g))
            for name in names:
                bad |= ~torch.isfinite(s[name])
            found["nonfinite"] = torch.count_nonzero(bad).double()
        else:  # NaN where some state is not finite; parameter and gradient show in their products
            found |= {_STATE + name: s[name].sum() for name in names}
        return found

    def _count_below(self, statistic: Tensor, eps: Scalar) -> Tensor:
        low = statistic.amin()
        # Mostly none is: on the host a look at the least saves the count.
        if low.device.type == "cpu" and low.numpy() > eps:
            return torch.zeros_like(low)
        return torch.le(statistic, eps, out=self._room(statistic)).sum()

    def _square(self, values: Tensor) -> Tensor:
        """Σ x², by short rows: along long ones torch adds equal numbers up with errors of 1e-4."""
        if values.shape[0] % ROW:
            return self._dot(values, values)
        norms = torch.linalg.vector_norm(values.view(-1, ROW), dim=1)
        return torch.dot(norms, norms)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ a·b where all of it may have one sign: ``torch.dot`` has that error too."""
        return torch.mul(a, b, out=self._room(a)).sum()

    def _room(self, like: Tensor) -> Tensor:
        size = like.shape[0]
        if self._scratch is None or self._scratch.shape[0] != size:
            self._scratch = torch.empty_like(like)
        return self._scratch

    def _log_sum(self, rate: Tensor) -> Tensor:
        if self.dtype is torch.float64:
            return rate.log().sum()
        return rate.view(torch.int32).to(torch.float32).sum()  # to be made logarithms by `_logs`


class _Rows:
    """Figures of the blocks of one parameter, by name.

    They are copied together at once: small tensors that stay, between large ones that are freed,
    would drive the allocator through ever new memory.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Take the figures of a block: 0-dim, of one dtype, the same ones from each block."""
        values = list(found.values())
        at = self._count % _CHUNK
        if at == 0:
            self._names = list(found)
            self._rows.append(values[0].new_empty((_CHUNK, len(values))))
        torch.stack(values, out=self._rows[-1][at])
        self._count += 1

    def total(self) -> dict[str, Tensor]:
        """Name to sum, or extreme: 0-dim, float64."""
        if not self._rows:
            return {}
        rows = (torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0])[: self._count]
        rows = rows.double()
        total = dict(zip(self._names, rows.sum(0).unbind(), strict=True))
        for name, extreme in _EXTREMES.items():
            if name in total:
                total[name] = extreme(rows[:, self._names.index(name)])
        return total


_EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "rate_min": Tensor.amin,
    "rate_max": Tensor.amax,
}


def _together(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Totals of two parts of a parameter to those of both."""
    result = first | second
    for name in first.keys() & second.keys():
        result[name] = _EXTREMES.get(name, Tensor.sum)(torch.stack([first[name], second[name]]))
    return result


def log_sums(rates: Tensor, counts: Tensor) -> Tensor:
    """Σ log of each row of positive float32 rates, to 0.3 %: (rows,), float64.

    Args:
        rates: (rows, n).
        counts: their fine histograms: (rows, BINS).
    """
    bits = rates.contiguous().view(torch.int32).to(torch.float32).sum(1)
    return _logs(bits.double(), rates.shape[1], counts)


def _logs(bits: Tensor, n: Tensor | int, counts: Tensor) -> Tensor:
    """Σ log of n float32 values, given the sum of their bits and a histogram: (rows,), float64.

    The bits are 2²³ · (log₂ + 127), linear between powers of two: a logarithm for the price of a
    conversion. Each is up to 0.086 octaves too small; how much on average, the histogram tells
    to 0.0035.
    """
    within = counts.view(len(counts), -1, _PER_OCTAVE).sum(1).double()
    share = torch.arange(_PER_OCTAVE, dtype=torch.float64, device=counts.device)
    share = (share + 0.5) / _PER_OCTAVE
    correction = within @ ((1 + share).log2() - share) / within.sum(1)
    return (bits * 2.0**-23 + n * (correction - 127.0)) * math.log(2)


class RateSample:
    """Evenly spread elements of a large parameter's rates.

    Attributes:
        stride: every how many elements one is taken.
    """

    def __init__(self, stride: int, device: torch.device) -> None:
        self.stride = stride
        self._device = device
        self._pieces: list[Tensor] = []

    def add(self, rate: Scalar, start: int, like: Tensor) -> None:
        """Take the rates of one block that starts at flat position ``start``."""
        if not is_scalar(rate, like):
            flat = cast("Tensor", rate).reshape(-1)
            some = flat[(-start) % self.stride :: self.stride]
            # A copy, since a view would keep all of the rates in memory.
            self._pieces.append(some.to(torch.float32, copy=True))

    def histogram(self) -> Tensor:
        """Counts in fine bins: (BINS,), int32; zeros where all elements share one rate."""
        if not self._pieces:
            return torch.zeros(BINS, dtype=torch.int32, device=self._device)
        return counts_of(torch.cat(self._pieces).unsqueeze(0))[0]


def histograms(rate: Scalar, like: Tensor) -> Tensor:
    """Counts in fine bins of each row of rates: (rows, BINS), int32; zeros for a shared rate."""
    if is_scalar(rate, like):
        return torch.zeros((like.shape[0], BINS), dtype=torch.int32, device=like.device)
    return counts_of(cast("Tensor", rate))


def fine_bins(rates: Tensor) -> Tensor:
    """Fine bin of each rate, by the bits of a float32: (as ``rates``), int32."""
    bits = rates.to(torch.float32).contiguous().view(torch.int32) >> SHIFT
    return bits.clamp_(0, BINS - 1)


def counts_of(rates: Tensor) -> Tensor:
    """Counts in fine bins of each row: (rows, BINS), int32."""
    at = fine_bins(rates)
    rows, size = len(at), len(at) * BINS
    at = (at + torch.arange(0, size, BINS, dtype=torch.int32, device=at.device)[:, None]).view(-1)
    if at.device.type == "cpu":
        return torch.bincount(at, minlength=size).int().view(rows, BINS)
    counts = torch.zeros(size, dtype=torch.int32, device=at.device)  # `bincount` would wait
    return counts.index_add_(0, at, torch.ones_like(at)).view(rows, BINS)


def stride_for(numel: int, width: int) -> int:
    """A stride that takes at least ``SAMPLE`` elements and no column more often than others."""
    stride = max(1, numel // SAMPLE)
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def whole_of(entry: Entry, group: Mapping[str, Any], rule: Rule) -> None:
    """Add what the rule needs to know of the whole parameter to the entry's state."""
    if rule.whole is not None:
        stream = Stream(entry, group, rule, exact=entry.param.numel() <= BLOCK)
        entry.state.update(rule.whole(Whole(entry, group, stream.slices)))
