"""Flat tensors, stepped one after another, have the frame of the parameters in them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

import lrprobe
from lrprobe import watching
from lrprobe.distributed.parts import Flat, Parts, Piece, whole
from lrprobe.schedule import Schedule


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 120), nn.Linear(120, 3)
    ).double()


def make(params: Any) -> Optimizer:
    return optim.AdamW(params, lr=0.01, eps=1e-3)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    model(x).square().mean().backward()


class Flattened:
    """Keeps a model's parameters in two flat tensors, one for each group, and steps one at a time.

    As ZeRO does: where a tensor is not stepped, it is in no group, and has no gradient.
    """

    def __init__(self, model: nn.Module, *, empties: bool) -> None:
        self.empties = empties
        self.named = dict(model.named_parameters())
        weights = {n: p for n, p in self.named.items() if p.ndim > 1}
        biases = {n: p for n, p in self.named.items() if p.ndim == 1}
        self.halves = [weights, biases]
        self.flats = [
            torch.cat([p.detach().reshape(-1) for p in half.values()]).requires_grad_()
            for half in self.halves
        ]
        self.optimizer = make([{"params": [flat]} for flat in self.flats])
        self.optimizer.param_groups[1]["lr"] = 0.002
        self.skipped = 0

    def parts(self, optimizer: Optimizer, _: Any) -> Parts | None:
        if optimizer is not self.optimizer:
            return None
        flats = []
        for group, (flat, half) in enumerate(zip(self.flats, self.halves, strict=True)):
            pieces, start = [], 0
            for name, param in half.items():
                span = slice(start, start + param.numel())
                pieces.append(Piece(name, param.numel(), span, whole(param.shape)))
                start = span.stop
            flats.append(Flat(flat, group, pieces))
        return Parts(weakref.ref(optimizer), flats, self.skips)

    def skips(self) -> int:
        count, self.skipped = self.skipped, 0
        return count

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for group, half, flat in zip(groups, self.halves, self.flats, strict=True):
            flat.grad = torch.cat([p.grad.reshape(-1) for p in half.values()])
            if self.empties:
                held, group["params"] = [each["params"] for each in groups], [flat]
                for other in groups:
                    if other is not group:
                        other["params"] = []
                self.optimizer.step()
                for each, params in zip(groups, held, strict=True):
                    each["params"] = params
            else:
                self.optimizer.param_groups = [group]
                self.optimizer.step()
                self.optimizer.param_groups = groups
            flat.grad = None
            start = 0
            for param in half.values():
                values = flat.detach()[start : start + param.numel()]
                param.data.copy_(values.view_as(param))
                start += param.numel()


@pytest.fixture(params=[False, True], ids=["taken-out", "emptied"])
def flattened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model, and its parameters in flat tensors of which the probe knows."""
    model = net()
    kept = Flattened(model, empties=request.param)
    monkeypatch.setattr(watching.deepspeed, "parts_of", kept.parts)
    return model, kept


def by_name(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["step", "parameter"], ignore_index=True).drop(columns="time")


def trained(probe: lrprobe.Probe, model: nn.Module, step: Callable[[], object]) -> Any:
    for number in range(4):
        backward(model, number)
        step()
    return probe.frame(), probe.elements()


def test_the_frame_is_that_of_the_parameters(flattened: Any) -> None:
    """Group by group, figure by figure and element by element, to rounding."""
    model, kept = flattened
    with lrprobe.attach(kept.optimizer, model, every=2, track=3) as probe:
        got = trained(probe, model, kept.step)
    twin = net()
    groups: list[Any] = [
        {"params": [p for p in twin.parameters() if p.ndim > 1]},
        {"params": [p for p in twin.parameters() if p.ndim == 1], "lr": 0.002},
    ]
    optimizer = make(groups)
    with lrprobe.attach(optimizer, twin, every=2, track=3) as probe:
        want = trained(probe, twin, optimizer.step)
    for a, b in zip(want, got, strict=True):
        a, b = by_name(a), by_name(b)  # noqa: PLW2901
        for name in ("reconstruction_error", "state_error"):
            assert (b.pop(name) < 1e-9).all() if name in b else True
            a.pop(name) if name in a else None
        pd.testing.assert_frame_equal(b, a, rtol=1e-10)


def test_a_skipped_step_has_its_rows(flattened: Any) -> None:
    """With its number and its norms, told at the next step; and at the end, by ``close``."""
    model, kept = flattened
    with lrprobe.attach(kept.optimizer, model, every=1) as probe:
        backward(model, 0)
        kept.step()
        kept.skipped += 2
        kept.step()
        assert probe.step == 4
        kept.skipped += 1
    frame = probe.frame()
    assert frame.groupby("step")["stepped"].all().to_dict() == {
        1: True, 2: False, 3: False, 4: True, 5: False,
    }  # fmt: skip
    norms = frame.pivot_table(index="step", columns="parameter", values="param_norm")
    pd.testing.assert_series_equal(norms.loc[1], norms.loc[2], check_names=False)
    pd.testing.assert_series_equal(norms.loc[4], norms.loc[5], check_names=False)
    assert frame.loc[~frame["stepped"], "update_norm"].isna().all()


def test_include_speaks_of_the_parameters(flattened: Any) -> None:
    """Patterns are for their names, not for flat tensors'."""
    model, kept = flattened
    with lrprobe.attach(kept.optimizer, model, include="weight", every=1) as probe:
        backward(model, 0)
        kept.step()
        assert probe.frame()["parameter"].tolist() == ["0.weight", "2.weight", "3.weight"]


def test_one_step_is_inspected_by_parameter(flattened: Any) -> None:
    """``inspect_step`` and ``effective_lr`` have one process' rates, flat, under its names."""
    model, kept = flattened
    twin = net()
    optimizer = make(twin.parameters())
    for each in optimizer.param_groups, kept.optimizer.param_groups:
        for group in each:
            group["lr"] = 0.01
    for number in range(2):
        backward(model, number)
        backward(twin, number)
        with lrprobe.inspect_step(kept.optimizer, model) as got:
            kept.step()
        with lrprobe.inspect_step(optimizer, twin) as want:
            optimizer.step()
    rates = lrprobe.effective_lr(kept.optimizer, model)
    assert set(got) == set(want) == set(rates)
    for name, view in want.items():
        torch.testing.assert_close(got[name].effective_lr, view.effective_lr.reshape(-1))
        torch.testing.assert_close(got[name].update, view.update.reshape(-1))
        torch.testing.assert_close(rates[name], view.effective_lr.reshape(-1))
        assert got[name].error < 1e-9


def test_a_trainer_that_does_not_count_skipped_steps_has_no_rows_of_them() -> None:
    """Numbers are the trainer's own: those that it left out, and no other."""
    at = {"step": 5}
    schedule = Schedule(1, lambda: at["step"], optim.SGD([torch.zeros(1)], lr=0.1))
    assert schedule.next() == 5
    schedule.step = 5
    at["step"] = 6
    assert list(schedule.skipped(2)) == []
    at["step"] = 8
    assert list(schedule.skipped(2)) == [6, 7]


def test_a_wrapper_in_a_wrapper_is_looked_through() -> None:
    """Though the outer one subclasses ``Optimizer``, and the inner one does not."""
    inner = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)

    class Middle:
        optimizer = inner

    class Outer(Optimizer):
        def __init__(self) -> None:
            self.optimizer = Middle()

    with lrprobe.attach(Outer(), every=1) as probe:
        inner.param_groups[0]["params"][0].grad = torch.ones(2)
        inner.step()
        assert len(probe.frame()) == 1
