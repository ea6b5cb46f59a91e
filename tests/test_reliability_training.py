"""However a training steps, saves and resumes: the same bits in the end, and a right record."""

from __future__ import annotations

import gc
import io
import math
import random
import re
import threading
import tracemalloc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import bits
from short_runs import references
from test_unchanged import assert_same, clone
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import lrprobe
from lrprobe import gathering
from lrprobe.engine import Engine, flight
from lrprobe.engine.planned import Planned

Flow = Callable[[nn.Module, Optimizer, int], None]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A net with dropout, buffers and a tied weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8)
    )
    model.append(nn.Linear(8, 8, bias=False))
    model[5].weight = model[4].weight
    return model.to(dtype)


def adamw(model: nn.Module) -> Optimizer:
    """AdamW with a rate that moves something."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a random batch."""
    return model(torch.randn(16, 6, dtype=dtype)).square().mean()


# --- Bit-identical training ---------------------------------------------------------------------


def plain(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def autocast(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
            loss.float().backward()
            optimizer.step()


def scaled(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


def accumulated_and_clipped(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            (loss_of(model) / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()


def closure(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    def again() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(again)


def compiled_model(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    torch.compiler.reset()
    plain(torch.compile(model, backend="aot_eager"), optimizer, steps)  # type: ignore[arg-type]


def compiled_step(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    torch.compiler.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        step()


def compiled_training_step(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def train(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(steps):
        train(torch.randn(16, 6))


def scheduled(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    for _ in range(steps):
        plain(model, optimizer, 1)
        schedule.step()


def lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)


def line_search(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")


def fused(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def capturable(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01), foreach=False)


FLOWS: dict[str, tuple[Flow, Callable[[nn.Module], Optimizer]]] = {
    "autocast": (autocast, adamw),
    "scaled": (scaled, adamw),
    "scaled, fused": (scaled, fused),
    "accumulated and clipped": (accumulated_and_clipped, adamw),
    "closure": (closure, adamw),
    "LBFGS": (closure, lbfgs),
    "LBFGS with line search": (closure, line_search),
    "compiled model": (compiled_model, adamw),
    "compiled step": (compiled_step, adamw),
    "compiled step, lr tensor": (compiled_step, capturable),
    "compiled training step": (compiled_training_step, adamw),
    "scheduled": (scheduled, adamw),
}


def end_of(flow: Flow, make: Callable[[nn.Module], Optimizer], to: Any) -> dict[str, Any]:
    """All that a training leaves, and the probe's frame where there was one."""
    model = net()
    optimizer = make(model)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is looked at
    random.seed(1)
    probe = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LBFGS has no rule")
        warnings.filterwarnings("ignore", "(?!lrprobe)")  # what torch says while it compiles
        if to is not None:
            probe = lrprobe.attach(optimizer, model, to=to, every=1, track=2, batch_size=16)
        flow(model, optimizer, 5)
        if probe is not None:
            probe.close()
    return {
        "model": {name: clone(value) for name, value in model.state_dict().items()},
        "gradients": [clone(param.grad) for param in model.parameters()],
        "optimizer": clone(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "random": random.getstate(),
    }, None if probe is None else probe.frame()


@pytest.mark.parametrize("name", FLOWS)
def test_every_way_of_training_is_bit_identical(name: str, tmp_path: Any) -> None:
    """Parameters, buffers, gradients, state and random states end as without a probe."""
    without, _ = end_of(*FLOWS[name], None)
    ended, frame = end_of(*FLOWS[name], [tmp_path / "run.parquet", tmp_path / "logdir"])
    assert_same(ended, without, name)
    skipped = name == "scaled"  # an unfused skip runs no hook
    assert frame["step"].unique().tolist() == list(range(1, 5 if skipped else 6))
    assert frame.loc[frame["stepped"], "grad_norm"].notna().all()
    assert not frame["reconstruction_error"].gt(1e-3).any()
    assert set(frame["rule"]) == ({"measured"} if "LBFGS" in name else {"adam"})
    passes = {"accumulated and clipped": 3.0}.get(name, 1.0)
    if "LBFGS" not in name:
        assert frame.loc[frame["stepped"], "samples"].eq(16 * passes).all()


def in_backward(probed: bool) -> tuple[list[Tensor], pd.DataFrame | None]:
    """One optimizer per parameter, each stepped as soon as its gradient is there."""
    model = net()
    names = {param: name for name, param in model.named_parameters()}
    optimizers = {name: torch.optim.Adam([p], lr=0.01) for p, name in names.items()}

    def step(param: Tensor) -> None:
        optimizers[names[param]].step()
        optimizers[names[param]].zero_grad()

    for param in names:
        param.register_post_accumulate_grad_hook(step)
    probe = lrprobe.attach(optimizers, model, every=1, batch_size=16) if probed else None
    torch.manual_seed(1)
    for _ in range(4):
        loss_of(model).backward()
    if probe is None:
        return [clone(p) for p in names], None
    probe.close()
    return [clone(p) for p in names], probe.frame()


def test_optimizer_in_backward() -> None:
    """One optimizer per parameter, stepped in the backward pass: same bits, every step recorded."""
    ended, frame = in_backward(probed=True)
    assert_same(ended, in_backward(probed=False)[0], "in backward")
    assert (frame["parameter"] == frame["optimizer"]).all()
    assert frame.groupby("optimizer")["step"].agg(list).map(lambda s: s == [1, 2, 3, 4]).all()
    assert not frame["reconstruction_error"].gt(1e-3).any()
    assert frame.loc[frame["step"] > 1, "samples"].eq(16).all()  # NaN before it is known


@pytest.mark.slow
def test_a_compiled_step_is_recorded_by_inductor_too() -> None:
    """With Inductor, a compiled optimizer step has the bits it has without a probe."""
    ends = []
    for probed in (False, True):
        torch.compiler.reset()
        torch.manual_seed(2)
        params = [nn.Parameter(torch.randn(20)) for _ in range(2)]
        optimizer = torch.optim.Adam(params, lr=torch.tensor(0.01))
        probe = lrprobe.attach(optimizer, every=1) if probed else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?!lrprobe)")
            step = torch.compile(optimizer.step)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn(20)
                step()
        ends.append([clone(p) for p in params])
    assert_same(ends[1], ends[0], "inductor")
    probe.close()
    assert probe.frame()["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert not probe.frame()["reconstruction_error"].gt(1e-3).any()


# --- Mixed precision ----------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


def test_a_skipped_step_asks_no_tensor_for_its_value() -> None:
    """A fused step, skipped by the scaler or not, is recorded without a value read by the host."""
    param = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    with lrprobe.attach(optimizer, every=1, track=2) as probe:
        for found in (0.0, 1.0, 0.0):
            param.grad = torch.full((5,), math.inf if found else 8.0)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
            with NoReads():
                optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
    assert probe.frame()["stepped"].tolist() == [True, False, True]
    assert probe.frame()["grad_norm"][0] == pytest.approx(2 * 5**0.5)  # unscaled


@pytest.mark.parametrize("impl", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("lr", [1e-4, 3e-3])
@pytest.mark.parametrize("numel", [900, 20_000])
def test_pure_bf16_loses_what_it_loses(impl: dict[str, bool], lr: float, numel: int) -> None:
    """In bf16, `lost_fraction` is what comparing the parameters bit by bit says, to 0.01."""
    generator = torch.Generator().manual_seed(3)
    param = nn.Parameter(torch.randn(numel, generator=generator).bfloat16())
    optimizer = torch.optim.AdamW([param], lr=lr, weight_decay=0.0, **impl)
    truth = []
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(4):
            param.grad = torch.randn(numel, generator=generator).bfloat16()
            before = bits(param)
            optimizer.step()
            truth.append(float((bits(param) == before).mean()))
    frame = probe.frame()
    np.testing.assert_allclose(frame["lost_fraction"], truth, atol=0.01)
    assert 0.05 < truth[0] < 0.999  # some are lost, some not
    assert (frame["rule"] == "adam").all()


class StochasticRounding(Optimizer):
    """SGD in bf16 whose sums are rounded up or down at random."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.generator = torch.Generator().manual_seed(4)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                exact = param.float() - group["lr"] * param.grad.float()
                noise = torch.randint(0, 1 << 16, exact.shape, generator=self.generator)
                rounded = (exact.view(torch.int32) + noise.int()) & -(1 << 16)
                param.copy_(rounded.view(torch.float32).bfloat16())


class StochasticAdamW(torch.optim.AdamW):
    """AdamW whose bf16 parameters are rounded stochastically, the state being float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        generator = torch.Generator().manual_seed(len(self.state))
        (group,) = self.param_groups
        (param,) = group["params"]
        state = self.state[param]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros(param.shape))
            state["exp_avg_sq"] = torch.zeros(param.shape)
        grad = param.grad.float()
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 0.1)
        state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
        t = state["step"].item()
        denominator = (state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + group["eps"]
        exact = param.float() - group["lr"] / (1 - 0.9**t) * state["exp_avg"] / denominator
        noise = torch.randint(0, 1 << 16, exact.shape, generator=generator)
        rounded = (exact.view(torch.int32) + noise.int()) & -(1 << 16)
        param.copy_(rounded.view(torch.float32).bfloat16())


class EightBit(Optimizer):
    """Momentum kept in 8 bits with one scale a block, as bitsandbytes does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros(param.numel(), dtype=torch.uint8) + 128
                    state["absmax"] = torch.zeros(param.numel() // 50)
                    state["step"] = 0
                state["step"] += 1
                moment = (state["exp_avg"].float() - 128).view(-1, 50) / 127
                moment = moment * state["absmax"].unsqueeze(1)
                moment = 0.9 * moment + param.grad.view(-1, 50)
                state["absmax"] = moment.abs().amax(1)
                scaled = moment / state["absmax"].unsqueeze(1)
                state["exp_avg"] = (scaled * 127 + 128).round().to(torch.uint8).view(-1)
                param.sub_(group["lr"] * moment.view(param.shape))


class EightBitAdam(torch.optim.Adam):
    """A subclass of Adam whose state is 8-bit codes under Adam's own names."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for param in group["params"]:
            state = self.state[param]
            state["step"] = torch.tensor(1.0)
            state["exp_avg"] = torch.full(param.shape, 130, dtype=torch.uint8)
            state["exp_avg_sq"] = torch.full(param.shape, 131, dtype=torch.uint8)
            param.sub_(group["lr"] * param.grad.sign())


def steps_of(
    optimizer: Optimizer, param: Tensor, steps: int
) -> tuple[pd.DataFrame, list[float], list[str]]:
    """The frame, the true ‖Δθ‖/‖g‖ of each step, and the warnings."""
    generator = torch.Generator().manual_seed(5)
    truth = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(steps):
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                before = param.detach().double()
                optimizer.step()
                moved = (param.detach().double() - before).norm()
                truth.append(float(moved / param.grad.double().norm()))
    return probe.frame(), truth, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(StochasticRounding, torch.bfloat16), (EightBit, torch.float32)]
)
def test_optimizers_nobody_knows_are_measured(kind: Any, dtype: torch.dtype) -> None:
    """Stochastic rounding and 8-bit state, without a rule, give |Δθ|/|g| as it really was."""
    param = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(6)).to(dtype))
    frame, truth, said = steps_of(kind([param], lr=0.01), param, 4)
    assert (frame["rule"] == "measured").all()
    np.testing.assert_allclose(frame["effective_lr_applied"], truth, rtol=1e-9)
    assert frame["nonfinite"].eq(0).all()
    (message,) = said
    assert re.search(f"{kind.__name__} has no rule.*register_rule", message)


@pytest.mark.usefixtures("eager")
def test_a_rule_survives_stochastic_rounding() -> None:
    """AdamW that rounds bf16 parameters at random is still AdamW: no parameter is given up."""
    param = nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(7)).bfloat16())
    frame, _, said = steps_of(StochasticAdamW([param], lr=0.01, weight_decay=0.0), param, 5)
    assert said == []
    assert (frame["rule"] == "adam").all()
    assert frame["reconstruction_error"].lt(5e-2).all()


def test_a_rule_does_not_misjudge_8_bit_codes() -> None:
    """Where 8-bit codes stand under Adam's names the rule is given up, and it is measured."""
    param = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(8)))
    frame, truth, said = steps_of(EightBitAdam([param], lr=0.01), param, 4)
    assert frame["rule"].tolist()[-2:] == ["measured", "measured"]
    np.testing.assert_allclose(frame["effective_lr_applied"][-2:], truth[-2:], rtol=1e-9)
    (message,) = said
    assert "does not explain the steps of EightBitAdam" in message


NEAR_ONE: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1.0, weight_decay=1.0),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, weight_decay=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, weight_decay=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, weight_decay=1.0),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", NEAR_ONE)
@pytest.mark.parametrize("numel", [1000, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decay_that_takes_all_is_explained(name: str, numel: int, dtype: torch.dtype) -> None:
    """Where rate times λ is near 1, nothing after the step tells what was before; it is kept."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(numel).to(dtype))
    optimizer = NEAR_ONE[name]([param])
    size = torch.logspace(-6, 0, numel)[torch.randperm(numel)]
    with lrprobe.attach(optimizer, every=1, track=5) as probe:
        for _ in range(30):
            param.grad = (torch.randn(numel) * size).to(dtype)
            optimizer.step()
    frame = probe.frame()
    assert frame["rule"].iloc[-1] != "measured"
    # Where g + λθ cancels, what is left in bf16 is rounding, which vector code does in another way.
    limit = 5e-2 if dtype == torch.bfloat16 else 1e-4
    assert frame["reconstruction_error"].max() < limit
    assert np.isfinite(probe.elements()["update"]).all()


def test_the_check_sees_pytorch_191763() -> None:
    """torch's fused SGD that leaves bf16 unmoved becomes measured, with what was seen."""
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=0.5, fused=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    if (param != 1).any():
        pytest.skip("this torch moves them")
    frame, truth, said = steps_of(optimizer, param, 4)
    assert frame["lost_fraction"].tolist()[:2] == [1.0, 1.0]
    assert frame["reconstruction_error"][:2].gt(0.95).all()  # but for one ulp, all is missing
    assert frame["rule"].tolist()[-2:] == ["measured"] * 2
    assert truth == [0.0] * 4
    (message,) = said
    assert "does not explain the steps of SGD: group0.param0 (reconstruction error 0.99" in message


# --- Dummy steps --------------------------------------------------------------------------------


@pytest.fixture(params=["at once", "late"])
def arrival(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Figures that are there at once, as on the host, or only at a later hook, as from a device."""
    if request.param == "late":
        asked: list[int] = []

        def ready(self: Any) -> bool:
            asked.append(1)
            return len(asked) % 4 == 0

        monkeypatch.setattr(flight.Crossing, "ready", ready)
    return str(request.param)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_a_checkpoint_librarys_dummy_step_is_no_progress(every: int, lr: str, arrival: str) -> None:
    """A step with lr=0 and zero gradients, taken to make state, has no row and is not counted."""
    model = nn.Linear(3, 2)
    rate = torch.tensor(0.1) if lr == "tensor" else 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
    with lrprobe.attach(optimizer, model, every=every, batch_size=4) as probe:
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.state
        assert probe.state_dict()["steps"] == {"AdamW": 0}
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        assert probe.state_dict()["steps"] == {"AdamW": 6}
    frame = probe.frame()
    assert frame["step"].unique().tolist() == ([1, 2, 3, 4, 5, 6] if every == 1 else [1, 3, 6])
    assert frame["stepped"].all()
    assert frame["initial_lr"].unique() == pytest.approx([0.1])
    assert (frame["samples"] == 4).all()


def test_dummy_steps_in_mid_run_are_not_counted(arrival: str) -> None:
    """SGD without momentum gets one at each checkpoint; the numbers go on as if it had not."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=2) as probe:
        for _ in range(6):
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)
            if arrival == "late":
                probe.state_dict()  # as a checkpoint does: it waits
    assert probe.frame()["step"].unique().tolist() == [1, 2, 4, 6]


def test_steps_after_a_dummy_are_numbered_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken before the figures of a dummy step arrive get their right numbers in the end."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        monkeypatch.setattr(flight.Crossing, "ready", lambda self: False)
        for _ in range(3):
            get_optimizer_state_dict(model, optimizer)
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert probe.frame()["step"].unique().tolist() == [1, 2, 3]
        assert probe.step == 3


def test_a_step_of_a_warmup_at_zero_is_a_step(arrival: str) -> None:
    """The first step of a linear warmup, lr=0 with gradients, has its row and its number."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 3, 1.0))
    with lrprobe.attach(optimizer, model, every=1, include="weight") as probe:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            if step == 0:
                model.weight.grad.zero_()  # all that is watched; another gradient is not zero
            optimizer.step()
            warmup.step()
    frame = probe.frame()
    assert frame["step"].tolist() == [1, 2, 3, 4]
    assert frame["stepped"].all()
    np.testing.assert_allclose(frame["lr"], [0, 0.1 / 3, 0.2 / 3, 0.1])
    assert frame["idle_fraction"].tolist() == [1, 0, 0, 0]
    assert frame["effective_lr_p50"].isna().tolist() == [True, False, False, False]


def test_a_step_without_any_gradient_is_a_step(arrival: str) -> None:
    """With lr=0 and no gradient at all, nothing says that it was a library's: it has its row."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.0)
    with lrprobe.attach(optimizer, every=1) as probe:
        optimizer.step()
    assert probe.frame()["stepped"].tolist() == [False]


# --- CUDA graphs, errors of our own -------------------------------------------------------------


def test_inside_a_capture_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph capture a step is neither read nor counted, and that is said once."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    with lrprobe.attach(optimizer, every=1, batch_size=1) as probe:
        param.grad = torch.ones(3)
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.warns(UserWarning, match="captured into a CUDA graph"):
                optimizer.step()
            optimizer.step()  # where another warning would be an error
            assert probe.step == 1
        optimizer.step()
    assert probe.frame()["step"].tolist() == [1, 2]
    assert param.tolist() == [-1.0] * 3


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("broken", ["every", "step", "before", "after", "collect"])
def test_no_error_of_ours_reaches_the_training(
    broken: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a schedule, in reading or in passing on costs records, and one warning."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    bad = False

    def fail(*_: Any, **__: Any) -> Any:
        if bad:
            raise ZeroDivisionError
        return 7

    options: dict[str, Any] = {"every": every, "batch_size": 1}
    if broken in options or broken == "step":
        options[broken] = fail
    probe = lrprobe.attach(optimizer, **options)
    param.grad = torch.ones(3)
    optimizer.step()  # the first is always due
    probe.flush()
    bad = True
    if broken in ("before", "after"):
        monkeypatch.setattr(Engine, broken, fail)
        monkeypatch.setattr(Planned, broken, fail)
    elif broken == "collect":
        monkeypatch.setattr(flight.StepInFlight, "is_dummy", property(fail))
        monkeypatch.setattr(gathering, "AT_ONCE", 8)
    fails = broken in ("every", "step") or every == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
        probe.close()
    messages = [str(w.message) for w in said]
    assert [("ZeroDivisionError" in m) for m in messages] == ([True, False] if fails else [])
    if fails:
        assert messages[1] == "lrprobe: 3 steps of SGD could not be recorded"
    assert param.tolist() == [-1.0] * 3


@pytest.mark.parametrize("where", ["update", "before", "whole"])
@pytest.mark.parametrize("numel", [5, 5000])
def test_an_error_inside_a_rule_costs_only_the_rule(where: str, numel: int) -> None:
    """A rule that raises makes its parameter measured, with a warning; training goes on."""

    class Odd(torch.optim.SGD):
        """One that has a rule of its own."""

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    parts: dict[str, Any] = {
        "update": lambda s: lrprobe.Update(s.group["lr"], s.grad),
        where: fail,
    }
    lrprobe.register_rule(Odd, lrprobe.Rule("odd", **parts))
    param = nn.Parameter(torch.ones(numel))
    optimizer = Odd([param], lr=0.5)
    with lrprobe.attach(optimizer, every=1, track=1) as probe:
        param.grad = torch.ones(numel)
        with pytest.warns(UserWarning, match=r"group0\.param0 \(ZeroDivisionError"):
            optimizer.step()
        optimizer.step()
    frame = probe.frame()
    assert frame["rule"].tolist() == ["measured"] * 2
    assert param.eq(0).all()
    np.testing.assert_allclose(frame["effective_lr_applied"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(frame["effective_lr_p50"], 0.5, rtol=0.01)


def test_a_rule_is_judged_by_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that arrive after the parameters have changed cost the rule of the right one."""

    class Picky(torch.optim.SGD):
        """One whose rule does not like a state that one parameter has."""

    def rule(s: lrprobe.Slice) -> lrprobe.Update:
        if "odd" in s:
            raise ZeroDivisionError
        return lrprobe.Update(s.group["lr"], s.grad)

    lrprobe.register_rule(Picky, rule)
    model = nn.ParameterDict({"two": torch.ones(2), "three": torch.ones(3), "four": torch.ones(4)})
    optimizer = Picky([model["two"], model["three"], model["four"]], lr=0.5)
    optimizer.state[model["three"]]["odd"] = torch.zeros(3)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        monkeypatch.setattr(flight.Crossing, "ready", lambda self: False)
        for param in model.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        del optimizer.param_groups[0]["params"][0]
        optimizer.step()
        with pytest.warns(UserWarning, match=r"of Picky: three \(ZeroDivisionError"):
            probe.frame()
        optimizer.step()
    rules = probe.frame().groupby("parameter")["rule"].agg(list)
    assert rules["three"] == ["measured"] * 3
    assert rules["four"] == ["picky"] * 3


def test_an_error_inside_a_rule_for_nothing() -> None:
    """The same holds for a parameter without elements."""

    class Nothing(torch.optim.SGD):
        """One that has a rule of its own."""

    lrprobe.register_rule(Nothing, lambda s: 1 / 0)
    optimizer = Nothing([param := nn.Parameter(torch.ones(0))], lr=0.5)
    with lrprobe.attach(optimizer, every=1) as probe:
        param.grad = torch.ones(0)
        with pytest.warns(UserWarning, match=r"group0\.param0 \(ZeroDivisionError"):
            optimizer.step()
        optimizer.step()
    assert probe.frame()["rule"].tolist() == ["measured"] * 2


def test_an_optimizer_without_lr() -> None:
    """An optimizer whose groups have no lr is measured, its lr NaN."""

    class Bare(Optimizer):
        """θ −= g."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.sub_(param.grad)

    param = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="Bare has no rule"):
        probe = lrprobe.attach(optimizer := Bare([param], {}), every=1)
    param.grad = torch.ones(3)
    optimizer.step()
    probe.close()
    assert math.isnan(probe.frame()["lr"][0])
    assert probe.frame()["effective_lr_p50"][0] == pytest.approx(1.0, rel=0.01)


# --- Checkpoints --------------------------------------------------------------------------------


def saved(value: Any) -> Any:
    """Through torch.save, and back as safely as torch can."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("disk", ["parquet", "logdir"])
def test_a_run_resumes_from_an_earlier_checkpoint(kind: str, disk: str, tmp_path: Any) -> None:
    """`read` gives each step once, the last attempt winning, and all of them when asked."""
    path = tmp_path / ("run.parquet" if disk == "parquet" else "logdir")
    model = net()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, to=path, every=1) as probe:
        plain(model, optimizer, 6)
        checkpoint = saved(
            {
                "model": model.state_dict(),
                "opt": optimizer.state_dict(),
                "probe": probe.state_dict(),
            }
        )
        plain(model, optimizer, 4)
    first = probe.frame()

    model = net()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.02)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["opt"])
    optimizer.param_groups[0]["lr"] = 0.02
    with lrprobe.attach(optimizer, model, to=path, every=1) as probe:
        probe.load_state_dict(checkpoint["probe"])
        assert probe.step == 6
        plain(model, optimizer, 3)
    assert probe.frame()["step"].unique().tolist() == [7, 8, 9]

    last, every = lrprobe.read(path), lrprobe.read(path, attempts="all")
    keys = ["step", "parameter"]
    assert not last.duplicated(keys).any()
    assert last["step"].unique().tolist() == list(range(1, 10))
    assert last.groupby("step")["attempt"].first().tolist() == [0] * 6 + [1] * 3
    np.testing.assert_allclose(last.groupby("step")["lr"].first(), [0.01] * 6 + [0.02] * 3, 1e-6)
    assert every["step"].unique().tolist() == list(range(1, 11))
    assert len(every) == len(first) + len(probe.frame())


@pytest.mark.parametrize("disk", ["parquet", "logdir"])
@pytest.mark.parametrize("how", ["load_state_dict", "step"])
def test_going_back_within_a_run_supersedes(how: str, disk: str, tmp_path: Any) -> None:
    """After `Probe.load_state_dict`, or a trainer's count going back, each step is read once."""
    path = tmp_path / ("run.parquet" if disk == "parquet" else "logdir")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    count = [0]

    def counted() -> int:
        count[0] += 1
        return count[0]

    step = counted if how == "step" else None
    with lrprobe.attach(optimizer, model, to=path, every=1, step=step) as probe:
        plain(model, optimizer, 3)
        state = probe.state_dict()
        plain(model, optimizer, 4)
        for _ in range(2):
            optimizer.param_groups[0]["lr"] /= 2
            if how == "step":
                count[0] = 3
            else:
                probe.load_state_dict(state)
            plain(model, optimizer, 3)
    frame = lrprobe.read(path)
    assert not frame.duplicated(["step", "parameter"]).any()
    assert frame["step"].unique().tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        frame.groupby("step")["lr"].first(), [0.01] * 3 + [0.0025] * 3, rtol=1e-6
    )
    assert probe.frame()["attempt"].unique().tolist() == [0, 1, 2]
    assert lrprobe.read(path, attempts="all").groupby("step").ngroups == 7


def sgd() -> Optimizer:
    """Of one parameter, with a gradient."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    return torch.optim.SGD([param], lr=0.1)


def test_going_back_by_one_step(tmp_path: Any) -> None:
    """Where only the last recorded step is taken again, it too is read once."""
    optimizer = sgd()
    with lrprobe.attach(optimizer, every=1, to=tmp_path / "run.parquet") as probe:
        optimizer.step()
        state = saved(probe.state_dict())
        optimizer.step()
        probe.load_state_dict(state)
        optimizer.step()
    assert probe.frame()["step"].tolist() == [1, 2, 2]
    frame = lrprobe.read(tmp_path / "run.parquet")
    assert frame[["step", "attempt"]].to_numpy().tolist() == [[1, 0], [2, 1]]


def test_loading_without_going_back_is_no_attempt(tmp_path: Any) -> None:
    """A state that is ahead of what was recorded only moves the count on."""
    optimizer = sgd()
    with lrprobe.attach(optimizer, every=1, to=tmp_path / "run.parquet") as probe:
        optimizer.step()
        probe.load_state_dict({"steps": {"SGD": 10}})
        optimizer.step()
    frame = lrprobe.read(tmp_path / "run.parquet")
    assert frame["step"].tolist() == [1, 11]
    assert frame["attempt"].tolist() == [0, 0]


# --- Groups and parameters come and go ----------------------------------------------------------


def test_freezing_and_thawing() -> None:
    """`requires_grad` switched in mid-run shows in `stepped`; a stale gradient still steps."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1, batch_size=16) as probe:
        plain(model, optimizer, 1)
        model[0].weight.requires_grad_(requires_grad=False)
        before = clone(model[0].weight)
        model[0].weight.grad = torch.ones_like(before)  # torch steps what has a gradient
        for param in list(model.parameters())[1:]:
            param.grad = None
        optimizer.step()
        assert not torch.equal(before, model[0].weight)
        plain(model, optimizer, 1)
        model[0].weight.requires_grad_(requires_grad=True)
        plain(model, optimizer, 1)
    frame = probe.frame()
    rows = frame[frame["parameter"] == "0.weight"]
    assert rows["stepped"].tolist() == [True, True, False, True]
    others = frame[frame["parameter"] != "0.weight"]
    assert others.groupby("step")["stepped"].agg(["any", "all"]).to_numpy().tolist() == [
        [True, True], [False, False], [True, True], [True, True]
    ]  # fmt: skip
    assert not frame["reconstruction_error"].gt(1e-3).any()
    assert set(frame["samples"].dropna()) == {16.0}


def test_a_parameter_that_is_exchanged_and_freed() -> None:
    """A head that is replaced is followed under its name, the old one freed, none mistaken."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        gone = []
        for _ in range(30):  # the memory of a freed one is used again, and with it its id
            gone.append(weakref.ref(model[1].weight))
            model[1] = nn.Linear(3, 2)
            optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    assert all(ref() is None for ref in gone)
    frame = probe.frame()
    assert frame["stepped"].all()
    assert frame.groupby("step")["parameter"].agg(list).map(
        lambda names: names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    ).all()  # fmt: skip


def test_a_probe_keeps_no_dead_model_alive(tmp_path: Any) -> None:
    """Model, optimizer and gradients are freed though the probe is still held, and open."""
    model = net()
    optimizer = adamw(model)
    probe = lrprobe.attach(optimizer, model, to=tmp_path / "a.parquet", every=1, batch_size=16)
    plain(model, optimizer, 2)
    there = references(model, optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in there] == [None] * len(there)
    assert probe.frame()["step"].max() == 2
    assert "2 parameters" not in repr(probe)
    probe.close()


def attach_and_close(times: int, folder: Any) -> dict[str, list[float]]:
    """Attach, step and close again and again; what was held at the end of each tenth."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    held: dict[str, list[float]] = {"bytes": [], "objects": [], "threads": [], "handles": []}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    tracemalloc.start()
    for at in range(times):
        to = [folder / f"{at}.parquet", folder / f"{at}"] if at % (times // 10) == 0 else None
        with lrprobe.attach(optimizer, model, to=to, every=1, track=1, batch_size=1):
            optimizer.step()
        if at % (times // 10) == times // 10 - 1:
            gc.collect()
            held["bytes"].append(tracemalloc.get_traced_memory()[0])
            held["objects"].append(len(gc.get_objects()))
            held["threads"].append(sum(t.is_alive() for t in threading.enumerate()))
            held["handles"].append(len(list(Path("/proc/self/fd").iterdir())))
    tracemalloc.stop()
    hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    hooks += [param._post_accumulate_grad_hooks or {} for param in model.parameters()]
    hooks += [param._backward_hooks or {} for param in model.parameters()]
    assert not any(hooks)
    return held


@pytest.mark.slow
def test_attaching_again_and_again_leaks_nothing(tmp_path: Any) -> None:
    """attach → step → close, 300 times, leaves no memory, object, thread, handle or hook."""
    held = attach_and_close(300, tmp_path)
    # A probe that stayed would be kilobytes, 150 times; a table of Python's that grows is one step.
    for what, allowed in (("bytes", 100_000), ("objects", 60), ("threads", 1), ("handles", 2)):
        grown = held[what][-1] - held[what][4]
        assert grown <= allowed, (what, held[what])
