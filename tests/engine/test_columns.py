"""The frame's columns, and rows that are merged."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from oracle import COLUMNS, Tape, assert_close
from rows import SPREAD, assert_quantiles, expected, one_row, probe_rates
from torch import nn

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


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
    kept = [c for c in COLUMNS if c not in ("group", "group_name", "parameter")]
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
            where = f"by={by} {key!r}, step {step}"
            right = expected(merged, row, 1e-12, where)
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
