"""What a plan reads: strided tensors, counters in groups, state that is new in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe
from lrprobe import rules
from lrprobe.engine import plan
from lrprobe.rules.base import Rule, Slice, Update, Whole

pytestmark = pytest.mark.usefixtures("seeded", "from_the_first_step")

STEPS = 12


Make = Callable[[list[nn.Parameter]], Optimizer]
Change = Callable[[int, Optimizer], None]


def frame_of(make: Make, shaped: Callable[[Tensor], Tensor], change: Change | None) -> pd.DataFrame:
    """Frame of a run with a backward pass, so that gradients lie as autograd lays them."""
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(shaped(torch.randn(6, 4, 5, generator=generator))) for _ in range(2)]
    optimizer = make(params)
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(STEPS):
            optimizer.zero_grad()
            target = torch.randn(params[0].shape, generator=generator)
            sum(((p - target) ** 3).sum() for p in params).backward()  # type: ignore[union-attr]
            if change is not None:
                change(step, optimizer)
            optimizer.step()
        return probe.frame().drop(columns="time")


def assert_waits_right(
    waited: list[int],
    monkeypatch: pytest.MonkeyPatch,
    make: Make,
    shaped: Callable[[Tensor], Tensor] = Tensor.clone,
    change: Change | None = None,
    together: int = STEPS - 1,
) -> None:
    """So many steps are computed together, and their rows are those of one step at a time."""
    frame = frame_of(make, shaped, change)
    assert waited == [together]
    monkeypatch.setattr(plan, "MAX_BYTES", 0)
    expected = frame_of(make, shaped, change)  # of strided tensors by eager code, in float32
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-6, atol=1e-7)
    assert "measured" not in set(frame["rule"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda t: t[:, :, 0::2],
    "one column": lambda t: t[..., 0],
    "transposed": lambda t: t.permute(2, 0, 1),
    "flat, strided": lambda t: t.reshape(-1)[::3],
    "rows of size 1": lambda t: t[:, 1:2, ::2],
    "a view in the middle": lambda t: t[1:3],
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adadelta, torch.optim.SGD])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_parameters_wait_too(
    layout: str, kind: type[Optimizer], waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its strides, a small tensor is copied in the order of its elements."""
    kwargs = {"momentum": 0.9, "weight_decay": 0.01} if kind is torch.optim.SGD else {}

    def make(params: list[nn.Parameter]) -> Optimizer:
        return kind(params, lr=0.01, **kwargs)

    assert_waits_right(waited, monkeypatch, make, LAYOUTS[layout])


def test_a_tensor_of_too_many_rows_does_not_wait(waited: list[int]) -> None:
    """Where rows are short, general code is as fast."""
    found = frame_of(torch.optim.AdamW, lambda t: t.repeat(4, 5, 1)[:, ::2, ::2], None)
    assert waited == []
    assert len(found) == 2 * STEPS


class Counting(Optimizer):
    """Counts in its groups, and keeps its last direction in a new tensor each time."""

    def __init__(self, params: Any, count: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "step": count, "norms": 0.0, "dtype": torch.float32})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step along the gradient, as long as the parameter before it, corrected like Adam."""
        for group in self.param_groups:
            group["step"] = group["step"] + 1
            group["norms"] = float(sum(p.norm() for p in group["params"]))
            for param in group["params"]:
                state = self.state[param]
                state["direction"] = param.grad * 1
                size = param.norm() / (1 + param.grad.square().sum())
                param.sub_(group["lr"] * size / (1 - 0.9 ** group["step"]) * state["direction"])


def _counting(s: Slice) -> Update:
    size: Any = s.scalar("size")
    return Update(s.lr * size / (1 - 0.9 ** s.group_step()), s["direction"])


def _size(whole: Whole) -> dict[str, Any]:
    assert torch.as_tensor(whole.group["step"]).dim() == 0, "each step has its own count"
    return {"size": whole.state["norm"] / (1 + whole.sum(lambda s: s.grad.square()))}


COUNTING = Rule("counting", _counting, before=lambda p, _, __: {"norm": p.norm()}, whole=_size)


@pytest.mark.parametrize("count", [0, torch.tensor(0.0)], ids=["int", "tensor"])
def test_counters_in_groups_wait_too(
    count: Any, waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has the group, the norm before it, and the state of its own time."""
    monkeypatch.setitem(rules._RULES, Counting, COUNTING)
    assert_waits_right(waited, monkeypatch, lambda params: Counting(params, count))


def test_a_rule_that_needs_a_number_gets_one(
    waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of several steps are a column; where a rule cannot use one, the steps go alone."""

    def counting(s: Slice) -> Update:
        size: Any = s.scalar("size")
        return Update(s.lr * size / (1 - 0.9 ** int(s.group["step"])), s["direction"])

    rule = Rule("counting", counting, before=COUNTING.before, whole=COUNTING.whole)
    monkeypatch.setitem(rules._RULES, Counting, rule)
    assert_waits_right(waited, monkeypatch, lambda params: Counting(params, 0))


def test_cycled_betas_wait_too(waited: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As OneCycleLR cycles them; a weight decay that comes in changes the equation."""

    def change(step: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * (step // 4), 0.999)

    frame = frame_of(torch.optim.AdamW, Tensor.clone, change)
    assert waited == [3, 4, 4], "steps of equal betas are computed together"
    monkeypatch.setattr(plan, "MAX_BYTES", 0)
    expected = frame_of(torch.optim.AdamW, Tensor.clone, change)
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-9, atol=0)


def test_what_is_measured_needs_no_state(waited: list[int]) -> None:
    """An optimizer without a rule waits, whatever its state holds."""

    class Odd(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                self.state[param]["history"] = [1, 2]
                param.sub_(0.01 * param.grad)

    with pytest.warns(UserWarning, match="Odd has no rule"):
        frame = frame_of(lambda params: Odd(params, {"lr": 0.01}), Tensor.clone, None)
    assert waited == [STEPS]
    assert set(frame["rule"]) == {"measured"}
    shares = frame[["effective_lr_p05", "effective_lr_p95"]].to_numpy()
    assert abs(shares / 0.01 - 1).max() < 1e-2, shares
