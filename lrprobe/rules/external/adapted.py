"""Adam with a rate that is estimated during training: D-Adaptation and Prodigy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, nonzero
from lrprobe.rules.external.common import decoupled, undecayed


def _before(_: Tensor, __: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Scalar]:
    """The estimate d that this step applies; after the step, the group holds the next one."""
    return {"d_before": group["d"]}


def _corrections(s: Slice) -> tuple[Scalar, Scalar]:
    """1 − β₁ᵗ and √(1 − β₂ᵗ), or 1 and 1 without bias correction (the default)."""
    beta1, beta2 = s.group["betas"][:2]
    if "k" in s.group:  # the authors' packages
        corrected, t = s.group["use_bias_correction"], s.group_step("k")
    else:  # pytorch_optimizer, whose Prodigy counts from 1
        corrected = s.group["bias_correction"]
        t = s.group_step() - int("d_coef" in s.group)
    return (1 - beta1**t, (1 - beta2**t).sqrt()) if corrected else (1.0, 1.0)


def _coupled(s: Slice) -> bool:
    return not s.group.get("decouple", s.group.get("weight_decouple"))


def _decay(s: Slice, rate: Tensor) -> Scalar:
    return 0.0 if _coupled(s) else decoupled(s, rate)


def _prodigy(s: Slice) -> Update:
    """d²·lr/(√v+d·ε) ⊙ m/d, where m and √v are averages of d·g.

    Mishchenko and Defazio 2024, algorithm 4; ``prodigyopt/prodigy.py``,
    ``pytorch_optimizer/optimizer/prodigy.py``. The factor d is the estimate from before the step;
    the d in d·ε is the new one. ``rms_grad`` is √v/d.
    """
    if s.group["eps"] is None:
        raise NotImplementedError("the rule does not support eps=None")
    known: Any = s.scalar("d_before")
    d = torch.as_tensor(known, dtype=torch.float64)
    correction1, correction2 = _corrections(s)
    rate = d * s.lr * (correction2 / correction1)
    root, eps = s["exp_avg_sq"].sqrt(), s.group["d"] * s.group["eps"]
    if "exp_avg" in s:
        effective_lr = (rate * d * correction1) / (root + eps)
        direction = s["exp_avg"] / (d * correction1)
    else:
        effective_lr, direction = rate * s.group["d"] / (root + eps), s.grad
    return Update(
        effective_lr=effective_lr,
        direction=direction,
        decay=_decay(s, rate),
        rms_grad=root / (d * correction2),
        eps=(root, eps),
        grad=undecayed(s, effective_lr * direction, coupled=_coupled(s)),
    )


def _dadapt_adam(s: Slice) -> Update:
    """d·lr/(√v+ε) ⊙ m/(d·lr), where m is an average of d·lr·g.

    Defazio and Mishchenko 2023, algorithm 3; ``dadaptation/dadapt_adam.py``,
    ``pytorch_optimizer/optimizer/dadapt.py``. d is the estimate from before the step.
    """
    known: Any = s.scalar("d_before")
    correction1, correction2 = _corrections(s)
    rate = torch.as_tensor(known, dtype=torch.float64) * s.lr * (correction2 / correction1)
    scaled = rate * s.group.get("layer_scale", 1.0)
    root, eps = s["exp_avg_sq"].sqrt(), s.group["eps"]
    effective_lr = scaled / (root + eps)
    direction = s["exp_avg"] / nonzero(scaled)
    return Update(
        effective_lr=effective_lr,
        direction=direction,
        decay=_decay(s, rate),
        rms_grad=root,
        eps=(root, eps),
        grad=undecayed(s, effective_lr * direction, coupled=_coupled(s)),
    )


PRODIGY = Rule("prodigy", _prodigy, before=_before)
DADAPT_ADAM = Rule("dadapt_adam", _dadapt_adam, before=_before)
