"""Schedule-Free: the parameters lie between a base sequence z and its average x.

In training mode, the only mode in which the optimizer steps, they are y = (1−β)·z + β·x. The
optimizer overwrites ``p.grad`` with what it subtracts from z: the gradient over the denominator,
plus the decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, nonzero
from lrprobe.rules.external.common import refuse, without_decay


def _average_weight(s: Slice) -> Tensor:
    """The weight c of the newest z in the average: t^r · lr_max^p over the sum of all weights."""
    group = s.group
    t = _t(s)
    lr_max = torch.as_tensor(group["lr_max"], dtype=torch.float64)
    total = torch.as_tensor(group["weight_sum"], dtype=torch.float64)
    share: Tensor = t ** group["r"] * lr_max ** group["weight_lr_power"] / nonzero(total)
    share = torch.where(total == 0, torch.zeros_like(share), share)
    if group.get("decoupling_c"):
        share = (share * (1 - group["betas"][0]) * group["decoupling_c"]).clamp(max=1.0)
    return share


def _t(s: Slice) -> Tensor:
    """The number of this step; the package's own count is ``k``, pytorch_optimizer's ``step``."""
    return s.group_step("k" if "k" in s.group else "step")


def _warmed(s: Slice) -> Tensor:
    """lr with a linear warmup."""
    lr: Tensor = s.lr * (_t(s) / max(s.group["warmup_steps"], 1)).clamp(max=1.0)
    return lr


def _step(
    s: Slice, lr: Tensor, beta: float, denominator: Tensor | None, rms: Tensor | None, eps: Scalar
) -> Update:
    """y ← y − c·(y − z) − lr·(1 − β·(1−c))·G, with G = g/denominator + λ·y as left in ``p.grad``.

    Defazio et al. 2024, algorithm 1; ``schedulefree/adamw_schedulefree.py``. The rate is that of z,
    lr/denominator. The direction includes the pull towards z. Without a denominator (SGD), λ·y is
    part of the direction.
    """
    left = s.grad
    c = _average_weight(s)
    base = s["z"] + lr * left  # z before the step
    share = 1 - beta * (1 - c)
    # y − z before the step, of which a share 1−c is left. At c = 1 (the first step) nothing is
    # left, and y was z.
    away = (s.param - base + lr * share * left) * torch.where(c < 1, 1 / nonzero(1 - c), 0.0)
    weight_decay = s.group["weight_decay"]
    pull = c * away / nonzero(lr)
    if denominator is None:
        grad = without_decay(s, left, base, away) if weight_decay else None
        return Update(lr, share * left + pull, grad=grad)
    normalised = without_decay(s, left, base, away) if weight_decay else left
    grad = normalised * denominator
    return Update(
        effective_lr=lr / denominator,
        direction=share * grad + pull * denominator,
        decay=lr * share * weight_decay,
        rms_grad=rms,
        eps=None if rms is None else (rms, eps),
        grad=grad,
    )


def _adamw(s: Slice) -> Update:
    refuse(s, "use_palm", "inner_momentum")
    beta1, beta2 = s.group["betas"]
    eps = s.group["eps"]
    rms = (s["exp_avg_sq"] / (1 - beta2 ** _t(s))).sqrt()
    denominator = rms + eps
    if "ams_bound" in s.group:  # pytorch_optimizer adds 1e-15 under the root too
        v = s["max_exp_avg_sq"] if s.group["ams_bound"] else s["exp_avg_sq"] / (1 - beta2 ** _t(s))
        rms = v.sqrt()
        denominator = (v + 1e-15).sqrt() + eps
    return _step(s, _warmed(s), beta1, denominator, rms, eps)


def _sgd(s: Slice) -> Update:
    refuse(s, "inner_momentum")  # momentum of z itself, in versions after 1.4
    return _step(s, _warmed(s), s.group["momentum"], None, None, 0.0)


def _radam(s: Slice) -> Update:
    """With RAdam's rectification; while that is intractable, lr is 0 or the denominator is 1."""
    refuse(s, "use_palm", "inner_momentum")
    beta1, beta2 = s.group["betas"]
    t, eps = _t(s), s.group["eps"]
    correction = 1 - beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction
    rms = (s["exp_avg_sq"] / correction).sqrt()
    if rho > 4:
        ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        return _step(s, s.lr * ratio**0.5, beta1, rms + eps, rms, eps)
    plain = 0.0 if s.group["silent_sgd_phase"] else 1.0
    # pytorch_optimizer then uses the rate 1 instead of lr.
    lr = s.lr * plain if "k" in s.group else torch.tensor(plain, dtype=torch.float64)
    return _step(s, lr, beta1, torch.ones_like(rms), rms, eps)


def _writes(_: Mapping[str, Any]) -> int:
    """One write towards z, and one along the gradient, which includes the decay."""
    return 2


ADAMW = Rule("schedulefree_adamw", _adamw, writes=_writes)
RADAM = Rule("schedulefree_radam", _radam, writes=_writes)
SGD = Rule("schedulefree_sgd", _sgd, writes=_writes)
