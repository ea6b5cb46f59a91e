"""Rules that divide by a root of accumulated squares: Adagrad, Adadelta, RMSprop."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrprobe.rules.base import Rule, Scalar, Slice, Update, nonzero


def _root(square: Tensor, eps: float, *, inside: bool) -> tuple[Tensor, tuple[Tensor, Scalar]]:
    """√x+ε, or √(x+ε) with ε ``inside`` the root; and (statistic, ε) for ``Update.eps``."""
    if inside:
        return (square + eps).sqrt(), (square, eps)
    root = square.sqrt()
    return root + eps, (root, eps)


def _adagrad(s: Slice, *, inside: bool = False) -> Update:
    """lr/(1+(t−1)·lr_decay) / (√sum+ε) ⊙ g (Duchi et al. 2011; ``torch/optim/adagrad.py``).

    ε may be ``inside`` the root (``keras/src/optimizers/adagrad.py``).
    """
    t = s.t()
    denominator, eps = _root(s["sum"], s.group["eps"], inside=inside)
    effective_lr = s.lr / (1 + (t - 1) * s.group["lr_decay"]) / denominator
    return Update(
        effective_lr,
        s.solve_decay(s.grad, effective_lr),
        s.decay,
        rms_grad=s["sum"].sqrt() / t.sqrt(),
        eps=eps,
    )


def _adadelta(s: Slice) -> Update:
    """lr · RMS[Δx]_{t−1}/RMS[g]_t ⊙ g (Zeiler 2012, eq. 14; ``torch/optim/adadelta.py``).

    The state after the step holds E[Δx²]_t. With r = g²/(E[g²]_t+ε), one step of its recurrence
    solved for the average before it gives E[Δx²]_{t−1}+ε = (E[Δx²]_t+ρε)/(ρ+(1−ρ)r), which never
    subtracts nearly equal numbers.
    """
    rho, eps = s.group["rho"], s.group["eps"]
    mean_square, after = s["square_avg"], s["acc_delta"]
    rms = (mean_square + eps).sqrt()
    scaled = after + rho * eps
    if s.coupled == 0:
        grad = s.grad
    elif s.before is not None:
        grad = s.grad + s.coupled * s.before
    else:
        grad = _grad_with_decay(s, rms, scaled)
    r = (grad / rms).square()
    before = scaled / (rho + (1 - rho) * r)
    return Update(
        effective_lr=s.lr * before.sqrt() / rms,
        direction=grad,
        decay=s.decay,
        rms_grad=mean_square.sqrt(),
        # E[Δx²] starts at 0; without the mask, rounding could make it positive in the first step.
        rms_update=((before - eps).clamp(min=0) * (s.t() > 1)).sqrt(),
        eps=(mean_square, eps),
    )


def _grad_with_decay(s: Slice, rms: Tensor, scaled: Tensor) -> Tensor:
    """Solve g = grad + λ·θ_before for g, where θ_before = θ_after + lr·δ(g), by Newton's method."""
    rho, decay = s.group["rho"], s.coupled
    known = s.grad + decay * s.param
    pull = decay * s.lr * scaled.sqrt()
    x: Tensor = known / rms  # δ(g) = √scaled · x/√(ρ + (1−ρ)x²), with x = g/RMS[g]
    for _ in range(6):
        root = (rho + (1 - rho) * x * x).sqrt()
        x = x - (x * rms - pull * x / root - known) / (rms - pull * rho / root**3)
    return x * rms


def _rmsprop(s: Slice, *, inside: bool = False) -> Update:
    """lr/(√avg+ε) ⊙ g (Hinton 2012, lecture 6; centered: Graves 2013; ``torch/optim/rmsprop.py``).

    The momentum buffer holds gradients that are already divided, so the direction is the buffer
    times this step's denominator. A ``velocity`` also contains the rates of its steps, so it is
    divided by lr too. ε may be ``inside`` the root (``keras/src/optimizers/rmsprop.py``).
    """
    average = s["square_avg"]
    if s.group["centered"]:
        # A difference of nearly equal numbers, which torch computes in the parameter's dtype.
        own, mean = average.to(s.dtype), s["grad_avg"].to(s.dtype)
        average = own.addcmul(mean, mean, value=-1).to(average.dtype)
    denominator, eps = _root(average, s.group["eps"], inside=inside)
    effective_lr = s.lr / denominator
    if "velocity" in s:
        direction = s["velocity"] * (denominator / nonzero(s.lr))
    elif s.group["momentum"] > 0:
        direction = s["momentum_buffer"] * denominator
    else:
        direction = s.solve_decay(s.grad, effective_lr)
    root = (average.clamp(min=0) if inside else average).sqrt()  # rounding may make it negative
    return Update(effective_lr, direction, s.decay, rms_grad=root, eps=eps)


def _sum(s: Slice) -> dict[str, Scalar]:
    """sum ← sum + g²."""
    grad = s.decayed_grad
    return {"sum": s.old("sum") + grad * grad}


def _averages(s: Slice) -> dict[str, Scalar]:
    """E[g²] ← ρE[g²] + (1−ρ)g², E[Δx²] ← ρE[Δx²] + (1−ρ)Δx² with Δx = RMS[Δx]/RMS[g]·g."""
    rho, eps, grad = s.group["rho"], s.group["eps"], s.decayed_grad
    square, delta = s.old("square_avg"), s.old("acc_delta")
    now = rho * square + (1 - rho) * grad * grad
    step = (delta + eps) / (now + eps) * grad * grad
    return {"square_avg": now, "acc_delta": rho * delta + (1 - rho) * step}


def _rmsprop_averages(s: Slice) -> dict[str, Scalar]:
    """E[g²] ← αE[g²] + (1−α)g²; centered: E[g] too; b ← μb + g/denominator."""
    alpha, grad = s.group["alpha"], s.decayed_grad
    square = alpha * s.old("square_avg") + (1 - alpha) * grad * grad
    state: dict[str, Scalar] = {"square_avg": square}
    average = square
    if s.group["centered"]:
        mean = s.old("grad_avg") + (1 - alpha) * (grad - s.old("grad_avg"))
        state["grad_avg"] = mean
        if s.group["momentum"] > 0:  # a difference of nearly equal numbers, so use torch's values
            average = s["square_avg"] - s["grad_avg"] * s["grad_avg"]
            if s.dtype != torch.float64:
                return state
    if s.group["momentum"] > 0:
        kept = s.group["momentum"] * s.old("momentum_buffer")
        state["momentum_buffer"] = kept + grad / (average.sqrt() + s.group["eps"])
    return state


ADAGRAD = Rule("adagrad", _adagrad, advance=_sum)
ADAGRAD_INSIDE = Rule("adagrad", partial(_adagrad, inside=True))
ADADELTA = Rule("adadelta", _adadelta, advance=_averages, needs_grad=True)
RMSPROP = Rule("rmsprop", _rmsprop, advance=_rmsprop_averages)
RMSPROP_INSIDE = Rule("rmsprop", partial(_rmsprop, inside=True))
