"""A probe changes nothing: the same bits with and without it, and the user's own object."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import random
import time
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import CASES, Case, closure_of, one_per_class
from oracle import bits
from torch import Tensor, nn

import lrprobe

PROBE = {"every": 1, "track": 3, "batch_size": 4}


def clone(value: Any) -> Any:
    """A copy that later steps do not touch."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def result(case: Case, dtype: torch.dtype, probed: bool) -> dict[str, Any]:
    """All that a short training leaves behind."""
    spike = 10.0 if dtype == torch.float16 else 1e3  # torch's NAdam overflows in float16
    torch.manual_seed(40)
    np.random.seed(40)  # noqa: NPY002 - the global state is what is looked at
    random.seed(40)
    generator = torch.Generator().manual_seed(41)
    params = case.parameters(dtype)
    optimizer = case.make(params)
    with warnings.catch_warnings():
        if case.measured:
            warnings.filterwarnings("ignore", ".*register_rule.*")
        probe = lrprobe.attach(optimizer, **PROBE) if probed else None
        for step in range(6):
            case.gradients(params, generator, spike if step == 3 else 1.0)
            optimizer.step(closure_of(optimizer))
            if probe is not None and step == 2:
                probe.frame()
        if probe is not None:
            probe.close()
            frame = probe.frame()
            assert len(frame) == 6 * len(params)
            assert not (frame["rule"] == "measured").any() or case.measured
    return {
        "parameters": [clone(param) for param in params],
        "gradients": [clone(param.grad) for param in params],
        "state": [
            {key: clone(value) for key, value in optimizer.state.get(param, {}).items()}
            for param in params
        ],
        "groups": [
            {key: clone(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "random": random.getstate(),
    }


def assert_same(got: Any, right: Any, where: str) -> None:
    """Bit by bit."""
    assert type(got) is type(right), f"{where}: got {type(got)}, without a probe {type(right)}"
    if isinstance(right, Tensor):
        assert got.dtype == right.dtype, where
        assert got.shape == right.shape, where
        if right.is_sparse:
            got, right = got.to_dense(), right.to_dense()
        if right.is_floating_point():
            different = np.flatnonzero(bits(got) != bits(right))
            assert not different.size, (
                f"{where}[{different[0]}]: got {got.reshape(-1)[different[0]]!r}, "
                f"without a probe {right.reshape(-1)[different[0]]!r}"
            )
        else:
            assert torch.equal(got, right), where
    elif isinstance(right, dict):
        assert list(got) == list(right), f"{where}: got {list(got)}, without {list(right)}"
        for key, value in right.items():
            assert_same(got[key], value, f"{where}.{key}")
    elif isinstance(right, list | tuple):
        assert len(got) == len(right), where
        for index, value in enumerate(right):
            assert_same(got[index], value, f"{where}[{index}]")
    elif isinstance(right, np.ndarray):
        np.testing.assert_array_equal(got, right, err_msg=where)
    else:
        assert got == right, f"{where}: got {got!r}, without a probe {right!r}"


@pytest.mark.sampled(23, 11)  # the cases of test_frame_figures.py whose programs are compiled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_training_is_bit_identical(case: Case) -> None:
    """Parameters, state, gradients, groups and random states end the same, bit by bit."""
    without = result(case, torch.float64, probed=False)
    assert_same(result(case, torch.float64, probed=True), without, case.id)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in one_per_class() if not c.sparse and not c.measured], ids=lambda c: c.id
)
def test_training_is_bit_identical_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    """The same in float32 and in 16 bits."""
    without = result(case, dtype, probed=False)
    assert_same(result(case, dtype, probed=True), without, f"{case.id} {dtype}")


@pytest.mark.parametrize(
    "case", [c for c in one_per_class() if not c.measured], ids=lambda case: case.id
)
def test_inspecting_is_bit_identical(case: Case) -> None:
    """inspect_step and effective_lr change nothing either."""

    def run(look: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(42)
        params = case.parameters()
        optimizer = case.make(params)
        for _ in range(3):
            case.gradients(params, generator)
            if not look:
                optimizer.step()
                continue
            with lrprobe.inspect_step(optimizer) as seen:
                optimizer.step()
            for view in seen.values():  # what is shown is the caller's to change
                view.effective_lr.zero_()
                view.direction.zero_()
                view.update.zero_()
            with contextlib.suppress(RuntimeError):  # where the state does not tell
                for rate in lrprobe.effective_lr(optimizer).values():
                    rate.zero_()
        state = [v for p in params for v in optimizer.state.get(p, {}).values()]
        return [clone(value) for value in (*params, *state)]

    assert_same(run(look=True), run(look=False), case.id)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small one, with dropout, so that the random state matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    """With two backward passes a step."""
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


def test_a_real_training_loop_is_bit_identical(tmp_path: Any) -> None:
    """With dropout, accumulation and every sink a net ends the same, bit by bit."""
    ends = []
    for to in (None, [tmp_path / "run.parquet", tmp_path / "logdir"]):
        model, optimizer = network()
        if to:
            with lrprobe.attach(optimizer, model, to=to, **PROBE):
                train(model, optimizer)
        else:
            train(model, optimizer)
        ends.append([*(clone(p) for p in model.parameters()), torch.get_rng_state()])
    assert_same(ends[1], ends[0], "net")


def test_the_optimizer_stays_the_users_own_object() -> None:
    """Its type, attributes, state_dict and state are what they would be without a probe."""
    model, optimizer = network()
    train(model, optimizer, 1)
    attributes = set(vars(optimizer))
    methods = (optimizer.step, optimizer.zero_grad, optimizer.state_dict)
    plain = copy.deepcopy(optimizer.state_dict())
    on_parameters = [set(vars(p)) for p in model.parameters()]
    on_modules = [set(vars(m)) for m in model.modules()]
    with lrprobe.attach(optimizer, model, **PROBE):
        assert type(optimizer) is torch.optim.AdamW
        assert set(vars(optimizer)) == attributes
        assert (optimizer.step, optimizer.zero_grad, optimizer.state_dict) == methods
        assert_same(optimizer.state_dict(), plain, "state_dict")
        train(model, optimizer, 2)
        assert list(optimizer.state_dict()) == list(plain)
        for state in optimizer.state.values():
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert [set(group) for group in optimizer.param_groups] == [
            set(group) | {"params"} for group in plain["param_groups"]
        ]
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert [set(vars(p)) for p in model.parameters()] == on_parameters
    assert [set(vars(m)) for m in model.modules()] == on_modules


def test_no_hooks_are_left_after_close() -> None:
    """After `close()` no hook is left, on the optimizer or on a parameter."""
    model, optimizer = network()
    probe = lrprobe.attach(optimizer, model, **PROBE)
    train(model, optimizer, 2)
    assert optimizer._optimizer_step_post_hooks
    probe.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    for param in model.parameters():
        assert not param._post_accumulate_grad_hooks
        assert not param._backward_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def by_pickle(value: Any) -> Any:
    """Through pickle."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own bytes


def by_torch(value: Any) -> Any:
    """Through torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("what", ["optimizer", "model"])
def test_copies_do_not_carry_the_probe(copied: Any, what: str) -> None:
    """A pickled or deep-copied optimizer or model is one without a probe, and still works."""
    model, optimizer = network()
    with lrprobe.attach(optimizer, model, **PROBE) as probe:
        train(model, optimizer, 1)
        if what == "optimizer":
            other = copied(optimizer)
            assert type(other) is torch.optim.AdamW
            assert not getattr(other, "_optimizer_step_post_hooks", None)
            for group in other.param_groups:
                for param in group["params"]:
                    assert not param._post_accumulate_grad_hooks
                    param.grad = torch.ones_like(param)
            other.step()
        else:
            other = copied(model)
            other(torch.randn(4, 8)).sum().backward()
            for param in other.parameters():
                assert not param._post_accumulate_grad_hooks
        assert probe.frame()["step"].max() == 1
        train(model, optimizer, 1)
    frame = probe.frame()
    assert frame["step"].unique().tolist() == [1, 2]
    assert (frame["samples"] == 8).all()


def test_load_state_dict_goes_on() -> None:
    """After `load_state_dict`, which replaces the tensors, the figures are still right."""
    model, optimizer = network()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 2)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 2)
    frame = probe.frame()
    assert frame["step"].unique().tolist() == [4, 5, 6, 7]  # it never goes back
    assert not frame["reconstruction_error"].gt(1e-3).any()


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_grad_scaler(kind: str, fused: bool) -> None:
    """Under GradScaler the end is bit-identical, a skipped step no step, and norms unscaled."""

    def run(probed: bool) -> tuple[list[Tensor], Any, list[float]]:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(16))
        optimizer = getattr(torch.optim, kind)([param], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        probe = lrprobe.attach(optimizer, every=1, batch_size=4) if probed else None
        norms = []
        for step in range(5):
            optimizer.zero_grad()
            loss = (param * (step + 1)).square().sum() * (float("inf") if step == 2 else 1.0)
            norms.append(float((2 * (step + 1) ** 2 * param.detach()).norm()))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if probe is not None:
            probe.close()
        return [clone(param), torch.tensor(scaler.get_scale())], probe, norms

    without, _, _ = run(probed=False)
    ends, probe, norms = run(probed=True)
    assert_same(ends, without, f"{kind} fused={fused}")
    frame = probe.frame()
    moved = frame[frame["stepped"]]
    right = [norm for step, norm in enumerate(norms) if step != 2]
    np.testing.assert_allclose(moved["grad_norm"], right, rtol=1e-5)
    assert not frame["reconstruction_error"].gt(1e-3).any()
    assert (moved["samples"] == 4).all(), moved["samples"].tolist()
    assert (~frame["stepped"]).sum() == (1 if fused else 0)
    assert not (frame["rule"] == "measured").any()


def test_an_error_in_the_step_is_the_users() -> None:
    """An error in the optimizer's own step comes through, and the next step is recorded."""
    model, optimizer = network()
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 1)

        def broken() -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            optimizer.step(broken)
        train(model, optimizer, 1)
    frame = probe.frame()
    assert frame["step"].unique().tolist() == [1, 2]
    assert not frame["reconstruction_error"].gt(1e-3).any()


def test_the_probe_lives_as_long_as_the_optimizer() -> None:
    """A probe that nobody kept goes on recording, and does not keep the optimizer alive."""
    model, optimizer = network()
    memory = lrprobe.sinks.Memory()
    lrprobe.attach(optimizer, model, every=1, to=memory)
    gc.collect()
    train(model, optimizer, 2)
    there = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert there() is None
    patience = time.monotonic() + 10
    while len(memory.frame()) < 8 and time.monotonic() < patience:
        time.sleep(0.01)  # the records are still on their way
    assert memory.frame()["step"].tolist() == [1] * 4 + [2] * 4
