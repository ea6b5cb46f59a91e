"""What the conventions of other packages have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from lrprobe.rules.base import Scalar, Slice


def refuse(s: Slice, *options: str) -> None:
    """Say that a rule does not hold under these options.

    Raises:
        NotImplementedError: if one of them is on; the parameter is then measured.
    """
    for option in options:
        if s.group.get(option):
            raise NotImplementedError(f"the rule does not support the option {option!r}")


def decoupled(s: Slice, lr: Scalar | None = None) -> Scalar:
    """λ·lr where the decay is decoupled; λ alone where it is fixed (pytorch_optimizer)."""
    if not s.group.get("weight_decouple", True):
        return 0.0
    weight_decay = s.group["weight_decay"]
    rate = s.lr if lr is None else lr
    return float(weight_decay) if s.group.get("fixed_decay") else rate * weight_decay


def undecayed(s: Slice, moved: Tensor, *, coupled: bool | None = None) -> Tensor | None:
    """The gradient, from a ``p.grad`` to which λ·θ_before was added in place.

    Args:
        s: the slice.
        moved: effective_lr ⊙ direction of this step.
        coupled: whether it was; by default pytorch_optimizer's options tell.
    """
    if coupled is None:
        coupled = not s.group.get("weight_decouple", True)
    weight_decay = s.group["weight_decay"]
    if not coupled or weight_decay == 0:
        return None
    return without_decay(s, s.grad, s.param, moved)


def without_decay(s: Slice, total: Tensor, after: Tensor, moved: Tensor) -> Tensor:
    """Total − λ·(after + moved), and 0 where only rounding in the parameter's dtype is left."""
    weight_decay = s.group["weight_decay"]
    rest = total - weight_decay * (after + moved)
    rounding = 4 * torch.finfo(s.dtype).eps * weight_decay * (after.abs() + moved.abs())
    kept: Tensor = rest * (rest.abs() > rounding)
    return kept
