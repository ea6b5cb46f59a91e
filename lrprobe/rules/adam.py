"""Adam and its family: Adam, AdamW, NAdam, RAdam, Adamax, SparseAdam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from lrprobe.rules.base import Rule, Scalar, Slice, Update, power

T = TypeVar("T")


def _adam(s: Slice, *, outside: bool = False) -> Update:
    """lr/(√v̂+ε) ⊙ m̂ (Kingma and Ba 2015, algorithm 1; ``torch/optim/adam.py``).

    amsgrad (Reddi et al. 2018): v is its own running maximum. AdamW (Loshchilov and Hutter 2019)
    decouples the decay. With ε ``outside`` the bias correction, as at the end of the paper's
    section 2, it is lr·√(1−β₂ᵗ)/(√v+ε) (``keras/src/optimizers/adam.py``).
    """
    beta1, beta2 = s.group["betas"]
    flags = "capturable", "differentiable"
    v = s["max_exp_avg_sq"] if s.group["amsgrad"] else s["exp_avg_sq"]
    correction = s.correction(beta2, *flags)
    eps = s.group["eps"]
    if outside:
        root = v.sqrt()
        rms = root / correction.sqrt()
        effective_lr = s.lr * correction.sqrt() / (root + eps)
    else:
        root = rms = (v / correction).sqrt()
        effective_lr = s.lr / (rms + eps)
    return Update(
        effective_lr=effective_lr,
        direction=s["exp_avg"] / s.correction(beta1, *flags),
        decay=s.decay,
        rms_grad=rms,
        eps=(root, eps),
    )


def _decoupled(equation: Callable[[Slice], T]) -> Callable[[Slice], T]:
    """The equation with a decoupled decay; AdamW's groups have that flag only since torch 2.7."""

    def of(s: Slice) -> T:
        s.group = {**s.group, "decoupled_weight_decay": True}
        return equation(s)

    return of


def _nadam(s: Slice) -> Update:
    """Adam with Nesterov's momentum (Dozat 2016; ``torch/optim/nadam.py``)."""
    beta1, beta2 = s.group["betas"]
    t = s.t("capturable")
    eps = s.group["eps"]

    def mu(t: Scalar) -> Any:
        return beta1 * (1 - 0.5 * 0.96 ** (t * s.group["momentum_decay"]))

    product: Any = s.scalar("mu_product")
    product = product if s.group.get("capturable") else product.double()
    rms = (s["exp_avg_sq"] / s.correction(beta2, "capturable")).sqrt()
    effective_lr = s.lr / (rms + eps)
    share = (1 - mu(t)) / (1 - product)
    direction = share * s.grad + mu(t + 1) / (1 - product * mu(t + 1)) * s["exp_avg"]
    direction = s.solve_decay(direction, effective_lr, share=share)
    return Update(effective_lr, direction, s.decay, rms_grad=rms, eps=(rms, eps))


def _radam(s: Slice) -> Update:
    """Adam, rectified (Liu et al. 2020, algorithm 2; ``torch/optim/radam.py``).

    While the variance is intractable (ρ_t ≤ 5), the step is lr·m̂. torch adds ε to √v, before
    the bias correction.
    """
    beta1, beta2 = s.group["betas"]
    t = s.t("capturable")
    eps = s.group["eps"]
    root = s["exp_avg_sq"].sqrt()
    correction = s.correction(beta2, "capturable")
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * power(beta2, t) / correction
    rectification = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    tractable = (rho > 5).to(rho.dtype)
    adaptive = torch.where(rho > 5, (rectification * correction).sqrt(), torch.zeros_like(rho))
    return Update(
        effective_lr=s.lr * (adaptive / (root + eps) + (1 - tractable)),
        direction=s["exp_avg"] / s.correction(beta1, "capturable"),
        decay=s.decay,
        rms_grad=root / correction.sqrt(),
        eps=(root, eps),
    )


def _adamax(s: Slice, *, outside: bool = False) -> Update:
    """lr/u ⊙ m̂, u the decaying maximum of |g|+ε.

    Kingma and Ba 2015, algorithm 2; ``torch/optim/adamax.py``. With ε ``outside``, u is the
    maximum of |g| and the rate is lr/(u+ε) (``keras/src/optimizers/adamax.py``).
    """
    beta1, _ = s.group["betas"]
    direction = s["exp_avg"] / s.correction(beta1, "capturable")
    if outside:
        u, eps = s["exp_inf"], s.group["eps"]
        return Update(s.lr / (u + eps), direction, s.decay, eps=(u, eps))
    effective_lr = s.lr / s["exp_inf"]
    # The direction does not depend on θ_before, so θ_before = θ_after + effective_lr·direction.
    grad = s.grad + s.group["weight_decay"] * (s.param + effective_lr * direction)
    return Update(effective_lr, direction, eps=(grad.abs(), s.group["eps"]))


def _sparse_adam(s: Slice) -> Update:
    """Adam on the rows that a sparse gradient touched; ε is outside the bias correction.

    ``torch/optim/_functional.py``.
    """
    beta1, beta2 = s.group["betas"]
    eps = s.group["eps"]
    root = s["exp_avg_sq"].sqrt()
    correction = s.correction(beta2)
    return Update(
        effective_lr=s.lr * correction.sqrt() / (root + eps),
        direction=s["exp_avg"] / s.correction(beta1) * s.touched,
        rms_grad=root / correction.sqrt(),
        eps=(root, eps),
    )


def _moments(s: Slice) -> dict[str, Scalar]:
    """m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², on the touched elements; amsgrad: max(v_max, v)."""
    beta1, beta2 = s.group["betas"]
    grad, touched = s.decayed_grad, s.touched
    m, v = s.old("exp_avg"), s.old("exp_avg_sq")
    state: dict[str, Scalar] = {
        "exp_avg": m + touched * (1 - beta1) * (grad - m),
        "exp_avg_sq": v + touched * (1 - beta2) * (grad * grad - v),
    }
    if s.group.get("amsgrad"):
        known = s.old("max_exp_avg_sq")
        state["max_exp_avg_sq"] = torch.maximum(state["exp_avg_sq"], known * torch.ones_like(grad))  # type: ignore[arg-type]
    return state


def _adamax_moments(s: Slice) -> dict[str, Scalar]:
    """m ← β₁m + (1−β₁)g, u ← max(β₂u, |g|+ε)."""
    beta1, beta2 = s.group["betas"]
    grad, m = s.decayed_grad, s.old("exp_avg")
    norm = torch.maximum(
        beta2 * s.old("exp_inf") * torch.ones_like(grad), grad.abs() + s.group["eps"]
    )
    return {"exp_avg": m + (1 - beta1) * (grad - m), "exp_inf": norm}


def _nadam_writes(group: Mapping[str, Any]) -> int:
    """One write each for the gradient and the momentum; one more for a decoupled decay."""
    return 2 + bool(group.get("decoupled_weight_decay") and group.get("weight_decay"))


ADAM = Rule("adam", _adam, advance=_moments)
ADAMW = Rule("adam", _decoupled(_adam), advance=_decoupled(_moments))
ADAM_OUTSIDE = Rule("adam", partial(_adam, outside=True))
NADAM = Rule("nadam", _nadam, advance=_moments, writes=_nadam_writes)
RADAM = Rule("radam", _radam, advance=_moments)
ADAMAX = Rule("adamax", _adamax, advance=_adamax_moments)
ADAMAX_OUTSIDE = Rule("adamax", partial(_adamax, outside=True))
SPARSE_ADAM = Rule("sparse_adam", _sparse_adam, advance=_moments)
