"""Parameters and gradients that are not plain, in both ways: NumPy's figures."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import QUANTILES, Tape, assert_close
from rows import SAMPLED, SPREAD, assert_quantiles, expected, one_row
from torch import Tensor, nn

import lrprobe

pytestmark = pytest.mark.usefixtures("seeded", "eager")


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


@pytest.mark.parametrize("way", ["eager", "cpu"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adadelta", "RMSprop", "Rprop", "ASGD"])
@pytest.mark.parametrize("name", kinds_of_parameters())
def test_parameters_of_every_kind(
    name: str, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complex, 0-dim, empty, strided and channels-last parameters have NumPy's figures."""
    monkeypatch.setenv("LRPROBE_ENGINE", way)
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
    row = one_row(probe.frame(), step=3)
    right = expected(truth, row, 1e-12, f"{name} {kind}")
    looser = {**SPREAD, "effective_lr_gmean": (0.01, 0.0)}
    if truth.after.size > 4096:
        looser |= SAMPLED
        for key in QUANTILES:
            del right[f"effective_lr_{key}"]
        assert_quantiles(row, truth.rate[truth.direction != 0], f"{name} {kind}")
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
    right = expected(truth, row, 1e-12, kind)
    assert_close(row, right, f"{kind} {rows}", looser=SPREAD)


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
