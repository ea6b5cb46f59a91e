"""Every figure of the frame against the oracle: plain NumPy float64 on the full tensors."""

from __future__ import annotations

import copy
import math
import re
import time
import warnings
from typing import Any

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
import versions
from optimizers import CASES, EXACT, FLOAT32, MUON, Case, closure_of, one_per_class
from oracle import COLUMNS, QUANTILES, Tape, assert_close
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe

FLOAT32_SCALARS = 3e-4  # 1 − 0.999 in float32, at the first step
AMSGRAD = [case for case in CASES if case.kwargs.get("amsgrad")][:1]  # a state nobody reads
RTOL = {EXACT: 1e-9, FLOAT32: FLOAT32_SCALARS, MUON: 5e-2}

COARSE = {
    **{f"effective_lr_{name}": (0.01, 0.0) for name in (*QUANTILES, "gmean")},
    "grad_persistence": (1e-6, 1e-9),
}
SPREAD = {"effective_lr_std": (1e-9, 1e-7), **COARSE}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one_row(frame: pd.DataFrame, **keys: Any) -> pd.Series:
    """The only row that has these keys."""
    for name, value in keys.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, f"{len(frame)} rows, not 1, have {keys}"
    return frame.iloc[0]


def check_error(row: Any, right: float, limit: float, where: str) -> None:
    """The reconstruction error is a rounding error, and NaN exactly where nothing moved."""
    got = row["reconstruction_error"]
    assert math.isnan(got) == math.isnan(right), f"{where}: got {got}, the oracle has {right}"
    assert not got > limit, f"{where}: reconstruction_error {got} > {limit}"


class Rates(Optimizer):
    """Toy optimizer whose effective rate is a tensor in its state."""

    def __init__(self, params: Any, rates: list[Tensor]) -> None:
        super().__init__(params, {"lr": 1.0})
        self.rates = rates

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= rate ⊙ g."""
        params = [p for group in self.param_groups for p in group["params"]]
        for param, rate in zip(params, self.rates, strict=True):
            self.state[param]["rate"] = rate
            if param.grad is not None:
                param.addcmul_(rate, param.grad, value=-1)


lrprobe.register_rule(Rates, lambda s: lrprobe.Update(effective_lr=s["rate"], direction=s.grad))


def probe_rates(*rates: Tensor, generator_seed: int = 0, **options: Any) -> lrprobe.Probe:
    """One step with these rates."""
    generator = torch.Generator().manual_seed(generator_seed)
    params = [nn.Parameter(torch.randn(r.shape, generator=generator, dtype=r.dtype)) for r in rates]
    optimizer = Rates(params, list(rates))
    with lrprobe.attach(optimizer, every=1, **options) as probe:
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()
    return probe


def assert_quantiles(row: pd.Series, rates: np.ndarray, where: str, ranks: float = 0.01) -> None:
    """Within 1 % of a value whose true rank is within one percentage point."""
    wrong = []
    levels = np.array(list(QUANTILES.values()))
    lows = np.quantile(rates, np.clip(levels - ranks, 0, 1))
    highs = np.quantile(rates, np.clip(levels + ranks, 0, 1))
    for name, low, high in zip(QUANTILES, lows, highs, strict=True):
        got = row[f"effective_lr_{name}"]
        if not low * 0.99 <= got <= high * 1.01:
            wrong.append(f"  {name}: got {got!r}, right is {low!r} to {high!r}")
    assert not wrong, f"{where}:\n" + "\n".join(wrong)


# --- every column, over the whole table ---------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_column_is_numpys(case: Case) -> None:
    """In float64 each figure of each step is what NumPy computes from before the step."""
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
            right = oracle.row(truth)
            error = right.pop("reconstruction_error")
            del right["state_error"]  # tests/engine/test_check.py has it
            if not truth.after.size:  # test_parameters_of_every_kind has the figures of nothing
                right = {key: right[key] for key in ("numel", "stepped", "lr", "initial_lr")}
            check_error(row, error, case.tolerance, where)
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


def check_big(row: Any, truth: oracle.Truth, dtype: torch.dtype, where: str) -> None:
    """All figures of a parameter of more than 4,096 elements are within the contract."""
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    looser = {
        "effective_lr_gmean": (0.01, 0.0),
        "effective_lr_std": (rtol, 1e-12),
        "update_grad_cosine": (rtol, rtol),
        # a share of the check sample, of at least 4,096 elements
        "lost_fraction": (0.0, 0.05),
    }
    right = oracle.row(truth)
    limit = 1e-12 if dtype == torch.float64 else 1e-3
    check_error(row, right.pop("reconstruction_error"), limit, where)
    if truth.after.size > 4096:
        for name in QUANTILES:
            del right[f"effective_lr_{name}"]
        assert_quantiles(row, truth.rate, where)
    assert_close(row, right, where, rtol, looser=looser)


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


# --- distributions ------------------------------------------------------------------------------


def distributions(size: int) -> dict[str, np.ndarray]:
    """Rates that are hard to summarise."""
    random = np.random.default_rng(size)
    half = size // 2
    tail = random.pareto(0.5, size) + 1e-12
    return {
        "constant": np.full(size, 0.3),
        "spikes": np.where(np.arange(size) % 2 == 0, 1e-6, 1e4),
        "spikes-in-halves": np.where(np.arange(size) < half, 1e-6, 1e4),
        "zero": np.zeros(size),
        "half-zero": random.random(size) * (random.random(size) < 0.5),
        "tail": tail,
        "sorted": np.sort(tail),
        "descending": np.sort(random.lognormal(0, 3, size))[::-1].copy(),
        "one-dead": np.where(np.arange(size) == size // 3, 1e5, random.random(size)),
        "tiny": random.random(size) * 1e-30,
        "periodic": 1.0 + np.arange(size) % 64,
    }


HARD_SHAPES = [(1,), (2,), (1000,), (4096,), (4097,), (300, 217), (64, 1024), (1000, 500)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
@pytest.mark.parametrize("name", distributions(2))
def test_adversarial_distributions(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """However the rates are spread, their figures are in the contract."""
    rates = torch.tensor(distributions(math.prod(shape))[name]).reshape(shape).to(dtype)
    row = probe_rates(rates).frame().iloc[0]
    flat = rates.double().numpy().reshape(-1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    with np.errstate(divide="ignore"):
        right = {
            "effective_lr_mean": float(np.mean(flat)),
            "effective_lr_std": float(np.std(flat)),
            "effective_lr_min": float(np.min(flat)),
            "effective_lr_max": float(np.max(flat)),
            "effective_lr_gmean": float(np.exp(np.mean(np.log(flat)))),
        }
        if flat.size <= 4096:
            for key, level in QUANTILES.items():
                right[f"effective_lr_{key}"] = float(np.quantile(flat, level))
    close = {
        "effective_lr_gmean": (0.01, 0.0),
        "effective_lr_std": (rtol, 1e-14 * float(np.mean(flat))),  # NumPy itself rounds
    }
    # float32 is what a rate is kept in on the way to its quantiles
    close |= {f"effective_lr_{key}": (1e-6, 0.0) for key in QUANTILES}
    assert_close(row, right, f"{name} {shape}", rtol, looser=close)
    assert_quantiles(row, flat, f"{name} {shape}")


@pytest.mark.parametrize("size", [100, 100_000])
def test_one_nan_shows(size: int) -> None:
    """One NaN among the rates is counted, and makes NumPy's figures NaN, so also these."""
    rates = torch.rand(size, dtype=torch.float64)
    rates[size // 3] = math.nan
    row = probe_rates(rates).frame().iloc[0]
    assert row["nonfinite"] == 1
    for name in ("mean", "gmean", "std", "min", "max", *QUANTILES):
        assert math.isnan(row[f"effective_lr_{name}"]), f"{name}: {row[f'effective_lr_{name}']}"
    assert row["stepped"]
    assert np.isfinite(row["grad_norm"])


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "parameter"])
def test_nonfinite_is_counted(where: str, bad: float, size: int) -> None:
    """Elements with a NaN or inf in gradient or parameter are counted, each once."""
    param = nn.Parameter(torch.ones(size))
    optimizer = torch.optim.Adam([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        param.grad = torch.ones(size)
        optimizer.step()
        param.grad = torch.ones(size)
        target = param.grad if where == "gradient" else param.detach()
        target[[3, size // 2, size - 1]] = bad
        optimizer.step()
    assert probe.frame()["nonfinite"].tolist() == [0.0, 3.0]


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
        watched = probe._recorder.hooks[0].watched
        kept = snapshot.before(watched, optimizer)
        optimizer.step()
        states = {k: v for k, v in optimizer.state[param].items() if v.shape == param.shape}
        for name, state in states.items():
            for bad in (math.nan, math.inf, -math.inf):
                good = state[7, 3].item()
                state[7, 3] = bad
                with torch.no_grad():
                    raw = snapshot.after(watched, optimizer, kept)
                state[7, 3] = good
                rows = [r.parts for r in raw.rows if r.parts is not None]
                counts = [part[0, PARTS.index("nonfinite")].item() for part in rows]
                right = 6500.0 if case.cls is versions.MUON else 1.0  # which mixes them all
                assert counts == [right], f"{case.id} {name}={bad}: {counts}, not [{right}]"


def test_twenty_million_elements() -> None:
    """A parameter of 20 million elements, where torch.quantile fails, has its figures."""
    begin = time.monotonic()
    size = 20_000_000
    generator = torch.Generator().manual_seed(11)
    rates = torch.empty(size).log_normal_(0, 2, generator=generator)
    param = nn.Parameter(torch.zeros(size))
    optimizer = Rates([param], [rates])
    with lrprobe.attach(optimizer, every=1) as probe:
        param.grad = torch.ones(size)
        optimizer.step()
    row = probe.frame().iloc[0]
    histogram = probe.histograms().iloc[0]
    took = time.monotonic() - begin
    flat = rates.numpy()
    mean = np.mean(flat, dtype=np.float64)
    right = {
        "numel": size,
        "effective_lr_mean": float(mean),
        "effective_lr_std": float(np.std(flat, dtype=np.float64)),
        "effective_lr_min": float(flat.min()),
        "effective_lr_max": float(flat.max()),
        "effective_lr_gmean": float(np.exp(np.mean(np.log(flat), dtype=np.float64))),
        "grad_norm": math.sqrt(size),
        "zero_grad_fraction": 0.0,
        "nonfinite": 0.0,
        "update_norm": math.sqrt(np.sum(np.square(flat, dtype=np.float64))),
    }
    assert_close(row, right, "20 million", 1e-5, looser={"effective_lr_gmean": (0.01, 0.0)})
    thinner = flat[::19]  # a million are enough to know a rank to 0.2 %
    assert_quantiles(row, thinner.astype(np.float64), "20 million")
    assert sum(histogram["counts"]) == size
    assert took < 15, f"took {took:.1f} s"


# --- histograms and elements --------------------------------------------------------------------


@pytest.mark.parametrize("name", distributions(2))
@pytest.mark.parametrize("size", [1, 64, 4096])
def test_histograms_are_numpys(name: str, size: int) -> None:
    """Up to 4,096 elements a histogram has exactly the counts of NumPy over its edges."""
    rates = torch.tensor(distributions(size)[name])
    histogram = probe_rates(rates).histograms().iloc[0]
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"])
    assert len(edges) == len(counts) + 1
    assert np.all(np.diff(edges) > 0), f"edges do not ascend: {edges}"
    assert counts.sum() == size
    flat = rates.numpy()
    right, _ = np.histogram(flat, bins=edges)
    np.testing.assert_array_equal(counts, right)


@pytest.mark.parametrize("name", distributions(2))
def test_big_histograms_add_up(name: str) -> None:
    """Of a big parameter the counts add up to its elements, and each share is right to 1 %."""
    rates = torch.tensor(distributions(70_000)[name])
    histogram = probe_rates(rates).histograms().iloc[0]
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"])
    assert np.all(np.diff(edges) > 0), f"edges do not ascend: {edges}"
    assert counts.sum() == rates.numel()
    below = np.searchsorted(np.sort(rates.numpy()), edges[1:], side="left") / rates.numel()
    got = np.cumsum(counts) / rates.numel()
    assert np.max(np.abs(got[:-1] - below[:-1]), initial=0) <= 0.01


@pytest.mark.parametrize("size", [4096, 8192, 1 << 18])
def test_histograms_leave_nan_out(size: int) -> None:
    """A rate that is NaN, of either sign, is in no bin, however large the parameter."""
    rates = torch.full((size,), 0.01)
    rates[: size // 4] = torch.nan
    rates[: size // 8] = -rates[: size // 8]
    histogram = probe_rates(rates).histograms().iloc[0]
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"])
    at = np.searchsorted(edges, 0.01, side="right") - 1
    assert counts.sum() == counts[at] == pytest.approx(0.75 * size, rel=0.01), (edges, counts)


def test_histograms_of_a_real_optimizer() -> None:
    """`histograms()` has one row per step and stepped parameter, of that step's rates."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tape = Tape(optimizer, [name for name, _ in model.named_parameters()])
    steps = []
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 30)).square().mean().backward()
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    table = probe.histograms()
    keys = ["step", "parameter", "edges", "counts"]
    assert [c for c in table.columns if c in keys] == keys
    assert len(table) == 12
    for row in table.itertuples():
        rates = steps[row.step - 1][row.parameter].rate.astype(np.float32)
        right, _ = np.histogram(rates, bins=np.asarray(row.edges))
        assert sum(row.counts) == rates.size
        # one of float64's rates may round across an edge
        assert np.abs(np.asarray(row.counts) - right).sum() <= 2


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


# --- parameters of every kind -------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "RAdam", "Adagrad", "ASGD"])
def test_parameters_that_are_read_together(kind: str) -> None:
    """Small ones of many shapes, of which one begins later and one has a NaN: NumPy's figures."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(64,), (2, 96), (8, 8), (64,), (4096,), (8, 3, 8), (63,), (1, 64), (2, 64)]
    params = [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]
    late, spoilt = 3, 8
    optimizer = getattr(torch.optim, kind)(params, lr=0.01, weight_decay=0.1)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(1, 4):
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.grad = None if i == late and step == 1 else grad
                if i == spoilt and step == 3:
                    grad.view(-1)[77] = torch.nan
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    rows = {(row["step"], row["parameter"]): row for row in probe.frame().to_dict("records")}
    assert len(rows) == 3 * len(shapes)
    for step, truths in enumerate(steps, 1):
        for i, (name, truth) in enumerate(truths.items()):
            where = f"{kind}, step {step}, {shapes[i]}"
            row, right = rows[step, name], oracle.row(truth)
            if (step, i) == (1, late):
                assert not row["stepped"], where
                continue
            if (step, i) == (3, spoilt):
                assert row["nonfinite"] == right["nonfinite"] == 1, where
                assert math.isnan(row["grad_norm"]), where
                continue
            check_error(row, right.pop("reconstruction_error"), 1e-12, where)
            assert_close(row, right, where, looser=SPREAD)


TOGETHER = [(96, 64), (128, 64), (300, 17), (160, 64), (128, 64), (64, 256), (300, 17), (256, 32)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "Adafactor"])
def test_large_parameters_that_are_read_together(
    kind: str, dtype: torch.dtype, compiled: bool
) -> None:
    """Of several sizes, one not contiguous, one that begins later, one with a NaN: NumPy's."""
    generator = torch.Generator().manual_seed(8)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in TOGETHER]
    params[-1] = nn.Parameter(params[-1].detach().T.contiguous().T)
    late, spoilt = 4, 5
    spread = [torch.exp(2 * torch.randn(s, generator=generator)).to(dtype) for s in TOGETHER]
    optimizer = getattr(torch.optim, kind)(params, lr=0.01)
    tape = Tape(optimizer)
    steps = []
    with lrprobe.attach(optimizer, every=1, compile=compiled) as probe:
        for step in range(1, 4):
            for i, (param, scale) in enumerate(zip(params, spread, strict=True)):
                grad = torch.randn(param.shape, generator=generator).to(dtype) * scale
                param.grad = None if i == late and step == 1 else grad
                if i == spoilt and step == 3:
                    grad[7, 7] = torch.nan
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    rows = {(row["step"], row["parameter"]): row for row in probe.frame().to_dict("records")}
    assert len(rows) == 3 * len(params)
    for step, truths in enumerate(steps, 1):
        for i, (name, truth) in enumerate(truths.items()):
            where = f"{kind} {dtype}, step {step}, {i}: {TOGETHER[i]}"
            row = rows[step, name]
            assert row["rule"] == kind.lower().replace("adamw", "adam"), where
            if (step, i) == (1, late):
                assert not row["stepped"], where
            elif (step, i) == (3, spoilt):
                assert row["nonfinite"] == oracle.row(truth)["nonfinite"], where
                assert math.isnan(row["grad_norm"]), where
            else:
                check_big(row, truth, dtype, where)
    histograms = probe.histograms()
    last = histograms[histograms["step"] == 3].set_index("parameter")["counts"]
    for i, (name, truth) in enumerate(steps[-1].items()):
        if i != spoilt:
            assert sum(last[name]) == truth.after.size, f"{kind} {dtype} {TOGETHER[i]}"


class Minimal(Optimizer):
    """Adam without a momentum, and with one second moment for each matrix."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ −= lr/√v ⊙ g."""
        for param in self.param_groups[0]["params"]:
            square = param.grad**2
            self.state[param]["v"] = square.mean() if param.dim() > 1 else square
            param.sub_(0.01 / self.state[param]["v"].sqrt() * param.grad)


class Failing(torch.optim.SGD):
    """Its rule raises where a gradient is large."""


def minimal(s: lrprobe.Slice) -> lrprobe.Update:
    """One number a row where v is."""
    root = s["v"].sqrt()
    return lrprobe.Update(s.lr / root, s.grad, rms_grad=root)


def failing(s: lrprobe.Slice) -> lrprobe.Update:
    """SGD's, but not of all gradients."""
    if (s.grad > 100).any():
        raise ValueError("too large")
    return lrprobe.Update(s.lr, s.grad)


lrprobe.register_rule(Minimal, minimal)
lrprobe.register_rule(Failing, failing)


@pytest.mark.parametrize("order", [1, -1])
def test_states_that_only_some_have_by_element(order: int) -> None:
    """A state that is one number for some parameters and shaped like others is read as it is."""
    shapes = [(64,), (8, 8), (16, 8), (5, 5), (128,)][::order]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = Minimal(params)
    with lrprobe.attach(optimizer, every=1) as probe:
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    frame = probe.frame()
    assert frame["rule"].eq("minimal").all()
    assert frame["reconstruction_error"].max() < 1e-12
    for param, got in zip(params, frame["rms_grad_mean"], strict=True):
        assert got == pytest.approx(float(optimizer.state[param]["v"].sqrt().mean())), param.shape


@pytest.mark.parametrize("size", [1, 80])
def test_a_rule_that_fails_on_one_shape_loses_no_other(size: int) -> None:
    """Of parameters that are read together only those of the shape it fails on are measured."""
    shapes = (64 * size,), (128 * size,), (8, 8 * size), (25, 25 * size)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Failing(params, lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
                if param is params[1] and step == 1:
                    param.grad[7] = 1000
            optimizer.step()
        frame = probe.frame()
    assert ["too large" in str(warning.message) for warning in said] == [True]
    rules = [frame.loc[frame["step"] == step, "rule"].tolist() for step in (1, 2, 3)]
    well, spoilt = ["failing"] * 4, ["failing", "measured", "failing", "failing"]
    assert rules == [well, spoilt, spoilt]


class Warming(Optimizer):
    """Each parameter decays as it wants, takes plain steps first, then RMSprop's."""

    def __init__(self, params: Any, decays: list[float]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.decays = decays

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """θ ← (1 − λ)·θ − lr·g, from the third step of each on lr/(√v+ε)·g."""
        for param, decay in zip(self.param_groups[0]["params"], self.decays, strict=True):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state |= {"step": torch.tensor(0.0), "v": torch.zeros_like(param)}
                state["decay"] = torch.tensor(decay, dtype=torch.float64)
            state["step"] += 1
            state["v"].mul_(0.9).addcmul_(param.grad, param.grad, value=0.1)
            rate: Any = 0.1 if state["step"] < 3 else 0.1 / (state["v"].sqrt() + 1e-8)
            param.mul_(1 - decay).sub_(rate * param.grad)


def warming(s: lrprobe.Slice) -> lrprobe.Update:
    """One rate for all elements where none has more than two steps."""
    t = torch.as_tensor(s.scalar("step"))
    later = s.lr / (s["v"].sqrt() + 1e-8)
    rate = s.lr if bool((t < 3).all()) else torch.where(t < 3, s.lr, later)
    return lrprobe.Update(rate, s.grad, s.scalar("decay"))


lrprobe.register_rule(Warming, warming)

WARMING = [
    ([(5000,)] * 18, range(16, 18)),
    ([(5000,)] * 18, range(16)),
    ([(5000,)] * 2 + [(6000,)] * 2, [2, 3]),
    ([(8192,), (5120,), (5000,)], [1]),
    ([(200_000,), (300_000,)], [1]),
    ([(300_000,), (200_000,)], [1]),
    ([(64,), (64,), (128,)], [1]),
]


@pytest.mark.parametrize("options", [{}, {"sample": 4500}, {"compile": True}], ids=str)
@pytest.mark.parametrize(("shapes", "late"), WARMING, ids=str)
def test_a_rule_that_says_other_things_of_other_parameters(
    shapes: list[tuple[int, ...]], late: Any, options: dict[str, Any]
) -> None:
    """A shared rate or one by element, a decay or none: each parameter has its own figures."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Warming(params, [0.1 * (i % 2) for i in range(len(params))])
    with warnings.catch_warnings(), lrprobe.attach(optimizer, every=1, **options) as probe:
        warnings.filterwarnings("ignore", "lrprobe: compile=True: torch.compile failed")
        for step in range(1, 6):
            old = [param.detach().double() for param in params]
            for i, param in enumerate(params):
                # Rates that are nearly the same, which are squared with something taken away.
                grad = torch.randn_like(param).sign() * (1 + 0.1 * torch.rand_like(param))
                param.grad = None if i in late and step < 3 else grad
            optimizer.step()
    frame = probe.frame()
    last = frame[frame["step"] == 5]
    assert (last["rule"] == "warming").all()
    for i, (param, row) in enumerate(zip(params, last.to_dict("records"), strict=True)):
        state = optimizer.state[param]
        rate = (
            0.1 / (state["v"].double().sqrt() + 1e-8) if state["step"] >= 3 else torch.tensor(0.1)
        )
        truth = {
            "effective_lr_mean": float(rate.mean()),
            "effective_lr_std": float(rate.std(correction=0)) if rate.dim() else 0.0,
            "effective_lr_max": float(rate.max()),
            "update_norm": float((param.detach().double() - old[i]).norm()),
        }
        if "sample" in options and param.numel() > 4500:
            assert_close(row, truth, f"{i}: {shapes[i]}", 0.05)
        else:
            looser = {"effective_lr_std": (1e-4, 1e-9)}
            assert_close(row, truth, f"{i}: {shapes[i]}", 1e-5, looser=looser)


def test_gradients_of_another_dtype_than_other_gradients() -> None:
    """Parameters of one dtype, of which one has its gradient in another, are recorded together."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip(f"torch {torch.__version__} allows one dtype only")
    params = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(3)]
    params[1].grad_dtype = torch.float32
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False, momentum=0.9)
    for options in ({}, {"sample": 4500}, {"compile": True}):
        with lrprobe.attach(optimizer, every=1, **options) as probe:
            for param in params:
                dtype = torch.float32 if param is params[1] else torch.bfloat16
                param.grad = torch.full_like(param, 0.3, dtype=dtype)
            optimizer.step()
            frame = probe.frame()
        assert frame["rule"].tolist() == ["sgd"] * 3
        norms = [float(param.grad.double().norm()) for param in params if param.grad is not None]
        np.testing.assert_allclose(frame["grad_norm"], norms, rtol=1e-6)
        assert norms[0] != norms[1]


def kinds_of_parameters() -> dict[str, Tensor]:
    """Parameters that are not plain."""
    random = torch.Generator().manual_seed(2)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    return {
        "complex": draw(5, 3, dtype=torch.complex128),
        "complex-big": draw(90, 60, dtype=torch.complex128),
        "0-dim": draw(),
        "1-element": draw(1),
        "empty": draw(0),
        "empty-matrix": draw(3, 0),
        "transposed": draw(7, 5).t(),
        "strided": draw(20, 6)[::2, ::3],
        "channels-last": draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels-last-big": draw(16, 8, 9, 9).to(memory_format=torch.channels_last),
        "transposed-big": draw(120, 70).t(),
    }


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "RMSprop", "Rprop", "ASGD"])
@pytest.mark.parametrize("name", kinds_of_parameters())
def test_parameters_of_every_kind(name: str, kind: str) -> None:
    """Complex, 0-dim, empty, strided and channels-last parameters have NumPy's figures."""
    value = kinds_of_parameters()[name]
    param = nn.Parameter(value)
    assert param.stride() == value.stride()
    options = {"momentum": 0.9, "weight_decay": 0.1} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)([param], lr=0.01, **options)
    tape = Tape(optimizer)
    generator = torch.Generator().manual_seed(4)
    with lrprobe.attach(optimizer, every=1, track=5) as probe:
        for _ in range(3):
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = torch.empty_like(param).copy_(grad)
            tape.before()
            optimizer.step()
            truth = tape.after()["group0.param0"]
    right = oracle.row(truth)
    row = one_row(probe.frame(), step=3)
    check_error(row, right.pop("reconstruction_error"), 1e-12, f"{name} {kind}")
    looser = {**SPREAD, "effective_lr_gmean": (0.01, 0.0)}
    if truth.after.size > 4096:
        for key in QUANTILES:
            del right[f"effective_lr_{key}"]
        assert_quantiles(row, truth.rate, f"{name} {kind}")
    assert_close(row, right, f"{name} {kind}", looser=looser)
    if not name.startswith("complex"):
        for element in probe.elements().query("step == 3").itertuples():
            got = {"param": element.param, "effective_lr": element.effective_lr}
            at = element.element
            right = {"param": truth.after[at], "effective_lr": truth.rate[at]}
            assert_close(got, right, f"{name} {kind} element {at}", 1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's Adagrad
@pytest.mark.parametrize("kind", ["SparseAdam", "SGD", "Adagrad"])
@pytest.mark.parametrize("rows", [[], [0], [2, 5, 2], list(range(9))], ids=str)
def test_sparse_gradients(kind: str, rows: list[int]) -> None:
    """A sparse gradient, uncoalesced or without a row, has the figures of its dense form."""
    if kind == "SparseAdam" and not rows:
        pytest.skip("torch steps without counting")
    generator = torch.Generator().manual_seed(8)
    param = nn.Parameter(torch.randn(9, 3, generator=generator, dtype=torch.float64))
    optimizer = getattr(torch.optim, kind)([param], lr=0.1)
    tape = Tape(optimizer)
    with lrprobe.attach(optimizer, every=1) as probe:
        for now in ([1, 3], rows):
            values = torch.randn(len(now), 3, generator=generator, dtype=torch.float64)
            index = torch.tensor([now], dtype=torch.long).reshape(1, -1)
            param.grad = torch.sparse_coo_tensor(index, values, (9, 3), check_invariants=True)
            tape.before()
            optimizer.step()
            truth = tape.after()["group0.param0"]
    row = one_row(probe.frame(), step=2)
    right = oracle.row(truth)
    check_error(row, right.pop("reconstruction_error"), 1e-12, kind)
    assert_close(row, right, f"{kind} {rows}", looser=SPREAD)


# --- shape of the table -------------------------------------------------------------------------


def small_model() -> nn.Module:
    """Nested, with a parameter at the root and one that stays without a gradient."""
    torch.manual_seed(0)
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    model.body = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    model.idle = nn.Linear(2, 2)
    model.forward = lambda x: model.body(x) * model.scale  # type: ignore[method-assign]
    return model.double()


def test_columns_are_the_contracts() -> None:
    """Names, order and dtypes of the columns are the contract's, with rows and without."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    with lrprobe.attach(optimizer, model, every=1) as probe:
        empty = probe.frame()
        model.forward(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
    frame = probe.frame()
    expected = [str(oracle.DTYPES.get(name, "float64")) for name in COLUMNS]
    for table in (empty, frame):
        assert list(table.columns) == COLUMNS
        assert [str(dtype) for dtype in table.dtypes] == expected
        assert isinstance(table.index, pd.RangeIndex)
    assert len(empty) == 0
    assert len(frame) == len(list(model.parameters()))
    assert frame["parameter"].tolist() == [name for name, _ in model.named_parameters()]
    assert (frame["attempt"] == 0).all()
    assert (frame["rule"] == "adam").all()
    assert frame["time"].between(time.time() - 100, time.time() + 1).all()


KEYS = {"module": ["module"], "group": ["group"], "model": []}


@pytest.mark.parametrize("by", KEYS)
def test_merged_rows_are_those_of_the_tensors_laid_end_to_end(by: str) -> None:
    """`frame(by=...)` gives the figures of the merged parameters as if they were one."""
    model = small_model()
    named = dict(model.named_parameters())
    first = [p for name, p in named.items() if "weight" in name]
    second = [p for name, p in named.items() if "weight" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.1, "weight_decay": 0.5}]
    )
    tape = Tape(optimizer, {param: name for name, param in named.items()})
    steps = []
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            model.forward(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
            tape.before()
            optimizer.step()
            steps.append(tape.after())
    frame = probe.frame(by=by)
    keys = KEYS[by]
    kept = [c for c in COLUMNS if c not in ("group", "parameter")]
    at = kept.index("numel")
    assert list(frame.columns) == [*kept[:at], *keys, *kept[at:]]
    assert [str(d) for d in frame.dtypes] == [oracle.DTYPES.get(c, "float64") for c in frame]
    for step, truths in enumerate(steps, 1):
        parts: dict[Any, list[oracle.Truth]] = {}
        for truth in truths.values():
            key = {"module": truth.name.rpartition(".")[0], "group": truth.group, "model": 0}[by]
            parts.setdefault(key, []).append(truth)
        assert len(frame[frame["step"] == step]) == len(parts)
        for key, merged in parts.items():
            row = one_row(frame, step=step, **dict.fromkeys(keys, key))
            right = oracle.row(merged)
            where = f"by={by} {key!r}, step {step}"
            check_error(row, right.pop("reconstruction_error"), 1e-12, where)
            looser = {**SPREAD, "effective_lr_gmean": (0.01, 0.0)}
            assert_close(row, right, where, 1e-6, looser=looser)


def test_merged_rows_of_big_parameters() -> None:
    """Merged figures of big parameters of unlike rates stay in the contract."""
    random = np.random.default_rng(0)
    sizes = (50_000, 10_000, 3000, 7)
    rates = [torch.tensor(10.0**k * random.lognormal(0, 1, n)) for k, n in enumerate(sizes)]
    row = probe_rates(*rates).frame(by="model").iloc[0]
    flat = np.concatenate([r.numpy() for r in rates])
    right = {
        "numel": flat.size,
        "effective_lr_mean": float(np.mean(flat)),
        "effective_lr_std": float(np.std(flat)),
        "effective_lr_min": float(np.min(flat)),
        "effective_lr_max": float(np.max(flat)),
        "effective_lr_gmean": float(np.exp(np.mean(np.log(flat)))),
    }
    assert_close(row, right, "merged", 1e-9, looser={"effective_lr_gmean": (0.01, 0.0)})
    assert_quantiles(row, flat, "merged")


def test_two_optimizers_are_never_merged() -> None:
    """`by="model"` has a row per optimizer; those of one class are told apart by #1."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4, 5)]
    optimizers = [
        torch.optim.SGD(params[:1], lr=0.1),
        torch.optim.Adam(params[1:2], lr=0.2),
        torch.optim.SGD(params[2:], lr=0.3),
    ]
    with lrprobe.attach(optimizers, every=1) as probe:
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.ones_like(param)
            optimizer.step()
    frame = probe.frame(by="model")
    got = sorted(zip(frame["optimizer"], frame["numel"], frame["lr"].round(6), strict=True))
    assert got == [("Adam", 4, 0.2), ("SGD", 3, 0.1), ("SGD#1", 5, 0.3)]


def test_optimizers_by_name() -> None:
    """A dict of optimizers gives the column `optimizer`; each counts its own steps."""
    params = {name: nn.Parameter(torch.ones(3)) for name in ("generator", "critic")}
    optimizers = {name: torch.optim.SGD([p], lr=0.1) for name, p in params.items()}
    with lrprobe.attach(optimizers, every=1) as probe:
        for turns in (1, 3):
            for name, optimizer in optimizers.items():
                params[name].grad = torch.ones(3)
                for _ in range(turns if name == "critic" else 1):
                    optimizer.step()
    frame = probe.frame()
    steps = {name: rows["step"].tolist() for name, rows in frame.groupby("optimizer")}
    assert steps == {"critic": [1, 2, 3, 4], "generator": [1, 2]}
    assert probe.step == 4


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
            right = oracle.row(truth)
            check_error(row, right.pop("reconstruction_error"), 1e-12, name)
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
    right = oracle.row(truths["group1.param0"], samples=4.0)
    right.pop("reconstruction_error")
    row = one_row(frame, step=4, group=1)
    assert_close(row, right, "the added group", looser=SPREAD)
    assert probe.elements()["step"].tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile itself
def test_names() -> None:
    """Names are the model's, else the group's param_names, else group0.param3."""
    model = nn.Sequential(nn.Linear(2, 2))

    def names(optimizer: Optimizer, model: nn.Module | None) -> list[str]:
        with lrprobe.attach(optimizer, model, every=1) as probe:
            optimizer.step()
        return probe.frame()["parameter"].tolist()

    plain = torch.optim.SGD(model.parameters())
    assert names(plain, model) == ["0.weight", "0.bias"]
    assert names(plain, None) == ["group0.param0", "group0.param1"]
    named = torch.optim.SGD(model.named_parameters(prefix="net"))
    assert names(named, None) == ["net.0.weight", "net.0.bias"]
    compiled = torch.compile(model)
    assert names(plain, compiled) == ["0.weight", "0.bias"]
    awkward = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    assert names(torch.optim.SGD(awkward.parameters()), awkward) == ["module.weight"]


# --- options ------------------------------------------------------------------------------------


def steps_recorded(options: dict[str, Any], steps: int = 12) -> list[int]:
    """Which steps are in the frame."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, **options) as probe:
        for _ in range(steps):
            param.grad = torch.ones(2)
            optimizer.step()
    return probe.frame()["step"].tolist()


def test_every() -> None:
    """`every` is step 1 and every multiple, or a predicate; 10 unless said otherwise."""
    assert steps_recorded({}) == [1, 10]
    assert steps_recorded({"every": 1}, 3) == [1, 2, 3]
    assert steps_recorded({"every": 4}) == [1, 4, 8, 12]
    assert steps_recorded({"every": lambda step: step in (2, 7)}) == [2, 7]
    assert steps_recorded({"every": lambda step: False}) == []


def test_step() -> None:
    """`step` is where to start counting, or the trainer's own step."""
    assert steps_recorded({"every": 5, "step": 8}) == [10, 15, 20]
    trainer = iter([3, 4, 5, 9, 10])
    assert steps_recorded({"every": 1, "step": lambda: next(trainer)}, 5) == [3, 4, 5, 9, 10]


def test_the_count_goes_on_from_the_optimizers_own() -> None:
    """Attached to an optimizer that has stepped, the count goes on from its state."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param])
    for _ in range(7):
        param.grad = torch.ones(2)
        optimizer.step()
    with lrprobe.attach(optimizer, every=1) as probe:
        assert probe.step == 7
        optimizer.step()
        assert probe.step == 8
    assert probe.frame()["step"].tolist() == [8]


def test_include_and_exclude() -> None:
    """`include` and `exclude` choose by re.search on names."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())

    def names(**options: Any) -> list[str]:
        with lrprobe.attach(optimizer, model, every=1, **options) as probe:
            optimizer.step()
        return probe.frame()["parameter"].tolist()

    assert names(include="weight") == ["0.weight", "1.weight"]
    assert names(include=["^0", r"1\.bias$"]) == ["0.weight", "0.bias", "1.bias"]
    assert names(exclude="bias") == ["0.weight", "1.weight"]
    assert names(include="^1", exclude=["bias"]) == ["1.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_warns(option: str) -> None:
    """`include` or `exclude` that matches no name warns, and shows the pattern."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.warns(UserWarning, match="encoder"):
        lrprobe.attach(optimizer, **{option: "encoder"}).close()


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


def test_frame_in_mid_run_and_after_close() -> None:
    """`frame()` waits for what is in flight, in mid-run too, and works after `close()`."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    probe = lrprobe.attach(optimizer, every=1)
    for step in range(1, 4):
        param.grad = torch.ones(2)
        optimizer.step()
        assert probe.frame()["step"].tolist() == list(range(1, step + 1))
    probe.close()
    probe.close()
    optimizer.step()
    assert probe.frame()["step"].tolist() == [1, 2, 3]


def test_state_dict_carries_the_count() -> None:
    """A probe goes on counting where another stood, for optimizers that keep no step."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(3):
            optimizer.step()
        state = copy.deepcopy(probe.state_dict())
    with lrprobe.attach(optimizer, every=1) as probe:
        probe.load_state_dict(state)
        optimizer.step()
    assert probe.frame()["step"].tolist() == [4]


# --- bad input ----------------------------------------------------------------------------------


def sgd() -> torch.optim.SGD:
    """Some optimizer."""
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


BAD: list[tuple[str, Any, dict[str, Any], type[Exception], list[str]]] = [
    ("int", 3, {}, TypeError, ["int", "Optimizer"]),
    ("none", None, {}, TypeError, ["None", "Optimizer"]),
    ("model-first", nn.Linear(2, 2), {}, TypeError, ["Linear", "Optimizer", "dict"]),
    ("empty", [], {}, ValueError, ["empty"]),
    ("in-a-list", "[sgd, 3]", {}, TypeError, ["int", "Optimizer"]),
    ("model", None, {"model": 3}, TypeError, ["int", "Module"]),
    ("to-int", None, {"to": 3}, TypeError, ["int", "SummaryWriter", ".parquet"]),
    ("to-csv", None, {"to": "run.csv"}, ValueError, [".csv", ".parquet", "TensorBoard"]),
    ("to-url", None, {"to": "s3://bucket/x.parquet"}, ValueError, ["s3://"]),
    ("to-in-list", None, {"to": ["tb", 3]}, TypeError, ["int", ".parquet"]),
    ("every-0", None, {"every": 0}, ValueError, ["every", "0", "at least 1"]),
    ("every-negative", None, {"every": -3}, ValueError, ["every", "-3"]),
    ("every-float", None, {"every": 1.5}, TypeError, ["every", "1.5"]),
    ("every-text", None, {"every": "epoch"}, TypeError, ["every", "epoch"]),
    ("include", None, {"include": "("}, ValueError, ["include", "(", "regular expression"]),
    ("exclude", None, {"exclude": ["a", "["]}, ValueError, ["exclude", "[", "regular"]),
    ("include-int", None, {"include": 3}, TypeError, ["include", "3"]),
    ("track", None, {"track": -1}, ValueError, ["track", "-1"]),
    ("track-float", None, {"track": 1.5}, TypeError, ["track", "1.5"]),
    ("batch-size", None, {"batch_size": 0}, ValueError, ["batch_size", "0"]),
    ("batch-size-float", None, {"batch_size": 2.5}, TypeError, ["batch_size", "2.5"]),
    ("step", None, {"step": -1}, ValueError, ["step", "-1"]),
    ("step-text", None, {"step": "now"}, TypeError, ["step", "now"]),
    ("sample", None, {"sample": 0}, ValueError, ["sample", "0"]),
]


@pytest.mark.parametrize(("given", "options", "error", "words"), [b[1:] for b in BAD],
                         ids=[b[0] for b in BAD])  # fmt: skip
def test_bad_input_gets_a_clear_error_at_the_call(
    given: Any,
    options: dict[str, Any],
    error: type[Exception],
    words: list[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says what came and what is allowed, and nothing was left behind."""
    monkeypatch.chdir(tmp_path)
    optimizer = sgd()
    target = [optimizer, 3] if given == "[sgd, 3]" else given
    if given is None and options:
        target = optimizer
    with pytest.raises(error) as caught:
        lrprobe.attach(target, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not list(tmp_path.iterdir()), f"left behind: {list(tmp_path.iterdir())}"


@pytest.mark.parametrize("name", ["run.parquet", "logdir"])
def test_a_destination_that_cannot_be_written(name: str, tmp_path: Any) -> None:
    """A destination that cannot be written is an OSError at the call, which names it."""
    (tmp_path / "file").write_text("in the way")
    optimizer = sgd()
    path = tmp_path / "file" / name
    with pytest.raises(OSError, match=re.escape(name)):
        lrprobe.attach(optimizer, to=path)
    assert not optimizer._optimizer_step_post_hooks


def test_no_memory_no_frame() -> None:
    """`frame()` after max_bytes=0 says why there is none."""
    probe = lrprobe.attach(sgd(), to=lrprobe.sinks.Memory(max_bytes=0))
    for table in (probe.frame, probe.elements, probe.histograms):
        with pytest.raises(RuntimeError, match="max_bytes"):
            table()
    probe.close()


def test_frame_by_something_else() -> None:
    """Another `by` is refused with those that are allowed."""
    with lrprobe.attach(sgd()) as probe, pytest.raises(ValueError, match="layer") as caught:
        probe.frame(by="layer")
    for word in ("parameter", "module", "group", "model"):
        assert word in str(caught.value)


def test_a_cell_run_twice_records_once(tmp_path: Any) -> None:
    """A probe with the same destination replaces the old one, with a warning."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    old = lrprobe.attach(optimizer, to=tmp_path / "run.parquet", every=1)
    with pytest.warns(UserWarning, match=r"run\.parquet"):
        new = lrprobe.attach(optimizer, to=tmp_path / "run.parquet", every=1)
    param.grad = torch.ones(2)
    optimizer.step()
    new.close()
    assert len(old.frame()) == 0
    assert len(new.frame()) == 1


def test_a_wrapper_is_looked_through() -> None:
    """An object with `.optimizer` or `.optim` is looked through, also one that is an Optimizer."""

    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    class Posing(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:  # like AcceleratedOptimizer
            self.optimizer = optimizer

    class Short:
        def __init__(self, optim: Any) -> None:
            self.optim = optim

    for wrap in (Wrapper, Posing, Short):
        optimizer = sgd()
        with lrprobe.attach(wrap(optimizer), every=1) as probe:
            optimizer.step()
        assert probe.frame()["optimizer"].tolist() == ["SGD"]


# --- measured -----------------------------------------------------------------------------------


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


def measure(optimizer: Optimizer, steps: int) -> tuple[pd.DataFrame, list[str], list[Any]]:
    """The frame, the warnings and the truth of some steps."""
    tape = Tape(optimizer)
    generator = torch.Generator().manual_seed(12)
    truths = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(steps):
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        param.grad = torch.randn(
                            param.shape, generator=generator, dtype=param.dtype
                        )
                        param.grad.view(-1)[0] = 0
                tape.before()
                optimizer.step()
                truths.append(tape.after())
        frame = probe.frame()
    return frame, [str(w.message) for w in caught], truths


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
                assert got == pytest.approx(np.quantile(ratio, level), rel=1e-6), name
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
    assert row["effective_lr_p50"] == pytest.approx(0.25)
    assert row["effective_lr_applied"] == pytest.approx(0.25)
    assert math.isnan(row["effective_lr_mean"])


def test_a_subclass_that_steps_as_its_parent_keeps_the_rule() -> None:
    """A faithful subclass has its parent's rule, and no warning."""
    frame, said, _ = measure(Faithful([nn.Parameter(torch.randn(40))], lr=0.5), 5)
    assert said == []
    assert (frame["rule"] == "sgd").all()
    assert frame["optimizer"].tolist() == ["Faithful"] * 5


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


# --- figures from a sample ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "AdamW", "Adadelta", "Adafactor", "Rprop"])
def test_figures_from_a_sample_are_estimates_and_norms_stay_exact(
    kind: str, dtype: torch.dtype
) -> None:
    """With `sample`, param_norm and grad_norm are exact and the other figures near the right."""
    generator = torch.Generator().manual_seed(14)
    shapes = [(300, 500), (70_000,), (11,)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    if kind == "Nesterov":  # whose foreach step overwrites the gradient
        optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True, foreach=True)
    else:
        optimizer = getattr(torch.optim, kind)(params, lr=0.1)
    tape = Tape(optimizer)
    with lrprobe.attach(optimizer, every=1, sample=10_000) as probe:
        for _ in range(3):
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                param.grad = (grad + grad.sign()).to(dtype)
            tape.before()
            optimizer.step()
            truths = tape.after()
    for name, truth in truths.items():
        row = one_row(probe.frame(), step=3, parameter=name)
        right = oracle.row(truth)
        where = f"{kind} {dtype} {name}"
        exact = ("numel", "stepped", "lr", "param_norm", "grad_norm", "nonfinite")
        assert_close(row, {key: right[key] for key in exact}, where, 1e-5)
        assert_quantiles(row, truth.rate, where, ranks=0.02)  # of a sample of 10,000
        near = ("mean", "gmean", "applied")
        estimates = {f"effective_lr_{key}": right[f"effective_lr_{key}"] for key in near}
        if dtype == torch.float32:
            estimates["update_norm"] = right["update_norm"]
        assert_close(row, estimates, where, 0.05)


@pytest.mark.parametrize("where", ["gradient", "parameter"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 12_345, 99_999])
def test_a_sample_never_misses_a_nonfinite(where: str, bad: float, at: int) -> None:
    """With `sample`, a single NaN or inf in gradient or parameter is not missed."""
    param = nn.Parameter(torch.ones(100_000))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1, sample=1000) as probe:
        for step in range(2):
            param.grad = torch.ones(100_000)
            if step:
                (param.grad if where == "gradient" else param.detach())[at] = bad
            optimizer.step()
    got = probe.frame()["nonfinite"].tolist()
    assert got[0] == 0
    assert got[1] >= 1


def test_a_sample_is_the_same_every_time() -> None:
    """With `sample`, the figures of two runs are the same, and draw nothing at random."""
    frames = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(15)
        param = nn.Parameter(torch.randn(50_000, generator=generator))
        optimizer = torch.optim.Adam([param], lr=0.1)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with lrprobe.attach(optimizer, every=1, sample=500) as probe:
            for _ in range(2):
                param.grad = torch.randn(50_000, generator=generator)
                optimizer.step()
        assert torch.equal(state, torch.get_rng_state())
        frames.append(probe.frame().drop(columns="time"))
    pd.testing.assert_frame_equal(*frames)
