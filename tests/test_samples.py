"""Samples of a step: backward passes are counted."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
def test_samples_are_counted(tied: bool, every: int) -> None:
    """`samples` is batch_size times the backward passes of that step, tied weights or not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    if tied:
        model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    passes = [3, 1, 2, 4, 1, 2]
    with lrprobe.attach(optimizer, model, every=every, batch_size=16) as probe:
        for number in passes:
            optimizer.zero_grad()
            for _ in range(number):
                model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
    frame = probe.frame()
    frame = frame[frame["parameter"] == "0.weight"]
    steps = [s for s in range(1, 7) if s == 1 or s % every == 0]
    right = [16.0 * passes[s - 1] for s in steps]
    np.testing.assert_array_equal(frame["samples"], right)
    np.testing.assert_allclose(frame["lr_per_sample"], 0.3 / np.array(right), rtol=1e-12)


def heads(model: nn.Module) -> None:
    """Two backward passes: each through the trunk, which comes last, and a head of its own."""
    for head in model[:2]:
        head(model[2](torch.randn(2, 4))).square().mean().backward()


def penalised(model: nn.Module) -> None:
    """Two passes whose gradients have a graph, which are added up in a new tensor each time."""
    for _ in range(2):
        model(torch.randn(2, 4)).square().mean().backward(create_graph=True)


def clipped(model: nn.Module) -> None:
    """Two passes, each with its gradient clipped in place."""
    for _ in range(2):
        model(torch.randn(2, 4)).square().mean().backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("way", [heads, penalised, clipped])
def test_samples_are_counted_however_gradients_come(way, set_to_none: bool) -> None:
    """Two passes in each step, whatever the first parameter takes part in."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with lrprobe.attach(optimizer, model, every=1, batch_size=16) as probe:
        for _ in range(4):
            optimizer.zero_grad(set_to_none)
            way(model)
            optimizer.step()
        optimizer.zero_grad()
    assert probe.frame()["samples"].tolist() == [32.0] * 4 * 6


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_samples_of_a_skipped_step_do_not_count(fused: bool, set_to_none: bool, clip: bool) -> None:
    """A gradient scaler that skips a step leaves no pass to the next, though no hook is run."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with lrprobe.attach(optimizer, model, every=1, batch_size=16) as probe:
        for passes, factor in ((2, 1.0), (3, math.inf), (1, 1.0), (2, 1.0)):
            optimizer.zero_grad(set_to_none)
            for _ in range(passes):
                scaler.scale(model(torch.randn(2, 4)).square().mean() * factor).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    frame = probe.frame()
    rows = frame[frame["stepped"] & (frame["parameter"] == "0.weight")]
    assert rows["samples"].tolist() == [32.0, 16.0, 32.0]


def test_counting_leaves_no_hook() -> None:
    """On no parameter, after closing."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1, batch_size=1):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert sum(bool(p._backward_hooks) for p in model.parameters()) == 4
    for param in model.parameters():
        assert not param._backward_hooks
        assert not param._post_accumulate_grad_hooks


def test_samples_are_nan_without_batch_size() -> None:
    """Without `batch_size` nothing is counted, and no hook is left on a parameter."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        assert not param._post_accumulate_grad_hooks
        param.sum().backward()
        optimizer.step()
    row = probe.frame().iloc[0]
    assert math.isnan(row["samples"])
    assert math.isnan(row["lr_per_sample"])


def test_a_fused_skip_for_the_scaler_is_no_step() -> None:
    """A step that a fused optimizer skipped for the scaler has stepped=False and its norms."""
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([param], lr=0.1, fused=True)
    with lrprobe.attach(optimizer, every=1) as probe:
        for found in (0.0, 1.0, 0.0):
            param.grad = torch.full((4,), 8.0)
            if found:
                param.grad[1] = math.inf
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
    frame = probe.frame()
    assert frame["stepped"].tolist() == [True, False, True]
    assert frame["nonfinite"].tolist() == [0.0, 1.0, 0.0]
    assert frame["grad_norm"].tolist() == [4.0, math.inf, 4.0]
    assert frame["lr"].tolist() == pytest.approx([0.1] * 3)
    skipped = frame.iloc[1]
    assert np.isfinite(skipped["param_norm"])
    gone = [c for c in oracle.FIGURES if c not in ("param_norm", "grad_norm", "nonfinite")]
    assert skipped[gone].isna().all(), f"not NaN: {skipped[gone].dropna().to_dict()}"
    assert not frame["reconstruction_error"].gt(1e-6).any()
