"""Parameters that are read together, and rules that treat them unlike."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Tape, assert_close
from rows import SPREAD, check_big, expected
from torch import nn
from torch.optim import Optimizer

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "RAdam", "Adagrad", "ASGD"])
def test_parameters_that_are_read_together(kind: str) -> None:
    """Small ones of many shapes, of which one begins later and one has a NaN: NumPy's figures."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(64,), (2, 96), (8, 8), (64,), (4096,), (8, 3, 8), (63,), (1, 64), (2, 64)]
    params = [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]
    late, spoilt = 3, 8
    optimizer = getattr(torch.optim, kind)(params, lr=0.01, weight_decay=0.1)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 4):
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.grad = None if i == late and step == 1 else grad
                if i == spoilt and step == 3:
                    grad.view(-1)[77] = torch.nan
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    rows = {(row["step"], row["parameter"]): row for row in probe.frame().to_dict("records")}
    assert len(rows) == 3 * len(shapes)
    for step, truths in enumerate(steps, 1):
        for i, (name, truth) in enumerate(truths.items()):
            where = f"{kind}, step {step}, {shapes[i]}"
            row = rows[step, name]
            if (step, i) == (1, late):
                assert not row["stepped"], where
                continue
            if (step, i) == (3, spoilt):
                assert row["nonfinite"] == 1, where
                assert math.isnan(row["grad_norm"]), where
                continue
            assert_close(row, expected(truth, row, 1e-12, where), where, looser=SPREAD)


TOGETHER = [(96, 64), (128, 64), (300, 17), (160, 64), (128, 64), (64, 256), (300, 17), (256, 32)]


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "Adafactor"])
def test_large_parameters_that_are_read_together(
    kind: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sizes, one not contiguous, one that begins later, one with a NaN: NumPy's."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    generator = torch.Generator().manual_seed(8)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in TOGETHER]
    params[-1] = nn.Parameter(params[-1].detach().T.contiguous().T)
    late, spoilt = 4, 5
    spread = [torch.exp(2 * torch.randn(s, generator=generator)).to(dtype) for s in TOGETHER]
    optimizer = getattr(torch.optim, kind)(params, lr=0.01)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 4):
            for i, (param, scale) in enumerate(zip(params, spread, strict=True)):
                grad = torch.randn(param.shape, generator=generator).to(dtype) * scale
                param.grad = None if i == late and step == 1 else grad
                if i == spoilt and step == 3:
                    grad[7, 7] = torch.nan
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    rows = {(row["step"], row["parameter"]): row for row in probe.frame().to_dict("records")}
    assert len(rows) == 3 * len(params)
    for step, truths in enumerate(steps, 1):
        for i, (name, truth) in enumerate(truths.items()):
            where = f"{kind} {dtype}, step {step}, {i}: {TOGETHER[i]}"
            row = rows[step, name]
            assert row["rule"] == kind.lower().replace("adamw", "adam"), where
            if (step, i) == (1, late):
                assert not row["stepped"], where
            elif (step, i) == (3, spoilt):
                assert row["nonfinite"] == oracle.row(truth)["nonfinite"], where
                assert math.isnan(row["grad_norm"]), where
            else:
                check_big(row, truth, dtype, where)
    histograms = probe.histograms()
    last = histograms[histograms["step"] == 3].set_index("parameter")["counts"]
    for i, (name, truth) in enumerate(steps[-1].items()):
        if i != spoilt:
            assert sum(last[name]) == truth.after.size, f"{kind} {dtype} {TOGETHER[i]}"


class Minimal(Optimizer):
    """Adam without a momentum, and with one second moment for each matrix."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= lr/√v ⊙ g."""
        for param in self.param_groups[0]["params"]:
            square = param.grad**2
            self.state[param]["v"] = square.mean() if param.dim() > 1 else square
            param.sub_(0.01 / self.state[param]["v"].sqrt() * param.grad)


class Failing(torch.optim.SGD):
    """Its rule raises where a gradient is large."""


def minimal(s: lrprobe.Slice) -> lrprobe.Update:
    """One number a row where v is."""
    root = s["v"].sqrt()
    return lrprobe.Update(s.lr / root, s.grad, rms_grad=root)


def failing(s: lrprobe.Slice) -> lrprobe.Update:
    """SGD's, but not of all gradients."""
    if (s.grad > 100).any():
        raise ValueError("too large")
    return lrprobe.Update(s.lr, s.grad)


lrprobe.register_rule(Minimal, minimal)
lrprobe.register_rule(Failing, failing)


@pytest.mark.parametrize("order", [1, -1])
def test_states_that_only_some_have_by_element(order: int) -> None:
    """A state that is one number for some parameters and shaped like others is read as it is."""
    shapes = [(64,), (8, 8), (16, 8), (5, 5), (128,)][::order]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = Minimal(params)
    with lrprobe.attach(optimizer, every=1) as probe:
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    frame = probe.frame()
    assert frame["rule"].eq("minimal").all()
    assert frame["reconstruction_error"].max() < 1e-12
    for param, got in zip(params, frame["rms_grad_mean"], strict=True):
        assert got == pytest.approx(float(optimizer.state[param]["v"].sqrt().mean())), param.shape


EAGER_ONLY: dict[str, Any] = {
    "branch": lambda g: g if g.abs() > -1 else -g,
    "method": lambda g: g + g.new_zeros(g.shape),
    "function": lambda g: torch.erfinv(torch.erf(g)),
    "conversion": lambda g: g * torch.as_tensor(g).sign() * g.sign(),
    "numpy": lambda g: g * np.ones(g.shape, np.float32),
}


@pytest.mark.parametrize("does", EAGER_ONLY)
def test_what_cannot_be_printed_is_computed_eagerly(does: str) -> None:
    """A rule that does to elements what no loop can do is right all the same."""
    rule = lrprobe.Rule(
        f"sgd-{does}", lambda s: lrprobe.Update(s.lr, EAGER_ONLY[does](s.grad)), tolerance=1e-2
    )

    class Plain(torch.optim.SGD):
        """SGD under another name."""

    lrprobe.register_rule(Plain, rule)
    param = nn.Parameter(torch.randn(1, dtype=torch.float64))
    optimizer = Plain([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            param.grad = torch.rand_like(param) + 0.5
            optimizer.step()
    frame = probe.frame()
    assert frame["rule"].eq(f"sgd-{does}").all()
    assert frame["reconstruction_error"].max() < 1e-6


@pytest.mark.parametrize("size", [1, 80])
def test_a_rule_that_fails_on_one_shape_loses_no_other(size: int) -> None:
    """Of parameters that are read together only those of the shape it fails on are measured."""
    shapes = (64 * size,), (128 * size,), (8, 8 * size), (25, 25 * size)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Failing(params, lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
                if param is params[1] and step == 1:
                    param.grad[7] = 1000
            optimizer.step()
        frame = probe.frame()
    assert ["too large" in str(warning.message) for warning in said] == [True]
    rules = [frame.loc[frame["step"] == step, "rule"].tolist() for step in (1, 2, 3)]
    well, spoilt = ["failing"] * 4, ["failing", "measured", "failing", "failing"]
    assert rules == [well, spoilt, spoilt]


class Warming(Optimizer):
    """Each parameter decays as it wants, takes plain steps first, then RMSprop's."""

    def __init__(self, params: Any, decays: list[float]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.decays = decays

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ ← (1 − λ)·θ − lr·g, from the third step of each on lr/(√v+ε)·g."""
        for param, decay in zip(self.param_groups[0]["params"], self.decays, strict=True):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state |= {"step": torch.tensor(0.0), "v": torch.zeros_like(param)}
                state["decay"] = torch.tensor(decay, dtype=torch.float64)
            state["step"] += 1
            state["v"].mul_(0.9).addcmul_(param.grad, param.grad, value=0.1)
            rate: Any = 0.1 if state["step"] < 3 else 0.1 / (state["v"].sqrt() + 1e-8)
            param.mul_(1 - decay).sub_(rate * param.grad)


def warming(s: lrprobe.Slice) -> lrprobe.Update:
    """One rate for all elements where none has more than two steps."""
    t = torch.as_tensor(s.scalar("step"))
    later = s.lr / (s["v"].sqrt() + 1e-8)
    rate = s.lr if bool((t < 3).all()) else torch.where(t < 3, s.lr, later)
    return lrprobe.Update(rate, s.grad, s.scalar("decay"))


lrprobe.register_rule(Warming, warming)


WARMING = [
    ([(5000,)] * 18, range(16, 18)),
    ([(5000,)] * 18, range(16)),
    ([(5000,)] * 2 + [(6000,)] * 2, [2, 3]),
    ([(8192,), (5120,), (5000,)], [1]),
    ([(200_000,), (300_000,)], [1]),
    ([(300_000,), (200_000,)], [1]),
    ([(64,), (64,), (128,)], [1]),
]


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize(("shapes", "late"), WARMING, ids=str)
def test_a_rule_that_says_other_things_of_other_parameters(
    shapes: list[tuple[int, ...]], late: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared rate or one by element, a decay or none: each parameter has its own figures."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Warming(params, [0.1 * (i % 2) for i in range(len(params))])
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 6):
            old = [param.detach().double() for param in params]
            for i, param in enumerate(params):
                # Rates that are nearly the same, which are squared with something taken away.
                grad = torch.randn_like(param).sign() * (1 + 0.1 * torch.rand_like(param))
                param.grad = None if i in late and step < 3 else grad
            optimizer.step()
    frame = probe.frame()
    last = frame[frame["step"] == 5]
    assert (last["rule"] == "warming").all()
    for i, (param, row) in enumerate(zip(params, last.to_dict("records"), strict=True)):
        state = optimizer.state[param]
        rate = (
            0.1 / (state["v"].double().sqrt() + 1e-8) if state["step"] >= 3 else torch.tensor(0.1)
        )
        truth = {
            "effective_lr_mean": float(rate.mean()),
            "effective_lr_std": float(rate.std(correction=0)) if rate.dim() else 0.0,
            "effective_lr_max": float(rate.max()),
            "update_norm": float((param.detach().double() - old[i]).norm()),
        }
        looser = {"effective_lr_std": (1e-4, 1e-6)}  # of the mean, which is 0.1
        assert_close(row, truth, f"{i}: {shapes[i]}", 1e-5, looser=looser)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has it from 2.10 on")
def test_gradients_of_another_dtype_than_other_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters of one dtype, of which one has its gradient in another, are recorded together."""
    params = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(3)]
    params[1].grad_dtype = torch.float32
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False, momentum=0.9)
    for way in ("eager", "cpu"):
        monkeypatch.setenv("LRPROBE_ENGINE", way)
        with lrprobe.attach(optimizer, every=1) as probe:
            for param in params:
                dtype = torch.float32 if param is params[1] else torch.bfloat16
                param.grad = torch.full_like(param, 0.3, dtype=dtype)
            optimizer.step()
            frame = probe.frame()
        assert frame["rule"].tolist() == ["sgd"] * 3
        norms = [float(param.grad.double().norm()) for param in params if param.grad is not None]
        np.testing.assert_allclose(frame["grad_norm"], norms, rtol=1e-6)
        assert norms[0] != norms[1]
