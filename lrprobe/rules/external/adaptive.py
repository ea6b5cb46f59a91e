"""Variants of Adam with an additional average: Adan and AdEMAMix."""

from __future__ import annotations

from lrprobe.rules.base import Rule, Slice, Update
from lrprobe.rules.external.common import decoupled, refuse, undecayed


def _adan(s: Slice) -> Update:
    """lr/(√n̂+ε) ⊙ (m̂ + β₂·v̂), m of gradients, v of their differences.

    Xie et al. 2024, algorithm 1; ``timm/optim/adan.py``, ``pytorch_optimizer/optimizer/adan.py``.
    With a proximal decay, θ and the step are divided by 1 + lr·λ. pytorch_optimizer overwrites
    ``p.grad`` with −g; its state also holds −g.
    """
    refuse(s, "caution", "use_gc", "adanorm")
    beta1, beta2, beta3 = s.group["betas"]
    t = s.group_step()
    eps = s.group["eps"]
    rms = (s["exp_avg_sq"] / (1 - beta3**t)).sqrt()
    shrink = s.lr * s.group["weight_decay"]
    at_once = s.group["no_prox"] if "no_prox" in s.group else s.group["weight_decouple"]
    effective_lr = s.lr / (rms + eps)
    if not at_once:
        effective_lr = effective_lr / (1 + shrink)
    return Update(
        effective_lr=effective_lr,
        direction=s["exp_avg"] / (1 - beta1**t) + beta2 / (1 - beta2**t) * s["exp_avg_diff"],
        decay=shrink if at_once else shrink / (1 + shrink),
        rms_grad=rms,
        eps=(rms, eps),
        grad=-s["previous_grad"] if "previous_grad" in s else None,
    )


def _ademamix(s: Slice) -> Update:
    """lr/(√v̂+ε) ⊙ (m̂ + α·m_slow).

    Pagliardini et al. 2025, algorithm 1; ``pytorch_optimizer/optimizer/ademamix.py``.
    """
    refuse(s, "cautious", "stable_adamw")
    beta1, beta2, _ = s.group["betas"]
    t = s.group_step()
    eps = s.group["eps"]
    alpha, warmup = s.group["alpha"], s.group["t_alpha_beta3"]
    alpha = (t * alpha / warmup).clamp(max=alpha) if warmup else alpha
    rms = s["exp_avg_sq"].sqrt() / (1 - beta2**t).sqrt()
    effective_lr = s.lr / (rms + eps)
    direction = s["exp_avg"] / (1 - beta1**t) + alpha * s["exp_avg_slow"]
    grad = undecayed(s, effective_lr * direction)
    return Update(effective_lr, direction, decoupled(s), rms_grad=rms, eps=(rms, eps), grad=grad)


ADAN = Rule("adan", _adan)
ADEMAMIX = Rule("ademamix", _ademamix)
