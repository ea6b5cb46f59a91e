"""How rates are distributed: moments, quantiles and histograms of hard cases."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import QUANTILES, Tape, assert_close
from rows import Rates, assert_quantiles, distributions, probe_rates
from torch import nn

import lrprobe
from lrprobe.engine.distribution import STRIDE, Bins, count_rates, fold, unfold

pytestmark = pytest.mark.usefixtures("seeded", "eager")

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
        if flat.size <= 65_536:
            levels = list(QUANTILES.values())
            exact = np.quantile(flat, levels, method="inverted_cdf")
            right |= {f"effective_lr_{k}": q for k, q in zip(QUANTILES, exact, strict=True)}
    close = {
        **{f"effective_lr_{key}": (0.01, 0.0) for key in (*QUANTILES, "gmean")},
        "effective_lr_std": (rtol, max(rtol, 1e-7) * float(np.mean(flat))),
    }
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


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("mean", [0.521, 0.3, 1.1e-3])
def test_the_std_of_rates_that_are_nearly_equal(
    mean: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates that differ in the last bit have no larger std than they should."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    rates = torch.full((300_000,), mean)
    rates[::7] *= 1 + 2e-7
    got = probe_rates(rates).frame()["effective_lr_std"].item()
    right = float(rates.double().std(correction=0))
    assert abs(got - right) < 1e-5 * mean, f"got {got}, right is {right}"


@pytest.mark.parametrize("way", ["eager", "cpu"])
def test_rows_as_long_as_the_stride(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a matrix is as wide as the stride between counted rates, all its columns count."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
    noise = torch.rand(250_000, STRIDE, generator=torch.Generator().manual_seed(5))
    rates = (1 + noise) * 4.0 ** torch.arange(STRIDE)
    row = probe_rates(rates).frame().iloc[0]
    assert_quantiles(row, rates.numpy().reshape(-1), way)


def test_twenty_million_elements() -> None:
    """A parameter of 20 million elements, where torch.quantile fails, has its figures."""
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


def test_two_runs_have_the_same_figures() -> None:
    """Which rates of a large parameter are counted, and checked, is the same every time."""
    rates = torch.rand(400_000) + 0.1
    first, second = (probe_rates(rates) for _ in range(2))
    frames = [each.frame().drop(columns="time") for each in (first, second)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_folded_counts_unfold_and_add_up(parts: int, sign: float) -> None:
    """What travels between ranks gives the same counts, added up, of rates of either sign."""
    generator = torch.Generator().manual_seed(0)
    each = []
    for _ in range(parts):
        rates = sign * torch.empty(5000).log_normal_(0, 3, generator=generator)
        each.append(count_rates(rates, torch.ones(5000, dtype=torch.bool), None))
    together = sum(fold(counts.table) for counts in each)
    found = unfold(together.unsqueeze(0).numpy())
    right = Bins.joined([Bins.of(0, counts) for counts in each])
    np.testing.assert_array_equal(found.bins, right.bins)
    np.testing.assert_allclose(found.counts, right.counts, rtol=1e-12)
