"""Every scheduler in torch: the frame's lr is what each step used, never the next one's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Tape, assert_close
from rows import SPREAD, expected
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as s

import lrprobe

pytestmark = pytest.mark.usefixtures("eager")

STEPS = 12


@dataclass(frozen=True)
class Plan:
    """How to make a scheduler, and how to step it.

    Attributes:
        make: given the optimizer, the scheduler.
        step: given the scheduler and the number of the step, steps it.
        kind: the optimizer.
        kwargs: the optimizer's options.
    """

    make: Callable[[Optimizer], Any]
    step: Callable[[Any, int], None] = lambda scheduler, _: scheduler.step()
    kind: type[Optimizer] = torch.optim.SGD
    kwargs: Any = ()

    def optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        """Two groups of different rates."""
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.02}]
        return self.kind(groups, **{"lr": 0.1, **dict(self.kwargs)})


MOMENTUM = (("momentum", 0.9),)

PLANS: dict[str, Plan] = {
    "LambdaLR": Plan(lambda o: s.LambdaLR(o, lambda t: 1 / (1 + t))),
    "MultiplicativeLR": Plan(lambda o: s.MultiplicativeLR(o, lambda t: 0.9)),
    "StepLR": Plan(lambda o: s.StepLR(o, 3, 0.5)),
    "MultiStepLR": Plan(lambda o: s.MultiStepLR(o, [2, 5], 0.1)),
    "ConstantLR": Plan(lambda o: s.ConstantLR(o, 0.5, 2)),
    "LinearLR": Plan(lambda o: s.LinearLR(o, 0.1, 1.0, 6)),
    "ExponentialLR": Plan(lambda o: s.ExponentialLR(o, 0.8)),
    "PolynomialLR": Plan(lambda o: s.PolynomialLR(o, 8, 2.0)),
    "CosineAnnealingLR": Plan(lambda o: s.CosineAnnealingLR(o, 7)),
    "CosineAnnealingWarmRestarts": Plan(lambda o: s.CosineAnnealingWarmRestarts(o, 4)),
    "ReduceLROnPlateau": Plan(
        lambda o: s.ReduceLROnPlateau(o, factor=0.5, patience=1),
        lambda scheduler, step: scheduler.step(1.0 + step),
    ),
    "SequentialLR": Plan(
        lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.5)], [3])
    ),
    "ChainedScheduler": Plan(
        lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)])
    ),
    "CyclicLR": Plan(
        lambda o: s.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=True), kwargs=MOMENTUM
    ),
    "CyclicLR-betas": Plan(
        lambda o: s.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=True),
        kind=torch.optim.AdamW,
    ),
    "OneCycleLR": Plan(lambda o: s.OneCycleLR(o, 0.3, total_steps=STEPS + 1), kwargs=MOMENTUM),
    "OneCycleLR-betas": Plan(
        lambda o: s.OneCycleLR(o, 0.3, total_steps=STEPS + 1), kind=torch.optim.Adam
    ),
    "OneCycleLR-nadam": Plan(
        lambda o: s.OneCycleLR(o, 0.3, total_steps=STEPS + 1), kind=torch.optim.NAdam
    ),
    "OneCycleLR-tensor-lr": Plan(
        lambda o: s.OneCycleLR(o, 0.3, total_steps=STEPS + 1),
        kind=torch.optim.AdamW,
        kwargs=(("lr", torch.tensor(0.1, dtype=torch.float64)), ("foreach", False)),
    ),
    "ExponentialLR-adadelta": Plan(
        lambda o: s.ExponentialLR(o, 0.5),
        kind=torch.optim.Adadelta,
        kwargs=(("weight_decay", 0.1),),
    ),
    "ExponentialLR-asgd": Plan(lambda o: s.ExponentialLR(o, 0.5), kind=torch.optim.ASGD),
    "SWALR": Plan(lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.001, anneal_epochs=4)),
    "ExponentialLR-adafactor": Plan(lambda o: s.ExponentialLR(o, 0.5), kind=torch.optim.Adafactor),
}


def test_no_scheduler_is_left_out() -> None:
    """Each public scheduler in torch has its test here; a new one is noticed."""
    there = {
        name
        for name, value in vars(s).items()
        if inspect.isclass(value)
        and issubclass(value, s.LRScheduler)
        and value.__module__ == s.__name__
        and not name.startswith("_")
    }
    there -= {"LRScheduler"}
    there |= {"SWALR"}  # of torch.optim.swa_utils
    assert there == {name.partition("-")[0] for name in PLANS}


def parameters() -> list[nn.Parameter]:
    """Some."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(6, 2, generator=generator).double()) for _ in range(4)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("each", [1, 3])
def test_lr_is_what_the_step_used(name: str, each: int) -> None:
    """`lr` is what each step used, momentum and betas too, read however late."""
    plan = PLANS[name]
    params = parameters()
    optimizer = plan.optimizer(params)
    scheduler = plan.make(optimizer)
    generator = torch.Generator().manual_seed(2)
    tape = Tape(optimizer)
    used, truths = [], []
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, STEPS + 1):
            for param in params:
                param.grad = torch.randn(6, 2, generator=generator, dtype=torch.float64)
            used.append([float(group["lr"]) for group in optimizer.param_groups])
            tape.before()
            optimizer.step()
            truths.append(tape.after())
            if step % each == 0:
                plan.step(scheduler, step)
            if step == 5:
                probe.frame()  # what was in flight then came after the scheduler
    frame = probe.frame()
    assert len({tuple(lrs) for lrs in used}) > 1, "the schedule moves nothing"
    for group in (0, 1):
        of_group = frame[frame["group"] == group]
        for _, rows in of_group.groupby("parameter"):
            np.testing.assert_array_equal(rows["lr"], [lrs[group] for lrs in used])
    error = frame["reconstruction_error"].max()
    assert not error > 1e-12, f"reconstruction_error {error}"
    assert not (frame["rule"] == "measured").any()
    for step, now in enumerate(truths, 1):
        of_step = frame[frame["step"] == step].set_index("parameter")
        for key, truth in now.items():
            where = f"{name}, step {step}, {key}"
            right = expected(truth, of_step.loc[key], 1e-12, where)
            del right["initial_lr"]
            loose = {**SPREAD, "update_grad_cosine": (1e-9, 1e-9)}
            assert_close(of_step.loc[key], right, where, looser=loose)


@pytest.mark.parametrize("name", PLANS)
def test_initial_lr_is_the_schedulers(name: str) -> None:
    """`initial_lr` is the group's, which the scheduler set, in every row."""
    plan = PLANS[name]
    params = parameters()
    optimizer = plan.optimizer(params)
    first = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = plan.make(optimizer)
    right = [
        float(group.get("initial_lr", lr))
        for group, lr in zip(optimizer.param_groups, first, strict=True)
    ]
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 5):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            plan.step(scheduler, step)
    frame = probe.frame()
    for group in (0, 1):
        got = set(frame[frame["group"] == group]["initial_lr"])
        assert got == {right[group]}, f"group {group}: got {got}, right is {right[group]}"


@pytest.mark.parametrize("name", ["OneCycleLR", "OneCycleLR-betas", "CyclicLR", "CyclicLR-betas"])
def test_momentum_does_cycle(name: str) -> None:
    """The plans that are to move momentum or betas do move them."""
    plan = PLANS[name]
    params = parameters()
    optimizer = plan.optimizer(params)
    scheduler = plan.make(optimizer)
    seen = set()
    for step in range(1, 6):
        group = optimizer.param_groups[0]
        seen.add(group["betas"][0] if "betas" in group else group["momentum"])
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        plan.step(scheduler, step)
    assert len(seen) > 2


def test_inspect_step_under_a_scheduler() -> None:
    """inspect_step shows the rate of its step, also read after the scheduler has moved it."""
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    scheduler = s.ExponentialLR(optimizer, 0.5)
    for lr in (0.1, 0.05, 0.025):
        for param in params:
            param.grad = torch.ones_like(param)
        with lrprobe.inspect_step(optimizer) as seen:
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(
            seen["group0.param0"].effective_lr, torch.full((6, 2), lr, dtype=torch.float64)
        )
