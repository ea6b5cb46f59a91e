"""Helpers for conventions that several packages share."""

from __future__ import annotations

import torch
from torch import Tensor

from lrprobe.rules.base import Scalar, Slice


def refuse(s: Slice, *options: str) -> None:
    """Refuse options that a rule does not support.

    Raises:
        NotImplementedError: if one of them is on; the parameter is then measured.
    """
    for option in options:
        if s.group.get(option):
            raise NotImplementedError(f"the rule does not support the option {option!r}")


def decoupled(s: Slice, lr: Scalar | None = None) -> Scalar:
    """λ·lr if the decay is decoupled, λ if it is fixed (pytorch_optimizer), 0 if it is coupled."""
    if not s.group.get("weight_decouple", True):
        return 0.0
    weight_decay = s.group["weight_decay"]
    rate = s.lr if lr is None else lr
    return float(weight_decay) if s.group.get("fixed_decay") else rate * weight_decay


def undecayed(s: Slice, moved: Tensor, *, coupled: bool | None = None) -> Tensor | None:
    """The gradient without the decay λ·θ_before that the optimizer added to ``p.grad`` in place.

    None if no decay was added.

    Args:
        s: the slice.
        moved: effective_lr ⊙ direction of this step.
        coupled: whether the decay is coupled; by default from pytorch_optimizer's options.
    """
    if coupled is None:
        coupled = not s.group.get("weight_decouple", True)
    weight_decay = s.group["weight_decay"]
    if not coupled or weight_decay == 0:
        return None
    return without_decay(s, s.grad, s.param, moved)


def without_decay(s: Slice, total: Tensor, after: Tensor, moved: Tensor) -> Tensor:
    """total − λ·(after + moved), or 0 if the difference is within rounding of the dtype."""
    weight_decay = s.group["weight_decay"]
    grad = total - weight_decay * (after + moved)
    rounding = 4 * torch.finfo(s.dtype).eps * weight_decay * (after.abs() + moved.abs())
    kept: Tensor = grad * (grad.abs() > rounding)
    return kept
