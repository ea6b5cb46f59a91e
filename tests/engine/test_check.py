"""The check of each step against the one really taken: what is lost, unexplained or idle."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
import versions
from optimizers import CASES, RULED, Case, one_per_class
from oracle import assert_close
from rows import COARSE, assert_quantiles, measure, one_row
from torch import nn

import lrprobe
from lrprobe.engine.buffers import column

pytestmark = pytest.mark.usefixtures("seeded", "eager")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("way", ["forloop", "foreach"])
def test_lost_fraction_is_what_bitwise_comparison_shows(kind: str, way: str) -> None:
    """`lost_fraction` is the share of elements that were to move and did not by one bit."""
    generator = torch.Generator().manual_seed(7)
    size = 4000
    param = nn.Parameter(torch.randn(size, generator=generator).to(torch.bfloat16))
    optimizer = getattr(torch.optim, kind)(
        [param], lr=1e-3, weight_decay=0, foreach=way == "foreach"
    )
    shares = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(5):
            grad = torch.randn(size, generator=generator).to(torch.bfloat16)
            grad[::3] = 0
            param.grad = grad
            before = oracle.bits(param)
            moment = optimizer.state[param].get("exp_avg") if kind == "AdamW" else None
            optimizer.step()
            moment = optimizer.state[param]["exp_avg"] if kind == "AdamW" else grad
            meant = (moment != 0).numpy()
            shares.append(float(np.mean(meant & (before == oracle.bits(param)))))
    assert min(shares) > 0.1, f"the case is none: {shares}"
    np.testing.assert_allclose(probe.frame()["lost_fraction"], shares, atol=1e-12)


def test_reconstruction_error_is_the_share_that_the_rule_misses() -> None:
    """A rule wrong by 0.05 % in the rate has an error of 0.05 %."""

    class Slightly(torch.optim.SGD):
        pass

    lrprobe.register_rule(
        Slightly,
        lambda s: lrprobe.Update(effective_lr=s.group["lr"] * 1.0005, direction=s.grad),
    )
    frame, said, _ = measure(Slightly([nn.Parameter(torch.randn(40).double())], lr=0.5), 3)
    assert said == []
    np.testing.assert_allclose(frame["reconstruction_error"], 0.0005 / 1.0005, rtol=1e-6)


AMSGRAD = [case for case in CASES if case.kwargs.get("amsgrad")][:1]  # a state nobody reads
LARGE = [case for case in one_per_class() + AMSGRAD if not case.measured and not case.sparse]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_a_state_that_is_not_finite_shows(case: Case) -> None:
    """One NaN or inf in any state of a large parameter is counted, whatever the rule reads."""
    param = nn.Parameter(torch.randn(130, 50))
    optimizer = case.make([param])
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(3):
            param.grad = torch.randn_like(param)
            optimizer.step()
        hooks = probe._recorder.hooks[0]
        kept = hooks.engine.before(hooks.watched, optimizer)
        optimizer.step()
        states = {k: v for k, v in optimizer.state[param].items() if v.shape == param.shape}
        for name, state in states.items():
            for bad in (math.nan, math.inf, -math.inf):
                good = state[7, 3].item()
                state[7, 3] = bad
                with torch.no_grad():
                    found = hooks.engine.after(hooks.watched, optimizer, kept)
                state[7, 3] = good
                counts = [v.table[0, column("nonfinite")].item() for v in found.vectors]
                right = 6500.0 if case.cls is versions.MUON else 1.0  # which mixes them all
                assert counts == [right], f"{case.id} {name}={bad}: {counts}, not [{right}]"


DEAD = 40


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("kind", ["Adam", "RMSprop", "Adagrad", "Adadelta", "NAdam"])
def test_elements_that_never_had_a_gradient_are_in_no_statistic_of_rates(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 300 inputs 40 are dead: the huge rate of their weights, as lr/ε, is no one's figure."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    model = nn.Linear(300, 20)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for _ in range(4):
            x = torch.randn(16, 300)
            x[:, :DEAD] = 0
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with lrprobe.inspect_step(optimizer, model) as step:
                optimizer.step()
    row = one_row(probe.frame(), step=4, parameter="weight")
    rate = step["weight"].effective_lr
    alive = rate[:, DEAD:].double().numpy().reshape(-1)
    if kind != "Adadelta":
        assert float(rate[:, :DEAD].min()) > 10 * alive.max(), "the case is none"
    assert row["idle_fraction"] == pytest.approx(DEAD / 300)
    right = {
        "effective_lr_mean": float(np.mean(alive)),
        "effective_lr_std": float(np.std(alive)),
        "effective_lr_min": float(np.min(alive)),
        "effective_lr_max": float(np.max(alive)),
        "effective_lr_gmean": float(np.exp(np.mean(np.log(alive)))),
        "eps_fraction": 0.0 if kind != "Adadelta" else row["eps_fraction"],
    }
    assert_close(row, right, kind, 1e-5, looser=COARSE)
    assert_quantiles(row, alive, kind, ranks=0.0)
    counts = probe.histograms().query("step == 4 and parameter == 'weight'")["counts"].iloc[0]
    assert sum(counts) == alive.size


def test_nothing_moves() -> None:
    """Where no element moves all figures of rates are NaN, and all elements are idle."""
    param = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.Adam([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        param.grad = torch.zeros(5)
        optimizer.step()
    row = probe.frame().iloc[0]
    rates = [name for name in oracle.FIGURES if name.startswith("effective_lr_")]
    assert row[rates].isna().all(), row[rates].to_dict()
    assert row["idle_fraction"] == 1
    assert row["update_norm"] == 0
    assert row["stepped"]


@pytest.mark.parametrize("size", [500, 50_000])
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_persistence_is_the_cosine_with_the_last_recorded_gradient(
    size: int, maximize: bool
) -> None:
    """Of each recorded step with the recorded step before it; NaN at first and after a gap."""
    param = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=0.1, maximize=maximize)
    base = torch.randn(size, dtype=torch.float64)
    grads = [base + 0.5 * torch.randn(size, dtype=torch.float64) for _ in range(9)]
    grads[5] = -grads[5]
    with lrprobe.attach(optimizer, every=2) as probe:
        for grad in grads:
            param.grad = grad
            optimizer.step()
    frame = probe.frame()
    assert frame["step"].tolist() == [1, 2, 4, 6, 8]
    recorded = [grads[step - 1] for step in frame["step"]]
    right = [
        float(a @ b / a.norm() / b.norm()) for a, b in zip(recorded[1:], recorded[:-1], strict=True)
    ]
    assert math.isnan(frame["grad_persistence"][0])
    tolerance = 1e-9 if size <= 4096 else 0.05  # of the check sample
    np.testing.assert_allclose(frame["grad_persistence"][1:], right, atol=tolerance)
    assert right[2] < -0.5, "the case is none"


# --- state_error -------------------------------------------------------------------------------

STATE_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}


@pytest.mark.sampled(23)
@pytest.mark.parametrize("dtype", STATE_LIMITS, ids=str)
@pytest.mark.parametrize("case", RULED, ids=lambda case: case.id)
def test_a_state_that_follows_from_the_gradient_has_no_error(
    case: Case, dtype: torch.dtype
) -> None:
    """Whatever the optimizer and its implementation, `state_error` is rounding, or NaN."""
    if dtype == torch.bfloat16 and case.sparse:
        pytest.skip("torch has no sparse gradients in 16 bits")
    if dtype == torch.bfloat16 and case.cls is torch.optim.SGD and case.kwargs.get("fused"):
        pytest.skip("pytorch#191763: its state has the error that is found")
    if dtype == torch.bfloat16 and case.cls is versions.MUON:
        pytest.skip("torch normalises the momentum of a bfloat16 parameter in place")
    generator = torch.Generator().manual_seed(40)
    params = case.parameters(dtype)
    optimizer = case.make(params)
    with lrprobe.attach(optimizer, every=1) as probe, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*register_rule.*")  # pytorch#191763
        for step in range(1, 6):
            case.gradients(params, generator, 1e3 if step == 3 else 1.0)
            optimizer.step()
    frame = probe.frame()
    limit = max(STATE_LIMITS[dtype], 10 * case.tolerance)
    bad = frame[frame["state_error"] > limit]
    columns = ["step", "parameter", "numel", "state_error"]
    assert bad.empty, f"{case.id} in {dtype}:\n{bad[columns].to_string()}"


def test_a_state_that_does_not_follow_from_the_gradient_shows() -> None:
    """torch 2.13's fused Adam pairs gradients with other elements where strides differ."""
    param = nn.Parameter(torch.randn(30, 20).t())
    errors = {}
    for fused in (False, True):
        optimizer = torch.optim.Adam([param], fused=fused)
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(3):
                param.grad = (2 * param.detach()).contiguous()
                optimizer.step()
        errors[fused] = probe.frame()["state_error"].tolist()
    assert max(errors[False]) < 1e-3
    if max(errors[True]) < 1e-3:
        pytest.skip("this torch pairs them rightly")
    assert min(errors[True]) > 0.1, errors
