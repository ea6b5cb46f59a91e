"""Every rule against the steps its optimizer really takes."""

from __future__ import annotations

import math
import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import CASES, RULED, Case, closure_of
from oracle import numpy, ulp
from torch import nn
from torch.optim import Optimizer

import lrprobe
from lrprobe.rules.base import Entry, Slice
from lrprobe.rules.muon import _adjustment
from lrprobe.testing import check_rule

STEPS = 10
SPIKE = 5


def run(
    case: Case, params: list[Any], optimizer: Optimizer, generator: torch.Generator, step: int
) -> tuple[list[np.ndarray], dict[str, lrprobe.StepView]]:
    """One step inside inspect_step: the parameters before it, and what it showed."""
    case.gradients(params, generator, 1e3 if step == SPIKE else 1.0)
    before = [numpy(param) for param in params]
    with lrprobe.inspect_step(optimizer) as seen:
        optimizer.step(closure_of(optimizer))
    return before, dict(seen)


def excess(predicted: np.ndarray, before: np.ndarray, after: np.ndarray, eps: Any) -> float:
    """What the step misses beyond one unit in the last place, relative to the step."""
    missed = np.maximum(np.abs(predicted - after) - ulp(before, eps), 0)
    taken = np.linalg.norm(after - before)
    if not missed.any():
        return 0.0
    return float(np.linalg.norm(missed) / taken) if taken else math.inf


@pytest.mark.sampled
@pytest.mark.parametrize("case", RULED, ids=lambda case: case.id)
def test_inspected_steps_explain_the_real_ones(case: Case) -> None:
    """θ_before·(1−decay) − effective_lr⊙direction is θ_after, of each step, spike included."""
    generator = torch.Generator().manual_seed(20)
    params = case.parameters()
    optimizer = case.make(params)
    for step in range(1, STEPS + 1):
        before, seen = run(case, params, optimizer, generator, step)
        assert list(seen) == [f"group0.param{i}" for i in range(len(params))]
        for (name, view), param, old in zip(seen.items(), params, before, strict=True):
            where = f"{case.id}, step {step}, {name}"
            assert view.rule != "measured", where
            for tensor in (view.effective_lr, view.direction, view.update):
                assert tensor.shape == param.shape, where
                assert tensor.dtype == torch.float64, where
            rate, direction = numpy(view.effective_lr), numpy(view.direction)
            predicted = old * (1 - view.decay) - rate * direction
            after = numpy(param)
            error = excess(predicted, old, after, param.dtype)
            worst = int(np.argmax(np.abs(predicted - after))) if after.size else 0
            assert error <= case.tolerance, (
                f"{where}: error {error:.3g} > {case.tolerance:g}; largest at {worst}: "
                f"by the rule {predicted.reshape(-1)[worst]!r}, "
                f"really {after.reshape(-1)[worst]!r}"
            )
            np.testing.assert_allclose(
                numpy(view.update), -view.decay * old - rate * direction, rtol=1e-12, atol=1e-300
            )
            assert not view.error > case.tolerance, f"{where}: .error is {view.error}"


UNTOLD = (torch.optim.ASGD, torch.optim.Adafactor, torch.optim.LBFGS)  # by their state


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_effective_lr_is_what_inspect_step_shows(case: Case) -> None:
    """`effective_lr` is inspect_step's, or a RuntimeError that says to use inspect_step."""
    generator = torch.Generator().manual_seed(21)
    params = case.parameters()
    optimizer = case.make(params)
    for step in (1, 2, SPIKE, SPIKE + 1):
        if case.measured:
            case.gradients(params, generator)
            optimizer.step(closure_of(optimizer))
            seen = {}
        else:
            _, seen = run(case, params, optimizer, generator, step)
        if case.cls in UNTOLD:
            with pytest.raises(RuntimeError, match="inspect_step"):
                lrprobe.effective_lr(optimizer)
            return
        rates = lrprobe.effective_lr(optimizer)
        assert list(rates) == list(seen)
        # without θ_before, coupled decay makes it a solution of an equation
        rtol = 1e-9 if case.tolerance <= 1e-12 else 1e-4
        for name, rate in rates.items():
            np.testing.assert_allclose(
                numpy(rate),
                numpy(seen[name].effective_lr),
                rtol=rtol,
                err_msg=f"{case.id}, step {step}, {name}",
            )


PLAIN = [case for case in RULED if not case.sparse]


@pytest.mark.sampled
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_check_rule_passes_every_rule(case: Case) -> None:
    """`check_rule` proves each rule over ten steps, and returns the largest error."""
    shapes = [shape for shape in case.shapes if math.prod(shape)]
    worst = check_rule(case.make, shapes=shapes, tolerance=case.tolerance)
    assert 0 <= worst <= case.tolerance


class Plain(Optimizer):
    """θ −= lr·g, and a rule that is told below."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= lr·g."""
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


def wrong(rate: float = 1.0, direction: float = 1.0, decay: float = 0.0) -> type[Plain]:
    """An optimizer whose rule is off by these factors."""

    class Wrong(Plain):
        pass

    def rule(s: lrprobe.Slice) -> lrprobe.Update:
        return lrprobe.Update(
            effective_lr=s.group["lr"] * rate, direction=s.grad * direction, decay=decay
        )

    lrprobe.register_rule(Wrong, rule)
    return Wrong


@pytest.mark.parametrize(
    "mistake", [{"rate": 1 + 1e-9}, {"rate": 2.0}, {"direction": -1.0}, {"decay": 1e-6}], ids=str
)
def test_check_rule_fails_a_wrong_rule(mistake: dict[str, float]) -> None:
    """A wrong rule fails `check_rule`, which shows both numbers."""
    with pytest.raises(AssertionError) as caught:
        check_rule(wrong(**mistake))
    message = str(caught.value)
    numbers = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", message)
    assert len(numbers) >= 2, message
    assert "wrong" in message, f"the rule's name is not in: {message}"
    by_rule = re.search(r"by the rule:\s+(\S+)", message)
    actual = re.search(r"actual:\s+(\S+)", message)
    assert by_rule, message
    assert actual, message
    assert by_rule[1] != actual[1], message


def test_check_rule_fails_a_nan() -> None:
    """A rule that gives NaN fails `check_rule`."""
    with pytest.raises(AssertionError):
        check_rule(wrong(rate=math.nan))


def test_check_rule_passes_a_right_rule() -> None:
    """A right rule passes `check_rule`, also in float32 and bfloat16 with their tolerances."""
    right = wrong()
    assert check_rule(right) <= 1e-12
    assert check_rule(right, dtype=torch.float32, tolerance=1e-3) <= 1e-3
    assert check_rule(right, dtype=torch.bfloat16, tolerance=5e-2) <= 5e-2


def test_check_rule_finds_a_rule_that_is_wrong_only_under_the_spike() -> None:
    """A rule right in ordinary steps and wrong under a gradient spike fails `check_rule`."""

    class Clipped(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad.clamp(-50, 50), alpha=group["lr"])

    lrprobe.register_rule(
        Clipped, lambda s: lrprobe.Update(effective_lr=s.group["lr"], direction=s.grad)
    )
    with pytest.raises(AssertionError, match="step 5"):
        check_rule(Clipped)


def test_check_rule_wants_a_rule() -> None:
    """`check_rule` of an optimizer without a rule says how to give it one."""
    with pytest.raises(LookupError, match="register_rule"):
        check_rule(Plain)


def test_check_rule_leaves_the_global_random_state() -> None:
    """`check_rule` draws from a generator of its own."""
    state = torch.get_rng_state()
    check_rule(torch.optim.Adam)
    assert torch.equal(state, torch.get_rng_state())


# --- in lower precision -------------------------------------------------------------------------

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def takes(case: Case) -> bool:
    """Whether torch takes this case in 16 bits, and is right there."""
    broken = case.cls is torch.optim.SGD and case.kwargs.get("fused")  # pytorch#191763
    return not case.sparse and not broken


LOWER = [case for case in RULED if takes(case)]


@pytest.mark.sampled(101)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOWER, ids=lambda case: case.id)
def test_the_error_stays_in_the_contract_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    """reconstruction_error is at most 1e-3 in float32 and 5e-2 in bfloat16, and no rule is lost."""
    generator = torch.Generator().manual_seed(22)
    params = case.parameters(dtype)
    optimizer = case.make(params)
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 7):
            case.gradients(params, generator, 1e3 if step == 3 else 1.0)
            optimizer.step()
    frame = probe.frame()
    bad = frame[frame["reconstruction_error"] > LIMITS[dtype]]
    columns = ["step", "parameter", "numel", "reconstruction_error"]
    assert bad.empty, f"{case.id} in {dtype}:\n{bad[columns].to_string()}"
    assert (frame["rule"] != "measured").all()


@pytest.mark.parametrize("size", [64, 1000])
def test_the_probe_reports_pytorch_191763(size: int) -> None:
    """torch 2.13's fused CPU SGD leaves bf16 elements unmoved, and the probe says so."""
    generator = torch.Generator().manual_seed(23)
    param = nn.Parameter(torch.randn(size, generator=generator).to(torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    still = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(2):
                param.grad = torch.randn(size, generator=generator).to(torch.bfloat16)
                before = param.detach().clone()
                optimizer.step()
                still.append(float((before == param).float().mean()))
    if max(still) < 0.5:
        pytest.skip("this torch moves them")
    said = [str(w.message) for w in caught]
    assert len(said) == 1, said
    assert "register_rule" in said[0]
    row = probe.frame().iloc[0]
    assert row["reconstruction_error"] > 0.5
    np.testing.assert_allclose(row["lost_fraction"], still[0], atol=0.01)


def test_each_beta_has_its_own_bias_correction() -> None:
    """`Slice.correction` tells betas apart that are computed where they are asked for."""
    entry = Entry(torch.zeros(3), torch.ones(3), {"step": torch.tensor(5.0)})
    s = Slice([entry], {"share": 0.1}, lambda name: torch.zeros(3))
    found = [s.correction(1 - share * s.group["share"]) for share in (1.0, 0.01, 5.0)]
    found += [s.correction(1 - torch.tensor(share).double()) for share in (0.1, 0.001, 0.5)]
    right = [1 - beta**5 for beta in (0.9, 0.999, 0.5)]
    assert [each.item() for each in found] == pytest.approx([*right, *right], rel=1e-6)


@pytest.mark.parametrize(
    ("how", "wide", "tall"),
    [
        (None, 1.0, 2.0),
        ("original", 1.0, 2.0),
        ("match_rms_adamw", 0.8, 0.8),
        ("spectral_unclamped", 0.5, 2.0),
    ],
)
def test_muons_rate_depends_on_the_shape(how: str | None, wide: float, tall: float) -> None:
    """As each `adjust_lr_fn` says, that of a later torch too; `optim_db` has those of this one."""
    for shape, wanted in (((4, 16), wide), ((16, 4), tall)):
        whole: Any = SimpleNamespace(
            entry=SimpleNamespace(param=torch.zeros(shape)), group={"adjust_lr_fn": how}
        )
        assert _adjustment(whole) == pytest.approx(wanted)
