"""Rows of the frame against the oracle, and rates that are given."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import oracle
import pandas as pd
import torch
from optimizers import EXACT, FLOAT32, MUON
from oracle import QUANTILES, Tape, assert_close
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe

FLOAT32_SCALARS = 3e-4  # 1 − 0.999 in float32, at the first step
RTOL = {EXACT: 1e-9, FLOAT32: FLOAT32_SCALARS, MUON: 5e-2}
"""By the tolerance of a case: of its figures."""

COARSE = {
    **{f"effective_lr_{name}": (0.01, 0.0) for name in (*QUANTILES, "gmean")},
    "grad_persistence": (1e-6, 1e-9),
}
"""What is read off logarithmic bins, and a cosine."""
SPREAD = {"effective_lr_std": (1e-9, 1e-7), **COARSE}

SAMPLED = {"lost_fraction": (0.0, 0.05), "grad_persistence": (0.0, 0.08)}
"""Of more than 4,096 elements, from the check sample."""


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


def expected(truths: Any, row: Any, limit: float, where: str) -> dict[str, Any]:
    """What the row has to be; its two errors, which are rounding errors, are compared here."""
    right = oracle.row(truths)
    check_error(row, right.pop("reconstruction_error"), limit, where)
    del right["state_error"]  # tests/engine/test_check.py has it for every optimizer
    assert not row["state_error"] > max(1e-6, 10 * limit), f"{where}: {row['state_error']}"
    return right


def check_big(row: Any, truth: oracle.Truth, dtype: torch.dtype, where: str) -> None:
    """All figures of a parameter of more than 4,096 elements are within the contract."""
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    looser = {
        "effective_lr_gmean": (0.01, 0.0),
        "effective_lr_std": (rtol, 1e-12),
        "update_grad_cosine": (rtol, rtol),
        **SAMPLED,
    }
    right = expected(truth, row, 1e-12 if dtype == torch.float64 else 1e-3, where)
    if truth.after.size > 4096:
        del right["grad_persistence"]  # of gradients with a heavy tail, from a sample
        for name in QUANTILES:
            del right[f"effective_lr_{name}"]
        assert_quantiles(row, truth.rate[truth.direction != 0], where)
    assert_close(row, right, where, rtol, looser=looser)


def assert_quantiles(row: pd.Series, rates: np.ndarray, where: str, ranks: float = 0.01) -> None:
    """Within 1 % of a value whose true rank is within one percentage point."""
    wrong = []
    levels = np.array(list(QUANTILES.values()))
    lows = np.quantile(rates, np.clip(levels - ranks, 0, 1), method="inverted_cdf")
    highs = np.quantile(rates, np.clip(levels + ranks, 0, 1), method="inverted_cdf")
    for name, low, high in zip(QUANTILES, lows, highs, strict=True):
        got = row[f"effective_lr_{name}"]
        if not low * 0.99 <= got <= high * 1.01:
            wrong.append(f"  {name}: got {got!r}, right is {low!r} to {high!r}")
    assert not wrong, f"{where}:\n" + "\n".join(wrong)


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
