"""Large parameters, block by block: rule and figures of blocks that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Scalar, Slice, Whole
from lrprobe.summary.figures import (
    is_scalar,
    scalar,
)
from lrprobe.summary.fused import COLUMNS, is_exact, kernel_for, totals
from lrprobe.summary.histogram import Counts, counts_of, listed, no_counts
from lrprobe.summary.reading import (
    Lines,
    block_size,
    blocks,
    is_flat,
    pieces,
    precision,
    take_all,
    take_block,
)
from lrprobe.summary.sums import DEPTH, Sums, all_finished, together, unless_zero

SAMPLE = 1 << 16
"""Elements of a large parameter whose rates are sorted into the fine histogram, at least."""


def read_singly(
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule,
    pivots: Sequence[Tensor] | None,
    states: Sequence[str],
    *,
    compile: bool,  # noqa: A002 - as in `attach`
    exact: bool,
) -> tuple[Tensor, Counts]:
    """PARTS (entries, ·) of large parameters, and fine histograms of a sample of their rates.

    Args:
        entries: parameters of one group and device.
        group: theirs.
        rule: theirs.
        pivots: a value among each one's rates, 0-dim; None where all its elements share a rate.
        states: names of the state entries that are looked through for what is not finite.
        compile: with a compiled kernel where there can be one.
        exact: in float64; else a row that float32 has spoilt comes out ``suspicious``.
    """
    streams = [Stream(entry, group, rule, exact=exact) for entry in entries]
    sums = Sums(states, exact=exact)
    for i, stream in enumerate(streams):
        stream.read(sums, None if pivots is None else pivots[i], compile=compile)
    counts = [cast("Counts", stream.counts) for stream in streams]
    n = torch.stack([stream.total.pop("count") for stream in streams])
    totals = [{k: v.unsqueeze(0) for k, v in stream.total.items()} for stream in streams]
    in_bits = streams[0].dtype is not torch.float64
    return all_finished(totals, n, counts if in_bits else None), listed(counts)


class Stream:
    """One large parameter, read block by block.

    Attributes:
        total: sums, extremes and what else is known of it, 0-dim, float64: name to tensor.
        counts: fine histogram of a sample of its rates.
    """

    def __init__(
        self,
        entry: Entry,
        group: Mapping[str, Any],
        rule: Rule,
        *,
        exact: bool,
    ) -> None:
        """``exact``: in float64; else a row that float32 has spoilt comes out ``suspicious``."""
        self.entry, self.group, self.rule, self.exact = entry, group, rule, exact
        self.dtype = torch.float64 if exact else precision(entry.param)
        self.numel = entry.param.numel()
        self.total: dict[str, Tensor] = {}
        self.counts: Counts | None = None

    def slices(self, start: int = 0) -> Iterator[Slice]:
        """All of it in order, of a ``flat`` entry from a flat position on."""
        memo: dict[Any, Any] = {}
        limit = block_size(self.dtype)
        if is_flat(self.entry):
            take = take_all(self.dtype)
            for piece in pieces(self.entry, start, limit):
                yield Slice([piece], self.group, take, memo=memo)
        else:
            for block in blocks(self.entry.param.shape, limit):
                yield Slice([self.entry], self.group, take_block(block, self.dtype), memo=memo)

    def read(self, sums: Sums, pivot: Tensor | None, *, compile: bool = False) -> None:  # noqa: A002
        """Fill ``total`` and ``counts``.

        Args:
            sums: what adds its blocks up.
            pivot: any of the rates, or 0; None where there is one for all.
            compile: with a compiled kernel where there can be one.
        """
        width = self.entry.param.shape[-1] if self.entry.param.dim() else 1
        rates = RateSample(stride_for(self.numel, width), self.numel, self.entry.param.device)
        total: dict[str, Tensor] = {}
        start = 0
        decay: Scalar = 0.0
        pivot = None if pivot is None else pivot.to(self.dtype)
        center: Scalar = 0.0 if pivot is None else pivot
        if compile and pivot is not None and self.exact == is_exact(pivot.device):
            total, start, decay = self._read_compiled(pivot, rates)
        away = None if pivot is None else unless_zero(pivot)
        for s in self.slices(start):
            decay, rate = self._block(s, sums, away, rates, start)
            center = center if rate is None else rate
            start += s.param.shape[0]
        total = together(total, {name: each[0] for name, each in sums.totals().items()})
        for name, value in (("count", start), ("decay", decay), ("pivot", center)):
            total[name] = scalar(value, self.entry.param).reshape(())
        self.total, self.counts = total, rates.histogram()

    def _block(
        self, s: Slice, sums: Sums, pivot: Tensor | None, rates: RateSample, start: int
    ) -> tuple[Scalar, Scalar | None]:
        """Take a block: its decay, and the rate where there is one for all.

        A method of its own, so that what the rule made is gone before the next block.
        """
        update = self.rule.update(s)
        rates.add(update.effective_lr, start, s.param)  # while they are in cache
        sums.add(s, update, pivot)
        one = is_scalar(update.effective_lr, s.param)
        return update.decay, update.effective_lr if one else None

    def _read_compiled(
        self, pivot: Tensor, sample: RateSample
    ) -> tuple[dict[str, Tensor], int, Scalar]:
        """Whole rows of a compiled kernel: totals, elements that they took, the decay."""
        entry = self.entry
        kernel = kernel_for(entry, self.group, self.rule)
        if kernel is None:
            return {}, 0, 0.0
        whole = self.numel // COLUMNS * COLUMNS
        rest = whole % kernel.most
        if rest < 2 * max(COLUMNS, sample.stride):
            whole -= rest  # one row, or one rate, would have to be compiled for itself
        if not whole:
            return {}, 0, 0.0
        scalars, decay = kernel.scalars_of(entry, self.group["lr"])
        factor = decay.to(pivot.device, pivot.dtype, non_blocking=True)
        tensors = [entry.param, cast("Tensor", entry.grad)]
        tensors += [entry.state[name] for name in kernel.states]
        flat = [torch.split(t.detach().view(-1)[:whole], kernel.most) for t in tensors]
        total: dict[str, Tensor] = {}
        tables: list[Tensor] = []
        start = 0
        for param, grad, *states in zip(*flat, strict=True):
            at = sample.positions(start, len(param))
            rows, rates = kernel.run(param, grad, states, scalars, pivot, factor, at)
            sample.keep(rates)
            tables.append(rows)
            start += len(param)
            if len(tables) == DEPTH or start == whole:
                total = together(total, totals(torch.cat(tables, 1), 1, exact=self.exact))
                tables = []
        return {name: each[0] for name, each in total.items()}, whole, decay


class RateSample:
    """Evenly spread elements of a large parameter's rates.

    Attributes:
        stride: every how many elements one is taken.
    """

    def __init__(self, stride: int, numel: int, device: torch.device) -> None:
        self.stride = stride
        self._count = -(-numel // stride)
        self._device = device
        self._rates: Tensor | None = None
        self._filled = 0

    def add(self, rate: Scalar, start: int, like: Tensor) -> None:
        """Take the rates of one block that starts at flat position ``start``."""
        if not is_scalar(rate, like):
            self.keep(cast("Tensor", rate).reshape(-1)[(-start) % self.stride :: self.stride])

    def positions(self, start: int, length: int) -> Tensor:
        """Which elements of such a block are in the sample: (·,), int64."""
        return torch.arange((-start) % self.stride, length, self.stride, device=self._device)

    def keep(self, rates: Tensor) -> None:
        """Take the next rates of the sample, which are copied, not kept alive."""
        if self._rates is None:
            self._rates = torch.empty(self._count, dtype=torch.float32, device=self._device)
        self._rates[self._filled : self._filled + len(rates)].copy_(rates)
        self._filled += len(rates)

    def histogram(self) -> Counts:
        """The fine histogram; without bins where all elements share one rate."""
        if self._rates is None:
            return no_counts(1, self._device)
        return counts_of(self._rates.unsqueeze(0), Lines(((1, 1),)))


def stride_for(numel: int, width: int) -> int:
    """A stride that takes at least ``SAMPLE`` elements and no column more often than others."""
    stride = max(1, numel // SAMPLE)
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def whole_of(entry: Entry, group: Mapping[str, Any], rule: Rule) -> None:
    """Add what the rule needs to know of the whole parameter to the entry's state."""
    if rule.whole is not None:
        exact = entry.param.numel() <= block_size(torch.float64)
        stream = Stream(entry, group, rule, exact=exact)
        entry.state.update(rule.whole(Whole(entry, group, stream.slices)))
