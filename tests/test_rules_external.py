"""What the rules of other packages' optimizers ask of the engine, with stand-ins for them."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe
from lrprobe.engine.eager import slices
from lrprobe.engine.pieces import read, sample
from lrprobe.rules import find_rule
from lrprobe.rules.base import Coded, Entry, Slice
from lrprobe.rules.external import known
from lrprobe.rules.external.common import without_decay


class Rewriting(Optimizer):
    """SGD that leaves lr·(g + λθ) in ``p.grad``, as some packages do."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.add_(param, alpha=group["weight_decay"]).mul_(group["lr"])
                param.sub_(param.grad)


class Ruled(Rewriting):
    """The same, with a rule."""


def ruled(s: Slice) -> lrprobe.Update:
    direction = s.grad / s.lr
    grad = without_decay(s, direction, s.param, s.grad)
    return lrprobe.Update(s.lr, direction, grad=grad)


lrprobe.register_rule(Ruled, lrprobe.Rule("ruled", ruled))


def trained(
    cls: type[Rewriting], size: int, closure: bool = False
) -> tuple[Any, Any, Tensor, Tensor]:
    """Frame and elements of three steps; the last gradient given, and what it moved."""
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
    optimizer = cls([param])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*register_rule.*")
        probe = lrprobe.attach(optimizer, every=1, track=3)
    for _ in range(3):
        given = torch.randn(size, generator=generator, dtype=torch.float64)
        given[::4] = 0
        before = param.detach().clone()

        def evaluate(given: Tensor = given) -> None:
            param.grad = given.clone()

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    probe.close()
    return probe.frame(), probe.elements(), given, before - param.detach()


@pytest.mark.parametrize("size", [40, 200_000])
@pytest.mark.parametrize("cls", [Ruled, Rewriting])
def test_figures_are_of_the_gradient_that_was_given(cls: type[Rewriting], size: int) -> None:
    """Also where the optimizer has overwritten it: told by the rule, or kept from before."""
    frame, elements, given, moved = trained(cls, size)
    row = frame.iloc[-1]
    assert row["rule"] == ("ruled" if cls is Ruled else "measured")
    np.testing.assert_allclose(row["grad_norm"], float(given.norm()), rtol=1e-9)
    np.testing.assert_allclose(row["zero_grad_fraction"], 0.25)
    cosine = float((moved * given).sum() / moved.norm() / given.norm())
    np.testing.assert_allclose(row["update_grad_cosine"], cosine, atol=0.03)  # measured: a sample
    last = elements.query("step == 3")
    at = last["element"].tolist()
    np.testing.assert_allclose(last["grad"], given[at], atol=1e-9)
    if cls is Rewriting:
        ratio = (moved.abs() / given.abs())[given != 0].numpy()
        np.testing.assert_allclose(row["effective_lr_p50"], np.median(ratio), rtol=0.05)


def test_with_a_closure_the_gradient_left_is_taken() -> None:
    """An old gradient before the step is not mistaken for that of the closure."""
    frame, _, given, moved = trained(Rewriting, 40, closure=True)
    np.testing.assert_allclose(frame["grad_norm"].iloc[-1], float(moved.norm()), rtol=1e-9)
    assert not math.isclose(float(moved.norm()), float(given.norm()), rel_tol=0.1)


def test_inspect_step_measures_by_the_gradient_that_was_given() -> None:
    """|Δθ|/|g| of an optimizer without a rule is not spoilt by what it leaves in ``p.grad``."""
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Rewriting([param])
    param.grad = torch.tensor([4.0, 8.0], dtype=torch.float64)
    with lrprobe.inspect_step(optimizer) as seen:
        optimizer.step()
    view = seen["group0.param0"]
    np.testing.assert_allclose(view.effective_lr, [0.45 / 4, 0.7 / 8], rtol=1e-12)


@pytest.mark.usefixtures("eager")
def test_a_rule_may_allow_for_rounded_state() -> None:
    """A parameter stays with its rule while the error is below the rule's own tolerance."""

    class Rough(Rewriting):
        pass

    for tolerance, expected in ((0.2, "rough"), (0.05, "measured")):
        rule = lrprobe.Rule(
            "rough", lambda s: lrprobe.Update(s.lr * 1.1, s.grad / s.lr), tolerance=tolerance
        )
        lrprobe.register_rule(Rough, rule)
        param = nn.Parameter(torch.ones(8, dtype=torch.float64))
        optimizer = Rough([param])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with lrprobe.attach(optimizer, every=1) as probe:
                for _ in range(4):
                    param.grad = torch.ones_like(param)
                    optimizer.step()
        frame = probe.frame()
        assert frame["rule"].iloc[-1] == expected
        assert bool(caught) == (expected == "measured")
        np.testing.assert_allclose(frame["reconstruction_error"].iloc[0], 0.1 / 1.1, rtol=1e-6)


CODES = torch.arange(256, dtype=torch.uint8)


def coded(shape: tuple[int, ...], bits: int, block: int) -> tuple[Coded, Tensor]:
    """A state in few bits, and all that it stands for."""
    generator = torch.Generator().manual_seed(2)
    numel = math.prod(shape)
    codes = torch.randint(1 << bits, (numel,), generator=generator, dtype=torch.uint8)
    scale = torch.rand(-(-numel // block), generator=generator) + 0.5
    table = torch.randn(1 << bits, generator=generator)
    whole = table[codes.int()] * scale.repeat_interleave(block)[:numel]
    stored = codes if bits == 8 else (codes[::2] << 4) | codes[1::2]
    return Coded(torch.Size(shape), stored, scale, block, table), whole


def everything(state: Coded) -> Tensor:
    """All that it stands for."""
    return read(state, slice(0, state.shape.numel()), state.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 50), (600, 1000), (3, 400_000), (1_000_002,)])
def test_coded_state_is_read_slice_by_slice(shape: tuple[int, ...], bits: int) -> None:
    """Blocks, the check sample and chosen positions of a state in few bits are what it is."""
    state, whole = coded(shape, bits, 128)
    assert torch.equal(everything(state), whole)
    param = torch.zeros(shape)
    entry = Entry(param, param, {"m": state})
    parts = [s["m"] for s in slices(entry, {}, torch.float32)]
    assert torch.equal(torch.cat(parts), whole)
    at = torch.tensor([0, 7, len(whole) - 1])
    assert torch.equal(read(state, at, state.shape), whole[at])
    where = sample(torch.arange(len(whole)).reshape(shape), param.shape)
    assert torch.equal(sample(state, param.shape), whole[where])


def test_coded_floats_need_no_table() -> None:
    """Codes of 8 bits that are themselves numbers are only scaled."""
    codes = torch.tensor([1.0, -2.0, 0.5, 448.0]).to(torch.float8_e4m3fn)
    try:
        codes[torch.tensor([0])]
    except RuntimeError as error:  # torch 2.6 on the CPU
        pytest.skip(str(error))
    state = Coded(torch.Size((4,)), codes, torch.tensor([2.0, 0.5]), 2)
    assert everything(state).tolist() == [2.0, -4.0, 0.25, 224.0]


def test_a_class_is_known_by_package_and_name() -> None:
    """A class of a known package finds its rule, its subclasses too; a namesake finds none."""
    there = type("Lion", (Optimizer,), {"__module__": "timm.optim.lion"})
    child = type("Child", (there,), {"__module__": "mine"})
    namesake = type("Lion", (Optimizer,), {"__module__": "mine.timm"})
    assert find_rule(there) is find_rule(child)
    assert find_rule(there).name == "lion"
    assert find_rule(namesake) is None


def test_a_registered_rule_goes_before_a_known_one() -> None:
    """`register_rule` on a class of a known package replaces what lrprobe knows of it."""
    there = type("Lion", (Optimizer,), {"__module__": "timm.optim.lion"})
    lrprobe.register_rule(there, lrprobe.Rule("mine", ruled))
    assert find_rule(there).name == "mine"


def test_no_package_is_imported_for_its_rules() -> None:
    """`import lrprobe` imports none of the packages whose optimizers it knows."""
    packages = sorted({package for package, _, _ in known()})
    code = f"import lrprobe, sys; print([p for p in {packages} if p in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_rate_of_none_is_nan() -> None:
    """An optimizer that has lr=None (Transformers' Adafactor) is recorded, with NaN for it."""

    class Own(Rewriting):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.param_groups[0]["lr"] = None

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad)

    lrprobe.register_rule(Own, lambda s: lrprobe.Update(1.0, s.grad))
    param = nn.Parameter(torch.ones(3))
    optimizer = Own([param])
    with lrprobe.attach(optimizer, every=1) as probe:
        param.grad = torch.ones_like(param)
        optimizer.step()
    row = probe.frame().iloc[0]
    assert math.isnan(row["lr"])
    assert math.isnan(row["initial_lr"])
    assert row["effective_lr_p50"] == 1.0


@pytest.mark.parametrize(
    ("rule", "option"),
    [("schedulefree", {"inner_momentum": 0.9}), ("prodigy", {"eps": None})],
)
def test_an_option_that_a_rule_does_not_know_is_named(rule: str, option: dict[str, Any]) -> None:
    """The parameters are measured, and the warning names the option."""
    from lrprobe.rules.external import adapted, schedulefree

    class Odd(Rewriting):
        """Of a package that has got one more option."""

    taken = {"schedulefree": schedulefree.SGD, "prodigy": adapted.PRODIGY}[rule]
    lrprobe.register_rule(Odd, taken)
    param = nn.Parameter(torch.ones(4))
    optimizer = Odd([param])
    optimizer.param_groups[0].update(
        {"d": 1.0, "d_coef": 1.0, "momentum": 0.9, "step": 1}, **option
    )
    probe = lrprobe.attach(optimizer, every=1)
    param.grad = torch.ones(4)
    with pytest.warns(UserWarning, match=next(iter(option))):
        optimizer.step()
    assert probe.frame()["rule"].tolist() == ["measured"]
    probe.close()
