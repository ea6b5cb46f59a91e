"""Optimizers whose state is kept in 8 or 4 bits: bitsandbytes and torchao.

They decode the state, take the step, and round the state again. The stored state therefore
determines the step only up to that rounding, for which ``Rule.tolerance`` allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Coded, Rule, Scalar, Slice, Update, Whole
from lrprobe.rules.external import layerwise, lion

_BLOCK = 256
"""Adjacent elements that share a scale in bitsandbytes."""


def _bounded_below(v: Tensor, m: Tensor, grad: Tensor, betas: Sequence[float]) -> Tensor:
    """The second moment, raised to its lower bound, because it may have been rounded to 0.

    v is at least (1−β₂)·g², the share of this gradient, and by Cauchy and Schwarz at least
    m²·(1−β₂)·(1−β₁²/β₂)/(1−β₁)². Without the bound, the rate would be unbounded.
    """
    beta1, beta2 = betas[:2]
    share = max(0.0, (1 - beta2) * (1 - beta1**2 / beta2)) / (1 - beta1) ** 2
    return torch.maximum(v, torch.maximum((1 - beta2) * grad.square(), share * m.square()))


# --- bitsandbytes -------------------------------------------------------------------------------


def _bnb_whole(whole: Whole) -> dict[str, Any]:
    """The moments under their usual names, decoded on reading."""
    state, shape = whole.state, whole.entry.param.shape
    moments: dict[str, Any] = {}
    for number in ("1", "2"):
        codes = state.get("state" + number)
        if codes is None:
            continue
        name = "moment" + number
        if codes.dtype != torch.uint8:
            moments[name] = codes
            continue
        scale, table = state["absmax" + number], state["qmap" + number]
        if codes.shape == shape:
            moments[name] = Coded(shape, codes, scale, _BLOCK, table)
        else:  # AdEMAMix: the fast and the slow average
            for i, each in enumerate((name, "slow")):
                moments[each] = Coded(shape, codes[i], scale[i], _BLOCK, table)
    if "moment1" in moments and isinstance(moments["moment1"], Tensor):
        both = moments["moment1"]
        if both.shape != shape:
            moments["moment1"], moments["slow"] = both[0], both[1]
    return moments


def _bnb_moments(s: Slice) -> tuple[Tensor, Tensor]:
    """m̂, and √v̂."""
    beta1, beta2 = s.group["betas"][:2]
    t, m = s.t(), s["moment1"]
    v = _bounded_below(s["moment2"], m, s.grad, s.group["betas"])
    return m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt()


def _bnb_adam(s: Slice) -> Update:
    """lr/(√v̂+ε) ⊙ m̂; the decay is decoupled in Adam too.

    Dettmers et al. 2022; ``bitsandbytes/backends/cpu/ops.py``.
    """
    direction, rms = _bnb_moments(s)
    eps, decay = s.group["eps"], s.lr * s.group["weight_decay"]
    return Update(s.lr / (rms + eps), direction, decay, rms_grad=rms, eps=(rms, eps))


def _bnb_ademamix(s: Slice) -> Update:
    """lr/(√v̂+ε) ⊙ (m̂ + α·m_slow)."""
    fast, rms = _bnb_moments(s)
    eps, decay = s.group["eps"], s.lr * s.group["weight_decay"]
    alpha, warmup = s.group["alpha"], s.group["t_alpha"]
    alpha = torch.clamp(s.t() * alpha / warmup, max=alpha) if warmup else alpha
    return Update(s.lr / (rms + eps), fast + alpha * s["slow"], decay, rms_grad=rms, eps=(rms, eps))


def _bnb_lamb_whole(whole: Whole) -> dict[str, Any]:
    moments = _bnb_whole(whole)
    whole.entry.add(moments)
    eps = whole.group["eps"]

    def normalised(s: Slice) -> Tensor:
        _, beta2 = s.group["betas"][:2]
        below = s["moment2"].sqrt() + eps * (1 - beta2 ** s.t()).sqrt()
        squares: Tensor = (s["moment1"] / below).square()
        return squares

    # With 8-bit state, bitsandbytes takes Adam's step, without a trust ratio.
    trust: Scalar = 1.0
    if not isinstance(moments["moment1"], Coded):
        trust = _bounded(1.0, whole, whole.sum(normalised))
    return {**moments, "trust": trust}


def _bounded(limit: float, whole: Whole, squares: Tensor) -> Tensor:
    """The factor that limits ‖u‖ to ``limit``·‖θ‖; bitsandbytes has no other trust ratio."""
    norm = torch.as_tensor(whole.state["norm_before"])
    return layerwise.ratio(limit * norm, squares.sqrt()).clamp(max=1.0)


def _bnb_lamb(s: Slice) -> Update:
    """min(1, ‖θ‖/‖u‖)·lr/(√v̂+ε) ⊙ m̂, u = m/(√v+ε); ``max_unorm`` must be 1, the default."""
    update = _bnb_adam(s)
    trust: Any = s.scalar("trust")
    return Update(
        update.effective_lr * trust,
        update.direction,
        update.decay,
        rms_grad=update.rms_grad,
        eps=update.eps,
    )


def _bnb_lars_whole(whole: Whole) -> dict[str, Any]:
    moments = _bnb_whole(whole)
    whole.entry.add(moments)
    trust: Scalar = 1.0
    if not isinstance(moments["moment1"], Coded):
        trust = _bounded(0.02, whole, whole.sum(lambda s: s["moment1"].square()))
    return {**moments, "trust": trust}


def _bnb_lars(s: Slice) -> Update:
    """min(1, 0.02·‖θ‖/‖b‖)·lr ⊙ b, b the momentum; ``max_unorm`` must be 0.02, the default."""
    trust: Any = s.scalar("trust")
    return Update(s.lr * trust, s["moment1"])


def _bnb_lion(s: Slice) -> Update:
    """θ ← θ·(1 − lr·λ) − lr·sign(β₁·m_{t−1} + (1−β₁)·g)."""
    return Update(s.lr, lion.direction(s, "moment1"), s.lr * s.group["weight_decay"])


def _bnb_lion_whole(whole: Whole) -> dict[str, Any]:
    moments = _bnb_whole(whole)
    if isinstance(moments["moment1"], Coded):
        raise NotImplementedError("8 bits of momentum do not determine the sign of the step")
    return moments


# --- torchao ------------------------------------------------------------------------------------


def _ao_whole(whole: Whole) -> dict[str, Any]:
    """The moments, decoded on reading; those of small parameters are plain tensors."""
    shape = whole.entry.param.shape
    return {
        name: Coded(shape, value.codes, value.scale, value.block_size, getattr(value, "qmap", None))
        for name, value in whole.state.items()
        if hasattr(value, "codes")
    }


def _ao_adam(s: Slice) -> Update:
    """lr/(√v̂+ε) ⊙ m̂ (``torchao/optim/adam.py``)."""
    # θ after the step is close enough to θ before it for a bound.
    return _ao_step(s, s.grad + s.group["weight_decay"] * s.param)


def _ao_step(s: Slice, grad: Tensor) -> Update:
    beta1, beta2 = s.group["betas"]
    t, eps = s.t(), s.group["eps"]
    v = s["max_exp_avg_sq"] if s.group["amsgrad"] else s["exp_avg_sq"]
    # If v was rounded to 0, the share of this gradient is its lower bound.
    rms = (torch.maximum(v, (1 - beta2) * grad.square()) / (1 - beta2**t)).sqrt()
    return Update(s.lr / (rms + eps), s["exp_avg"] / (1 - beta1**t), rms_grad=rms, eps=(rms, eps))


def _ao_adamw(s: Slice) -> Update:
    """Like ``_ao_adam``, with a decoupled decay of lr·λ."""
    update = _ao_step(s, s.grad)
    return Update(
        update.effective_lr,
        update.direction,
        s.lr * s.group["weight_decay"],
        rms_grad=update.rms_grad,
        eps=update.eps,
    )


BNB_ADAM = Rule("adam", _bnb_adam, whole=_bnb_whole, tolerance=0.2)
BNB_ADEMAMIX = Rule("ademamix", _bnb_ademamix, whole=_bnb_whole, tolerance=0.2)
BNB_LAMB = Rule(
    "lamb",
    _bnb_lamb,
    before=layerwise.norm_before,
    whole=_bnb_lamb_whole,
    tolerance=0.2,
)
BNB_LARS = Rule(
    "lars",
    _bnb_lars,
    before=layerwise.norm_before,
    whole=_bnb_lars_whole,
    tolerance=0.2,
)
BNB_LION = Rule("lion", _bnb_lion, whole=_bnb_lion_whole)
AO_ADAM = Rule("adam", _ao_adam, whole=_ao_whole, tolerance=1.0)
AO_ADAMW = Rule("adam", _ao_adamw, whole=_ao_whole, tolerance=1.0)
