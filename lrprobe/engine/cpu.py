"""Computes figures with a generated loop: one call for all pieces of a kind, on the CPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.distribution import BINS, Bins
from lrprobe.engine.generated import cache_folder, import_generated
from lrprobe.engine.pieces import is_negated, sample_runs
from lrprobe.engine.printer import CHUNK, LANES, LOADED, differing, source
from lrprobe.engine.program import Symbol
from lrprobe.engine.recording import Recorded

_THREADED = 1 << 20
"""Elements above which starting several threads pays off."""
_MAX_THREADS = 8
_ALIGNED = 64
"""Alignment of a check sample in bytes: one cache line."""
_RANGES = 8
"""Parts of the work per thread, so that the others can take over those of a delayed thread."""


def unavailable() -> str:
    """Why no loop can be compiled here; empty if one can be."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    if cache_folder() is None:
        return "there is no writable folder for generated code"
    return ""


def figures(
    recorded: Recorded,
    addresses: NDArray[np.int64],
    numel: NDArray[np.int64],
    dtypes: Sequence[torch.dtype],
    *,
    exact: bool,
) -> tuple[Tensor, Bins | None, Tensor | None]:
    """Figures of several pieces: (pieces, figures) float64, and the distribution of their rates.

    Args:
        recorded: what to compute.
        addresses: of the leaves of each piece: (pieces, leaves).
        numel: elements of each piece, at least 1: (pieces,).
        dtypes: of the leaves.
        exact: whether elements are computed in float64.
    """
    kernel = _kernel(recorded, tuple(dtypes), exact)
    layout = _layout(tuple(numel.tolist()), _threads(int(numel.sum())))
    scalars = recorded.program.table(torch.device("cpu")).numpy()
    found = differing(recorded)
    out = np.empty((len(layout.owner), len(found)))
    counted = recorded.rate is not None
    begin = np.cumsum(layout.room) - layout.room
    end = begin.copy()
    counts, pool = _scratch(layout.threads, int(layout.room.sum()) if counted else 0)
    pieces = layout.owner, layout.start, layout.bounds

    def work(slot: int, ranges: Any) -> None:
        for who in ranges:
            arrays = addresses, numel, *pieces, scalars, out, pool, begin, end, counts
            _call(kernel, who, slot, *arrays)

    ranges = iter(range(len(layout.bounds) - 1))  # `next` is atomic under the interpreter's lock
    helpers = [
        threading.Thread(target=work, args=(slot, ranges), daemon=True)
        for slot in range(1, layout.threads)
    ]
    try:
        for thread in helpers:
            thread.start()
        work(0, ranges)
        for thread in helpers:
            thread.join()
    except BaseException:  # after an interrupt, threads may still write to the old scratch tables
        _local.scratch = None
        raise
    table = torch.from_numpy(_table(recorded, found, out, layout.first, numel))
    if not counted:
        return table, None, None
    parts = [pool[a:b].T.copy() for a, b in zip(begin, end, strict=True)]
    each = [Bins(owner, bins, count.astype(np.float64)) for owner, bins, count in parts]
    return table, Bins.joined([one for one in each if len(one.owner)]), None


def _table(
    recorded: Recorded,
    found: list[int],
    out: NDArray[np.float64],
    first: NDArray[np.int64],
    numel: NDArray[np.int64],
) -> NDArray[np.float64]:
    """All figures of each piece: (pieces, figures); ``found`` lists those summed by chunk."""
    table = np.full((len(numel), len(recorded.table)), np.nan)
    table[:, found] = np.add.reduceat(out, first, axis=0)
    extremes = {"min": np.minimum, "max": np.maximum}
    moving = numel.astype(np.float64)
    for at, i in enumerate(found):
        figure = recorded.table[i]
        if figure.merge != "sum":
            table[:, i] = extremes[figure.merge].reduceat(out[:, at], first)
        elif figure.name == "moving":
            moving = table[:, i]
    for i, (figure, value) in enumerate(zip(recorded.table, recorded.values, strict=True)):
        if value is None or isinstance(value, Symbol):
            continue
        shared = value.detach().double().numpy().reshape(-1) if isinstance(value, Tensor) else value
        count = moving if figure.moving else numel
        nothing = {"sum": 0.0, "min": np.inf, "max": -np.inf}[figure.merge]
        with np.errstate(all="ignore"):
            total = shared * count if figure.merge == "sum" else shared
        table[:, i] = np.where(count > 0, total, nothing)
    return table


def gather(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Copy the check samples of several tensors to one byte buffer; also return their offsets."""
    runs = np.array([sample_runs(t.numel()) for t in tensors], np.int64).reshape(-1, 3)
    size = np.array([t.element_size() for t in tensors], np.int64)
    room = -(-(runs[:, 0] * runs[:, 1] * size) // _ALIGNED) * _ALIGNED
    starts = np.cumsum(room) - room
    addresses = np.array([t.data_ptr() for t in tensors], np.int64)
    return copied(addresses, runs, size, starts, int(room.sum())), starts.tolist()


def copied(
    addresses: NDArray[np.int64],
    runs: NDArray[np.int64],
    size: NDArray[np.int64],
    starts: NDArray[np.int64],
    total: int,
) -> Tensor:
    """Copy elements to a new buffer of ``total`` bytes.

    Args:
        addresses: of the first element of each tensor.
        runs: what is copied of each: number of runs, run length, and stride between runs.
        size: bytes of an element of each.
        starts: offset of each in the buffer.
        total: bytes of the buffer.
    """
    from lrprobe.engine.intrinsics import gather as copy

    buffer = torch.empty(total, dtype=torch.uint8, device="cpu")
    _call(copy, addresses, runs, size, buffer.data_ptr() + starts)
    return buffer


class _Layout(NamedTuple):
    """How the work is divided.

    Attributes:
        threads: how many threads work.
        owner, start: piece and first element of each chunk.
        first: index of each piece's first chunk.
        bounds: first chunk of each range, and the end.
        room: upper bound of the count entries of each range.
    """

    threads: int
    owner: NDArray[np.int64]
    start: NDArray[np.int64]
    first: NDArray[np.int64]
    bounds: NDArray[np.int64]
    room: NDArray[np.int64]


@lru_cache(maxsize=32)
def _layout(sizes: tuple[int, ...], threads: int) -> _Layout:
    numel = np.array(sizes, np.int64)
    chunks = -(-numel // CHUNK)
    first = np.cumsum(chunks) - chunks
    owner = np.repeat(np.arange(len(numel)), chunks)
    start = (np.arange(len(owner)) - first[owner]) * CHUNK
    work = np.cumsum(np.minimum(CHUNK, numel[owner] - start) + 64)
    ranges = _RANGES * threads if threads > 1 else 1
    cuts = np.searchsorted(work, np.linspace(0, work[-1], ranges + 1)[1:-1])
    bounds = np.array([0, *cuts, len(owner)], np.int64)
    room = [
        int(np.minimum(numel[np.unique(owner[a:b])], BINS).sum())
        for a, b in itertools.pairwise(bounds)
    ]
    return _Layout(threads, owner, start, first, bounds, np.array(room, np.int64))


def _threads(elements: int) -> int:
    return min(torch.get_num_threads(), _MAX_THREADS) if elements >= _THREADED else 1


_local = threading.local()


def _scratch(threads: int, room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counting tables, which every call leaves zeroed, and room for the counts found.

    Each calling thread has its own. Memory that is new in each step costs page faults.
    """
    counts, pool = getattr(_local, "scratch", None) or (
        np.zeros((0, 0, 0), np.int64),
        np.empty((0, 3), np.int64),
    )
    if len(counts) < threads:
        counts = np.zeros((threads, LANES, BINS), np.int64)
    if len(pool) < room:
        pool = np.empty((room, 3), np.int64)
    _local.scratch = counts, pool
    return counts, pool


# ---- compilation --------------------------------------------------------------------------------

_kernels: dict[Any, Callable[..., None]] = {}
_compiling = threading.Lock()


def _call(function: Any, *args: Any) -> None:
    """Call a numba function; compile it in a separate thread.

    While it compiles, numba keeps references to stack frames, and so to the training's tensors.
    """
    if function.overloads:
        function(*args)
    else:
        with ThreadPoolExecutor(1) as compiler:
            compiler.submit(function, *args).result()


def _kernel(recorded: Recorded, dtypes: tuple[torch.dtype, ...], exact: bool) -> Any:
    key = recorded.key, dtypes, exact
    kernel = _kernels.get(key)
    if kernel is None:
        with _compiling:
            text = source(recorded, dtypes, exact=exact)
            from lrprobe.engine import intrinsics

            kernel = _kernels[key] = import_generated(text, intrinsics.__file__).kernel
    return kernel


def is_addressable(tensor: Tensor) -> bool:
    """Whether a dense tensor's elements can be read from its address."""
    return (
        tensor.is_cpu
        and tensor.dtype in LOADED
        and tensor.layout is torch.strided
        and not is_negated(tensor)
        and (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        <= tensor.untyped_storage().nbytes()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)  # 0 for a wrapper subclass
    )
