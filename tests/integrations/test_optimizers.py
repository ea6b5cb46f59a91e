"""Optimizers of other packages, in their current releases."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from packages import (
    CASES,
    CLOSURES,
    MADE,
    NO_STEP,
    SECOND_ORDER,
    SHARP,
    WRAPPERS,
    Case,
    classes,
    one_per_class,
    package,
)
from tables import read_table
from torch import Tensor, nn

import lrprobe
from lrprobe.rules import find_rule
from lrprobe.rules.external import known
from lrprobe.testing import check_rule


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_rule_explains_every_step(case: Case) -> None:
    """`check_rule` proves the rule on the real optimizer, over ten steps with a spike."""
    worst = check_rule(case.make, shapes=case.shapes, dtype=case.dtype, tolerance=case.tolerance)
    assert 0 <= worst <= case.tolerance


def test_every_known_class_is_proved_or_shares_its_proof() -> None:
    """Each rule has a case, and each class it is given to exists in its package."""
    module_of = {case.module.partition(".")[0]: case.module for case in CASES}
    proved = {find_rule(type(_made(case))) for case in one_per_class()}
    for name, cls, rule in known():
        if name == "keras":  # which is proved in test_keras.py
            continue
        assert rule in proved, f"{name}.{cls}"
        if name != "timm":  # of which only those in the table are loaded
            assert hasattr(package(module_of[name]), cls), f"{name} has no {cls} any more"


def _made(case: Case) -> Any:
    return case.make([nn.Parameter(torch.ones(8, 8, dtype=case.dtype))])


def trained(case: Case, dtype: torch.dtype, probed: bool) -> tuple[list[Tensor], Any, list[float]]:
    """Parameters after six steps, the frame, and the norms of the gradients given."""
    generator = torch.Generator().manual_seed(3)
    params = [  # each twice, since small ones of a shape are taken together
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in (*case.shapes, *case.shapes)
    ]
    optimizer = case.make(params)
    probe = lrprobe.attach(optimizer, every=1, track=2) if probed else None
    norms = []
    for _ in range(6):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            norms.append(float(param.grad.double().norm()))
        optimizer.step()
    frame = None
    if probe is not None:
        probe.close()
        frame = probe.frame()
    return [param.detach().clone() for param in params], frame, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", one_per_class(), ids=lambda case: case.id)
def test_training_is_the_same_and_reconstructed(case: Case, dtype: torch.dtype) -> None:
    """Parameters end bit-identical, no rule is lost, grad_norm is that of the gradient given."""
    without, _, _ = trained(case, dtype, probed=False)
    ends, frame, norms = trained(case, dtype, probed=True)
    for got, right in zip(ends, without, strict=True):
        assert torch.equal(got, right)
    assert (frame["rule"] != "measured").all(), frame[["parameter", "reconstruction_error"]]
    rtol = 1e-3 if dtype == torch.float32 else 0.1
    np.testing.assert_allclose(frame["grad_norm"], norms, rtol=rtol)
    assert (frame["rule"] == find_rule(type(_made(case))).name).all()


DECAYED = [
    Case("pytorch_optimizer", "Lion", {"weight_decay": 0.1, "weight_decouple": False}),
    Case("pytorch_optimizer", "AdEMAMix", {"weight_decay": 0.1}),
    Case("pytorch_optimizer", "Prodigy", {"weight_decay": 0.1, "weight_decouple": False}),
    Case("pytorch_optimizer", "DAdaptAdam", {"weight_decay": 0.1}),
    Case("pytorch_optimizer", "Adan", {"foreach": False}),
    Case("prodigyopt", "Prodigy", {"weight_decay": 0.1, "decouple": False}),
    Case("dadaptation", "DAdaptAdam", {"weight_decay": 0.1}),
    Case("schedulefree", "AdamWScheduleFree", {"weight_decay": 0.1}),
    Case("schedulefree", "SGDScheduleFree", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize("case", DECAYED, ids=lambda case: case.id)
def test_a_gradient_rewritten_in_place_is_told(case: Case) -> None:
    """Norm, zeros, cosine and tracked elements are of the gradient before decay and division."""
    generator = torch.Generator().manual_seed(5)
    param = nn.Parameter(torch.randn(140, 1000, generator=generator, dtype=torch.float64))
    optimizer = case.make([param])
    with lrprobe.attach(optimizer, every=1, track=3) as probe:
        for _ in range(3):
            given = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            given[:, ::4] = 0
            before = param.detach().clone()
            param.grad = given.clone()
            optimizer.step()
    row = probe.frame().iloc[-1]
    moved = before - param.detach()
    cosine = float((moved * given).sum() / moved.norm() / given.norm())
    assert row["rule"] != "measured"
    np.testing.assert_allclose(row["grad_norm"], float(given.norm()), rtol=1e-9)
    np.testing.assert_allclose(row["update_grad_cosine"], cosine, atol=1e-6)
    np.testing.assert_allclose(row["zero_grad_fraction"], 0.25, atol=0)
    elements = probe.elements().query("step == 3")
    at = elements["element"].tolist()
    np.testing.assert_allclose(elements["grad"], given.reshape(-1)[at], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(-elements["update"], moved.reshape(-1)[at], rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_between_train_and_eval(name: str) -> None:
    """Evaluating in between, which moves the weights, leaves steps explained and rates the same."""
    schedulefree = package("schedulefree")

    def run(evaluated: bool) -> Any:
        generator = torch.Generator().manual_seed(7)
        param = nn.Parameter(torch.randn(6, 8, generator=generator, dtype=torch.float64))
        optimizer = getattr(schedulefree, name)([param], lr=0.05, weight_decay=0.1)
        optimizer.train()
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(8):
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                optimizer.step()
                if evaluated:
                    optimizer.eval()
                    optimizer.train()
        return probe.frame()

    frames = [run(evaluated=True), run(evaluated=False)]
    for frame in frames:
        assert (frame["rule"] != "measured").all()
        assert not frame["reconstruction_error"].gt(1e-9).any()
    for column in ("effective_lr_p50", "effective_lr_applied", "grad_norm"):
        np.testing.assert_allclose(frames[0][column], frames[1][column], rtol=1e-6, err_msg=column)


def test_schedule_free_rate_is_that_of_its_base_sequence() -> None:
    """The rate is what takes z along the gradient: −Δz/g, per element."""
    schedulefree = package("schedulefree")
    param = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
    optimizer = schedulefree.AdamWScheduleFree([param], lr=0.05, warmup_steps=3)
    optimizer.train()
    for step in range(5):
        given = torch.cos(torch.arange(12, dtype=torch.float64) + step)
        param.grad = given.clone()
        z = optimizer.state[param].get("z", param).clone()
        with lrprobe.inspect_step(optimizer) as seen:
            optimizer.step()
        rate = (z - optimizer.state[param]["z"]) / given
        np.testing.assert_allclose(seen["group0.param0"].effective_lr, rate.detach(), rtol=1e-9)


def test_prodigy_applies_the_estimate_from_before_the_step() -> None:
    """The rate has the old d as its factor, where the group already holds the new one."""
    prodigyopt = package("prodigyopt")
    param = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = prodigyopt.Prodigy([param], betas=(0.0, 0.99), d0=1e-2)
    grown = False
    for _ in range(6):
        before, d = param.detach().clone(), optimizer.param_groups[0]["d"]
        param.grad = param.detach() * 2
        gradient = param.grad.clone()
        with lrprobe.inspect_step(optimizer) as seen:
            optimizer.step()
        now = optimizer.param_groups[0]["d"]
        root = optimizer.state[param]["exp_avg_sq"].sqrt()
        expected = d * now / (root + now * 1e-8)
        view = seen["group0.param0"]
        np.testing.assert_allclose(view.effective_lr, expected, rtol=1e-12)
        np.testing.assert_allclose(before - view.effective_lr * gradient, param.detach(), rtol=1e-9)
        grown |= now > 2 * d
    assert grown


def test_an_optimizer_without_a_rate_has_a_frame() -> None:
    """Adafactor's lr=None is NaN in the frame, and its rate, which it finds itself, is there."""
    case = Case("transformers", "Adafactor", {})
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = case.make([param])
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
    frame = probe.frame()
    assert frame["lr"].isna().all()
    assert frame["initial_lr"].isna().all()
    assert (frame["rule"] == "adafactor").all()
    assert (frame["effective_lr_p50"] > 0).all()


@pytest.mark.parametrize(
    ("module", "name", "exact"),
    [
        ("bitsandbytes.optim", "AdamW8bit", "AdamW"),
        ("torchao.optim", "AdamW8bit", "_AdamW"),
        ("torchao.optim", "AdamWFp8", "_AdamW"),
    ],
)
def test_rates_of_low_bit_states_are_near_those_in_full(module: str, name: str, exact: str) -> None:
    """After a step the median rate is within 3 % of the one of the same optimizer in 32 bits."""
    medians = []
    for cls in (name, exact):
        generator = torch.Generator().manual_seed(9)
        param = nn.Parameter(torch.randn(600, 512, generator=generator))
        optimizer = getattr(package(module), cls)([param], lr=1e-3)
        with lrprobe.attach(optimizer, every=1) as probe:
            param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        row = probe.frame().iloc[0]
        assert row["rule"] == "adam"
        medians.append(row["effective_lr_p50"])
    np.testing.assert_allclose(medians[0], medians[1], rtol=0.03)


# --- all of pytorch_optimizer -------------------------------------------------------------------

SHARED = ((5, 7), (11,), (4, 3, 2, 2))


def run(cls: type, probed: bool) -> tuple[list[Tensor], Any, Any]:
    """Parameters after four steps, the frame, and the optimizer."""
    name = cls.__name__
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    params: list[Any] = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHARED]
    if name == "SafeFP16Optimizer":
        params = [nn.Parameter(param.detach().half()) for param in params]
    optimizer: Any = MADE.get(name, lambda cls, params: cls(params))(cls, params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    inner = getattr(optimizer, "optimizer", optimizer)
    held = [param for group in inner.param_groups for param in group["params"]]
    if name != "SafeFP16Optimizer":
        params = held
    probe = lrprobe.attach(optimizer, every=1, track=2) if probed else None
    for _ in range(4):
        pull = [torch.randn(param.shape, generator=generator) for param in params]

        @torch.enable_grad()
        def loss(pull: list[Tensor] = pull) -> Any:
            optimizer.zero_grad()
            terms = [(p * w).sum() + p.square().sum() for p, w in zip(params, pull, strict=True)]
            total = torch.stack(terms).sum()
            if name == "SafeFP16Optimizer":
                optimizer.backward(total.float())
            else:
                total.backward(create_graph=name in SECOND_ORDER)
            return (total, total) if name == "GSAM" else total

        if name in CLOSURES:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    frame = None
    if probe is not None:
        probe.close()
        frame = probe.frame()
        assert len(frame) == 4 * len(held)
    return [param.detach().clone() for param in params], frame, optimizer


def rule_of(cls: type) -> str:
    """What the table says of it, found in four steps, which a probe leaves as they are."""
    if cls.__name__ in NO_STEP:
        return "none: it steps inside the backward pass, and has no `step()`"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without, _, _ = run(cls, probed=False)
        ends, frame, _ = run(cls, probed=True)
    for got, right in zip(ends, without, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)
    (rule,) = set(frame["rule"])
    for held, names in {"adam": WRAPPERS, "sgd": SHARP}.items():
        if cls.__name__ in names:
            assert rule == held, f"it wraps an optimizer with the rule {held}; the rule is {rule}"
            assert not frame["reconstruction_error"].gt(1e-3).any()
            return "that of the optimizer it wraps"
    return str(rule)


@pytest.mark.parametrize("name", SHARP)
def test_a_sharpness_aware_step_is_that_of_the_optimizer_inside(name: str) -> None:
    """It begins at the unperturbed weights and takes the gradient of the perturbed ones."""
    generator = torch.Generator().manual_seed(11)
    pull = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    param = nn.Parameter(torch.randn(pull.shape, generator=generator, dtype=torch.float64))
    # WSAM's default adds the sharpness to the weights itself, after the step of the optimizer.
    more = {"decouple": False} if name == "WSAM" else {}
    optimizer = MADE[name](classes()[name], [param], **more)

    @torch.enable_grad()
    def loss() -> Any:
        optimizer.zero_grad()
        total = (param**4 * pull).sum()
        total.backward()
        return (total, total) if name == "GSAM" else total

    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(3):
            before = param.detach().clone()
            loss()
            beside = param.grad.clone()
            optimizer.step(loss)
            moved = before - param.detach()
            torch.testing.assert_close(moved, 0.1 * param.grad)
            assert not torch.allclose(param.grad, beside)  # the weights were perturbed
            row = probe.frame().iloc[-1]
            assert row["rule"] == "sgd"
            np.testing.assert_allclose(row["effective_lr_p50"], 0.1, rtol=0.01)
            np.testing.assert_allclose(row["grad_norm"], float(param.grad.norm()), rtol=1e-9)
            np.testing.assert_allclose(row["update_norm"], float(moved.norm()), rtol=1e-9)


def test_every_class_of_pytorch_optimizer(subtests: pytest.Subtests) -> None:
    """Each attaches, trains bit-identically, and is reconstructed or measured as the table says."""
    table = read_table()
    for name, cls in classes().items():
        with subtests.test(name):
            assert rule_of(cls) == table.pop(name, None)
    assert not table, f"the table in docs/optimizers.md also names {sorted(table)}"
