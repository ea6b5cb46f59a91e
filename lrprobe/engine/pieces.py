"""The local pieces of parameters, and how their elements are read.

A piece is a plain tensor, the local shard of a ``DTensor``, or a range of a flat buffer. Each
becomes an ``Entry``: real tensors of parameter, gradient and state that match element by element.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from lrprobe.names import Located
from lrprobe.rules.base import Coded, Entry, Readable, Rule, Scalar, SparseRows

SAMPLE = 4096
"""Elements of a piece that are compared with the actual step; all elements of a smaller piece."""

RUN = 128
"""Length of a run of adjacent elements in the check sample of a larger piece."""

PLAIN = (Tensor, torch.nn.Parameter)

At: TypeAlias = slice | Tensor
"""Elements in row-major order: a range, or flat positions."""


@dataclass(slots=True, eq=False)
class WatchedParameter:
    """One parameter, or a range of a flat buffer, that a probe watches.

    Attributes:
        name: its name in the frame.
        group, group_name: index and name of its parameter group.
        place: returns the tensor from its optimizer; None while the optimizer steps others.
        rule: the rule of its optimizer; None if its rate is measured.
        tracked: flat positions, in the whole parameter, of elements that are recorded; or None.
        numel: its real elements (a complex one counts twice).
        initial_lr: value of the frame's column; None until first seen.
        span: its range in a flat buffer; None for a tensor of its own.
        layout: the layout over the ranks, if the tensor is a flat buffer; else None.
        content: digest of the values, to see whether ranks hold copies; "" if that is known.
        previous: the ``Samples`` with the gradient of the last recorded step, and its index there.
    """

    name: str
    group: int
    place: Located
    rule: Rule | None
    tracked: Tensor | None
    numel: int
    group_name: str = ""
    initial_lr: Scalar | None = None
    span: slice | None = None
    layout: Any = None
    content: str = ""
    previous: tuple[Any, int] | None = None


def local(tensor: Tensor) -> Tensor:
    """The local shard of a ``DTensor``; any other tensor unchanged."""
    if type(tensor) in PLAIN:  # the usual case, which must be fast
        return tensor
    # Not imported here: if the module is not loaded, the class has no instances.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return cast("Tensor", tensor.detach().to_local())
    return tensor


def local_real(tensor: Tensor, span: slice | None = None) -> Tensor:
    """The local shard as a real tensor (complex numbers as pairs), or a flat range of it."""
    tensor = local(tensor)
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.detach())
    return tensor if span is None else tensor.detach().reshape(-1)[span]


def entry_of(
    param: Tensor,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    grad: Tensor | None = None,
    span: slice | None = None,
) -> Entry:
    """Create the entry of a parameter; ``grad`` replaces its own gradient."""
    grad = local(cast("Tensor", param.grad) if grad is None else grad)
    if grad.is_sparse and grad.sparse_dim() == 1:
        gradient: Tensor | SparseRows = SparseRows.of(grad.detach())
    else:
        gradient = local_real(grad.to_dense() if grad.is_sparse else grad, span)
    if type(param) in PLAIN and span is None and not extra and not param.dtype.is_complex:
        return Entry(param, gradient, state)  # no copy of the state: rules do not write to it
    wide = None if span is None else param.shape
    entries = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = value.to_dense() if value.is_sparse else value  # noqa: PLW2901
            entries[name] = local_real(value, span if value.shape == wide else None)
        else:
            entries[name] = value
    return Entry(local_real(param, span), gradient, {**entries, **extra})


def precision(tensor: Tensor) -> torch.dtype:
    """The dtype of computations on a tensor: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=512)
def sample_runs(numel: int) -> tuple[int, int, int]:
    """The check sample of a piece: number of runs, run length, and stride between runs."""
    if numel <= SAMPLE:
        return 1, numel, max(numel, 1)
    runs = SAMPLE // RUN
    stride = (numel - RUN) // (runs - 1)
    odd = stride - (stride % 2 == 0)  # an even one might make every run start in the same column
    return runs, RUN, odd


def sample(readable: Readable, shape: torch.Size) -> Tensor:
    """The check sample of a tensor of this shape, or broadcast to it: flat, possibly a view."""
    runs, run, stride = sample_runs(shape.numel())
    if isinstance(readable, Tensor) and readable.shape == shape and readable.is_contiguous():
        flat = readable.detach().view(-1)
        return flat if runs == 1 else flat.as_strided((runs, run), (stride, 1)).reshape(-1)
    starts = torch.arange(runs, device=_device(readable)).unsqueeze(1) * stride
    at = starts + torch.arange(run, device=_device(readable))
    return read(readable, at.reshape(-1), shape)


def sampled(entry: Entry) -> Entry:
    """The check sample of an entry as an entry of its own."""
    shape = entry.param.shape
    state = {
        name: sample(value, shape) if is_per_element(value, shape) else value
        for name, value in entry.state.items()
    }
    grad = sample(entry.grad, shape)
    if isinstance(entry.grad, SparseRows):
        state["touched"] = sample(entry.grad.pattern(), shape)
    return Entry(sample(entry.param, shape), grad, state)


def is_strided(value: Any) -> TypeGuard[Tensor]:
    """Whether a state entry is a tensor that can be indexed; a sparse one has no strides."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def is_negated(tensor: Tensor) -> bool:
    """Whether a tensor has the negative bit; unlike ``is_neg``, this lets no other thread run."""
    c: Any = torch._C  # noqa: SLF001 - torch has no other way
    return bool(c._dispatch_keys(tensor).has(c.DispatchKey.Negative))  # noqa: SLF001 - the same


def host_value(number: Tensor) -> float:
    """The number in a tensor on the host; unlike ``item``, this lets no other thread run."""
    value: Any = number.reshape(()).tolist() if number.dim() else number.tolist()
    return float(value)


def is_per_element(value: Any, shape: torch.Size) -> bool:
    """Whether a state entry has one value per element, or broadcasts to the shape."""
    if isinstance(value, Coded):
        return True
    if not is_strided(value) or not (value.dim() or not shape):
        return False
    padded = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    pairs = zip(padded, shape, strict=False)
    return len(padded) == len(shape) and all(own in (1, size) for own, size in pairs)


def lies_flat(entry: Entry) -> bool:
    """Whether all element-wise tensors share one dense layout, and so can be read flat."""
    param, grad = entry.param, entry.grad
    shape, strides = param.shape, param.stride()
    if not isinstance(grad, Tensor) or grad.shape != shape or grad.stride() != strides:
        return False
    for value in entry.state.values():
        if is_strided(value):
            if value.shape == shape:
                if value.stride() != strides:
                    return False
            elif value.dim() and is_per_element(value, shape):
                return False
        elif isinstance(value, Coded):
            return False
    return param.is_contiguous() or is_dense(param)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory without gaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def flattened(entry: Entry) -> Entry:
    """The entry as flat tensors in memory order, if all share a layout; else unchanged."""
    if entry.param.is_contiguous() or not lies_flat(entry):
        return entry
    shape = entry.param.shape
    state = {
        name: _flat(value) if is_per_element(value, shape) else value
        for name, value in entry.state.items()
    }
    return Entry(_flat(entry.param), _flat(cast("Tensor", entry.grad)), state)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def read(readable: Readable, at: At, shape: torch.Size) -> Tensor:
    """Elements of a tensor of this shape, or broadcast to it: flat."""
    if isinstance(readable, Tensor):
        tensor = readable.detach()
        if tensor.shape == shape and tensor.is_contiguous():
            flat = tensor.view(-1)
            return flat[at] if isinstance(at, slice) else flat.index_select(0, at)
        if isinstance(at, slice):
            if at.start == 0 and at.stop >= shape.numel():
                return tensor.expand(shape).reshape(-1)
            at = _range(at, shape, tensor.device)
        coordinates = []
        for size in reversed(shape):  # `torch.unravel_index` would synchronize
            coordinates.append(at % size)
            at = at // size
        return tensor.expand(shape)[tuple(reversed(coordinates))] if shape else tensor.reshape(-1)
    if isinstance(at, slice):
        at = _range(at, shape, _device(readable))
    return readable.read(at)


def _range(at: slice, shape: torch.Size, device: torch.device) -> Tensor:
    return torch.arange(at.start or 0, min(at.stop, shape.numel()), device=device)


def _device(readable: Readable) -> torch.device:
    if isinstance(readable, SparseRows):
        return readable.values.device
    return readable.codes.device if isinstance(readable, Coded) else readable.device


def draw_tracked(name: str, numel: int, count: int) -> Tensor | None:
    """Draw the flat positions of tracked elements: at most ``count``, the same in every run."""
    if not count or not numel:
        return None
    generator = torch.Generator("cpu").manual_seed(
        zlib.crc32(name.encode("utf-8", "backslashreplace"))
    )
    if numel <= 1 << 16:
        drawn = torch.randperm(numel, generator=generator, device="cpu")[:count]
    else:
        drawn = torch.randint(numel, (2 * count,), generator=generator, device="cpu")
        drawn = torch.unique(drawn)
        drawn = drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[:count]]
    return torch.sort(drawn)[0]
