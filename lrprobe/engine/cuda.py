"""Computes figures with generated Triton kernels: a few launches for all pieces of a kind.

Nothing here synchronizes with the device.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.block_printer import TYPES, Sum, source
from lrprobe.engine.distribution import BINS, FOLDED, Bins
from lrprobe.engine.generated import cache_folder, import_generated
from lrprobe.engine.pieces import is_negated, sample_runs
from lrprobe.engine.printer import differing
from lrprobe.engine.program import Symbol
from lrprobe.engine.recording import Recorded
from lrprobe.rules.base import to_device

_CHUNK = 4096
"""Elements of a chunk, which one program processes; doubled until the chunks are not too many."""
_MAX_CHUNKS = 1 << 17
_MAX_COUNTED = 1 << 10
"""Pieces counted in one launch, which bounds the memory of their counts."""
_ALIGNED = 16
"""Bytes that a thread loads at once."""
_PARTS = 8
"""Programs that fold the counts of a piece."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


DEVICES = {"cpu" if interpreted() else "cuda"}
"""Types of devices whose memory kernels can read."""


def unavailable() -> str:
    """Why no kernel can be compiled here; empty if one can be."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if not interpreted():
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if torch.version.cuda is None:
            return "this torch was not built with NVIDIA's CUDA"
        compilers = [os.environ.get("CC", ""), "clang", "gcc", "cc"]
        if not any(shutil.which(name) for name in compilers if name):
            return "there is no C compiler, which Triton needs"
    return "" if cache_folder() else "there is no writable folder for generated code"


def is_addressable(tensor: Tensor) -> bool:
    """Whether a dense tensor's elements can be read from its address."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in TYPES
        and tensor.layout is torch.strided
        and not is_negated(tensor)
        and (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        <= tensor.untyped_storage().nbytes()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def gather(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Copy the check samples of several tensors to one byte buffer; also return their offsets."""
    from lrprobe.engine import blocks

    runs = np.array([sample_runs(t.numel()) for t in tensors], np.int64).reshape(-1, 3)
    units = np.array([t.element_size() // 2 for t in tensors], np.int64)
    room = -(-(runs[:, 0] * runs[:, 1] * units) // _ALIGNED) * _ALIGNED
    starts = np.cumsum(room) - room
    device = tensors[0].device
    buffer = torch.empty(2 * int(room.sum()), dtype=torch.uint8, device=device)
    addresses = np.array([t.data_ptr() for t in tensors], np.int64)
    columns = addresses, runs[:, 0], runs[:, 1] * units, runs[:, 2] * units, starts
    table = to_device(torch.from_numpy(np.stack(columns, 1)), device)
    launch(blocks.copy, (len(tensors),), table, buffer.view(torch.int16), N=1024)
    return buffer, (2 * starts).tolist()


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
    module = _module(recorded, tuple(dtypes))
    columns = _columns(recorded)  # before `table`: it adds the figures' scalars to the program's
    scalars = recorded.program.table(recorded.device)
    counted = recorded.rate is not None and recorded.moves is not None
    size = _MAX_COUNTED if counted else len(numel)
    results = [
        _figures(
            module,
            addresses[at : at + size],
            numel[at : at + size],
            scalars[at : at + size],
            columns,
            exact=exact,
            counted=counted,
            device=recorded.device,
        )
        for at in range(0, len(numel), size)
    ]
    tables, folds = zip(*results, strict=True)
    if len(tables) == 1:
        return tables[0], None, folds[0] if counted else None
    return torch.cat(tables), None, torch.cat(folds) if counted else None


def _figures(
    module: ModuleType,
    addresses: NDArray[np.int64],
    numel: NDArray[np.int64],
    scalars: Tensor,
    columns: NDArray[np.int64],
    *,
    exact: bool,
    counted: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    import triton.language as tl

    from lrprobe.engine import blocks

    pieces = len(numel)
    host, full, rest = _table(addresses, numel, scalars.shape[1], columns)
    table = torch.from_numpy(host)
    if scalars.device.type == "cpu":  # one copy for both
        known = scalars.contiguous().view(torch.int64).reshape(-1)
        table = to_device(torch.cat([table, known]), device)
        scalars = table[len(host) :].view(torch.float64)
    else:
        table = to_device(table, device)
    width, rows, n = int(columns[0]), full + rest, len(columns) // 3
    single, double = (1, rows * width) if exact else (rows * width, rows * width)
    out = torch.empty(single, dtype=torch.float32, device=device)
    wide = torch.empty(double, dtype=torch.float64, device=device)
    room = pieces * (BINS + 1) if counted else 1
    counts = torch.zeros(room, dtype=torch.int32, device=device) if counted else out
    seen = counts[pieces * BINS :] if counted else out
    result = torch.empty((pieces, n), dtype=torch.float64, device=device)
    folds = torch.empty((pieces if counted else 0, FOLDED), dtype=torch.float64, device=device)
    given = table, scalars, out, wide, counts, seen
    real = tl.float64 if exact else tl.float32
    for count, whole in ((full, True), (rest, False)):
        if count:
            constants = {"REAL": real, "WIDE": real, "LANES": lanes(whole, exact)}
            launch(module.kernel, (count,), *given, FULL=whole, **constants)
    recounted = counted and bool((numel > blocks.ALL.value).any())
    if not exact or recounted:
        constants = {"REAL": real, "WIDE": tl.float64, "LANES": lanes(False, True)}
        launch(module.again, (rows,), *given, **constants)
    grid = pieces, 1 + _PARTS * counted
    last = result, folds if counted else result, n
    size = {"N": 64 if rows > 64 * pieces else 8, "C": 1 << (n - 1).bit_length()}
    launch(blocks.combine, grid, table, scalars, out, wide, counts, *last, ONLY_WIDE=exact, **size)
    return result, folds


def lanes(full: bool, wide: bool) -> int:
    """Adjacent elements that a thread processes at once: as many as fit in its registers."""
    if interpreted():
        return 8
    return (2 if wide else 4) if full else (1 if wide else 2)


def _table(
    addresses: NDArray[np.int64], numel: NDArray[np.int64], scalars: int, columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int, int]:
    """The table that kernels read, and the numbers of full chunks and of other chunks."""
    from lrprobe.engine import blocks

    chunk = _CHUNK
    while numel.sum() > _MAX_CHUNKS * chunk:
        chunk *= 2
    aligned = (addresses % _ALIGNED == 0).all(1) & (numel.max() > chunk)  # else one launch does
    full = np.where(aligned, numel // chunk, 0)
    rest = -(-(numel - full * chunk) // chunk)
    first = [np.concatenate([[0], np.cumsum(each)]) for each in (full, rest)]
    parts = [np.concatenate(first), full * chunk, numel, addresses.reshape(-1), columns]
    begin = np.cumsum([blocks.HEAD.value, *map(len, parts)])
    head = np.zeros(blocks.HEAD.value, np.int64)
    rounds = len(numel).bit_length()
    numbers = len(numel), rounds, chunk, int(full.sum()), scalars, *begin[:-1]
    head[: len(numbers)] = numbers
    padding = np.zeros(-(len(head) + sum(map(len, parts))) % 2, np.int64)  # keeps scalars aligned
    return np.concatenate([head, *parts, padding]), int(full.sum()), int(rest.sum())


def _columns(recorded: Recorded) -> NDArray[np.int64]:
    """Tells ``combine`` how to make each figure: row width, then (kind, place, count) each."""
    from lrprobe.engine import blocks as b

    sums = [Sum(recorded, i) for i in differing(recorded)]
    place = {one.name: at for at, one in enumerate(sums)}
    by_name = {one.name: one for one in sums}
    plain = {"sum": b.SUM, "min": b.MIN, "max": b.MAX}
    shared = {"sum": b.SHARED, "min": b.SHARED_MIN, "max": b.SHARED_MAX}
    about = [len(sums) + 1]
    for figure, value in zip(recorded.table, recorded.values, strict=True):
        moving = place.get("moving", -1) if figure.moving else -1
        if isinstance(value, Symbol):
            kind = plain[figure.merge]
            if by_name[figure.name].pivoted:
                kind = b.MEAN if figure.name == "rate" else b.SPREAD
            about += [kind.value, place[figure.name], moving]
        elif value is None:
            about += [b.NOTHING.value, 0, -1]
        else:
            about += [shared[figure.merge].value, recorded.program.scalar(value), moving]
    return np.array(about, np.int64)


def launch(program: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first tensor."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        program[grid](*args, **constants, enable_fp_fusion=True)


_modules: dict[Any, ModuleType] = {}
_compiling = threading.Lock()


def _module(recorded: Recorded, dtypes: tuple[torch.dtype, ...]) -> ModuleType:
    key = recorded.key, dtypes
    module = _modules.get(key)
    if module is None:
        with _compiling:
            from lrprobe.engine import blocks

            text = source(recorded, dtypes)
            module = _modules[key] = import_generated(text, blocks.__file__)
    return module
