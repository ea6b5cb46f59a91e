"""What a plan reads: strided tensors, counters in groups, state that is new or changes."""

from __future__ import annotations

import math
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
from lrprobe.record import Record
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


_counting.__module__ = "lrprobe.rules.counting"  # as if it were one of lrprobe's
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

    counting.__module__ = _counting.__module__
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


# ---- what a fresh pair of eyes found ------------------------------------------------------------

Equation = Callable[[Slice], Any]

EQUATIONS: dict[str, Equation] = {
    "a key": lambda s: {3: 2.0, 8: 3.0}.get(s.group["step"], 1.0),
    "a member": lambda s: 2.0 if s.group["step"] in {3, 7} else 1.0,
    "its type": lambda s: 0.5 if isinstance(s.group["step"], int) else 1.0,
    "a large number": lambda s: 1.0 + (s.group["step"] + 2**60) % 5,
    "a huge number": lambda s: 1.0 + (s.group["step"] + 10**320) % 5,
    "a condition": lambda s: 2.0 if s.group["step"] > 5 else 1.0,
    "its gradients": lambda s: sum(float(p.grad.norm()) for p in s.group["params"]),
}
"""What a user's rule may do with its group, however many steps are computed together."""


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_users_rule_sees_the_group_of_its_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are numbers, and parameters have their values and gradients."""
    equation = EQUATIONS[name]
    group: dict[str, Any] = {"lr": 0.01, "step": 0}

    class Own(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            (own,) = self.param_groups
            own["step"] += 1
            grads = [param.grad.clone() for param in own["params"]]
            factor = equation(Slice([], own, lambda _: grads[0]))
            for param in own["params"]:
                param.sub_(0.01 * factor * param.grad)

    def update(s: Slice) -> Update:
        return Update(0.01 * equation(s), s.grad)

    monkeypatch.setitem(rules._RULES, Own, Rule("own", update))
    frame = frame_of(lambda params: Own(params, group), Tensor.clone, None)
    assert set(frame["rule"]) == {"own"}
    assert frame["reconstruction_error"].max() < 1e-4, frame["reconstruction_error"].tolist()


def test_a_flag_is_no_number(waited: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with True and with 3.0 are not computed together, although both are true."""

    class Flagged(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                param.sub_(0.01 * self.param_groups[0]["flag"] * param.grad)

    def update(s: Slice) -> Update:
        return Update(0.01 * torch.as_tensor(s.group["flag"], dtype=torch.float64), s.grad)

    def change(step: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["flag"] = True if step < 6 else 3.0

    update.__module__ = _counting.__module__
    monkeypatch.setitem(rules._RULES, Flagged, Rule("flagged", update))
    frame = frame_of(lambda p: Flagged(p, {"lr": 1.0, "flag": True}), Tensor.clone, change)
    assert frame["effective_lr_mean"].tolist() == [0.01] * 12 + [0.03] * 12
    assert waited == [6, 6]


class Odd(Optimizer):
    """Its state is what a test makes of it; the rate depends on it."""

    def __init__(self, params: Any, put: Callable[[dict[str, Any], int], None]) -> None:
        super().__init__(params, {"lr": 0.01})
        self._put, self._taken = put, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Along the gradient, at a rate that the state decides."""
        self._taken += 1
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            self._put(state, self._taken)
            size = state["size"]
            param.sub_(0.01 * (1.0 if size is None else float(torch.as_tensor(size))) * param.grad)


def _odd(s: Slice) -> Update:
    return Update(0.01 * torch.as_tensor(s.scalar("size") if "size" in s else 1.0), s.grad)


def grows(state: dict[str, Any], taken: int) -> None:
    """One number, then two, then so many."""
    state["size"], state["history"] = 0.5, torch.ones(taken)


def alternates(state: dict[str, Any], taken: int) -> None:
    """A number in every second step."""
    state["size"] = 0.5 if taken % 2 else None


def is_an_element(state: dict[str, Any], taken: int) -> None:
    """Of the shape of a parameter with one element."""
    state["size"] = torch.full((1,), 1.0 / taken)


def is_changed_in_place(state: dict[str, Any], taken: int) -> None:
    """The same tensor, with another number each time."""
    state.setdefault("size", torch.zeros(())).fill_(1.0 / taken)


@pytest.mark.parametrize("put", [grows, alternates, is_an_element, is_changed_in_place])
@pytest.mark.parametrize("shape", [(1,), (3, 2)], ids=str)
def test_numbers_in_the_state_are_those_of_the_step(
    put: Callable[[dict[str, Any], int], None],
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever becomes of a number, no step is lost, and each has its own rate."""
    monkeypatch.setitem(rules._RULES, Odd, Rule("odd", _odd))

    def shaped(values: Tensor) -> Tensor:
        return values.reshape(-1)[: math.prod(shape)].reshape(shape).clone()

    frame = frame_of(lambda params: Odd(params, put), shaped, None)
    assert frame["step"].unique().tolist() == list(range(1, STEPS + 1))
    assert set(frame["rule"]) == {"odd"}
    assert frame["reconstruction_error"].max() < 1e-4, frame["reconstruction_error"].tolist()


def test_what_a_rule_keeps_from_before_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the state that changes later is kept as it was."""

    def put(state: dict[str, Any], taken: int) -> None:
        state["next"] = state.get("next", torch.ones(()))
        state["size"] = float(state["next"])
        state["next"].fill_(1.0 / (taken + 1))

    rule = Rule(
        "odd",
        lambda s: Update(0.01 * torch.as_tensor(s.scalar("kept")), s.grad),
        before=lambda _, state, __: {"kept": state.get("next", torch.ones(()))},
    )
    monkeypatch.setitem(rules._RULES, Odd, rule)
    frame = frame_of(lambda params: Odd(params, put), Tensor.clone, None)
    wanted = [0.01 / step for step in range(1, STEPS + 1) for _ in range(2)]
    assert frame["effective_lr_mean"].tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_record_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a table as pandas takes it; changing or keeping it concerns no other step."""
    kept: list[Record] = []

    class Keeps:
        def write(self, record: Record) -> None:
            table = record.tables["parameter"]
            kept.append(record)
            assert "module" not in table
            table["parameter"][:], table["numel"][:], table["lr"][:] = "x", -1, 7.0  # type: ignore[call-overload]

        def close(self) -> None:
            pass

    def net() -> tuple[nn.Parameter, Optimizer]:
        param = nn.Parameter(torch.ones(3, 2))
        return param, torch.optim.AdamW([param], lr=0.01)

    frames = []
    for sinks in ([Keeps()], []):
        param, optimizer = net()
        with lrprobe.attach(optimizer, every=1, to=sinks) as probe:
            for _ in range(40):
                param.grad = torch.ones(3, 2)
                optimizer.step()
            frames.append(probe.frame())
    assert len(kept) == 40
    assert pd.DataFrame(kept[7].tables["parameter"]).shape == (1, len(frames[0].columns))
    assert frames[1]["parameter"].unique().tolist() == ["group0.param0"]
    assert frames[1]["numel"].unique().tolist() == [6]
    arrays = [a for t in kept[7].tables.values() for a in t.values()] + [*kept[7].edges]
    owned = sum({id(a.base): a.base.nbytes for a in arrays if a.base is not None}.values())
    assert owned < 3 * kept[7].nbytes, "a record keeps no other"


def test_an_entry_that_was_none_is_planned_anew() -> None:
    """SGD's buffer is None before the first step in checkpoints of old versions of torch."""

    def change(step: int, optimizer: Optimizer) -> None:
        if step in {0, 7}:
            for param in optimizer.param_groups[0]["params"]:
                optimizer.state[param]["momentum_buffer"] = None

    frame = frame_of(lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), Tensor.clone, change)
    assert frame["step"].unique().tolist() == list(range(1, STEPS + 1))
    assert frame["state_error"].max() < 1e-6, frame["state_error"].tolist()


def test_a_gradient_that_torch_negates_when_it_is_read() -> None:
    """Autograd hands over such a gradient, which is no view, for a parameter of one element."""
    real, imaginary = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor([0.25]))
    optimizer = torch.optim.Adam([real, imaginary], lr=0.01)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(STEPS):
            optimizer.zero_grad()
            number = torch.complex(real, imaginary).conj() * torch.tensor([1.5 - 0.5j])
            number.imag.sum().backward()
            optimizer.step()
    assert imaginary.grad is not None
    assert imaginary.grad.is_neg()
    frame = probe.frame()
    assert frame["update_grad_cosine"].tolist() == pytest.approx([1.0] * 2 * STEPS)
    assert frame["state_error"].max() < 1e-6, frame["state_error"].tolist()


class KeepsGradient(torch.optim.SGD):
    """It has a state entry with the name of another tensor."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep three times the gradient."""
        for param in self.param_groups[0]["params"]:
            self.state[param]["grad"] = 3 * param.grad
        super().step(closure)


def test_a_state_entry_named_like_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the parameter, also where the state has a ``grad``."""
    rule = Rule("keeps", lambda s: Update(s.lr, s.grad))
    monkeypatch.setitem(rules._RULES, KeepsGradient, rule)
    frame = frame_of(lambda params: KeepsGradient(params, 1e-3), Tensor.clone, None)
    expected = frame_of(lambda params: torch.optim.SGD(params, 1e-3), Tensor.clone, None)
    pd.testing.assert_series_equal(frame["grad_norm"], expected["grad_norm"], rtol=1e-6)
    assert set(frame["rule"]) == {"keeps"}
