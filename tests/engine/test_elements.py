"""Tracked elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import Tape, assert_close
from torch import nn
from torch.optim import Optimizer

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


def run_tracked(dtype: torch.dtype, seed: int, track: int = 10) -> tuple[pd.DataFrame, list[Any]]:
    """The tracked elements of three steps, and the truth."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    tape = Tape(optimizer, [name for name, _ in model.named_parameters()])
    steps = []
    with lrprobe.attach(optimizer, model, every=1, track=track) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 30, dtype=dtype)).square().mean().backward()
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    return probe.elements(), steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_elements_are_the_true_elements(dtype: torch.dtype) -> None:
    """`elements()` shows the tracked elements' own rate, update, gradient and value."""
    table, steps = run_tracked(dtype, seed=0)
    columns = ["step", "parameter", "element", "effective_lr", "update", "grad", "param"]
    assert [c for c in table.columns if c in columns] == columns
    assert table["element"].dtype == "int64"
    sizes = table.groupby(["step", "parameter"]).size()
    assert sizes.max() == 10
    assert sizes.min() == 3  # the last bias has no more
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for row in table.itertuples():
        truth = steps[row.step - 1][row.parameter]
        right = {
            "effective_lr": float(truth.rate[row.element]),
            "update": float(truth.change[row.element]),
            "grad": float(truth.grad[row.element]),
            "param": float(truth.after[row.element]),
        }
        where = f"step {row.step}, {row.parameter}[{row.element}]"
        assert_close(row._asdict(), right, where, rtol, 1e-12)


def test_the_same_elements_are_tracked_in_every_run() -> None:
    """Which elements are tracked does not hang on the global random state."""
    keys = ["step", "parameter", "element"]
    first, _ = run_tracked(torch.float32, seed=0)
    second, _ = run_tracked(torch.float32, seed=1)
    pd.testing.assert_frame_equal(first[keys], second[keys])
    assert not first.duplicated(keys).any()


def test_no_elements_without_track() -> None:
    """Without `track`, `elements()` is an empty table with its columns."""
    table, _ = run_tracked(torch.float32, seed=0, track=0)
    assert len(table) == 0
    assert {"step", "parameter", "element", "effective_lr", "update", "grad", "param"} <= set(table)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "Adadelta", "RMSprop", "NAdam"])
def test_tracked_elements_know_themselves_before_the_step(kind: str) -> None:
    """With a coupled decay, which is of the parameter before the step, each has its own."""
    param = nn.Parameter(torch.randn(40, 30, dtype=torch.float64))
    optimizer = getattr(torch.optim, kind)([param], lr=0.1, weight_decay=0.5)
    tape = Tape(optimizer)
    with lrprobe.attach(optimizer, every=1, track=7) as probe:
        for _ in range(3):
            param.grad = torch.randn_like(param)
            tape.before()
            optimizer.step()
            truth = tape.after()["group0.param0"]
    last = probe.elements().query("step == 3")
    assert len(last) == 7
    for row in last.itertuples():
        right = {
            "effective_lr": float(truth.rate[row.element]),
            "update": float(truth.change[row.element]),
        }
        assert_close(row._asdict(), right, f"{kind} {row.element}", 1e-9, 1e-12)


def test_tracked_elements_of_measured_parameters() -> None:
    """Where the rate is measured an element has its own |Δθ|/|g|, and how it really moved."""

    class Own(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            param = self.param_groups[0]["params"][0]
            param.sub_(param.grad.sign(), alpha=0.25)

    param = nn.Parameter(torch.randn(500, dtype=torch.float64))
    optimizer = Own([param], {"lr": 0.25})
    with pytest.warns(UserWarning, match="register_rule"):
        probe = lrprobe.attach(optimizer, every=1, track=6)
    param.grad = torch.randn_like(param)
    optimizer.step()
    probe.close()
    table = probe.elements()
    at = torch.tensor(table["element"])
    np.testing.assert_allclose(table["effective_lr"], 0.25 / param.grad[at].abs(), rtol=1e-12)
    np.testing.assert_allclose(table["update"], -0.25 * param.grad[at].sign(), rtol=1e-12)
