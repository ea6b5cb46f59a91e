"""The rounding that the check allows for: it costs no right rule, and hides no wrong one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from optimizers import RULED, Case, one_per_class
from torch import nn

import lrprobe
from lrprobe.rules import find_rule

pytestmark = pytest.mark.usefixtures("seeded")

RATES = (1e-2, 1e-4, 1e-6, 1e-8)


def rounded() -> list[Case]:
    """The first case of each optimizer, implementation and kind of decay, but for sparse ones."""
    found: dict[tuple[Any, ...], Case] = {}
    flags = ("foreach", "fused", "decoupled_weight_decay", "maximize")
    for case in RULED:
        broken = case.cls is torch.optim.SGD and case.kwargs.get("fused")  # pytorch#191763
        if not case.sparse and not broken:
            decay = bool(case.kwargs.get("weight_decay"))
            found.setdefault((case.cls, decay, *map(case.kwargs.get, flags)), case)
    return list(found.values())


ROUNDED = rounded()


@pytest.mark.sampled(53)
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("near", [1.0, 1e3])
@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.id)
def test_no_right_rule_is_given_up_for_rounding(
    case: Case, near: float, dtype: torch.dtype
) -> None:
    """Parameters near 1 and 1e3, rates down to 1e-8: what rounding explains is no error."""
    generator = torch.Generator().manual_seed(41)
    params = case.parameters(dtype)
    optimizer = case.make(params)
    with torch.no_grad():
        for param in params:
            param.mul_(0.1).add_(near)
    with lrprobe.attach(optimizer, every=1) as probe:
        for lr in RATES:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            for _ in range(10):
                case.gradients(params, generator)
                optimizer.step()
    frame = probe.frame()
    lost = frame[frame["rule"] == "measured"]
    columns = ["step", "lr", "parameter", "numel", "reconstruction_error", "update_norm"]
    high = frame[frame["reconstruction_error"] > (1e-3 if dtype == torch.float32 else 5e-2)]
    assert lost.empty, f"{case.id} {dtype} {near}:\n{high[columns].to_string()}"
    assert high.empty, f"{case.id} {dtype} {near}:\n{high[columns].to_string()}"


SPARSE = [case for case in one_per_class() if case.sparse]


@pytest.mark.slow
@pytest.mark.usefixtures("eager")  # a rule is judged in float64 either way
@pytest.mark.parametrize("case", [*ROUNDED, *SPARSE], ids=lambda case: case.id)
def test_a_thousand_steps_cost_no_right_rule(case: Case) -> None:
    """Rates from 1e-2 to 1e-8, float32 parameters near 1 and near 1e3: none becomes measured."""
    generator = torch.Generator().manual_seed(42)
    params, groups = [], []
    for near in (1.0, 1e3):
        for lr in RATES:
            start = near * (1 + 0.1 * torch.randn(8, 16, generator=generator))
            params.append(nn.Parameter(start))
            given = case.kwargs.get("lr")
            rate = torch.tensor(lr, dtype=given.dtype) if isinstance(given, torch.Tensor) else lr
            groups.append({"params": [params[-1]], "lr": rate})
    optimizer = case.make(groups)
    # Two recorded steps in a row are what a rule is judged by.
    with lrprobe.attach(optimizer, every=lambda step: step % 50 < 2) as probe:
        for _ in range(1000):
            case.gradients(params, generator)
            optimizer.step()
    frame = probe.frame()
    assert frame["step"].nunique() == 40
    lost = frame[frame["rule"] == "measured"].groupby("parameter").first()
    assert lost.empty, f"{case.id}:\n{lost[['step', 'lr', 'param_norm']].to_string()}"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case", [case for case in one_per_class() if not case.measured], ids=lambda case: case.id
)
def test_a_rule_that_is_wrong_by_one_percent_is_given_up(case: Case, dtype: torch.dtype) -> None:
    """At usual steps the allowance for rounding does not hide it."""
    right = find_rule(case.cls)
    assert right is not None
    wrong_by = 1.01 + 2 * right.tolerance  # Muon's own orthogonalisation is in bfloat16

    class Wrong(case.cls):
        pass

    def update(s: lrprobe.Slice) -> lrprobe.Update:
        told = right.update(s)
        return replace(told, effective_lr=told.effective_lr * wrong_by)

    lrprobe.register_rule(Wrong, replace(right, update=update))
    params = [nn.Parameter(torch.randn(40, 50, dtype=dtype))]
    optimizer = replace(case, cls=Wrong).make(params)
    generator = torch.Generator().manual_seed(43)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(4):
                case.gradients(params, generator)
                optimizer.step()
    assert len(said) == 1, [str(each.message) for each in said]
    assert probe.frame()["rule"].iloc[-1] == "measured"
