"""Figures with plain tensor operations: any device, any dtype, sparse and low-bit state.

This is the reference for generated code: it processes one piece at a time, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrprobe.engine.distribution import RateCounts, count_rates
from lrprobe.engine.figures import Elements, Figure, is_elementwise
from lrprobe.engine.pieces import At, precision, read
from lrprobe.rules.base import Entry, Rule, Slice, SparseRows, Whole, to_device_float64

BLOCK = 1 << 18
"""Elements processed at once: few, because each intermediate result takes memory."""

_EXACT = 1 << 17
"""Elements of a piece up to which it is computed in float64."""


def slice_of(
    entry: Entry,
    group: Mapping[str, Any],
    at: At,
    dtype: torch.dtype,
    memo: dict[Any, Any] | None = None,
    old: Mapping[str, Tensor] | None = None,
    *,
    chosen: bool = False,
) -> Slice:
    """Some elements of an entry, flat.

    ``old`` has tensors from before the step, with all elements, or with only those in ``at`` if
    they are ``chosen``.
    """
    shape = entry.param.shape
    kept = old or {}

    def fetch(name: str) -> Tensor:
        if name == "param":
            return read(entry.param, at, shape).to(dtype)
        if name == "grad":
            return read(entry.grad, at, shape).to(dtype)
        if name == "touched" and isinstance(entry.grad, SparseRows):
            return read(entry.grad.pattern(), at, shape).to(dtype)
        if name.startswith("old "):
            value = kept[name.removeprefix("old ")]
            return (value if chosen else value[at]).to(dtype)
        return read(entry.state[name], at, shape).to(dtype)

    return Slice([entry], group, fetch, memo, kept)


def slices(
    entry: Entry,
    group: Mapping[str, Any],
    dtype: torch.dtype,
    old: Mapping[str, Tensor] | None = None,
) -> Iterator[Slice]:
    """All elements of an entry in order, block by block."""
    memo: dict[Any, Any] = {}
    numel = entry.param.numel()
    for start in range(0, numel, BLOCK):
        at = slice(start, min(start + BLOCK, numel))
        yield slice_of(entry, group, at, dtype, memo, old)


def add_whole_statistics(entry: Entry, group: Mapping[str, Any], rule: Rule) -> None:
    """Add what ``Rule.whole`` computes to the entry's state."""
    if rule.whole is not None:
        exact = torch.float64 if entry.param.numel() <= _EXACT else precision(entry.param)
        made = Whole(entry, group, lambda: slices(entry, group, exact))
        entry.add(rule.whole(made))


def figures(
    table: Sequence[Figure],
    entry: Entry,
    group: Mapping[str, Any],
    rule: Rule | None,
    *,
    rates: bool,
    dtype: torch.dtype | None = None,
    old: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, RateCounts | None]:
    """Figures of one entry: (len(table),) float64, and the distribution of its rates.

    Args:
        table: which figures.
        entry: the elements.
        group: their parameter group.
        rule: their rule; None if the rate is measured.
        rates: whether the rates are counted.
        dtype: of the computation. By default float64; float32 for large pieces on a CPU that are
            not float64, unless their sums overflow or underflow.
        old: tensors from before the step.
    """
    if dtype is not None:
        return _figures(table, entry, group, rule, rates=rates, dtype=dtype, old=old)
    fast = precision(entry.param)
    if entry.param.numel() <= _EXACT or entry.param.device.type != "cpu":
        fast = torch.float64
    found = _figures(table, entry, group, rule, rates=rates, dtype=fast, old=old)
    if fast is torch.float32 and not _is_sound(table, found[0]):
        return _figures(table, entry, group, rule, rates=rates, dtype=torch.float64, old=old)
    return found


def _figures(
    table: Sequence[Figure],
    entry: Entry,
    group: Mapping[str, Any],
    rule: Rule | None,
    *,
    rates: bool,
    dtype: torch.dtype,
    old: Mapping[str, Tensor] | None,
) -> tuple[Tensor, RateCounts | None]:
    blocks: list[Tensor] = []
    counts: RateCounts | None = None
    device = entry.param.device
    for s in slices(entry, group, dtype, old):
        e = Elements(s, rule)
        blocks.append(_block(table, e, s.param))
        if rates:
            counts = _counted(e, counts)
    if not blocks:
        return _empty(table, entry, group, rule), None
    stacked = torch.stack(blocks)
    columns = [_merged(f, stacked[:, i]) for i, f in enumerate(table)]
    return torch.stack(columns).to(device), counts


def _block(table: Sequence[Figure], e: Elements, like: Tensor) -> Tensor:
    """The table's figures of one block."""
    numbers = []
    moves: Any = e.moves if any(figure.moving for figure in table) else True
    moving: Any = len(like) if moves is True or moves is None else torch.count_nonzero(moves)
    for figure in table:
        value = figure.of(e)
        if value is None:
            number = _NAN
        elif is_elementwise(value):
            number = _over_elements(figure, value, moves if figure.moving else True, moving)
        else:
            number = _shared(figure, figure.value(e), moving if figure.moving else len(like))
        same = number.device == like.device
        numbers.append(number if same else to_device_float64(number, like.device))
    return torch.stack(numbers).double()  # counts of a block are exact in float32, too


_NAN = torch.tensor(torch.nan, dtype=torch.float64, device="cpu")


def _over_elements(figure: Figure, value: Tensor, chosen: Any, count: Any) -> Tensor:
    """The figure of the chosen elements, of which there are ``count``; True chooses all."""
    if value.dtype == torch.bool:
        return torch.count_nonzero(value if chosen is True else value & chosen)
    nothing = {"sum": 0, "min": torch.inf, "max": -torch.inf}[figure.merge]
    kept = value if chosen is True else value.where(chosen, nothing)  # slow on a CPU
    if figure.merge != "sum":
        return kept.amin() if figure.merge == "min" else kept.amax()
    if not figure.squared:
        return kept.sum()
    if figure.name != "rate_square" or value.dtype == torch.float64:
        return _sum_of_squares(kept)
    # Their variance is a small difference of large squares, so it is computed first.
    total = kept.sum().double()
    mean = total / count if chosen is True else total / count.clamp(min=1)
    apart = value - mean
    apart = apart if chosen is True else apart.where(chosen, 0)
    return _sum_of_squares(apart).double().add(total * mean)


def _sum_of_squares(value: Tensor) -> Tensor:
    """Row by row, because the error of a norm in float32 grows with the number of elements."""
    if value.dtype == torch.float64 or len(value) % _ROW:
        return value.mul(value).sum()
    norms: Tensor = torch.linalg.vector_norm(value.view(-1, _ROW), dim=1)
    return norms.double().square().sum()


_ROW = 1024


def _shared(figure: Figure, value: Any, count: Any) -> Any:
    """The figure of ``count`` elements that all share one value."""
    value = torch.as_tensor(value, dtype=torch.float64).reshape(())
    if isinstance(count, int):
        return value * count if figure.merge == "sum" else value
    device = count.device if value.device.type == "cpu" else value.device
    value, count = to_device_float64(value, device), to_device_float64(count, device)
    if figure.merge == "sum":
        return torch.where(count > 0, value * count, 0.0)
    return torch.where(count > 0, value, torch.inf if figure.merge == "min" else -torch.inf)


def _merged(figure: Figure, column: Tensor) -> Tensor:
    if figure.merge == "sum":
        return column.sum()
    return column.amin() if figure.merge == "min" else column.amax()


def _counted(e: Elements, counts: RateCounts | None) -> RateCounts | None:
    if e.rate is None:
        return count_rates(e.measured_rate, e.has_grad, counts)
    if is_elementwise(e.rate):
        return count_rates(e.rate, e.moves, counts)
    # A block of one element looks scalar; other ranks or blocks may have more elements.
    if e.param.numel() == 1 and isinstance(e.rate, Tensor):
        return count_rates(e.rate.reshape(1), e.moves.reshape(1), counts)
    return counts


_SQUARES = ("rate_square", "direction_square", "moved_square", "param_square", "grad_square")


def _is_sound(table: Sequence[Figure], found: Tensor) -> bool:
    """Whether no sum of float32 products overflowed, underflowed or is NaN."""
    named = dict(zip((f.name for f in table), found.tolist(), strict=True))
    return all(1e-24 < named[name] < float("inf") for name in _SQUARES if name in named)


def _empty(
    table: Sequence[Figure], entry: Entry, group: Mapping[str, Any], rule: Rule | None
) -> Tensor:
    """Figures of zero elements: sums are 0, or NaN if the rule lacks the figure."""
    numbers = []
    e = None
    if rule is not None and rule.whole is None:
        s = slice_of(entry, group, slice(0, 0), torch.float64)
        e = Elements(s, rule)
    for figure in table:
        value = None if e is None else figure.value(e)
        start = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}[figure.merge]
        if e is not None and value is None:
            start = torch.nan
        elif figure.name == "decay":
            start = torch.nan if value is None else float(value)
        numbers.append(start)
    return torch.tensor(numbers, dtype=torch.float64)
