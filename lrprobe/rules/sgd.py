"""Rules whose rate does not depend on the size of the gradient: SGD, ASGD, Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from lrprobe.rules.base import Rule, Scalar, Slice, Update, nonzero


def _sgd(s: Slice) -> Update:
    """θ ← θ − lr·d with d = g, the buffer b, or g + μ·b.

    Sutskever et al. 2013; ``torch/optim/sgd.py``. If the state has a ``velocity`` v instead of b,
    which contains the rates of its steps, b is −v/lr (``keras/src/optimizers/sgd.py``).
    """
    momentum = s.group["momentum"]
    buffer = None
    if momentum != 0 and "momentum_buffer" in s:
        buffer = s["momentum_buffer"]
    elif "velocity" in s:
        buffer = s["velocity"] / -nonzero(s.lr)
    if buffer is None:
        direction = s.solve_decay(s.grad, s.lr)
    elif s.group["nesterov"]:
        if _overwrites(s.group):  # then p.grad holds the direction
            return Update(s.lr, s.grad, s.decay, grad=s.grad - momentum * buffer)
        direction = s.solve_decay(s.grad + momentum * buffer, s.lr)
    else:
        direction = buffer
    return Update(s.lr, direction, s.decay)


def _overwrites(group: Mapping[str, Any]) -> bool:
    """Whether torch leaves Nesterov's direction in ``p.grad``.

    Its foreach step adds the buffer to it in place, except with a decay or ``maximize``, for which
    it copies the gradient first.
    """
    if not group["nesterov"] or group.get("maximize") or group.get("fused"):
        return False
    if group.get("weight_decay", 0.0) != 0:
        return False
    foreach = group.get("foreach", False)
    if foreach is None and group.get("fused") is None:  # torch looks at all tensors of the group
        params = [p for p in group["params"] if p.grad is not None]
        if params and params[0].device.type != "cpu":
            _, foreach = _default_to_fused_or_foreach(params, False, False)
    return bool(foreach)


def _asgd_before(
    _: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> dict[str, Scalar]:
    eta = state.get("eta")
    # torch starts η at lr, in the default dtype.
    return {"eta_before": torch.as_tensor(group["lr"]) if eta is None else eta.clone()}


def _asgd(s: Slice) -> Update:
    """θ ← θ·(1 − λη) − η·g (Polyak and Juditsky 1992; ``torch/optim/asgd.py``).

    torch updates η at the end of its step, so the η of this step is kept from before it.
    """
    eta: Any = s.scalar("eta_before")
    eta = eta if s.group.get("capturable") else eta.double()
    decay = s.group["lambd"] * eta
    return Update(eta, s.solve_decay(s.grad, eta, decay=decay), decay)


def _rprop(s: Slice) -> Update:
    """θ ← θ − step_size ⊙ sign(g) (Riedmiller and Braun 1993; ``torch/optim/rprop.py``).

    If the sign of the gradient changed, torch stores 0 in place of the gradient, and does not move.
    """
    return Update(s["step_size"], s["prev"].sign())


def _buffer(s: Slice) -> dict[str, Scalar]:
    """b ← μb + (1−τ)g; b = g in the first step."""
    if not s.group["momentum"]:
        return {}
    grad = s.decayed_grad
    if s.group["nesterov"] and _overwrites(s.group):  # g is no longer available
        return {}
    kept = s.group["momentum"] * s.old("momentum_buffer")
    damped = 1 - s.group.get("dampening", 0.0) * s.had("momentum_buffer")
    return {"momentum_buffer": kept + damped * grad}


def _rprop_state(s: Slice) -> dict[str, Scalar]:
    """prev ← g, or 0 if its sign changed; the step size grows or shrinks."""
    minus, plus = s.group["etas"]
    low, high = s.group["step_sizes"]
    size = s.old("step_size", float(s.lr)) * torch.ones_like(s.grad)
    agreement = (s.grad * s.old("prev")).sign()
    grown = torch.where(agreement < 0, size * minus, size)
    grown = torch.where(agreement > 0, size * plus, grown).clamp(low, high)
    return {"prev": torch.where(agreement < 0, 0.0, s.grad), "step_size": grown}


SGD = Rule("sgd", _sgd, overwrites=_overwrites, advance=_buffer, shared_rate=True)
ASGD = Rule("asgd", _asgd, before=_asgd_before, writes=lambda _: 2, shared_rate=True)
RPROP = Rule("rprop", _rprop, advance=_rprop_state)
