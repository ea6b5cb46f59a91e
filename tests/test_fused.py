"""``attach(compile=True)``: the compiled pass and the eager one say the same."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import lrprobe
from lrprobe.record import FIGURES
from lrprobe.rules import find_rule
from lrprobe.summary import fused, stream
from lrprobe.summary.histogram import aligned
from lrprobe.summary.reading import entry_of
from lrprobe.summary.sums import Sums


def frames(
    optimizer: torch.optim.Optimizer,
    sample: int | None = None,
    late: int | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same three steps, recorded eagerly and as asked; one parameter may begin a step late."""
    generator = torch.Generator().manual_seed(3)
    plain = lrprobe.attach(optimizer, every=1, to=lrprobe.sinks.Memory(), sample=sample)
    to = lrprobe.sinks.Memory()
    other = lrprobe.attach(optimizer, every=1, to=to, sample=sample, **options)
    with plain, other:
        for step in range(3):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator)
                param.grad = None if i == late and not step else (0.1 * grad).to(param.dtype)
            optimizer.step()
    return plain.frame(), other.frame()


def parameters() -> list[nn.Parameter]:
    """One call of a kernel and a remainder; the same in bfloat16; a small one."""
    generator = torch.Generator().manual_seed(2)
    shapes = [((730, 800), torch.float32), ((701, 800), torch.bfloat16), ((5,), torch.float32)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in shapes]


CASES: list[tuple[Any, dict[str, Any], int | None]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True, "maximize": True}, None),
    (torch.optim.AdamW, {"lr": 1e-2, "maximize": True}, 8192),
    (torch.optim.AdamW, {"lr": 1e-2, "maximize": True}, 401_408),  # more than are read at once
    (torch.optim.AdamW, {"lr": torch.tensor([1e-2]), "foreach": False}, None),
    (torch.optim.Adadelta, {"weight_decay": 0.1}, None),
]


@pytest.mark.parametrize(("cls", "options", "sample"), CASES)
def test_compiled_figures_are_the_eager_ones(
    cls: Any, options: dict[str, Any], sample: int | None, monkeypatch: Any
) -> None:
    """Every figure agrees to 2e-5, the geometric mean within the contract's 1 %."""
    monkeypatch.setattr(fused, "_kernels", {})
    eager, compiled = frames(cls(parameters(), **options), sample, compile=True)
    assert len(fused._kernels) == 2, "one kernel for float32, one for bfloat16"
    assert None not in fused._kernels.values()
    assert eager["rule"].tolist() == compiled["rule"].tolist()
    for name in FIGURES:
        rtol = 1e-2 if name == "effective_lr_gmean" else 2e-5
        np.testing.assert_allclose(
            compiled[name], eager[name], rtol=rtol, atol=1e-12, equal_nan=True, err_msg=name
        )


def test_samples_of_parameters_that_began_apart_are_not_compiled_together() -> None:
    """Bias corrections that differ are each parameter's own, with a compiled kernel or without."""
    params = [nn.Parameter(torch.randn(300, 800)) for _ in range(3)]
    optimizer = torch.optim.Adam(params, lr=0.0321)
    eager, compiled = frames(optimizer, 16_384, late=1, compile=True)
    first = eager[eager["step"] == 3]["effective_lr_mean"]
    assert first.iloc[1] != pytest.approx(first.iloc[0], rel=0.05)
    for name in FIGURES:
        rtol = 1e-2 if name == "effective_lr_gmean" else 2e-5
        np.testing.assert_allclose(
            compiled[name], eager[name], rtol=rtol, atol=1e-12, equal_nan=True, err_msg=name
        )


@pytest.mark.parametrize("spoilt", [False, True], ids=["tiny", "NaN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_for_devices_is_exact(dtype: Any, spoilt: bool, monkeypatch: Any) -> None:
    """Where nothing can be computed again, squares do not underflow and NaN is counted.

    The kernel is the one that a GPU gets, compiled for the CPU.
    """
    monkeypatch.setattr(fused, "is_exact", lambda _: True)
    monkeypatch.setattr(stream, "is_exact", lambda _: True)
    monkeypatch.setattr(fused, "_kernels", {})
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(700, 1000).to(dtype))
    optimizer = torch.optim.AdamW([param], lr=0.01, maximize=True)
    for scale in (1e-3, 1e-24):
        param.grad = (scale * torch.randn(param.shape)).to(dtype)
        param.grad[::7] = 0
        optimizer.step()
    assert param.grad is not None
    if spoilt:
        param.grad[3, :5] = torch.nan
        optimizer.state[param]["exp_avg"][9, 4] = torch.inf
        param.data[9, :2] = torch.nan
    entry = entry_of(param.detach(), optimizer.state[param], {}, param.grad)
    group, rule = optimizer.param_groups[0], find_rule(torch.optim.AdamW)
    assert rule is not None
    found = {}
    for compiled in (False, True):
        one = stream.Stream(entry, group, rule, exact=True)
        sums = Sums(["exp_avg", "exp_avg_sq"], exact=True)
        one.read(sums, torch.tensor(0.1, dtype=torch.float64), compile=compiled)
        found[compiled] = one.total, one.counts
    assert len(fused._kernels) == 1
    eager, kernel = found[False][0], found[True][0]
    assert kernel["nonfinite"] == (8 if spoilt else 0)
    assert set(eager) <= set(kernel)
    signed = 1e-6 * float((eager["uu"] * eager["gg"]).sqrt().nan_to_num())  # terms cancel out
    for name in eager:
        atol = signed if name == "ug" else 0
        np.testing.assert_allclose(kernel[name], eager[name], rtol=1e-6, atol=atol, err_msg=name)
    one, other = aligned([found[False][1], found[True][1]])
    assert (one.table - other.table).abs().sum() <= 4  # on the edge of a bin


def test_without_a_compiler_it_records_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch.compile fails there is one line of notice, and the frame is the eager one."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.setattr(fused, "_told", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eager, other = frames(torch.optim.RMSprop(parameters()), compile=True)
    said = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    assert len(said) == 1, said
    pd.testing.assert_frame_equal(eager, other)


def test_a_rule_that_rounds_is_not_compiled(monkeypatch: Any) -> None:
    """Centered RMSprop subtracts in bfloat16, as a compiler would not: it stays eager there."""
    monkeypatch.setattr(fused, "_told", set())
    optimizer = torch.optim.RMSprop(parameters(), centered=True, alpha=0.5)
    with pytest.warns(UserWarning, match="'rmsprop' rounds on the way"):
        eager, other = frames(optimizer, compile=True)
    half = eager["parameter"] == "group0.param1"
    pd.testing.assert_frame_equal(eager[half], other[half])
    assert not eager[~half].equals(other[~half]), "float32 was not compiled"


def test_a_rate_shared_by_all_elements_is_not_compiled() -> None:
    """SGD's rate is one number: nothing is gained, so nothing is compiled, and all is the same."""
    eager, other = frames(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9), compile=True)
    pd.testing.assert_frame_equal(eager, other)


def test_a_kernel_is_compiled_once_whatever_the_sizes() -> None:
    """Large parameters of any size run the one kernel of their kind: nothing is compiled later."""
    shapes = [(256, 4096), (257, 4096), (600, 4096), (1, 8192), (2, 4096), (5000,), (3, 1667)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.Adam(params, lr=0.0123)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        lrprobe.attach(optimizer, every=1, compile=True) as probe,
    ):
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        frame = probe.frame()
    assert frame["rule"].eq("adam").all()
    assert frame["reconstruction_error"].max() < 1e-4
