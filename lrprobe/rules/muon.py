"""Muon: momentum, orthogonalised matrix by matrix."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, Whole


def _orthogonalise(matrix: Tensor, group: Any) -> Tensor:
    """Newton–Schulz iteration towards UVᵀ, in bfloat16 like torch (Jordan et al. 2024)."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        polynomial = gram.addmm(gram, gram, beta=b, alpha=c)
        x = x.addmm(polynomial, x, beta=a)
    return cast("Tensor", x.T.contiguous() if tall else x)


def _whole(whole: Whole) -> dict[str, Scalar]:
    group, buffer = whole.group, whole.state["momentum_buffer"]
    if group["nesterov"]:
        buffer = whole.entry.grad.lerp(buffer, group["momentum"])  # type: ignore[union-attr]
    return {"orthogonal": _orthogonalise(buffer, group), "adjustment": _adjustment(whole)}


def _adjustment(whole: Whole) -> float:
    """Factor of lr that depends on the shape (``torch/optim/_muon.py``, ``_adjust_lr``)."""
    rows, columns = whole.entry.param.shape[:2]
    how = whole.group.get("adjust_lr_fn")
    if how is None or how == "original":
        return math.sqrt(max(1.0, rows / columns))
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if how == "spectral_unclamped":  # from torch 2.14
        return math.sqrt(rows / columns)
    return 1.0


def _muon(s: Slice) -> Update:
    """θ ← θ·(1 − lr·λ) − lr·adjustment·orthogonal.

    Jordan et al. 2024; ``torch/optim/_muon.py``.
    """
    adjustment: Any = s.scalar("adjustment")
    return Update(s.lr * adjustment, s["orthogonal"], s.lr * s.group["weight_decay"])


def _buffer(s: Slice) -> dict[str, Scalar]:
    """b ← μb + (1−μ)g."""
    kept = s.old("momentum_buffer")
    return {"momentum_buffer": kept + (1 - s.group["momentum"]) * (s.grad - kept)}


MUON = Rule("muon", _muon, whole=_whole, advance=_buffer, shared_rate=True)
