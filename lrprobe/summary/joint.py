"""Several large parameters at once: samples of them, or all of those that are not very large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Slice, Take
from lrprobe.summary.figures import (
    ADDITIVE,
    PARTS,
    ROW,
    gradient,
    is_scalar,
    plain_figures,
    square_sum,
)
from lrprobe.summary.fused import COLUMNS, is_exact, kernel_for, totals
from lrprobe.summary.histogram import Counts, added, counts_of, histograms, listed
from lrprobe.summary.reading import (
    Lines,
    block_size,
    is_flat,
    parted,
    precision,
    spread,
    take_rows,
)
from lrprobe.summary.stream import Stream
from lrprobe.summary.sums import Sums, all_finished, column, owned, together, unless_zero

MOST = 1 << 17
"""Elements below which parameters are read together: what Python does around a block takes as long
as two thirds of as many elements, and all of their rates are sorted into the fine histogram."""


class Part(NamedTuple):
    """Parameters that are read together.

    Attributes:
        entries: the parameters.
        pivot: a value among each one's rates: (parameters,); None where all its elements share a
            rate.
        lines: how their elements, or samples of these, become rows.
        width: elements of a row.
        takes: what reads them, one after the other, given a dtype.
    """

    entries: Sequence[Entry]
    pivot: Tensor | None
    lines: Lines
    width: int
    takes: Sequence[Callable[[torch.dtype], Take]]


class Read(NamedTuple):
    """What was read of a part.

    Attributes:
        total: sums, extremes, and what else ``finished`` takes, by name: (parameters,).
        counts: fine histograms of the rates.
        overwritten: whether the optimizer leaves something else where the gradient was.
    """

    total: dict[str, Tensor]
    counts: Counts
    overwritten: bool


class Reader:
    """Reads parameters of one group and device, parts of them together."""

    def __init__(
        self,
        like: Entry,
        group: Mapping[str, Any],
        rule: Rule,
        states: Sequence[str],
        *,
        compile: bool,  # noqa: A002 - as in `attach`
        exact: bool,
    ) -> None:
        """Set up.

        Args:
            like: one of the parameters.
            group: theirs.
            rule: theirs.
            states: names of the state entries that are looked through for what is not finite.
            compile: with a compiled kernel where there can be one.
            exact: in float64; else a row that float32 has spoilt comes out ``suspicious``.
        """
        self._group, self._rule = group, rule
        self._device = like.param.device
        self._dtype = torch.float64 if exact else precision(like.param)
        self._sums = Sums(states, exact=exact)
        self._exact = exact
        self._by_kernel = compile and exact == is_exact(self._device)

    def whole(
        self, entries: Sequence[Entry], pivots: Sequence[Tensor] | None
    ) -> tuple[list[int], Tensor, Counts]:
        """Which entry each row is of, then PARTS (entries, ·), and histograms, of all elements.

        Args:
            entries: parameters of less than ``MOST`` elements.
            pivots: a value among each one's rates, 0-dim; None where all its elements share a rate.
        """
        joins = [self._joins(entry) for entry in entries]
        order = sorted(range(len(entries)), key=lambda i: (joins[i], entries[i].param.shape))
        sizes = [entries[i].param.numel() for i in order]
        parts = []
        for run in self._together([joins[i] for i in order], sizes):
            at = [order[i] for i in run]
            some = [entries[i] for i in at]
            lines = Lines.of(some)
            width = some[0].param.numel() // lines.runs[0][1]
            parts.append(Part(some, self._pivot(pivots, at), lines, width, [lines.take]))
        figures, counts, _ = self._all(parts, _known(sizes, self._device))
        return order, figures, counts

    def sample(
        self, entries: Sequence[Entry], pivots: Sequence[Tensor] | None, size: int
    ) -> tuple[Tensor, Counts]:
        """PARTS and histograms from a sample of each; norms of parameter and gradient are exact.

        Args:
            entries: parameters that are larger than that.
            pivots: as in ``whole``.
            size: elements of each, at least; whole rows of a kernel where there may be one.
        """
        plain = plain_figures(entries, counts=False)
        at = [spread(entry.param.numel(), size, self._device) for entry in entries]
        sizes = [len(each) for each in at]
        parts = []
        for chosen in self._together(sizes, sizes):
            some = [entries[i] for i in chosen]
            pieces = zip(*(at[i].pieces(block_size(self._dtype)) for i in chosen), strict=True)
            takes = [partial(take_rows, piece) for piece in pieces]
            lines = Lines(((len(some), 1),))
            parts.append(Part(some, self._pivot(pivots, chosen), lines, sizes[chosen[0]], takes))
        n = _known(sizes, self._device)
        result, counts, overwritten = self._all(parts, n)
        numel = _known([entry.param.numel() for entry in entries], self._device)
        for name in ADDITIVE:
            result[:, PARTS.index(name)] *= numel / n
        if overwritten:  # what is there now is not the gradient
            plain["gg"] = torch.stack([self._gradient_squares(entry) for entry in entries])
        for name in ("pp", "gg"):
            result[:, PARTS.index(name)] = plain[name]
        bad = result[:, PARTS.index("nonfinite")]
        result[:, PARTS.index("nonfinite")] = bad.maximum(plain["nonfinite"])
        return result, counts

    def _gradient_squares(self, entry: Entry) -> Tensor:
        """Σg² of the gradient that the rule says there was: 0-dim."""
        slices = Stream(entry, self._group, self._rule, exact=self._exact).slices()
        return sum(
            (square_sum(gradient(s, self._rule.update(s))) for s in slices),
            torch.zeros((), dtype=torch.float64, device=self._device),
        )

    def _joins(self, entry: Entry) -> tuple[int, tuple[int, ...]]:
        """What is equal for parameters that can be read together."""
        shape = entry.param.shape
        if is_flat(entry):
            if self._by_kernel and shape.numel() % COLUMNS == 0:
                return COLUMNS, ()
            if shape.numel() % ROW == 0:
                return ROW, ()
        return 0, tuple(shape)

    def _pivot(self, values: Sequence[Tensor] | None, at: Sequence[int]) -> Tensor | None:
        """Those of some parameters, in the dtype of what they are taken from."""
        return None if values is None else torch.stack([values[i] for i in at]).to(self._dtype)

    def _together(self, keys: Sequence[Any], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
        """Positions of neighbours of one key, of which a block is read at once."""
        # Of several, a device is not asked whether they share the scalars that a kernel takes.
        most = 1 if self._by_kernel and self._exact else block_size(self._dtype)
        for _, run in groupby(range(len(keys)), keys.__getitem__):
            at = list(run)
            yield from parted(at, [sizes[i] for i in at], most)

    def _all(self, parts: Sequence[Part], n: Tensor) -> tuple[Tensor, Counts, bool]:
        """PARTS of all of them, histograms, and whether gradients were overwritten.

        Args:
            parts: in order.
            n: elements of each parameter that are read.
        """
        each = [self._read(part) for part in parts]
        counts = [read.counts for read in each]
        in_bits = self._dtype is not torch.float64
        figures = all_finished([read.total for read in each], n, counts if in_bits else None)
        return figures, listed(counts), any(read.overwritten for read in each)

    def _read(self, part: Part) -> Read:
        if self._by_kernel and part.pivot is not None:
            read = self._compiled(part, part.pivot)
            if read is not None:
                return read
        return self._eager(part)

    def _eager(self, part: Part) -> Read:
        lines = part.lines
        away = None
        if part.pivot is not None:
            away = unless_zero(lines.spread(part.pivot).unsqueeze(1))
        bins = []
        for take in part.takes:
            s = Slice(lines.each(part.entries), self._group, take(self._dtype))
            update = self._rule.update(s)
            bins.append(histograms(update.effective_lr, s.param, lines))
            self._sums.add(s, update, away)
        total = owned(self._sums.totals(), lines)
        total["decay"] = lines.owned(column(update.decay, s.param), Tensor.amin)
        if is_scalar(update.effective_lr, s.param):
            total["pivot"] = lines.owned(column(update.effective_lr, s.param), Tensor.amin)
        elif part.pivot is not None:
            total["pivot"] = part.pivot.double()
        else:
            total["pivot"] = torch.zeros_like(total["decay"])
        return Read(total, added(bins), update.grad is not None)

    def _compiled(self, part: Part, pivot: Tensor) -> Read | None:
        """By a compiled kernel; None where there is none that takes all of them at once."""
        some, lines = part.entries, part.lines
        if part.width % COLUMNS:
            return None
        # All have states of the same names.
        kernel = kernel_for(some[0], self._group, self._rule, sampled=True)
        if kernel is None:
            return None
        s = Slice(some, self._group, part.takes[0](self._dtype))
        numbers = {name: s.scalar(name) for name in kernel.scalars}
        if any(isinstance(each, Tensor) and each.dim() for each in numbers.values()):
            return None  # not the same for all
        first = Entry(some[0].param, some[0].grad, numbers)
        scalars, decay = kernel.scalars_of(first, self._group["lr"])
        factor = decay.to(self._device, self._dtype, non_blocking=True)
        tensors = [[e.param for e in some], [cast("Tensor", e.grad) for e in some]]
        tensors += [[e.state[name] for e in some] for name in kernel.states]
        if any(t.dtype != each[0].dtype for each in tensors for t in each):
            return None
        away = lines.spread(pivot).unsqueeze(1)
        total: dict[str, Tensor] = {}
        bins = []
        for take in part.takes:
            read = [take(each[0].dtype)(lines.each(each)) for each in tensors]
            rows = away.expand(-1, read[0].shape[1] // COLUMNS).reshape(-1, 1)
            param, grad, *states = (each.view(-1) for each in read)
            figures, rates = kernel.run(param, grad, states, scalars, rows, factor)
            total = together(total, totals(figures, len(away), exact=self._exact))
            bins.append(counts_of(rates.view(len(away), -1), lines))
        total = owned(total, lines)
        total |= {"pivot": pivot.double(), "decay": decay.double().expand(len(some))}
        return Read(total, added(bins), overwritten=False)


def _known(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
