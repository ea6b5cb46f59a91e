"""Large parameters from a sample of each: rule and figures of a few of their elements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Slice
from lrprobe.summary.figures import ADDITIVE, PARTS, plain_figures
from lrprobe.summary.fused import COLUMNS, is_exact, kernel_for, totals
from lrprobe.summary.histogram import counts_of, histograms
from lrprobe.summary.reading import Spread, block_size, precision, spread, take_rows
from lrprobe.summary.sums import Sums, column, finished, together, unless_zero


def estimated(
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule,
    pivots: Sequence[Tensor] | None,
    sample: int,
    sums: Sums,
    *,
    compile: bool,  # noqa: A002 - as in `attach`
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """PARTS (entries, ·) and histograms (entries, BINS) from a sample of each.

    Args:
        entries: large parameters of one group and device.
        group: theirs.
        rule: theirs.
        pivots: a value among each one's rates, 0-dim; None where all its elements share a rate.
        sample: elements of each, at least; whole rows of a kernel where there may be one.
        sums: what adds them up.
        compile: with a compiled kernel where there can be one.
        exact: in float64; else a row that float32 has spoilt comes out ``suspicious``.
    """
    dtype = torch.float64 if exact else precision(entries[0].param)
    device = entries[0].param.device
    at = [spread(entry.param.numel(), sample, device) for entry in entries]
    plain = plain_figures(entries, counts=False)
    by_kernel = compile and pivots is not None and exact == is_exact(device)
    # Of several, a device is not asked whether they share the scalars that a kernel takes.
    most = 1 if by_kernel and exact else max(1, block_size(dtype) // sample)
    found: list[dict[str, Tensor]] = []
    counts: list[Tensor] = []
    for chosen in _of_one_length([len(each) for each in at], most):
        some, where = [entries[i] for i in chosen], [at[i] for i in chosen]
        pivot = None
        if pivots is not None:
            pivot = torch.stack([pivots[i] for i in chosen]).to(dtype).unsqueeze(1)
        read = None
        if by_kernel and pivot is not None:
            read = _read_by_kernel(some, where, group, rule, pivot, exact=exact)
        if read is None:
            read = _read_by_rule(some, where, group, rule, pivot, sums, dtype)
        figures, histogram, overwritten = read  # the last the same for all, which have one rule
        found.append(figures)
        counts.append(histogram)
    total = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    decay, center, bins = total.pop("decay"), total.pop("pivot"), torch.cat(counts)
    sizes = [[len(each) for each in at], [entry.param.numel() for entry in entries]]
    n, numel = torch.tensor(sizes, dtype=torch.float64).to(device, non_blocking=True).unbind()
    parts = finished(total, n, decay, center, None if dtype is torch.float64 else bins)
    for name in ADDITIVE:
        parts[:, PARTS.index(name)] *= numel / n
    for name in ("pp",) if overwritten else ("pp", "gg"):
        parts[:, PARTS.index(name)] = plain[name]
    bad = parts[:, PARTS.index("nonfinite")]
    parts[:, PARTS.index("nonfinite")] = bad.maximum(plain["nonfinite"])
    return parts, bins


def _read_by_rule(
    some: Sequence[Entry],
    at: Sequence[Spread],
    group: Mapping[str, Any],
    rule: Rule,
    pivot: Tensor | None,
    sums: Sums,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """Totals of samples, their pivots and decays among them: (some,); histograms (some, BINS).

    And whether the optimizer has overwritten the gradient.
    """
    bins = []
    for where in zip(*(each.pieces(block_size(dtype)) for each in at), strict=True):
        s = Slice(some, group, take_rows(where, dtype))
        update = rule.update(s)
        bins.append(histograms(update.effective_lr, s.param))
        sums.add(s, update, None if pivot is None else unless_zero(pivot))
    decay = column(update.decay, s.param)
    center = column(update.effective_lr, s.param) if pivot is None else pivot[:, 0].double()
    total = sums.totals() | {"pivot": center, "decay": decay}
    return total, sum(bins[1:], bins[0]), update.grad is not None


def _read_by_kernel(
    some: Sequence[Entry],
    at: Sequence[Spread],
    group: Mapping[str, Any],
    rule: Rule,
    pivot: Tensor,
    *,
    exact: bool,
) -> tuple[dict[str, Tensor], Tensor, bool] | None:
    """The same by a compiled kernel; None where there is none that takes all of them at once."""
    kernel = kernel_for(some[0], group, rule, sampled=True)  # all have states of the same names
    if kernel is None:
        return None
    s = Slice(some, group, take_rows(at, pivot.dtype))
    numbers = {name: s.scalar(name) for name in kernel.scalars}
    if any(isinstance(each, Tensor) and each.dim() for each in numbers.values()):
        return None  # not the same for all
    scalars, decay = kernel.scalars_of(Entry(some[0].param, some[0].grad, numbers), group["lr"])
    factor = decay.to(pivot.device, pivot.dtype, non_blocking=True)
    inputs = [[e.param for e in some], [cast("Tensor", e.grad) for e in some]]
    inputs += [[e.state[name] for e in some] for name in kernel.states]
    total: dict[str, Tensor] = {}
    bins = []
    for where in zip(*(each.pieces(block_size(pivot.dtype)) for each in at), strict=True):
        read = [take_rows(where, tensors[0].dtype)(tensors) for tensors in inputs]
        away = pivot.expand(-1, read[0].shape[1] // COLUMNS).reshape(-1, 1)
        param, grad, *states = (each.view(-1) for each in read)
        rows, rates = kernel.run(param, grad, states, scalars, away, factor)
        total = together(total, totals(rows, len(some), exact=exact))
        bins.append(counts_of(rates.view(len(some), -1)))
    total |= {"pivot": pivot[:, 0].double(), "decay": decay.double().expand(len(some))}
    return total, sum(bins[1:], bins[0]), False


def _of_one_length(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Neighbours of one length, at most so many together."""
    start = 0
    for end in range(1, len(lengths) + 1):
        full = end - start == most
        if full or end == len(lengths) or lengths[end] != lengths[start]:
            yield range(start, end)
            start = end
