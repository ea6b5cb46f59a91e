"""LAMB and LARS: a rate per layer, proportional to the norm of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, Whole
from lrprobe.rules.external.common import decoupled, refuse

_ITERATIONS = 8


def norm_before(param: Tensor, _: Mapping[str, Any], __: Mapping[str, Any]) -> dict[str, Scalar]:
    """‖θ‖ before the step, in float64."""
    return {"norm_before": torch.linalg.vector_norm(param, dtype=_accumulator(param)).double()}


def _accumulator(param: Tensor) -> torch.dtype | None:
    """Sum half precision in float32; None otherwise, as a complex norm accepts no other dtype."""
    return torch.float32 if param.dtype in (torch.bfloat16, torch.float16) else None


def ratio(above: Scalar, below: Scalar) -> Tensor:
    """above/below, or 1 if either is 0."""
    above, below = torch.as_tensor(above), torch.as_tensor(below)
    usable = (above > 0) & (below > 0)
    return torch.where(usable, above / torch.where(usable, below, 1.0), 1.0)


def _adapts(group: Mapping[str, Any]) -> bool:
    """Whether timm uses the trust ratio: only with weight decay, or with ``always_adapt``."""
    return bool(group["weight_decay"] != 0 or group["always_adapt"])


def _lamb_parts(s: Slice) -> tuple[Tensor, Tensor]:
    """m̂ and √v̂ (timm)."""
    beta1, beta2 = s.group["betas"]
    step: Any = s.group["step"]
    t = torch.as_tensor(step).double() if s.group["bias_correction"] else None
    if t is None:
        return s["exp_avg"], s["exp_avg_sq"].sqrt()
    return s["exp_avg"] / (1 - beta1**t), (s["exp_avg_sq"] / (1 - beta2**t)).sqrt()


def _lamb_normalised(s: Slice) -> Tensor:
    direction, rms = _lamb_parts(s)
    normalised: Tensor = direction / (rms + s.group["eps"])
    return normalised


def _lamb_whole(whole: Whole) -> dict[str, Scalar]:
    """The layer's trust ratio ‖θ‖/‖u‖, u = a + λ·θ, where a = m̂/(√v̂+ε) and θ is before the step.

    Only the norm of θ was kept. Because θ_after = θ − x·u with x = lr·ratio, the product of θ and
    a follows from θ_after for a given x. So x is the fixed point of lr·‖θ‖/‖u(x)‖; the iteration
    converges fast, because x·λ is small.
    """
    group = whole.group
    if not _adapts(group):
        return {"trust": 1.0}
    lr = torch.as_tensor(group["lr"], dtype=torch.float64)
    shrunk, weight_decay = _decay_before(lr, group)
    norm = torch.as_tensor(whole.state["norm_before"]) * (1 - shrunk)
    aa = whole.sum(lambda s: _lamb_normalised(s).square())
    if weight_decay == 0:
        trust = ratio(norm, aa.sqrt())
        return {"trust": trust.clamp(max=1.0) if group["trust_clip"] else trust}
    ap = whole.sum(lambda s: _lamb_normalised(s) * s.param)
    trust = ratio(norm, aa.sqrt())
    for _ in range(_ITERATIONS):
        x = lr * trust
        product = (ap + x * aa) / (1 - x * weight_decay)  # of a and θ before the step
        square = aa + 2 * weight_decay * product + (weight_decay * norm) ** 2
        trust = ratio(norm, square.clamp(min=0).sqrt())
        trust = trust.clamp(max=1.0) if group["trust_clip"] else trust
    return {"trust": trust}


def _decay_before(lr: Tensor, group: Mapping[str, Any]) -> tuple[Scalar, float]:
    """The decay applied to θ before the norms are computed, and the λ inside u (timm)."""
    if not group.get("decoupled_decay"):
        return 0.0, group["weight_decay"]
    scale = lr**2 / group["max_lr_snapshot"] if group["corrected_weight_decay"] else lr
    return scale * group["weight_decay"], 0.0


def _lamb(s: Slice) -> Update:
    """lr·‖θ‖/‖u‖/(√v̂+ε) ⊙ m̂, u = m̂/(√v̂+ε) + λ·θ; the decay is scaled with the layer's rate too.

    You et al. 2020, algorithm 2; ``timm/optim/lamb.py``.
    """
    refuse(s, "caution")
    direction, rms = _lamb_parts(s)
    eps = s.group["eps"]
    shrunk, inside = _decay_before(s.lr, s.group)
    rate = s.lr * torch.as_tensor(s.scalar("trust"))
    return Update(
        rate / (rms + eps), direction, shrunk + rate * inside, rms_grad=rms, eps=(rms, eps)
    )


def _lamb_stored_trust(s: Slice) -> Update:
    """LAMB as in ``_lamb``, with the trust ratio from the state, and v without bias correction.

    ``pytorch_optimizer/optimizer/lamb.py``.
    """
    refuse(s, "rectify", "adanorm")
    beta1, _ = s.group["betas"]
    rms, eps = s["exp_avg_sq"].sqrt(), s.group["eps"]
    correction = 1.0 if s.group.get("adam_debias") else 1 - beta1 ** s.group["step"]
    trust: Any = 1.0 if s.group["adam"] else s.scalar("trust_ratio")
    decay = decoupled(s)
    if not s.group["weight_decouple"]:
        decay = s.lr / correction * trust * s.group["weight_decay"]
    return Update(
        effective_lr=s.lr * trust / (rms + eps),
        direction=s["exp_avg"] / correction,
        decay=decay,
        rms_grad=rms,
        eps=(rms, eps),
    )


def _lars_whole(whole: Whole) -> dict[str, Scalar]:
    group = whole.group
    if not _adapts(group):
        return {"trust": 1.0}
    norm = torch.as_tensor(whole.state["norm_before"])
    grad = whole.sum(lambda s: s.grad.square()).sqrt()
    below = grad + norm * group["weight_decay"] + group["eps"]
    usable = (norm > 0) & (grad > 0)
    trust = torch.where(usable, group["trust_coeff"] * norm / below, 1.0)
    return {"trust": (trust / group["lr"]).clamp(max=1.0) if group["trust_clip"] else trust}


def _lars(s: Slice) -> Update:
    """lr·c·‖θ‖/(‖g‖+λ·‖θ‖) ⊙ (g + λ·θ), or the momentum buffer divided by the trust ratio.

    You et al. 2017, algorithm 1; ``timm/optim/lars.py``.
    """
    momentum = s.group["momentum"]
    trust = torch.as_tensor(s.scalar("trust"))
    rate = s.lr * trust
    direction = s.grad
    if momentum:
        direction = s["momentum_buffer"] / trust
        if s.group["nesterov"]:
            direction = s.solve_decay(s.grad + momentum * direction, rate)
    elif _adapts(s.group):
        direction = s.solve_decay(direction, rate)
    return Update(rate, direction)


LAMB = Rule("lamb", _lamb, before=norm_before, whole=_lamb_whole)
LAMB_STORED_TRUST = Rule("lamb", _lamb_stored_trust)
LARS = Rule("lars", _lars, before=norm_before, whole=_lars_whole, needs_grad=True)
