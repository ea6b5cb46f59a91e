"""Every figure of the frame against the oracle: NumPy float64 on the full tensors."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
from optimizers import CASES, Case, closure_of, one_per_class
from oracle import Tape, assert_close
from rows import COARSE, RTOL, SPREAD, check_big, expected, one_row
from torch import nn

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


@pytest.mark.sampled(23)
@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_column_is_numpys(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 each figure of each step is what NumPy computes from before the step."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    generator = torch.Generator().manual_seed(3)
    params = case.parameters()
    optimizer = case.make(params)
    tape = Tape(optimizer)
    steps = []
    with warnings.catch_warnings():
        if case.measured:
            warnings.filterwarnings("ignore", ".*register_rule.*")
        with lrprobe.attach(optimizer, every=1) as probe:
            for step in range(1, 6):
                case.gradients(params, generator, 1e3 if step == 3 else 1.0)
                tape.before()
                optimizer.step(closure_of(optimizer))
                steps.append(tape.after())
    frame = probe.frame()
    assert len(frame) == 5 * len(params)
    rows = {(row["step"], row["parameter"]): row for row in frame.to_dict("records")}
    rtol = RTOL[case.tolerance]
    if case.measured:
        rtol = 1e-6
    looser = {"effective_lr_std": (rtol, 1e-7), "update_grad_cosine": (rtol, rtol), **COARSE}
    for step, truths in enumerate(steps, 1):
        for name, truth in truths.items():
            row = rows[step, name]
            where = f"{case.id}, step {step}, {name} of {truth.after.size}"
            right = expected(truth, row, case.tolerance, where)
            if not truth.after.size:  # test_kinds.py has the figures of nothing
                right = {key: right[key] for key in ("numel", "stepped", "lr", "initial_lr")}
            assert_close(row, right, where, rtol, looser=looser)
            assert row["optimizer"] == case.cls.__name__
            assert row["group"] == 0
            assert (row["rule"] == "measured") == case.measured


BIG = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 1e-3, "weight_decay": 0.1}),
    ("Adadelta", {"weight_decay": 0.01}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9}),
    ("RAdam", {"betas": (0.9, 0.99)}),
    ("Adafactor", {}),
    ("Rprop", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "kwargs"), BIG, ids=[kind for kind, _ in BIG])
def test_big_parameters_are_numpys_within_the_contract(
    kind: str, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    """Above 4,096 elements norms, means and extremes stay exact, and quantiles in the contract."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(300, 217), (100, 1000), (5000,), (3, 5, 7, 43), (1, 5000), (5000, 1)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    spread = [torch.exp(3 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]
    optimizer = getattr(torch.optim, kind)(params, **kwargs)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(8 if kind == "RAdam" else 3):
            for param, scale in zip(params, spread, strict=True):
                param.grad = torch.randn(param.shape, generator=generator).to(dtype) * scale
                param.grad.view(-1)[::7] = 0
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    frame = probe.frame()
    for truth in steps[-1].values():
        row = one_row(frame, step=len(steps), parameter=truth.name)
        check_big(row, truth, dtype, f"{kind} {dtype} {truth.name}")


HALF = [case for case in one_per_class() if not case.sparse and not case.measured]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF, ids=lambda case: case.id)
def test_16_bit_parameters(case: Case, dtype: torch.dtype) -> None:
    """With 16-bit parameters what is there is exact, and rates are right to that precision."""
    generator = torch.Generator().manual_seed(6)
    params = case.parameters(dtype)
    optimizer = case.make(params)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(4):
            case.gradients(params, generator)
            for param in params:
                param.grad += param.grad.sign()  # float16 would round a small square to 0
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    frame = probe.frame()
    there = ("param_norm", "grad_norm", "zero_grad_fraction", "nonfinite", "numel", "lr")
    for step, truths in enumerate(steps, 1):
        for name, truth in truths.items():
            row = one_row(frame, step=step, parameter=name)
            where = f"{case.id} {dtype}, step {step}, {name}"
            right = oracle.row(truth)
            if not truth.after.size:
                continue
            assert_close(row, {key: right[key] for key in there}, where, 1e-6)
            coarse = ("effective_lr_p50", "effective_lr_gmean", "effective_lr_applied")
            assert_close(row, {key: right[key] for key in coarse}, where, 0.05)
            assert row["rule"] != "measured", where
            assert not row["reconstruction_error"] > 5e-2, (
                f"{where}: reconstruction_error {row['reconstruction_error']}"
            )


def test_parameters_without_a_gradient() -> None:
    """A parameter without a gradient has stepped=False and NaN figures; lr and norm stay."""
    params = [nn.Parameter(torch.full((4,), 2.0)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        params[0].grad = torch.ones(4)
        optimizer.step()
    frame = probe.frame()
    assert frame["stepped"].tolist() == [True, False]
    still = frame.iloc[1]
    assert still["lr"] == pytest.approx(0.1)
    assert still["param_norm"] == pytest.approx(4.0)
    rest = [c for c in oracle.FIGURES if c != "param_norm"]
    assert still[rest].isna().all(), f"not NaN: {still[rest].dropna().to_dict()}"
    assert len(probe.histograms()) == 1


def test_groups_have_their_own_hyperparameters() -> None:
    """Each group's own lr, betas, eps and decay count, never those of the first."""
    generator = torch.Generator().manual_seed(9)
    params = [nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
              for _ in range(3)]  # fmt: skip
    optimizer = torch.optim.AdamW(
        [
            {"params": params[:1], "lr": 0.1, "weight_decay": 0.0},
            {"params": params[1:2], "lr": 0.01, "betas": (0.5, 0.7), "eps": 0.1},
            {"params": params[2:], "lr": 0.02, "amsgrad": True, "maximize": True},
        ]
    )
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 5):
            for param in params:
                param.grad = torch.randn(6, dtype=torch.float64, generator=generator)
            if step == 3:
                optimizer.param_groups[1]["lr"] = 0.5
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    frame = probe.frame()
    for step, truths in enumerate(steps, 1):
        for name, truth in truths.items():
            row = one_row(frame, step=step, parameter=name)
            right = expected(truth, row, 1e-12, name)
            assert_close(row, {"group": truth.group, **right}, f"step {step}, {name}",
                         looser=SPREAD)  # fmt: skip
    assert frame.query("group == 1")["initial_lr"].tolist() == [0.01] * 4


def test_a_group_added_in_mid_run_is_recorded() -> None:
    """`add_param_group` in mid-run is seen at the next step, its initial_lr when first seen."""
    params = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.Adam(params[:1], lr=0.1)
    tape = Tape(optimizer)
    with lrprobe.attach(optimizer, every=1, track=2, batch_size=4) as probe:
        for step in range(1, 5):
            if step == 3:
                optimizer.add_param_group({"params": params[1:], "lr": 0.7})
            for param in params:
                param.grad = None
            sum((param * step).square().sum() for param in params).backward()
            tape.before()
            optimizer.step()
            truths = tape.after()
    frame = probe.frame()
    assert frame["step"].tolist() == [1, 2, 3, 3, 4, 4]
    row = one_row(frame, step=4, group=1)
    right = expected(truths["group1.param0"], row, 1e-12, "the added group")
    right |= {"samples": 4.0, "lr_per_sample": 0.7 / 4}
    assert_close(row, right, "the added group", looser=SPREAD)
    assert probe.elements()["step"].tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
