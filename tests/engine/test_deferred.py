"""Steps of small nets, which are copied and become figures later, many at once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from optimizers import CASES, Case
from short_runs import references
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe
from lrprobe import gathering, rules, worker
from lrprobe.engine import deferred, plan
from lrprobe.record import Record
from lrprobe.rules.base import Rule, Slice, Update

pytestmark = pytest.mark.usefixtures("seeded", "from_the_first_step")


def run(case: Case, dtype: torch.dtype, steps: int = 7) -> pd.DataFrame:
    """Frame of some steps of a case: two groups, a schedule, a hyperparameter that changes."""
    shapes = [shape for shape in case.shapes if shape and 0 not in shape]
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    if case.kwargs.get("differentiable"):
        params = [p.clone() for p in params]  # type: ignore[misc]
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.01}])
    with lrprobe.attach(optimizer, every=1) as probe:
        for step in range(steps):
            for param in params:
                scale = torch.exp(2 * torch.randn(param.shape, generator=generator))
                grad = torch.randn(param.shape, generator=generator) * scale
                param.grad = grad.to(dtype)
            optimizer.step()
            for group in optimizer.param_groups:
                if not isinstance(group.get("lr"), Tensor):
                    group["lr"] *= 0.9
            if step == 3:
                optimizer.param_groups[0]["weight_decay"] = 0.02
        frame = probe.frame()
        histograms = probe.histograms()
    frame["counts"] = [tuple(counts) for counts in histograms["counts"]]
    return frame.drop(columns="time")


DENSE = [case for case in CASES if not case.sparse and case.cls is not torch.optim.LBFGS]


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.sampled(41)  # each compiles two programs of its own
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, DTYPES[i % 3], id=f"{c.id}-{DTYPES[i % 3]}") for i, c in enumerate(DENSE)],
)
def test_the_figures_are_those_of_one_step_at_a_time(
    case: Case, dtype: torch.dtype, waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole table: a step that waits has the same row as one that does not."""
    if case.cls is torch.optim.SGD and case.kwargs.get("fused") and dtype == torch.bfloat16:
        pytest.skip("pytorch#191763: which elements it moves differs from run to run")
    frame = run(case, dtype)
    assert bool(waited) == waits(case)
    monkeypatch.setattr(plan, "MAX_BYTES", 0)
    expected = run(case, dtype)
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-9, atol=0)


def waits(case: Case) -> bool:
    """Whether the steps of a case can wait; Adafactor's state has other shapes."""
    values = [*case.kwargs.values(), *case.kwargs.get("betas", ())]
    return not (
        any(isinstance(value, Tensor) for value in values)
        or case.kwargs.get("capturable")
        or case.kwargs.get("differentiable")
        or case.cls is torch.optim.Adafactor
    )


Change = Callable[[int, nn.Module, Optimizer], None]


def train(model: nn.Module, optimizer: Optimizer, steps: int, before: Change | None = None) -> None:
    """Train on random data; ``before`` is called between the backward pass and the step."""
    generator = torch.Generator().manual_seed(5)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        if before is not None:
            before(step, model, optimizer)
        optimizer.step()


def net() -> nn.Module:
    """Four small parameters, always the same."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def frame_of(before: Change, kind: type[Optimizer] = torch.optim.AdamW) -> pd.DataFrame:
    """Frame of a run in which something happens."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 12, before)
        return probe.frame().drop(columns="time")


def loads_a_checkpoint(step: int, _: nn.Module, optimizer: Optimizer) -> None:
    """The state's tensors are others afterwards."""
    if step == 6:
        optimizer.load_state_dict(optimizer.state_dict())


def lacks_a_gradient(step: int, model: nn.Module, _: Optimizer) -> None:
    """One parameter rests in one step."""
    if step == 6:
        model[0].bias.grad = None  # type: ignore[union-attr,operator]


def moves_a_parameter(step: int, model: nn.Module, _: Optimizer) -> None:
    """Its values are elsewhere in memory afterwards."""
    if step == 6:
        model[0].weight.data = model[0].weight.detach().clone()  # type: ignore[union-attr,operator]


def transposes_a_gradient(step: int, model: nn.Module, _: Optimizer) -> None:
    """Its elements lie in another order than those of the parameter."""
    if step >= 6:
        grad = model[0].weight.grad  # type: ignore[union-attr]
        model[0].weight.grad = grad.T.contiguous().T  # type: ignore[union-attr,operator]


def adds_a_group(step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """A parameter comes in mid-run."""
    if step == 6:
        extra = nn.Parameter(torch.ones(3))
        extra.grad = torch.ones(3)
        optimizer.add_param_group({"params": [extra], "lr": 0.1})
    for group in optimizer.param_groups[1:]:
        group["params"][0].grad = torch.full((3,), float(step))


def cycles_a_hyperparameter(step: int, _: nn.Module, optimizer: Optimizer) -> None:
    """As schedules of the momentum do."""
    optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.999)


@pytest.mark.parametrize(
    "change",
    [
        loads_a_checkpoint,
        lacks_a_gradient,
        moves_a_parameter,
        transposes_a_gradient,
        adds_a_group,
        cycles_a_hyperparameter,
    ],
)
def test_what_changes_in_mid_run_is_followed(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the tensors, the rows are those of one step at a time."""
    frame = frame_of(change)
    monkeypatch.setattr(plan, "MAX_BYTES", 0)
    pd.testing.assert_frame_equal(frame, frame_of(change), rtol=1e-9, atol=0)


class Wayward(torch.optim.SGD):
    """SGD that takes another step than its own from some step on, under a rule of its own."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        """Step; from the sixth on, further than SGD says."""
        self.taken += 1
        if self.taken >= 6:
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.sub_(0.05 * param.grad)
        return super().step(closure)


def raises_late(s: Slice) -> Update:
    """SGD's equation until the rate says otherwise."""
    if s.group.get("broken"):
        raise ValueError("no such step")
    return Update(s.lr, s.grad)


def breaks(step: int, _: nn.Module, optimizer: Optimizer) -> None:
    """The rule raises from the sixth step on."""
    optimizer.param_groups[0]["broken"] = step >= 6


@pytest.mark.parametrize("change", [None, breaks], ids=["explains nothing", "raises"])
def test_a_rule_is_given_up_at_the_same_step(
    change: Change | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that wait while their rule turns out to be wrong are measured nevertheless."""
    monkeypatch.setitem(rules._RULES, Wayward, Rule("wayward", raises_late))
    if change is not None:
        monkeypatch.setattr(Wayward, "step", torch.optim.SGD.step)
    frames = []
    for limit in (plan.MAX_BYTES, 0):
        monkeypatch.setattr(plan, "MAX_BYTES", limit)
        with pytest.warns(UserWarning, match="does not explain the steps of Wayward"):
            frames.append(frame_of(change or (lambda *_: None), Wayward))
    pd.testing.assert_frame_equal(*frames, rtol=1e-9, atol=0)
    first = 6 if change is not None else 8  # two bad steps in a row, or an error
    measured = frames[0].groupby("step")["rule"].first().eq("measured")
    assert measured.idxmax() == first


def test_many_steps_take_one_computation(waited: list[int]) -> None:
    """256 pieces, or a quarter of a second, whichever comes first; no step is lost."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 300)
        assert probe.frame()["step"].unique().tolist() == list(range(1, 301))
    assert max(waited) == deferred.MAX_PIECES // 4
    assert sum(waited) == 299, "the first step creates the state, and does not wait"


def test_steps_that_wait_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another optimizer do not pile up behind one whose steps have few pieces."""
    monkeypatch.setattr(deferred, "MAX_WAITING_BYTES", 1 << 16)
    monkeypatch.setattr(deferred, "MAX_SECONDS", 1e9)
    small, large = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(30, 30))
    optimizers = [torch.optim.AdamW([param], lr=0.01) for param in (small, large)]
    most = 0
    with lrprobe.attach(optimizers, every=1) as probe:
        for _ in range(60):
            for param, optimizer in zip((small, large), optimizers, strict=True):
                param.grad = torch.ones_like(param)
                optimizer.step()
            most = max(most, probe._recorder.waiting_bytes)
        assert len(probe.frame()) == 120
        assert probe._recorder.waiting_bytes == 0
    assert 1 << 15 < most < 1 << 17, most


def test_no_step_waits_for_another_that_never_comes() -> None:
    """A training that hangs, or evaluates for an hour, has its last step in the sinks at once."""
    steps: list[int] = []

    class Seen:
        def write(self, record: Record) -> None:
            steps.append(record.step)

        def close(self) -> None:
            pass

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1, to=Seen()):
        train(model, optimizer, 5)
        until = time.monotonic() + 30
        while len(steps) < 5 and time.monotonic() < until:
            time.sleep(0.01)
        assert steps == [1, 2, 3, 4, 5]


def test_a_warning_of_the_background_is_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule found wrong between two steps is said at the next one, in the thread that trains."""
    monkeypatch.setitem(rules._RULES, Wayward, Rule("wayward", raises_late))
    model = net()
    optimizer = Wayward(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 10)
        until = time.monotonic() + 30
        while probe._recorder._waiting and time.monotonic() < until:
            time.sleep(0.01)
        assert not probe._recorder._waiting
        with pytest.warns(UserWarning, match="does not explain the steps of Wayward"):
            train(model, optimizer, 1)


def test_steps_that_wait_keep_no_model_alive() -> None:
    """Parameters, gradients and state are freed with their optimizer; the frame is whole."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = lrprobe.attach(optimizer, model, every=1)
    train(model, optimizer, 5)
    there = references(model, optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in there] == [None] * len(there)
    assert probe.frame()["step"].max() == 5
    probe.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_does_not_have_its_parents_steps() -> None:
    """Steps that wait when a process forks are in the parent's frame only, each once."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 5)
        child = os.fork()
        if child == 0:
            os._exit(int(bool(probe._recorder.hooks[0]._local.deferred.waiting)))
        assert os.waitpid(child, 0)[1] == 0
        train(model, optimizer, 5)
        assert probe.frame()["step"].unique().tolist() == list(range(1, 11))


# ---- what a fresh pair of eyes found ------------------------------------------------------------


class Scheduled(Optimizer):
    """Keeps its rate's factor in the group, and changes it in its step."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "factor": 1.0, "odd": None, "late": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """SGD with the factor, and from the sixth step on with a buffer that was None."""
        for group in self.param_groups:
            group["factor"] *= 1.1
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("buffer", None)
                state["taken"] = state.get("taken", 0) + 1
                if state["taken"] >= 6 and group["late"]:
                    state["buffer"] = 2 * param.grad
                direction = param.grad if state["buffer"] is None else state["buffer"]
                param.sub_(group["lr"] * group["factor"] * direction)


def scheduled(s: Slice) -> Update:
    """The rate is in the group, in part."""
    rate = s.group["lr"] * torch.as_tensor(s.group["factor"])
    return Update(rate, s["buffer"]) if "buffer" in s else Update(rate, s.grad)


def keeps_an_array(_: int, __: nn.Module, optimizer: Optimizer) -> None:
    """A hyperparameter that cannot be compared with ==."""
    optimizer.param_groups[0]["odd"] = np.ones(3)


def begins_a_buffer(_: int, __: nn.Module, optimizer: Optimizer) -> None:
    """A state entry that was None becomes a tensor."""
    optimizer.param_groups[0]["late"] = True


def decays_its_rate(_: int, __: nn.Module, optimizer: Optimizer) -> None:
    """The rate differs between steps that wait."""
    optimizer.param_groups[0]["lr"] *= 0.9
    optimizer.param_groups[0]["factor"] = 1.0 / 1.1


@pytest.mark.parametrize("change", [keeps_an_array, begins_a_buffer, decays_its_rate])
def test_hyperparameters_are_those_of_the_step(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right rule of an optimizer that changes its groups and its state explains every step."""
    monkeypatch.setitem(rules._RULES, Scheduled, Rule("scheduled", scheduled))
    frame = frame_of(change, Scheduled)
    assert set(frame["rule"]) == {"scheduled"}
    assert frame["reconstruction_error"].max() < 1e-5, frame["reconstruction_error"].tolist()


def test_a_list_in_a_group_may_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step that waits has the values of its own time."""

    def changes(step: int, _: nn.Module, optimizer: Optimizer) -> None:
        betas = optimizer.param_groups[0]["betas"]
        optimizer.param_groups[0]["betas"] = betas = betas if type(betas) is list else [*betas]
        betas[0] = 0.9 - 0.01 * step

    frame = frame_of(changes)
    monkeypatch.setattr(plan, "MAX_BYTES", 0)
    pd.testing.assert_frame_equal(frame, frame_of(changes), rtol=1e-9, atol=0)


def test_a_group_that_is_added_finds_the_waiting_steps_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rule that steps before it have shown to be wrong is not used after it."""
    monkeypatch.setitem(rules._RULES, Wayward, Rule("wayward", raises_late))
    monkeypatch.setattr(gathering, "AT_ONCE", 8)
    model = net()
    optimizer = Wayward(model.parameters(), lr=0.01)
    optimizer.taken = -10
    extra = nn.Parameter(torch.ones(3))

    def adds(step: int, _: nn.Module, optimizer: Optimizer) -> None:
        extra.grad = torch.ones(3)
        if step == 22:
            optimizer.add_param_group({"params": [extra]})

    with lrprobe.attach(optimizer, model, every=1) as probe:
        with pytest.warns(UserWarning, match="does not explain the steps of Wayward"):
            train(model, optimizer, 30, adds)
        frame = probe.frame()
    rule = frame[frame["parameter"] == "0.weight"].set_index("step")["rule"]
    assert rule[rule == "measured"].index.tolist() == list(range(18, 31))


def test_an_interrupt_while_figures_are_computed_loses_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are computed again, and every step has its row."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 10)
        with monkeypatch.context() as patch:

            def interrupted(*_: Any) -> Any:
                raise KeyboardInterrupt

            patch.setattr(deferred, "figures_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                probe.frame()
        assert probe.frame()["step"].unique().tolist() == list(range(1, 11))


def test_a_slow_sink_does_not_hold_up_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sink has no room, waiting steps stay where they are, and other probes go on."""
    monkeypatch.setattr(worker, "WAITING_RECORDS", 4)
    gate = threading.Event()

    class Hanging:
        def write(self, _: Record) -> None:
            gate.wait()

        def close(self) -> None:
            pass

    model, other = net(), net()
    one = torch.optim.AdamW(model.parameters(), lr=0.01)
    two = torch.optim.AdamW(other.parameters(), lr=0.01)
    with lrprobe.attach(one, model, every=1, to=Hanging()) as slow:
        with lrprobe.attach(two, other, every=1) as quick:
            train(model, one, 4)
            slow._recorder.collect(wait=True)
            train(model, one, 4)
            time.sleep(2 * deferred.MAX_SECONDS)
            train(other, two, 2)
            start = time.monotonic()
            assert quick.frame()["step"].max() == 2
            assert time.monotonic() - start < 0.9, "a sink without room is waited for a second"
        gate.set()
    assert slow.frame()["step"].max() == 8


def test_a_gradient_of_another_dtype_does_not_persist() -> None:
    """After `model.double()` there is no gradient to compare with, for one step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def same(step: int, model: nn.Module, _: Optimizer) -> None:
        if step == 6:
            model.double()
        for param in model.parameters():
            param.grad = torch.ones_like(param)

    with lrprobe.attach(optimizer, model, every=1) as probe:
        for step in range(1, 9):
            same(step, model, optimizer)
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
        persistence = probe.frame(by="model")["grad_persistence"]
    np.testing.assert_allclose(persistence, [np.nan, 1, 1, 1, 1, np.nan, 1, 1], rtol=1e-6)


TRAINS = """
import multiprocessing, sys
import torch, lrprobe

def work(path):
    global optimizer
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lrprobe.attach(optimizer, model, every=1, to=path)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()

if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=work, args=(sys.argv[1],))
    process.start()
    process.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_that_ends_without_close_loses_no_step(tmp_path: Path) -> None:
    """It runs no `atexit`; the steps that wait are in its dataset nevertheless."""
    script = tmp_path / "trains.py"
    script.write_text(TRAINS)
    path = tmp_path / "run.parquet"
    subprocess.run([sys.executable, script, path], check=True)
    assert lrprobe.read(path)["step"].unique().tolist() == list(range(1, 31))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Wayward])
def test_steps_with_a_closure_wait_too(
    kind: type[Optimizer], waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rule or measured, their rows are those of one step at a time."""

    def frame() -> pd.DataFrame:
        model = net()
        optimizer = kind(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4, generator=generator)).square().mean()
            loss.backward()
            return loss

        with lrprobe.attach(optimizer, model, every=1) as probe:
            for _ in range(10):
                optimizer.step(closure)
            return probe.frame().drop(columns="time")

    if kind is Wayward:
        monkeypatch.setitem(rules._RULES, Wayward, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = frame()
        assert sum(waited) >= 9
        monkeypatch.setattr(plan, "MAX_BYTES", 0)
        pd.testing.assert_frame_equal(found, frame(), rtol=1e-9, atol=0)
