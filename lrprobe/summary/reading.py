"""Which elements are read, and how: blocks of one tensor, or the same positions of several."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lrprobe.rules.base import Coded, Entry, Readable, SparseRows, Take

WHOLE = 4096
"""Parameters up to this size are read whole, in float64; of larger ones a sample is checked."""

_BLOCK_BYTES = 3 << 19

Block = tuple[int | slice, ...]
T = TypeVar("T")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a ``DTensor``; any other tensor itself."""
    if type(tensor) in (Tensor, torch.nn.Parameter):  # which is nearly always so
        return tensor
    # Looked up among what is imported: a class that is not loaded has no instances.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return cast("Tensor", tensor.detach().to_local())
    return tensor


def real(tensor: Tensor) -> Tensor:
    """Local, a complex tensor seen as pairs of reals."""
    tensor = local(tensor)
    return torch.view_as_real(tensor.detach()) if tensor.dtype.is_complex else tensor


def entry_of(
    param: Tensor,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    grad: Tensor | None = None,
) -> Entry:
    """What rules read of a parameter; ``grad`` stands in where it has no gradient."""
    grad = local(cast("Tensor", param.grad) if grad is None else grad)
    if grad.is_sparse and grad.sparse_dim() == 1:
        gradient: Tensor | SparseRows = SparseRows.of(grad.detach())
    else:
        gradient = real(grad.to_dense() if grad.is_sparse else grad)
    real_state = {
        name: real(value.to_dense() if value.is_sparse else value)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
    return Entry(real(param), gradient, {**real_state, **extra})


def precision(tensor: Tensor) -> torch.dtype:
    """The dtype in which the elements of a large parameter are computed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def block_size(dtype: torch.dtype) -> int:
    """Elements of a dtype that are read at once.

    Few enough for what is made of them to stay in cache and within bounds, many enough for what
    Python does around them to be little.
    """
    return _BLOCK_BYTES // dtype.itemsize


@cache
def keep_freed_memory() -> None:
    """Let what one block has freed serve the next, rather than be given back to the system.

    The system would take it away and clear it page by page, for up to a third of a recorded step.
    glibc keeps as much as twice the largest block that was ever freed, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD): here is one, of which no page is touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def blocks(shape: Sequence[int], limit: int) -> Iterator[Block]:
    """Indices that cut a tensor into consecutive blocks of at most ``limit`` elements."""
    inner = math.prod(shape)
    if not shape:
        yield ()
        return
    for dim, size in enumerate(shape):  # noqa: B007 - the dimension to cut is used below
        inner //= max(size, 1)
        if inner <= limit:
            break
    pieces = max(1, math.ceil(size / max(1, limit // max(inner, 1))))
    cuts = [size * i // pieces for i in range(pieces + 1)]
    for lead in itertools.product(*(range(n) for n in shape[:dim])):
        for start, stop in itertools.pairwise(cuts):
            yield (*lead, slice(start, stop))


def is_flat(entry: Entry) -> bool:
    """Whether parameter, gradient and state can be read side by side in memory order."""
    tensors = [entry.param, entry.grad, *_wide(entry.state).values()]
    return not any(isinstance(value, Coded) for value in entry.state.values()) and all(
        isinstance(t, Tensor) and t.shape == entry.param.shape and t.is_contiguous()
        for t in tensors
    )


def pieces(entry: Entry, start: int, limit: int) -> Iterator[Entry]:
    """A flat entry from a flat position on, cut into entries of at most ``limit`` elements."""
    if start == entry.param.numel():
        return
    wide = _wide(entry.state)
    tensors = [entry.param, cast("Tensor", entry.grad), *wide.values()]
    cut = [torch.split(t.view(-1)[start:], limit) for t in tensors]
    for param, grad, *states in zip(*cut, strict=True):
        yield Entry(param, grad, {**entry.state, **dict(zip(wide, states, strict=True))})


def _wide(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim()}


def take_all(dtype: torch.dtype) -> Take:
    """Read the whole of one tensor, which is flat."""

    def take(tensors: Sequence[Readable]) -> Tensor:
        return cast("Tensor", tensors[0]).to(dtype)

    return take


def take_block(block: Block, dtype: torch.dtype) -> Take:
    """Read one block of one tensor, flat."""

    def take(tensors: Sequence[Readable]) -> Tensor:
        (tensor,) = tensors
        if isinstance(tensor, SparseRows):
            return _sparse_block(tensor, block).reshape(-1).to(dtype)
        if isinstance(tensor, Coded):
            return tensor.read(_flat(block, tensor.shape, tensor.codes.device)).to(dtype)
        return tensor.detach()[block].reshape(-1).to(dtype)

    return take


Positions: TypeAlias = "Spread | Tensor | None"
"""Flat positions of elements, or all of them."""


def take_rows(at: Sequence[Positions], dtype: torch.dtype) -> Take:
    """Read flat positions of several tensors, or all of each: (tensors, positions)."""
    whole = all(each is None for each in at)

    def take(tensors: Sequence[Readable]) -> Tensor:
        if whole and _alike(tensors):
            together = torch.stack(cast("list[Tensor]", list(tensors)))  # no object for each
            return together.reshape(len(tensors), -1).to(dtype)
        if len(tensors) > 1 and all(isinstance(each, Spread) for each in at):
            return _gathered(tensors, cast("Sequence[Spread]", at)).to(dtype)
        return torch.stack(list(map(positions, tensors, at))).to(dtype)

    return take


@dataclass(frozen=True, slots=True)
class Lines:
    """Parameters that are read whole, cut into lines of one width, so that sizes can differ.

    Attributes:
        runs: of parameters of one shape that follow each other: how many, and the lines of each.
    """

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Lines:
        """Those of these parameters, sorted by shape, none of which is empty."""
        if entries[0].param.shape == entries[-1].param.shape:
            return cls(((len(entries), 1),))
        shapes = [(shape, len(list(run))) for shape, run in groupby(e.param.shape for e in entries)]
        width = math.gcd(*(shape.numel() for shape, _ in shapes))
        return cls(tuple((count, shape.numel() // width) for shape, count in shapes))

    @property
    def owners(self) -> int:
        """How many parameters there are."""
        return sum(n for n, _ in self.runs)

    @property
    def uncut(self) -> bool:
        """Whether each owner is one line."""
        return all(lines == 1 for _, lines in self.runs)

    def each(self, owners: Sequence[T]) -> list[T]:
        """The owner of each line."""
        if self.uncut:
            return list(owners)
        at = iter(owners)
        return [owner for n, lines in self.runs for owner in islice(at, n) for _ in range(lines)]

    def split(self, owners: Sequence[T]) -> Iterator[Sequence[T]]:
        """The owners of one shape."""
        end = 0
        for n, _ in self.runs:
            start, end = end, end + n
            yield owners[start:end]

    def cut(self, tables: Sequence[Tensor]) -> Tensor:
        """Such tables as lines: (lines, width)."""
        if len(tables) == 1:
            return tables[0]
        runs = zip(tables, self.runs, strict=True)
        return torch.cat([table.reshape(n * lines, -1) for table, (n, lines) in runs])

    def tables(self, rows: Tensor) -> list[Tensor]:
        """Lines as a table (owners, elements) of each shape."""
        if len(self.runs) == 1:
            return [rows]
        parts = torch.split(rows, [n * lines for n, lines in self.runs])
        return [part.reshape(n, -1) for part, (n, _) in zip(parts, self.runs, strict=True)]

    def take(self, dtype: torch.dtype) -> Take:
        """Read all of one tensor per line, its owner's: (lines, width)."""

        def take(tensors: Sequence[Readable]) -> Tensor:
            if self.uncut:
                return take_rows([None] * len(tensors), dtype)(tensors)
            owners, end = [], 0
            for n, lines in self.runs:
                start, end = end, end + n * lines
                owners += [positions(each, None) for each in tensors[start:end:lines]]
            return torch.cat(owners).view(len(tensors), -1).to(dtype)

        return take

    def owned(self, values: Tensor, how: Callable[[Tensor, int], Tensor] = Tensor.sum) -> Tensor:
        """Of figures (lines, ·) those of the owners: (owners, ·)."""
        if self.uncut:
            return values
        parts = torch.split(values, [n * lines for n, lines in self.runs])
        each = zip(parts, self.runs, strict=True)
        return torch.cat([how(part.view(*run, *values.shape[1:]), 1) for part, run in each])

    def spread(self, values: Tensor) -> Tensor:
        """Of figures (owners,) that of each line's owner: (lines,)."""
        if self.uncut:
            return values
        parts = torch.split(values, [n for n, _ in self.runs])
        each = zip(parts, self.runs, strict=True)
        return torch.cat([part.repeat(lines, 1).T.reshape(-1) for part, (_, lines) in each])


def parted(items: Sequence[T], sizes: Sequence[int], most: int) -> Iterator[Sequence[T]]:
    """Cut into parts whose sizes add up to so much at most, or of one item."""
    start = total = 0
    for end, size in enumerate(sizes):
        if total + size > most and end > start:
            yield items[start:end]
            start, total = end, 0
        total += size
    if items:
        yield items[start:]


def _alike(tensors: Sequence[Readable]) -> bool:
    """Whether these are plain tensors of one shape."""
    if not {SparseRows, Coded}.isdisjoint(map(type, tensors)):
        return False
    return all(map(tensors[0].shape.__eq__, map(attrgetter("shape"), tensors)))


def _gathered(tensors: Sequence[Readable], at: Sequence[Spread]) -> Tensor:
    """As many positions of each, read into their rows at once."""
    plain = [each for each in tensors if isinstance(each, Tensor) and each.is_contiguous()]
    if len(plain) < len(tensors) or len({each.dtype for each in plain}) > 1:
        return torch.stack(list(map(positions, tensors, at)))
    rows = plain[0].new_empty((len(at), len(at[0])))
    for tensor, each, row in zip(plain, at, rows, strict=True):
        torch.index_select(each.runs(tensor), 0, each.lines, out=row.view(-1, each.run))
    return rows


def positions(tensor: Readable, at: Positions) -> Tensor:
    """The elements at flat, row-major positions (all of them for None)."""
    if isinstance(at, Spread):
        if isinstance(tensor, Tensor) and tensor.is_contiguous():
            return at.runs(tensor).index_select(0, at.lines).view(-1)
        at = at.flat()
    if isinstance(tensor, Coded):
        return tensor.read(at)
    if isinstance(tensor, SparseRows):
        return _sparse_positions(tensor, at)
    if at is None:
        return tensor.reshape(-1)
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, at)
    coordinates = []
    for size in reversed(tensor.shape):  # `torch.unravel_index` would wait for a device
        coordinates.append(at % size)
        at = at // size
    return tensor[tuple(reversed(coordinates))]


def _flat(block: Block, shape: Sequence[int], device: torch.device) -> Tensor:
    """The flat positions of one of ``blocks``, which are neighbours: (elements,)."""
    start, stop, inner = 0, 1, math.prod(shape)
    for index, size in zip(block, shape, strict=False):
        inner //= size
        first, last = (index, index + 1) if isinstance(index, int) else (index.start, index.stop)
        start, stop = start + first * inner, start + last * inner
    return torch.arange(start, stop, device=device)


def _sparse_block(grad: SparseRows, block: Block) -> Tensor:
    first = block[0]
    device = grad.values.device
    if isinstance(first, int):
        at, hit = grad.lookup(torch.tensor([first], device=device))
        rest: Block = (0, *block[1:])
    else:
        at, hit = grad.lookup(torch.arange(first.start, first.stop, device=device))
        rest = ()
    if not len(grad.values):
        return grad.values.new_zeros((len(at), *grad.shape[1:]))[rest]
    values = grad.values[at]
    return torch.where(hit.view(-1, *[1] * (values.dim() - 1)), values, 0)[rest]


def _sparse_positions(grad: SparseRows, at: Tensor | None) -> Tensor:
    if at is None:
        return _sparse_block(grad, (slice(0, grad.shape[0]),)).reshape(-1)
    width = math.prod(grad.shape[1:])
    if not len(grad.values):
        return grad.values.new_zeros(len(at))
    row, hit = grad.lookup(at // width)
    return torch.where(hit, grad.values.reshape(len(grad.rows), -1)[row, at % width], 0)


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Positions spread evenly over a parameter, in runs of neighbours that share a cache line.

    Attributes:
        lines: ascending numbers of the runs: (runs,).
        run: neighbours in each.
    """

    lines: Tensor
    run: int

    def __len__(self) -> int:
        return len(self.lines) * self.run

    def pieces(self, limit: int) -> Iterator[Spread]:
        """These positions, at most so many at once."""
        for lines in torch.split(self.lines, max(1, limit // self.run)):
            yield Spread(lines, self.run)

    def runs(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor as runs, of which ``lines`` are numbers: (·, run)."""
        return tensor.as_strided((tensor.numel() // self.run, self.run), (self.run, 1))

    def flat(self) -> Tensor:
        """The positions themselves, row-major: (runs · run,)."""
        within = torch.arange(self.run, dtype=torch.int64, device=self.lines.device)
        return (self.lines.unsqueeze(1) * self.run + within).reshape(-1)


@lru_cache(maxsize=256)
def spread(numel: int, count: int, device: torch.device) -> Spread:
    """At least ``count`` positions of ``numel`` elements (which must be as many).

    One run is drawn from each stratum, the same in every program; drawn rather than strided, so
    that no row length can alias with it.
    """
    run = next(n for n in (32, 16, 8, 4, 2, 1) if -(-count // n) <= numel // n)
    runs = -(-count // run)
    generator = torch.Generator("cpu").manual_seed(numel)
    edges = torch.arange(runs + 1, dtype=torch.int64, device="cpu") * (numel // run) // runs
    widths = edges.diff()
    uniform = torch.rand(runs, generator=generator, dtype=torch.float64, device="cpu")
    drawn = edges[:-1] + torch.minimum((uniform * widths).long(), widths - 1)
    return Spread(drawn.to(device, non_blocking=True), run)
