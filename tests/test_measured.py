"""Optimizers without a rule, or whose rule does not explain their steps."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from optimizers import Case, closure_of, one_per_class
from oracle import QUANTILES, Tape
from rows import assert_quantiles, measure, one_row
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


class Sign(Optimizer):
    """An optimizer that lrprobe does not know."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= lr·sign(g)."""
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad.sign(), alpha=group["lr"])


class Halved(torch.optim.SGD):
    """A subclass whose step its parent's rule does not explain."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= lr/2·g."""
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] / 2)


class Faithful(torch.optim.SGD):
    """A subclass whose step is its parent's."""


@pytest.mark.parametrize("size", [50, 50_000])
def test_an_unknown_optimizer_is_measured(size: int) -> None:
    """Without a rule quantiles are of |Δθ|/|g|, the moments NaN, and one warning says so."""
    param = nn.Parameter(torch.randn(size, dtype=torch.float64))
    frame, said, truths = measure(Sign([param], lr=0.25), 4)
    assert len(said) == 1, said
    assert "register_rule" in said[0]
    assert "Sign" in said[0]
    assert (frame["rule"] == "measured").all()
    assert frame["stepped"].all()
    for row, truth in zip(frame.itertuples(), truths, strict=True):
        grad = truth["group0.param0"].grad
        there = grad != 0
        ratio = 0.25 / np.abs(grad[there])
        if size <= 4096:
            for name, level in QUANTILES.items():
                got = getattr(row, f"effective_lr_{name}")
                right = np.quantile(ratio, level, method="inverted_cdf")
                assert got == pytest.approx(right, rel=0.01), name
            applied = 0.25 * math.sqrt(there.sum()) / np.linalg.norm(grad)
            assert row.effective_lr_applied == pytest.approx(applied, rel=1e-6)
        else:
            assert_quantiles(pd.Series(row._asdict()), ratio, "measured")
        for name in ("mean", "gmean", "std", "min", "max"):
            assert math.isnan(getattr(row, f"effective_lr_{name}")), name
        assert row.lr == pytest.approx(0.25)
        assert row.grad_norm == pytest.approx(np.linalg.norm(grad))
        assert row.update_norm == pytest.approx(0.25 * math.sqrt(there.sum()), rel=0.05)


def test_lbfgs_is_measured() -> None:
    """LBFGS has no rate per element: measured, with one warning."""
    param = nn.Parameter(torch.randn(20, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([param], lr=0.5)
    tape = Tape(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param - 1).pow(4).sum()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            tape.before()
            optimizer.step(closure)
            truth = tape.after()["group0.param0"]
    assert len(caught) == 1
    assert "register_rule" in str(caught[0].message)
    row = probe.frame().iloc[0]
    assert row["rule"] == "measured"
    assert row["update_norm"] == pytest.approx(float(np.linalg.norm(truth.after - truth.before)))


def test_a_subclass_that_steps_otherwise_becomes_measured() -> None:
    """A rule that two recorded steps in a row belie is given up, with one warning."""
    params = [nn.Parameter(torch.randn(40, dtype=torch.float64)) for _ in range(2)]
    frame, said, _ = measure(Halved(params, lr=0.5), 5)
    assert len(said) == 1, said
    for word in ("register_rule", "Halved", "group0.param0", "group0.param1"):
        assert word in said[0], f"{word!r} not in: {said[0]}"
    rules = [rows["rule"].tolist() for _, rows in frame.groupby("parameter")]
    for each in rules:
        assert each[0] == "sgd"
        assert each[2:] == ["measured"] * 3, each
    errors = frame[frame["rule"] == "sgd"]["reconstruction_error"]
    np.testing.assert_allclose(errors, 0.5, rtol=1e-9)
    row = one_row(frame, step=5, parameter="group0.param1")
    assert row["effective_lr_p50"] == pytest.approx(0.25, rel=0.01)
    assert row["effective_lr_applied"] == pytest.approx(0.25)
    assert math.isnan(row["effective_lr_mean"])


def test_a_subclass_that_steps_as_its_parent_keeps_the_rule() -> None:
    """A faithful subclass has its parent's rule, and no warning."""
    frame, said, _ = measure(Faithful([nn.Parameter(torch.randn(40))], lr=0.5), 5)
    assert said == []
    assert (frame["rule"] == "sgd").all()
    assert frame["optimizer"].tolist() == ["Faithful"] * 5


def test_a_state_that_is_sparse_costs_no_record() -> None:
    """What an optimizer keeps of sparse gradients may be sparse too (pytorch_optimizer's SM3)."""

    class SparseState(Sign):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                self.state[param]["sum"] = param.grad.clone()
                param.add_(param.grad, alpha=-0.5)

    sparse, dense = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.ones(4))
    optimizer = SparseState([sparse, dense], lr=0.5)
    with pytest.warns(match="has no rule"):
        probe = lrprobe.attach(optimizer, every=1)
    for _ in range(2):
        sparse.grad = torch.tensor([1.0, 0, 1, 0, 0]).unsqueeze(1).expand(5, 3).to_sparse(1)
        dense.grad = torch.ones(4)
        optimizer.step()
    probe.close()
    frame = probe.frame()
    assert frame["step"].tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(frame["update_norm"], [0.5 * 6**0.5, 1.0] * 2)
    np.testing.assert_allclose(frame["effective_lr_p50"], 0.5, rtol=0.01)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("case", one_per_class(), ids=lambda case: case.id)
def test_the_same_parameter_twice_is_measured_from_the_first_step(case: Case) -> None:
    """What one step moves twice has one row, measured; the parameters beside it keep the rule."""
    generator = torch.Generator().manual_seed(2)
    params = case.parameters()[:2]
    if len(params) < 2:
        params = [case.parameters()[0], case.parameters()[0]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = case.make([params[0], params[1], params[0]])
        probe = lrprobe.attach(optimizer, every=1)
        for _ in range(4):
            case.gradients(params, generator)
            optimizer.step(closure_of(optimizer))
        probe.close()
    said = [str(each.message) for each in caught if "lrprobe" in str(each.message)]
    assert [each for each in said if "group0.param0 more than once" in each], said
    assert len(said) == 1 + case.measured, said
    frame = probe.frame()
    assert set(frame["parameter"]) == {"group0.param0", "group0.param1"}
    rules = {name: set(rows["rule"]) for name, rows in frame.groupby("parameter")}
    assert rules["group0.param0"] == {"measured"}
    assert ("measured" in rules["group0.param1"]) == case.measured, rules
    assert "step-stuck" not in [each.code for each in probe.findings().findings]


def test_one_belied_step_is_not_enough() -> None:
    """One odd step, such as another hand on the parameter, does not cost the rule."""

    class Once(torch.optim.SGD):
        count = 0

        def step(self, closure: Any = None) -> None:
            super().step()
            Once.count += 1
            if Once.count == 3:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)

    frame, said, _ = measure(Once([nn.Parameter(torch.randn(40))], lr=0.5), 6)
    assert said == []
    assert (frame["rule"] == "sgd").all()
    assert (frame["reconstruction_error"] > 1e-3).tolist() == [False] * 2 + [True] + [False] * 3
