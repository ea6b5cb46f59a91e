"""Lion: the sign of a mix of momentum and gradient."""

from __future__ import annotations

from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update
from lrprobe.rules.external.common import decoupled, refuse, undecayed


def direction(s: Slice, momentum: str) -> Tensor:
    """sign(β₁·m_{t−1} + (1−β₁)·g), with m_{t−1} = (m_t − (1−β₂)·g)/β₂."""
    beta1, beta2 = s.group["betas"]
    before = (s[momentum] - (1 - beta2) * s.grad) / beta2
    mixed: Tensor = beta1 * before + (1 - beta1) * s.grad
    return mixed.sign()


def _lion(s: Slice) -> Update:
    """θ ← θ·(1 − lr·λ) − lr·sign(β₁·m_{t−1} + (1−β₁)·g).

    Chen et al. 2023, algorithm 2; ``timm/optim/lion.py``, ``pytorch_optimizer/optimizer/lion.py``.
    """
    refuse(s, "caution", "cautious", "use_gc", "adanorm")
    step = direction(s, "exp_avg")
    decay: Scalar = decoupled(s)
    if s.group.get("corrected_weight_decay"):
        decay = s.lr**2 / s.group["max_lr_snapshot"] * s.group["weight_decay"]
    return Update(s.lr, step, decay, grad=undecayed(s, s.lr * step))


LION = Rule("lion", _lion, shared_rate=True)
