"""Tensors to additive figures, on the device: nothing here reads a value that is not on the host.

A row of figures belongs to one parameter; its columns are ``PARTS``. All of them are sums, extremes
or a mean with its squared deviations, so that rows of shards, modules and groups merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrprobe.rules.base import Entry, Scalar, Slice, SparseRows, Update
from lrprobe.summary.reading import block_size, blocks, precision

PARTS = (
    "decay",
    "rate_mean",
    "rate_m2",  # Σ(rate − mean)²
    "rate_log",  # Σ log rate
    "rate_min",
    "rate_max",
    "dd",  # sums of products: d direction, e rate ⊙ direction, u −Δθ, p parameter after, g gradient
    "ee",
    "uu",
    "ug",
    "pp",
    "gg",
    "zeros",
    "rms_grad",
    "rms_update",
    "below_eps",
    "nonfinite",
)
ADDITIVE = tuple(
    name for name in PARTS if name not in ("decay", "rate_mean", "rate_min", "rate_max")
)
"""Those that are sums over elements."""
CHECKS = (
    "checked",  # elements in the check sample
    "lost",
    "residual",  # Σ of squares, beyond one ulp
    "intended",
    "observed",
    "sample_gg",
    "sample_og",  # Σ observed · gradient
)

BINS = 1 << 14
SHIFT = 17
PER_OCTAVE = 64
"""A bin of the fine histogram: the upper 14 bits below the sign of a float32, 64 bins an octave."""
ROW = 1024
"""Elements that are added up at once. Along long rows torch adds equal numbers up in float32 with
errors of 1e-4; along one row of very many it also takes longer."""


def scalar(value: Scalar, like: Tensor) -> Tensor:
    """As float64 where ``like`` is; the host does not wait for it to be there."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, torch.float64, non_blocking=True)
    return like.new_full((), value, dtype=torch.float64)  # a tensor made there, not brought there


def is_scalar(rate: Scalar, like: Tensor) -> bool:
    """Whether all elements share the rate."""
    return not isinstance(rate, Tensor) or rate.shape != like.shape


def gradient(s: Slice, update: Update) -> Tensor:
    """The gradient of the step, also where the optimizer has overwritten it."""
    return s.grad if update.grad is None else update.grad


def check_figures(s: Slice, update: Update, before: Tensor) -> Tensor:
    """The update as reconstructed against the one observed, on a sample: (rows, CHECKS).

    Args:
        s: the sample after the step, in float64.
        update: what the rule says of it.
        before: the parameter before the step, in its own dtype, whose rounding is no error:
            (rows, n).
    """
    old = before.double()
    change = intended(update, s)
    observed = s.param - old
    grad = gradient(s, update)
    # A decay is a rounding more: of the factor 1 − decay, and of its product with θ.
    roundings = 1.0 if _is_zero(update.decay) else 1.5
    residual = (change - observed).abs_().sub_(ulp(old, before.dtype), alpha=roundings)
    # Comparisons into floats, which take a fifth of the time of those into bools.
    lost = torch.ne(change, 0, out=torch.empty_like(old))
    lost.mul_(torch.eq(old, s.param, out=torch.empty_like(old)))
    squares = [
        torch.linalg.vector_norm(each, dim=1).square()
        for each in (residual.clamp_(min=0), change, observed, grad)
    ]
    return torch.stack(
        [
            torch.full_like(old[:, 0], old.shape[1]),
            lost.sum(1),
            *squares,
            (observed * grad).sum(1),
        ],
        dim=1,
    )


def measured_figures(s: Slice, grad: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What can be said without a rule: CHECKS, and |Δθ|/|g| where g ≠ 0 (NaN elsewhere)."""
    observed = s.param - before.double()
    nan = torch.full_like(observed[:, 0], torch.nan)
    checks = torch.stack(
        [
            torch.full_like(nan, observed.shape[1]),
            nan,
            nan,
            nan,
            observed.square().sum(1),
            grad.square().sum(1),
            (observed * grad).sum(1),
        ],
        dim=1,
    )
    return checks, measured_rates(observed, grad)


def measured_rates(observed: Tensor, grad: Tensor) -> Tensor:
    """|Δθ|/|g|, NaN where the gradient is 0."""
    return torch.where(grad == 0, torch.nan, observed.abs() / grad.abs())


def intended(update: Update, s: Slice) -> Tensor:
    """Δθ before any rounding, from the state after the step alone: (as ``s.param``)."""
    moved: Tensor = update.effective_lr * update.direction
    if _is_zero(update.decay):
        return -moved
    return (moved + update.decay * s.param) / (update.decay - 1)


def _is_zero(decay: Scalar) -> bool:
    return not isinstance(decay, Tensor) and decay == 0


_EXPONENT = 0x7FF << 52  # of a float64


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of float64 values to the next one in ``dtype``: (as ``values``)."""
    info = torch.finfo(dtype)
    power = (values.contiguous().view(torch.int64) & _EXPONENT).view(torch.float64)
    return power.mul_(info.eps).clamp_(min=info.smallest_normal * info.eps)


def suspicious(parts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows of PARTS whose float32 sums may have overflowed, underflowed or met a NaN: (rows,).

    They are computed again, exactly.
    """
    named = dict(zip(PARTS, parts.T, strict=True))
    optional = ("rms_grad", "rms_update", "below_eps")
    wrong = ~np.isfinite([named[k] for k in PARTS if k not in optional]).all(axis=0)
    for name in optional:
        wrong |= np.isinf(named[name])
    squares = np.array([named[k] for k in ("dd", "ee", "pp", "gg")])
    wrong |= (squares < 1e-24).any(axis=0)
    same = named["rate_min"] == named["rate_max"]
    wrong |= ~same & ((named["rate_min"] < 1e-37) | (named["rate_max"] > 1e37))
    return cast("NDArray[np.bool_]", wrong | (~same & (named["rate_m2"] < 1e-24)))


def state_like(entry: Entry) -> Iterator[str]:
    """Names of the floating state entries that are shaped like the parameter.

    Those that only look like a tensor (low-bit states) cannot be read as one.
    """
    for name, value in entry.state.items():
        if (
            isinstance(value, Tensor)
            and value.shape == entry.param.shape
            and value.is_floating_point()
            and not is_traceable_wrapper_subclass(value)
        ):
            yield name


def plain_figures(entries: Sequence[Entry], *, counts: bool) -> dict[str, Tensor]:
    """What needs no rule, of whole parameters, exactly: name in PARTS to (entries,).

    Args:
        entries: the parameters.
        counts: whether zeros, and what is not finite in the optimizer's state, are counted too.
    """
    rows = []
    none = torch.zeros((), dtype=torch.float64, device=entries[0].param.device)
    for entry in entries:
        grad = entry.grad.values if isinstance(entry.grad, SparseRows) else entry.grad
        squares = [square_sum(entry.param), square_sum(grad)]
        tensors, sums, zero = [entry.param, grad], squares, none
        if counts:
            missing = entry.param.numel() - grad.numel()  # a sparse gradient has no others
            zero = zeros(grad) + missing
            states = [entry.state[name] for name in state_like(entry)]
            tensors = tensors + states
            sums = squares + [tensor.sum(dtype=torch.float64) for tensor in states]
        # Their sums tell whether anything is not finite; a device is not asked, but counts.
        sound = grad.device.type == "cpu" and all(math.isfinite(each.numpy()) for each in sums)
        rows.append(torch.stack([*squares, zero, none if sound else _nonfinite_count(tensors)]))
    return dict(zip(("pp", "gg", "zeros", "nonfinite"), torch.stack(rows).T, strict=True))


def zeros(tensor: Tensor) -> Tensor:
    """How many elements are 0, without a copy of the tensor's size: 0-dim, int64."""
    count = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in blocks(tensor.shape, block_size(torch.float64)):
        count = count + torch.count_nonzero(tensor[block])
    return tensor.numel() - count


def _nonfinite_count(tensors: Sequence[Tensor]) -> Tensor:
    same = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]
    count = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for block in blocks(tensors[0].shape, block_size(torch.float64)):
        finite = torch.isfinite(tensors[0][block])
        for tensor in same[1:]:
            finite = finite & torch.isfinite(tensor[block])
        count = count + torch.count_nonzero(~finite)
    for tensor in tensors:  # the rows of a sparse gradient
        if tensor.shape != tensors[0].shape:
            count = count + torch.count_nonzero(~torch.isfinite(tensor))
    return count


def square_sum(tensor: Tensor) -> Tensor:
    """Σx² in float64, without a copy of the tensor's size: 0-dim."""
    fast = precision(tensor)
    total = _square_sum(tensor, fast)
    if tensor.device.type == "cpu" and fast is torch.float32:
        safe = 1e-24 < float(total.numpy()) < np.inf
        return total if safe else _square_sum(tensor, torch.float64)
    return total if fast is torch.float64 else _square_sum(tensor, torch.float64)


def _square_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype and tensor.is_contiguous():
        flat = tensor.view(-1)
        even = len(flat) // ROW * ROW
        norms = torch.linalg.vector_norm(flat[:even].view(-1, ROW), dim=1)
        total = _sum_of_squares(norms)
        return total if even == len(flat) else total + _sum_of_squares(flat[even:])
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in blocks(tensor.shape, block_size(torch.float64)):
        total = total + _sum_of_squares(tensor[block].reshape(-1).to(dtype))
    return total


def _sum_of_squares(values: Tensor) -> Tensor:
    return values.square().sum(dtype=torch.float64)
