"""Adafactor: a factored second moment, relative step sizes and clipping by the whole parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, Whole


def _before(param: Tensor, _: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Scalar]:
    eps1 = group["eps"][0]
    return {
        "rms_param": torch.linalg.vector_norm(param).double() / max(param.numel(), 1) ** 0.5,
        "eps1": torch.finfo(param.dtype).eps if eps1 is None else eps1,
    }


def _whole(whole: Whole) -> dict[str, Scalar]:
    state = whole.state
    figures: dict[str, Scalar] = {}
    if state.get("row_var") is not None:
        mean = state["row_var"].mean(dim=-2, keepdim=True)
        figures["row_mean"] = mean.clamp(min=state["eps1"])
    # The slices below read it from the entry's state.
    whole.entry.add(figures)
    squares = whole.sum(lambda s: (s.grad / _denominator(s)).square())
    figures["rms_scaled"] = (squares / max(whole.entry.param.numel(), 1)).sqrt()
    return figures


def _second_moment(s: Slice) -> Tensor:
    if "row_var" in s:
        return s["row_var"] * s["col_var"] / s["row_mean"]
    return s["variance"]


def _denominator(s: Slice) -> Tensor:
    eps1: Any = s.scalar("eps1")
    return _second_moment(s).clamp(min=eps1 * eps1).sqrt()


def _adafactor(s: Slice) -> Update:
    """α_t/max(1, RMS(u)/d) · 1/√max(v, ε₁²) ⊙ g, with u = g/√v.

    Shazeer and Stern 2018, algorithms 4 and 5; ``torch/optim/_adafactor.py``.
    """
    lr: Any = s.lr
    _, eps2 = s.group["eps"]
    t = s.t()
    relative = torch.clamp(t**-0.5, max=lr)
    alpha = torch.clamp(_column(s.scalar("rms_param")), min=eps2) * relative
    clip = torch.clamp(_column(s.scalar("rms_scaled")) / s.group["d"], min=1.0)
    eps1: Any = s.scalar("eps1")
    moment = _second_moment(s)
    denominator = moment.clamp(min=eps1 * eps1).sqrt()
    return Update(
        effective_lr=alpha / clip / denominator,
        direction=s.grad,
        decay=lr * s.group["weight_decay"],
        rms_grad=moment.sqrt(),
        eps=(moment, eps1 * eps1),
    )


def _column(value: Scalar) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _variance(s: Slice) -> dict[str, Scalar]:
    """v ← v + t^decay·(g² − v), if v is not factored."""
    if "variance" not in s:
        return {}
    kept = s.old("variance")
    return {"variance": kept + s.t() ** s.group["beta2_decay"] * (s.grad * s.grad - kept)}


ADAFACTOR = Rule("adafactor", _adafactor, before=_before, whole=_whole, advance=_variance)
