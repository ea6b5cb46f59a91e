"""A stand-in for another framework's optimizer is recorded as one of torch's, step by step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import lrprobe
from lrprobe.foreign.standin import Parameter, StandIn
from lrprobe.names import module_of
from lrprobe.passes import Passes

LR, EPS, DECAY = 0.1, 1e-2, 0.05


def adam(s: dict[str, Any], g: Any, t: int) -> tuple[Any, Any]:
    s["exp_avg"] = 0.9 * s.get("exp_avg", 0.0) + 0.1 * g
    s["exp_avg_sq"] = 0.99 * s.get("exp_avg_sq", 0.0) + 0.01 * g * g
    rate = LR * math.sqrt(1 - 0.99**t) / (s["exp_avg_sq"].sqrt() + EPS)
    return rate, s["exp_avg"] / (1 - 0.9**t)


def adamax(s: dict[str, Any], g: Any, t: int) -> tuple[Any, Any]:
    s["exp_avg"] = 0.9 * s.get("exp_avg", 0.0) + 0.1 * g
    s["exp_inf"] = torch.maximum(0.99 * s.get("exp_inf", torch.zeros_like(g)), g.abs())
    return LR / (s["exp_inf"] + EPS), s["exp_avg"] / (1 - 0.9**t)


def adagrad(s: dict[str, Any], g: Any, t: int) -> tuple[Any, Any]:
    s["sum"] = s.get("sum", 0.0) + g * g
    return LR / (s["sum"] + EPS).sqrt(), g


def rmsprop(s: dict[str, Any], g: Any, t: int) -> tuple[Any, Any]:
    s["square_avg"] = 0.9 * s.get("square_avg", 0.0) + 0.1 * g * g
    s["grad_avg"] = 0.9 * s.get("grad_avg", 0.0) + 0.1 * g
    root = (s["square_avg"] - s["grad_avg"] ** 2 + EPS).sqrt()
    s["velocity"] = 0.9 * s.get("velocity", 0.0) + LR * g / root
    return LR / root, s["velocity"] * root / LR


def sgd(s: dict[str, Any], g: Any, t: int) -> tuple[Any, Any]:
    s["velocity"] = 0.9 * s.get("velocity", 0.0) - LR * g
    return torch.full_like(g, LR), g - 0.9 * s["velocity"] / LR


BETAS = {"betas": (0.9, 0.99), "eps": EPS}
CASES = {
    "Adam": (adam, {**BETAS, "amsgrad": False}),
    "Adamax": (adamax, BETAS),
    "Adagrad": (adagrad, {"eps": EPS, "lr_decay": 0.0}),
    "RMSprop": (rmsprop, {"eps": EPS, "momentum": 0.9, "centered": True}),
    "SGD": (sgd, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CASES)
def test_the_rules_take_keras_conventions(name: str) -> None:
    """ε in its place, a velocity for a buffer and a decay of every optimizer; all explained."""
    step, options = CASES[name]
    group = {**options, "weight_decay": DECAY, "decoupled_weight_decay": True, "capturable": True}
    param = torch.linspace(-1, 1, 12, dtype=torch.float64)
    cls = type(name, (StandIn,), {"__module__": "keras.src.optimizers"})
    optimizer = cls([Parameter("net/dense/kernel", param, group)], LR)
    state: dict[str, Any] = {}
    rates = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for t in range(1, 6):
            grad = torch.cos(torch.arange(12, dtype=torch.float64) * t)
            optimizer.show(0, param)
            optimizer.before()
            rate, direction = step(state, grad, t)
            param = param * (1 - LR * DECAY) - rate * direction
            count = torch.tensor(t, dtype=torch.float64)
            optimizer.show(0, param, grad, {"step": count, **state})
            optimizer.after()
            optimizer.forget([0])
            rates.append(rate)
    frame = probe.frame()
    assert set(frame["rule"]) == {name.lower()}
    assert frame["optimizer"].unique().tolist() == [name]
    assert frame["reconstruction_error"].max() < 1e-14
    middle = [np.quantile(r, 0.5, method="inverted_cdf") for r in rates]
    np.testing.assert_allclose(frame["effective_lr_p50"], middle, rtol=0.01)
    np.testing.assert_allclose(frame["effective_lr_mean"], [r.mean() for r in rates], rtol=1e-12)
    np.testing.assert_allclose(frame["decay"], LR * DECAY)
    assert probe.frame(by="module")["module"].unique().tolist() == ["net/dense"]


@pytest.mark.usefixtures("eager")
def test_a_velocity_without_a_rate_moves_nothing() -> None:
    """lr = 0 before anything moved: the step is 0, not NaN, and nothing has a rate."""
    cls = type("SGD", (StandIn,), {"__module__": "keras"})
    group = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    param = torch.ones(3)
    optimizer = cls([Parameter("w", param, group)], 0.0)
    with lrprobe.attach(optimizer, every=1) as probe:
        optimizer.show(0, param)
        optimizer.before()
        optimizer.show(0, param, torch.ones(3), {"velocity": torch.zeros(3)})
        optimizer.after()
    row = probe.frame().iloc[0]
    assert (row["update_norm"], row["idle_fraction"]) == (0, 1)
    assert math.isnan(row["effective_lr_max"])


def test_a_stand_in_has_groups_as_its_parameters_share_options() -> None:
    """In order of appearance; it keeps no memory of the parameters, and a skipped step no row."""
    values = [torch.ones(n) for n in (2, 3, 4)]
    options = [{"weight_decay": d} for d in (0.1, 0.0, 0.1)]
    made = [Parameter(f"p{i}", v, o) for i, (v, o) in enumerate(zip(values, options, strict=True))]
    optimizer = StandIn(made, 0.5)
    assert [g["param_names"] for g in optimizer.param_groups] == [["p0", "p2"], ["p1"]]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert {p.untyped_storage().nbytes() for p in optimizer.shown} == {4}
    with pytest.warns(UserWarning, match="StandIn has no rule"):
        probe = lrprobe.attach(optimizer, every=1)
    optimizer.before()  # of a step that was none
    optimizer.before()
    optimizer.after()
    probe.close()
    assert probe.frame()["step"].tolist() == [1, 1, 1]
    assert not probe.frame()["stepped"].any()


def test_passes_can_be_told() -> None:
    """Those of another framework, once."""
    passes = Passes(8)
    passes.add_external(3)
    assert passes.take() == 24
    assert math.isnan(passes.take())


@pytest.mark.parametrize(
    ("name", "module"),
    [("a.b.w", "a.b"), ("net/dense/kernel", "net/dense"), ("net/dense.1/bias", "net/dense.1"),
     ("w", ""), ("a/b.w", "a/b")],
)  # fmt: skip
def test_a_module_is_what_stands_before_the_last_separator(name: str, module: str) -> None:
    """A dot, or Keras's slash."""
    assert module_of(name) == module
