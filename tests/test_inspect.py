"""`inspect_step` and `effective_lr` against the oracle."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import RULED, Case
from oracle import Tape, numpy
from torch import Tensor, nn

import lrprobe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# one implementation of each configuration; the others are proved in test_rules
SOME = [case for case in RULED if "-foreach" not in case.id and "-fused" not in case.id]


@pytest.mark.sampled
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_rate_direction_and_decay_are_the_oracles(case: Case) -> None:
    """Rate, direction and decay are DESIGN section 4's, computed from before the step."""
    generator = torch.Generator().manual_seed(30)
    params = case.parameters()
    optimizer = case.make(params)
    tape = Tape(optimizer)
    rtol = {1e-12: 1e-9, 1e-5: 3e-4, 1e-2: 1e-1}[case.tolerance]
    for step in range(1, 8):
        case.gradients(params, generator, 1e3 if step == 4 else 1.0)
        tape.before()
        with lrprobe.inspect_step(optimizer) as seen:
            optimizer.step()
        for name, truth in tape.after().items():
            view, where = seen[name], f"{case.id}, step {step}, {name}"
            pairs = {
                "effective_lr": (view.effective_lr, truth.rate),
                "direction": (view.direction, truth.direction),
                "update": (view.update, truth.change),
            }
            for key, (got, right) in pairs.items():
                scale = np.max(np.abs(right), initial=0)
                np.testing.assert_allclose(
                    numpy(got).reshape(-1),
                    right,
                    rtol=rtol,
                    atol=rtol * scale if key != "effective_lr" else 0,
                    err_msg=f"{where}: {key}",
                )
            assert view.decay == pytest.approx(truth.decay, rel=1e-6, abs=1e-12), where


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose last layer gets no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def backward(model: nn.Module) -> None:
    """Gradients for all but the last layer."""
    model[:2](torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()


def test_names_are_the_models() -> None:
    """Both name parameters as the model does, and leave out those that took no step."""
    model, optimizer = model_and_optimizer()
    backward(model)
    with lrprobe.inspect_step(optimizer, model) as step:
        optimizer.step()
    right = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(step) == right
    assert list(lrprobe.effective_lr(optimizer, model)) == right
    assert step["0.weight"].rule == "adam"
    assert step["0.weight"].decay == pytest.approx(0.01 * 0.01)
    with pytest.raises(KeyError, match=r"2\.weight"):
        step["2.weight"]


def test_inspect_step_needs_a_step() -> None:
    """Asked for a step that was not taken, inspect_step says to take one."""
    _, optimizer = model_and_optimizer()
    with lrprobe.inspect_step(optimizer) as step:
        pass
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        step["group0.param0"]


def test_inspect_step_shows_the_last_of_several() -> None:
    """Of several steps in the block it shows the last."""
    model, optimizer = model_and_optimizer()
    with lrprobe.inspect_step(optimizer, model) as step:
        for lr in (0.1, 0.2):
            optimizer.param_groups[0]["lr"] = lr
            backward(model)
            before = model[0].weight.detach().clone()
            optimizer.step()
    view = step["0.weight"]
    assert view.decay == pytest.approx(0.2 * 0.01)
    predicted = before * (1 - view.decay) - view.effective_lr * view.direction
    torch.testing.assert_close(predicted, model[0].weight.detach(), rtol=1e-12, atol=1e-14)


def test_inspect_step_takes_its_hooks_away() -> None:
    """No hook stays after the block, also after an error in it, and nothing in the state."""
    model, optimizer = model_and_optimizer()
    backward(model)

    def in_block() -> None:
        with lrprobe.inspect_step(optimizer, model):
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_block()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("function", [lrprobe.effective_lr, lrprobe.inspect_step])
def test_bad_input(function: Any) -> None:
    """What is no optimizer, or no module, is a TypeError that says what came."""

    def call(*args: Any) -> None:
        with warnings.catch_warnings():
            found = function(*args)
            if function is lrprobe.inspect_step:
                with found:
                    pass

    with pytest.raises(TypeError, match="int") as caught:
        call(3)
    assert "attach" not in str(caught.value), f"that was no attach: {caught.value}"
    _, optimizer = model_and_optimizer()
    with pytest.raises(TypeError, match=r"Module"):
        call(optimizer, "0.weight")


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adadelta", "Rprop", "ASGD", "LBFGS", "Muon"])
def test_effective_lr_before_the_first_step(kind: str) -> None:
    """Before the first step it says that there was none, and names inspect_step."""
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = getattr(torch.optim, kind)([param], lr=0.1)
    with pytest.raises(RuntimeError, match="inspect_step"):
        lrprobe.effective_lr(optimizer)


def test_effective_lr_after_the_gradient_is_gone() -> None:
    """Where the rate depends on the gradient, and it is gone, it says to use inspect_step."""
    param = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = torch.optim.Adadelta([param], weight_decay=0.1)
    param.grad = torch.randn(4, dtype=torch.float64)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="inspect_step"):
        lrprobe.effective_lr(optimizer)


def test_effective_lr_without_the_gradient_where_the_state_tells() -> None:
    """Adam's rate stands in its state, so it is told after zero_grad too."""
    param = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([param], lr=0.1)
    param.grad = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    optimizer.step()
    right = 0.1 / (param.grad.abs() + 1e-8)
    optimizer.zero_grad()
    rates = lrprobe.effective_lr(optimizer)
    torch.testing.assert_close(rates["group0.param0"], right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adadelta_is_not_read_from_the_state_after_the_step(decay: float) -> None:
    """Adadelta's numerator is RMS[Δx] from before the step, with and without coupled decay."""
    param = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = torch.optim.Adadelta([param], lr=0.7, rho=0.8, weight_decay=decay)
    for step in range(6):
        param.grad = torch.randn(50, dtype=torch.float64) * (100 if step == 4 else 1)
        state = optimizer.state.get(param, {})
        old = state["acc_delta"].clone() if state else torch.zeros(50, dtype=torch.float64)
        optimizer.step()
        square = optimizer.state[param]["square_avg"]
        right = 0.7 * ((old + 1e-6) / (square + 1e-6)).sqrt()
        stale = 0.7 * ((optimizer.state[param]["acc_delta"] + 1e-6) / (square + 1e-6)).sqrt()
        rate = lrprobe.effective_lr(optimizer)["group0.param0"]
        torch.testing.assert_close(rate, right, rtol=1e-9, atol=0)
        assert not torch.allclose(rate, stale, rtol=1e-3)


def test_complex_parameters() -> None:
    """Of a complex parameter, each part has its own figure, in a complex tensor."""
    param = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    optimizer = torch.optim.Adam([param], lr=0.1)
    param.grad = torch.randn(3, 2, dtype=torch.complex128)
    before = numpy(param)
    with lrprobe.inspect_step(optimizer) as seen:
        optimizer.step()
    view = seen["group0.param0"]
    assert view.effective_lr.shape == param.shape
    predicted = before - numpy(view.effective_lr) * numpy(view.direction)
    np.testing.assert_allclose(predicted, numpy(param), rtol=1e-12)
    right = 0.1 / (np.abs(numpy(param.grad)) + 1e-8)
    np.testing.assert_allclose(numpy(view.effective_lr), right, rtol=1e-9)
    rate = lrprobe.effective_lr(optimizer)["group0.param0"]
    torch.testing.assert_close(rate, view.effective_lr, rtol=1e-12, atol=0)


def test_a_step_that_the_rule_does_not_explain_is_shown_as_measured() -> None:
    """Where the rule is wrong, inspect_step shows |Δθ|/|g| as measured, and warns."""

    class Third(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"] / 3)

    param = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = Third([param], lr=0.3)
    param.grad = torch.randn(5, dtype=torch.float64)
    with (
        pytest.warns(UserWarning, match=r"group0\.param0"),
        lrprobe.inspect_step(optimizer) as seen,
    ):
        optimizer.step()
    view = seen["group0.param0"]
    assert view.rule == "measured"
    assert view.error == pytest.approx(2 / 3)
    torch.testing.assert_close(view.effective_lr, torch.full((5,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(view.update, -0.1 * param.grad)


def test_inspect_step_with_a_closure() -> None:
    """With a closure the gradients do not exist before the step; it is explained all the same."""
    param = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = torch.optim.Adadelta([param], weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param - 2).pow(4).sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = param.detach().clone()
        with lrprobe.inspect_step(optimizer) as seen:
            optimizer.step(closure)
        view = seen["group0.param0"]
        predicted = before * (1 - view.decay) - view.effective_lr * view.direction
        torch.testing.assert_close(predicted, param.detach(), rtol=1e-12, atol=1e-14)
        assert math.isfinite(view.error)


def test_a_step_is_shown_in_a_line_each() -> None:
    """Names, shapes and rules, and no tensor; before the step that there is none."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with lrprobe.inspect_step(optimizer, model) as step:
        assert repr(step) == "<no step yet>"
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    weight, bias = (
        rf"'{n}': <StepView {s} float32, rule adam, error [\de.-]+>"
        for n, s in (("weight", "2×3"), ("bias", "2"))
    )
    assert re.fullmatch(f"{{{weight}, {bias}}}", repr(step))
