"""Transformers' Adafactor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, Whole


def _whole(whole: Whole) -> dict[str, Scalar]:
    state = whole.state
    figures: dict[str, Scalar] = {}
    if state.get("exp_avg_sq_row") is not None:
        rows = state["exp_avg_sq_row"]
        figures["row"] = (rows / rows.mean(dim=-1, keepdim=True)).unsqueeze(-1)
        figures["column"] = state["exp_avg_sq_col"].unsqueeze(-2)
    # The slices below read it from the entry's state.
    whole.entry.add(figures)
    squares = whole.sum(lambda s: s.grad.square() / _second_moment(s))
    figures["rms_scaled"] = (squares / max(whole.entry.param.numel(), 1)).sqrt()
    return figures


def _second_moment(s: Slice) -> Tensor:
    return s["row"] * s["column"] if "row" in s else s["exp_avg_sq"]


def _rate(s: Slice) -> Tensor:
    """α_t: lr or 1/√t, times the root mean square of the parameter before the step."""
    group, t = s.group, s.t()
    rate = s.lr if not group["relative_step"] else t**-0.5
    if group["relative_step"]:
        limit = 1e-6 * t if group["warmup_init"] else torch.full_like(t, 1e-2)
        rate = torch.minimum(rate, limit)
    if group["scale_parameter"]:
        rms: Any = s.scalar("RMS")
        rate = rate * torch.as_tensor(rms, dtype=torch.float64).clamp(min=group["eps"][1])
    return rate


def _adafactor(s: Slice) -> Update:
    """α_t/max(1, RMS(u)/d)/√v ⊙ g, with u = g/√v.

    Shazeer and Stern 2018, algorithms 4 and 5; ``transformers/optimization.py``. The first moment,
    if there is one, averages such steps, so the direction is that average over the rate. ε₁ is
    added to g².
    """
    group = s.group
    alpha = _rate(s)
    scaled: Any = s.scalar("rms_scaled")
    clip = (torch.as_tensor(scaled) / group["clip_threshold"]).clamp(min=1.0)
    root = _second_moment(s).sqrt()
    effective_lr = alpha / clip / root
    direction = s["exp_avg"] / effective_lr if group["beta1"] is not None else s.grad
    return Update(
        effective_lr=effective_lr,
        direction=direction,
        decay=alpha * group["weight_decay"],
        rms_grad=root,
        eps=(s.grad.square(), group["eps"][0]),
    )


ADAFACTOR = Rule("adafactor", _adafactor, whole=_whole, needs_grad=True)
