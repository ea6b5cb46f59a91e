"""The oracle: what DESIGN says of a step, in plain NumPy float64 on the full tensors.

Written from the definitions, not from lrprobe: it takes what was there *before* the step (the
parameter, the optimizer's state, the group), and computes the step from it as the papers do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import versions
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

Array = NDArray[np.float64]

QUANTILES = {
    "p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99,
}  # fmt: skip

FIGURES = [
    "effective_lr_mean", "effective_lr_gmean", "effective_lr_std", "effective_lr_min",
    *(f"effective_lr_{p}" for p in QUANTILES),
    "effective_lr_max", "effective_lr_applied", "idle_fraction",
    "update_norm", "update_ratio", "update_grad_cosine",
    "param_norm", "grad_norm", "zero_grad_fraction", "grad_persistence",
    "rms_grad_mean", "rms_update_mean", "eps_fraction",
    "nonfinite", "lost_fraction", "reconstruction_error", "state_error",
]  # fmt: skip

COLUMNS = [
    "step", "time", "attempt", "optimizer", "group", "group_name", "parameter", "numel",
    "rule", "stepped", "lr", "initial_lr", "decay", "samples", "lr_per_sample", *FIGURES,
]  # fmt: skip

DTYPES = {
    "step": "int64", "attempt": "int64", "group": "int64", "numel": "int64",
    "stepped": "bool",
    **dict.fromkeys(
        ("optimizer", "group_name", "parameter", "module", "rule"), versions.TEXT
    ),
}  # fmt: skip


def numpy(tensor: Tensor) -> Array:
    """A tensor as float64, a complex one as pairs, a sparse one in full."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().numpy().copy()


def bits(tensor: Tensor) -> NDArray[Any]:
    """What the elements are, bit by bit."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer).numpy().reshape(-1).copy()


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """The distance to the next larger number of the dtype."""
    info = torch.finfo(dtype)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(values)))
    exponent = np.maximum(exponent, math.log2(info.smallest_normal))
    return info.eps * np.exp2(exponent)


@dataclass
class Truth:
    """One parameter's step. Arrays are flat; an elementwise figure a step lacks is None."""

    name: str
    group: int
    lr: float
    initial_lr: float
    dtype: torch.dtype
    after: Array
    stepped: bool = False
    measured: bool = False
    maximize: bool = False
    decay: float = math.nan
    rate: Array | None = None
    direction: Array | None = None
    grad: Array | None = None
    previous: Array | None = None
    before: Array | None = None
    same: NDArray[np.bool_] | None = None
    rms_grad: Array | None = None
    rms_update: Array | None = None
    eps: tuple[Array, float] | None = None
    nonfinite: NDArray[np.bool_] | None = None
    optimizer: str = ""

    @property
    def change(self) -> Array:
        """Δθ as intended."""
        if self.measured:
            return self.after - self.before
        return -self.decay * self.before - self.rate * self.direction


@dataclass
class Old:
    """What a step begins from."""

    param: Tensor
    array: Array
    state: dict[str, Any]
    group: dict[str, Any]
    grad: Tensor | None


@dataclass
class Tape:
    """Looks at an optimizer before and after a step.

    ``tape.before()``, ``optimizer.step()``, ``tape.after()`` gives a ``Truth`` per parameter.
    """

    optimizer: Optimizer
    names: Mapping[Tensor, str] | Sequence[str] | None = None
    title: str = ""
    first_lr: dict[int, float] = field(default_factory=dict)
    kept: dict[Tensor, Old] = field(default_factory=dict)
    grads: dict[str, Array] = field(default_factory=dict)

    def before(self) -> None:
        """Keep everything."""
        self.kept = {}
        for group in self.optimizer.param_groups:
            options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for param in group["params"]:
                state = {
                    key: value.detach().clone() if isinstance(value, Tensor) else value
                    for key, value in self.optimizer.state.get(param, {}).items()
                }
                grad = None if param.grad is None else param.grad.detach().clone()
                self.kept[param] = Old(param.detach().clone(), numpy(param), state, options, grad)

    def after(self) -> dict[str, Truth]:
        """What the step was."""
        truths = {}
        for index, group in enumerate(self.optimizer.param_groups):
            lr = float(self.kept[group["params"][0]].group["lr"])
            first = self.first_lr.setdefault(index, lr)
            for place, param in enumerate(group["params"]):
                name = f"group{index}.param{place}"
                if isinstance(self.names, Mapping):
                    name = self.names[param]
                elif self.names is not None:
                    name = self.names[len(truths)]
                old = self.kept[param]
                truth = Truth(
                    name=name,
                    group=index,
                    lr=lr,
                    initial_lr=float(group.get("initial_lr", first)),
                    dtype=torch.view_as_real(param).dtype if param.is_complex() else param.dtype,
                    after=numpy(param).reshape(-1),
                    maximize=bool(group.get("maximize", False)),
                    optimizer=self.title or type(self.optimizer).__name__,
                )
                if param.grad is not None:
                    state = self.optimizer.state.get(param, {})
                    self._step(truth, param, old, state)
                    truth.previous = self.grads.get(name)
                    self.grads[name] = truth.grad
                truths[name] = truth
        return truths

    def _step(self, truth: Truth, param: Tensor, old: Old, state: Mapping[str, Any]) -> None:
        truth.stepped = True
        # torch's foreach step leaves Nesterov's direction in the place of the gradient.
        given = old.grad if old.group.get("nesterov") and old.grad is not None else param.grad
        grad = numpy(given)
        truth.grad = grad.reshape(-1)
        truth.before = old.array.reshape(-1)
        truth.same = bits(param) == bits(old.param)
        bad = ~np.isfinite(truth.grad) | ~np.isfinite(truth.after)
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == param.shape and param.dim():
                bad |= ~np.isfinite(numpy(value).reshape(-1))
        truth.nonfinite = bad
        equation = EQUATIONS.get(type(self.optimizer))
        if equation is None:
            truth.measured, truth.decay = True, math.nan
            return
        with np.errstate(all="ignore"):
            step = equation(Given(old, given, grad, state))
        shape = old.array.shape
        truth.rate = np.broadcast_to(step["rate"], shape).reshape(-1).astype(np.float64)
        truth.direction = np.broadcast_to(step["direction"], shape).reshape(-1)
        truth.decay = float(step.get("decay", 0.0))
        for key in ("rms_grad", "rms_update"):
            if key in step:
                setattr(truth, key, np.broadcast_to(step[key], shape).reshape(-1))
        if "eps" in step:
            statistic, eps = step["eps"]
            truth.eps = np.broadcast_to(statistic, shape).reshape(-1), float(eps)


class Given:
    """What an equation starts from: option ``o.beta``, state before the step, gradient."""

    def __init__(self, old: Old, raw: Tensor, grad: Array, after: Mapping[str, Any]) -> None:
        self.old = old
        self.raw = raw
        self.g = -grad if old.group.get("maximize", False) else grad
        self.theta = old.array
        self.after = after

    def option(self, name: str, default: Any = None) -> Any:
        """A hyperparameter as a number."""
        value = self.old.group.get(name, default)
        if isinstance(value, tuple | list):
            return tuple(None if v is None else float(v) for v in value)
        return float(value) if isinstance(value, Tensor) else value

    def state(self, name: str, start: float = 0.0) -> Array:
        """A state tensor as it was before the step; ``start`` before the first."""
        if name not in self.old.state or self.old.state[name] is None:
            return np.full_like(self.theta, start)
        return numpy(self.old.state[name])

    @property
    def t(self) -> float:
        """The number of this step, from 1."""
        return float(self.old.state.get("step", 0)) + 1

    @property
    def decoupled(self) -> bool:
        return bool(self.option("decoupled_weight_decay", default=False))

    @property
    def coupled_grad(self) -> Array:
        """The gradient with the coupled decay."""
        if self.decoupled:
            return self.g
        return self.g + self.option("weight_decay", 0) * self.theta

    @property
    def decay(self) -> float:
        """The decoupled decay."""
        return self.option("lr") * self.option("weight_decay") if self.decoupled else 0.0


def sgd(o: Given) -> dict[str, Any]:
    g, mu = o.coupled_grad, o.option("momentum")
    direction = g
    if mu:
        started = o.old.state.get("momentum_buffer") is not None
        buffer = mu * o.state("momentum_buffer") + (1 - o.option("dampening")) * g
        buffer = buffer if started else g
        direction = g + mu * buffer if o.option("nesterov") else buffer
    return {"rate": o.option("lr"), "direction": direction}


def moments(o: Given, g: Array) -> tuple[Array, Array]:
    beta1, beta2 = o.option("betas")
    m = beta1 * o.state("exp_avg") + (1 - beta1) * g
    v = beta2 * o.state("exp_avg_sq") + (1 - beta2) * g * g
    return m, v


def adam(o: Given) -> dict[str, Any]:
    beta1, beta2 = o.option("betas")
    m, v = moments(o, o.coupled_grad)
    if o.option("amsgrad"):
        v = np.maximum(v, o.state("max_exp_avg_sq"))
    root = np.sqrt(v / (1 - beta2**o.t))
    eps = o.option("eps")
    return {
        "rate": o.option("lr") / (root + eps),
        "direction": m / (1 - beta1**o.t),
        "decay": o.decay,
        "rms_grad": root,
        "eps": (root, eps),
    }


def adamw(o: Given) -> dict[str, Any]:
    o.old.group["decoupled_weight_decay"] = True  # which torch's group says from 2.7 on
    return adam(o)


def nadam(o: Given) -> dict[str, Any]:
    beta1, beta2 = o.option("betas")
    g = o.coupled_grad
    m, v = moments(o, g)
    psi = o.option("momentum_decay")
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * psi)) for t in (o.t, o.t + 1))
    product = float(o.after["mu_product"])  # torch keeps it in float32
    root = np.sqrt(v / (1 - beta2**o.t))
    eps = o.option("eps")
    return {
        "rate": o.option("lr") / (root + eps),
        "direction": (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m,
        "decay": o.decay,
        "rms_grad": root,
        "eps": (root, eps),
    }


def radam(o: Given) -> dict[str, Any]:
    beta1, beta2 = o.option("betas")
    m, v = moments(o, o.coupled_grad)
    t, lr, eps = o.t, o.option("lr"), o.option("eps")
    correction = 1 - beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction
    rate: Any = lr
    if rho > 5:
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        rate = lr * r * math.sqrt(correction) / (np.sqrt(v) + eps)
    return {
        "rate": rate,
        "direction": m / (1 - beta1**t),
        "decay": o.decay,
        "rms_grad": np.sqrt(v / correction),
        "eps": (np.sqrt(v), eps),
    }


def adamax(o: Given) -> dict[str, Any]:
    beta1, beta2 = o.option("betas")
    g, eps = o.coupled_grad, o.option("eps")
    m = beta1 * o.state("exp_avg") + (1 - beta1) * g
    u = np.maximum(beta2 * o.state("exp_inf"), np.abs(g) + eps)
    return {
        "rate": o.option("lr") / u,
        "direction": m / (1 - beta1**o.t),
        "eps": (np.abs(g), eps),
    }


def adagrad(o: Given) -> dict[str, Any]:
    g, eps = o.coupled_grad, o.option("eps")
    if o.raw.is_sparse:
        g = o.g
    total = o.state("sum", o.option("initial_accumulator_value")) + g * g
    return {
        "rate": o.option("lr") / (1 + (o.t - 1) * o.option("lr_decay")) / (np.sqrt(total) + eps),
        "direction": g,
        "rms_grad": np.sqrt(total / o.t),
        "eps": (np.sqrt(total), eps),
    }


def adadelta(o: Given) -> dict[str, Any]:
    g, rho, eps = o.coupled_grad, o.option("rho"), o.option("eps")
    square = rho * o.state("square_avg") + (1 - rho) * g * g
    delta = o.state("acc_delta")
    return {
        "rate": o.option("lr") * np.sqrt(delta + eps) / np.sqrt(square + eps),
        "direction": g,
        "rms_grad": np.sqrt(square),
        "rms_update": np.sqrt(delta),
        "eps": (square, eps),
    }


def rmsprop(o: Given) -> dict[str, Any]:
    g, alpha, eps = o.coupled_grad, o.option("alpha"), o.option("eps")
    average = alpha * o.state("square_avg") + (1 - alpha) * g * g
    if o.option("centered"):
        mean = alpha * o.state("grad_avg") + (1 - alpha) * g
        average = average - mean * mean
    root = np.sqrt(average)
    direction = g
    if o.option("momentum"):
        buffer = o.option("momentum") * o.state("momentum_buffer") + g / (root + eps)
        direction = buffer * (root + eps)
    return {
        "rate": o.option("lr") / (root + eps),
        "direction": direction,
        "rms_grad": root,
        "eps": (root, eps),
    }


def rprop(o: Given) -> dict[str, Any]:
    minus, plus = o.option("etas")
    low, high = o.option("step_sizes")
    agreement = np.sign(o.g * o.state("prev"))
    factor = np.where(agreement > 0, plus, np.where(agreement < 0, minus, 1.0))
    size = np.clip(o.state("step_size", o.option("lr")) * factor, low, high)
    return {"rate": size, "direction": np.where(agreement < 0, 0.0, np.sign(o.g))}


def asgd(o: Given) -> dict[str, Any]:
    eta = float(o.old.state["eta"]) if "eta" in o.old.state else float(np.float32(o.option("lr")))
    return {"rate": eta, "direction": o.coupled_grad, "decay": o.option("lambd") * eta}


def adafactor(o: Given) -> dict[str, Any]:
    g, lr = o.g, o.option("lr")
    eps1, eps2 = o.option("eps")
    if eps1 is None:
        eps1 = torch.finfo(o.old.param.dtype).eps
    weight = o.t ** o.option("beta2_decay")  # 1 − β₂ of this step
    alpha = max(eps2, math.sqrt(np.mean(o.theta**2))) * min(lr, 1 / math.sqrt(o.t))

    def average(name: str, now: Array) -> Array:
        old = numpy(o.old.state[name]) if name in o.old.state else np.zeros_like(now)
        return old + weight * (now - old)

    if g.ndim > 1:
        row = average("row_var", np.mean(g * g, axis=-1, keepdims=True))
        column = average("col_var", np.mean(g * g, axis=-2, keepdims=True))
        v = row * column / np.maximum(np.mean(row, axis=-2, keepdims=True), eps1)
    else:
        v = average("variance", g * g)
    root = np.sqrt(np.maximum(v, eps1**2))
    clip = max(1.0, math.sqrt(np.mean((g / root) ** 2)) / o.option("d"))
    return {
        "rate": alpha / clip / root,
        "direction": g,
        "decay": lr * o.option("weight_decay"),
        "rms_grad": np.sqrt(v),
        "eps": (v, eps1**2),
    }


def sparse_adam(o: Given) -> dict[str, Any]:
    beta1, beta2 = o.option("betas")
    touched = np.zeros(o.theta.shape[0], dtype=bool)
    touched[o.raw.coalesce().indices()[0].numpy()] = True
    mask = touched.reshape(-1, *[1] * (o.theta.ndim - 1))
    m0, v0 = o.state("exp_avg"), o.state("exp_avg_sq")
    m = np.where(mask, beta1 * m0 + (1 - beta1) * o.g, m0)
    v = np.where(mask, beta2 * v0 + (1 - beta2) * o.g**2, v0)
    eps, correction = o.option("eps"), 1 - beta2**o.t
    return {
        "rate": o.option("lr") * math.sqrt(correction) / (np.sqrt(v) + eps),
        "direction": np.where(mask, m / (1 - beta1**o.t), 0.0),
        "rms_grad": np.sqrt(v / correction),
        "eps": (np.sqrt(v), eps),
    }


def muon(o: Given) -> dict[str, Any]:
    mu, lr = o.option("momentum"), o.option("lr")
    buffer = mu * o.state("momentum_buffer") + (1 - mu) * o.g
    x = (1 - mu) * o.g + mu * buffer if o.option("nesterov") else buffer
    a, b, c = o.option("ns_coefficients")
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / max(np.linalg.norm(x), o.option("eps"))
    for _ in range(o.option("ns_steps")):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if rows > columns else x
    how = o.old.group["adjust_lr_fn"]
    factor = math.sqrt(max(1, rows / columns))
    if how == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(rows, columns))
    elif how == "spectral_unclamped":  # torch 2.14
        factor = math.sqrt(rows / columns)
    return {"rate": lr * factor, "direction": x, "decay": lr * o.option("weight_decay")}


EQUATIONS = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adadelta: adadelta,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Rprop: rprop,
    torch.optim.ASGD: asgd,
    torch.optim.Adafactor: adafactor,
    torch.optim.SparseAdam: sparse_adam,
}
"""DESIGN section 4, line by line."""
if versions.MUON is not None:
    EQUATIONS[versions.MUON] = muon


def norm(values: Array) -> float:
    """The Euclidean one."""
    return float(np.sqrt(np.sum(np.square(values))))


def _distribution(rate: Array) -> dict[str, float]:
    out = {
        "effective_lr_mean": np.mean(rate),
        "effective_lr_gmean": np.exp(np.mean(np.log(rate))),
        "effective_lr_std": np.std(rate),
        "effective_lr_min": np.min(rate),
        "effective_lr_max": np.max(rate),
    }
    levels = np.quantile(rate, list(QUANTILES.values()), method="inverted_cdf")
    for name, q in zip(QUANTILES, levels, strict=True):
        out[f"effective_lr_{name}"] = q
    return out


def figures(truths: Sequence[Truth]) -> dict[str, float]:
    """Every figure of the frame, of one parameter or of several laid end to end."""
    truths = list(truths)
    out = dict.fromkeys(FIGURES, math.nan)
    out["param_norm"] = norm(np.concatenate([t.after for t in truths]))
    moved = [t for t in truths if t.stepped]
    if not moved:
        return out
    with np.errstate(all="ignore"):
        out |= _of_the_step(moved, out["param_norm"])
        out |= _of_measured(moved) if any(t.measured for t in moved) else _of_the_rule(moved)
    return {key: float(value) for key, value in out.items()}


def _of_the_step(moved: Sequence[Truth], param_norm: float) -> dict[str, Any]:
    """What a step is, whatever the rule."""
    grad = np.concatenate([t.grad for t in moved])
    observed = np.concatenate([t.after - t.before for t in moved])
    change = np.concatenate([t.change for t in moved])
    same = np.concatenate([t.same for t in moved])
    uphill = np.concatenate([np.full(t.grad.shape, 1 if t.maximize else -1) for t in moved])
    spacing = np.concatenate([ulp(t.before, t.dtype) for t in moved])
    out: dict[str, Any] = {
        "update_norm": norm(change),
        "update_ratio": np.float64(norm(change)) / (param_norm or math.nan),
        "update_grad_cosine": np.sum(uphill * change * grad) / (norm(change) * norm(grad)),
        "grad_norm": norm(grad),
        "nonfinite": float(sum(t.nonfinite.sum() for t in moved)),
    }
    beyond = np.maximum(np.abs(change - observed) - spacing, 0)
    scale = np.float64(max(norm(change), norm(observed)))
    out["reconstruction_error"] = norm(beyond) / scale
    if all(t.previous is not None and t.previous.size == t.grad.size for t in moved):
        previous = np.concatenate([t.previous for t in moved])
        out["grad_persistence"] = np.sum(previous * grad) / (norm(previous) * norm(grad))
    if grad.size:
        out["zero_grad_fraction"] = np.mean(grad == 0)
        out["lost_fraction"] = np.mean((change != 0) & same)
    return out


def _of_measured(moved: Sequence[Truth]) -> dict[str, Any]:
    """What can be seen of a step from outside."""
    grad = np.concatenate([t.grad for t in moved])
    observed = np.concatenate([t.after - t.before for t in moved])
    out: dict[str, Any] = {}
    there = grad != 0
    ratio = np.abs(observed[there]) / np.abs(grad[there])
    if ratio.size:
        levels = np.quantile(ratio, list(QUANTILES.values()), method="inverted_cdf")
        out |= {f"effective_lr_{k}": q for k, q in zip(QUANTILES, levels, strict=True)}
    out["effective_lr_applied"] = norm(observed) / np.float64(norm(grad))
    out["reconstruction_error"] = out["lost_fraction"] = math.nan  # none was intended
    out["idle_fraction"] = np.mean(observed == 0) if observed.size else math.nan
    return out


def _of_the_rule(moved: Sequence[Truth]) -> dict[str, Any]:
    """What the equation says of the step."""
    rate = np.concatenate([t.rate for t in moved])
    direction = np.concatenate([t.direction for t in moved])
    moves = direction != 0  # what does not move got no rate
    out: dict[str, Any] = _distribution(rate[moves]) if moves.any() else {}
    out["effective_lr_applied"] = norm(rate * direction) / np.float64(norm(direction))
    if rate.size:
        out["idle_fraction"] = 1 - np.mean(moves)
    for name, key in (("rms_grad_mean", "rms_grad"), ("rms_update_mean", "rms_update")):
        values = [getattr(t, key) for t in moved if getattr(t, key) is not None]
        if values and rate.size:
            out[name] = np.mean(np.concatenate(values))
    with_eps = [(t.eps, t.direction != 0) for t in moved if t.eps is not None]
    below = [(statistic <= eps)[some] for (statistic, eps), some in with_eps]
    if sum(map(len, below)):
        out["eps_fraction"] = np.mean(np.concatenate(below))
    return out


def row(truths: Truth | Sequence[Truth], samples: float = math.nan) -> dict[str, Any]:
    """One row of the frame, but for its keys and the rule's name."""
    truths = [truths] if isinstance(truths, Truth) else list(truths)

    def shared(values: list[float]) -> float:
        return values[0] if all(v == values[0] for v in values) else math.nan

    lr = shared([t.lr for t in truths])
    return {
        "numel": sum(t.after.size for t in truths),
        "stepped": any(t.stepped for t in truths),
        "lr": lr,
        "initial_lr": shared([t.initial_lr for t in truths]),
        "decay": shared([t.decay for t in truths if t.stepped] or [math.nan]),
        "samples": samples,
        "lr_per_sample": lr / samples,
        **figures(truths),
    }


def assert_close(
    actual: Any,
    expected: Any,
    where: str,
    rtol: float = 1e-9,
    atol: float = 0.0,
    looser: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Compare figure by figure; a failure shows all that differ, both numbers each.

    Args:
        actual: what the frame has, name to number.
        expected: what the oracle has.
        where: what to call it in a failure.
        rtol: largest relative error.
        atol: largest absolute error.
        looser: name to (rtol, atol) where it is another.
    """
    wrong = []
    for name, right in expected.items():
        got = actual[name]
        relative, absolute = (looser or {}).get(name, (rtol, atol))
        if isinstance(right, float):
            close = bool(np.isclose(got, right, rtol=relative, atol=absolute, equal_nan=True))
        else:
            close = got == right
        if not close:
            wrong.append(f"  {name}: got {got!r}, right is {right!r}")
    assert not wrong, f"{where}:\n" + "\n".join(wrong)
