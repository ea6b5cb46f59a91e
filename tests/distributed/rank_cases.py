"""What else may happen among ranks."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_net import BATCH, OPTIMIZERS, STEPS, Net, data, frames, net, train
from rank_wrappers import ddp, fsdp1, fsdp2, hsdp
from torch import Tensor, nn, optim

import lrprobe
from lrprobe.distributed import exchange
from lrprobe.engine import flight


def zero() -> dict[str, Any] | None:
    """Each rank's optimizer has some of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, part = ddp(net())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optim.AdamW, lr=1e-2, weight_decay=0.1, eps=1e-4
    )
    options = {"every": 2, "track": 3, "batch_size": BATCH // part[1]}
    with lrprobe.attach(optimizer, model, **options) as probe:
        train(model, optimizer, part=part)
        return frames(probe) if dist.get_rank() == 0 else None


def stage_of(name: str) -> int:
    return 0 if name.startswith(("up", "norm")) else dist.get_world_size() - 1


def staged() -> tuple[Net, nn.Module, optim.Optimizer, Callable[[], None]]:
    """Stages of a pipeline that hold different parameters, and share the norm.

    Returns the whole model, which every rank computes here, this rank's stage of it, its
    optimizer, and what brings the stages together after a step.
    """
    model, rank = net(), dist.get_rank()
    here = {name: p for name, p in model.named_parameters() if stage_of(name) == rank}
    if rank:
        here = dict(reversed(here.items()))
    here |= {name: p for name, p in model.named_parameters() if name.startswith("norm")}
    optimizer = optim.AdamW(here.values(), lr=1e-2, weight_decay=0.1, eps=1e-4)

    stage = nn.Module()
    for child in dict.fromkeys(name.partition(".")[0] for name in here):
        stage.add_module(child, getattr(model, child))

    def together() -> None:
        for name, param in model.named_parameters():
            dist.broadcast(param.data, stage_of(name))

    return model, stage, optimizer, together


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x, y = data(step, torch.float64)
    (model(x) - y).square().mean().backward()


def stages() -> dict[str, Any] | None:
    model, stage, optimizer, together = staged()
    with lrprobe.attach(optimizer, stage, every=2, track=3, batch_size=BATCH) as probe:
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            together()
        return frames(probe) if dist.get_rank() == 0 else None


def lagging() -> Any:
    """The last stage skips its second step, as a scaler of its own would have it."""
    flight.PATIENCE = exchange.PATIENCE = 2.0
    model, stage, optimizer, together = staged()
    probe = lrprobe.attach(optimizer, stage, every=1)
    for step in range(STEPS):
        backward(model, step)
        if not (step == 1 and dist.get_rank()):
            optimizer.step()
        together()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.close()
    if dist.get_rank():
        return None
    return probe.frame(), [str(each.message) for each in caught]


def warming() -> Any:
    """A checkpoint library's step, then one without a rate in which the last rank has only zeros.

    Each step counts in its parameter: what it is after the step is the number of steps before it.
    """
    param = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([("b" if dist.get_rank() else "a", param)], lr=0.0, momentum=0.5)
    with lrprobe.attach(optimizer, every=2) as probe:
        param.grad = torch.zeros(4)
        optimizer.step()
        saved = probe.state_dict()["steps"]
        for step in range(STEPS):
            (group,) = optimizer.param_groups
            group["lr"], group["momentum"] = float(step > 0), 0.0
            param.grad = torch.full((4,), 0.0 if dist.get_rank() and not step else -1.0)
            optimizer.step()
            dist.barrier()
        frame = probe.frame() if dist.get_rank() == 0 else None
        return saved, probe.step, frame


def no_gradient() -> Any:
    """At step 2 the last stage has no gradient for one of its parameters."""
    model, stage, optimizer, together = staged()
    with lrprobe.attach(optimizer, stage, every=1) as probe:
        for step in range(3):
            backward(model, step)
            if step == 1 and dist.get_rank():
                model.down.bias.grad = None
            optimizer.step()
            together()
        return probe.frame() if dist.get_rank() == 0 else None


def added() -> Any:
    """The last stage unfreezes a parameter of its own in mid-run."""
    model, stage, optimizer, together = staged()
    held = optimizer.param_groups[0]["params"]
    if dist.get_rank():
        late = held.pop(0)
    with lrprobe.attach(optimizer, stage, every=1) as probe:
        for step in range(4):
            backward(model, step)
            if step == 1 and dist.get_rank():
                optimizer.add_param_group({"params": [late], "lr": 0.5})
            optimizer.step()
            together()
        return probe.frame() if dist.get_rank() == 0 else None


def differing() -> list[str]:
    """What each rank is told where things cannot be merged."""
    told = []
    model = nn.Linear(4, 3 if dist.get_rank() else 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    named = {"a" if dist.get_rank() else "b": optimizer}
    every = 2 if dist.get_rank() else 3
    to = "somewhere.csv" if dist.get_rank() == 0 else None
    same = nn.Linear(2, 2)
    plain = optim.SGD(same.parameters(), lr=0.1)
    wrong = "net" if dist.get_rank() else same
    for arguments, options in (
        ((optimizer, model), {}), ((plain, same), {"every": every}), ((named, model), {}),
        ((plain, same), {"to": to}), ((plain, wrong), {}),
    ):  # fmt: skip
        try:
            lrprobe.attach(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            told.append(f"{type(error).__name__}: {error}")
    return told


def elsewhere() -> str:
    """What a rank that has no frame says."""
    model, _ = fsdp2(net())
    optimizer = OPTIMIZERS["adamw"](model)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, part=(dist.get_rank(), dist.get_world_size()))
        state = probe.state_dict()
        try:
            return f"{len(probe.frame())} rows, {state}"
        except RuntimeError as error:
            return f"{error}, {state}"


COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
    "send", "recv", "isend", "irecv", "barrier", "batch_isend_irecv", "all_gather_object",
    "broadcast_object_list", "all_gather_coalesced", "all_reduce_coalesced", "gather_object",
    "scatter_object_list", "new_group", "monitored_barrier",
)  # fmt: skip


def counted(wrap: Callable[[Net], tuple[nn.Module, tuple[int, int]]], kind: str) -> Any:
    """Calls and bytes of torch.distributed in each ``optimizer.step()``, and in ``close()``."""
    model, part = wrap(net())
    optimizer = OPTIMIZERS[kind](model)
    probe = lrprobe.attach(optimizer, model, every=2, track=3)
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in args if isinstance(a, Tensor)]
            calls.append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return originals[name](*args, **kwargs)

        return call

    steps = []
    for step in range(STEPS):
        x, y = (t.chunk(part[1])[part[0]] for t in data(step, torch.float64))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        optimizer.step()
        steps.append(list(calls))
        calls.clear()
        for name, original in originals.items():
            setattr(dist, name, original)
    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    probe.close()
    for name, original in originals.items():
        setattr(dist, name, original)
    return {"steps": steps, "close": list(calls)}


def untouched() -> bool:
    """Whether parameters are the same bits with and without a probe."""
    results = []
    for probed in (False, True):
        model, part = fsdp2(net(torch.float32))
        optimizer = OPTIMIZERS["adamw"](model)
        if probed:
            lrprobe.attach(optimizer, model, every=1, track=2)
        train(model, optimizer, dtype=torch.float32, part=part)
        results.append([p.to_local().clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def skipped() -> Any:
    """A fused optimizer skips step 2 everywhere, and step 3 on the last rank only."""
    model, part = fsdp2(net(torch.float32))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for step in range(4):
            optimizer.grad_scale = torch.tensor(4.0)
            last = dist.get_rank() == dist.get_world_size() - 1
            bad = step == 1 or (step == 2 and last)
            optimizer.found_inf = torch.tensor(float(bad))
            x, y = (t.chunk(part[1])[part[0]] for t in data(step, torch.float32))
            optimizer.zero_grad()
            (4 * (model(x) - y).square().mean()).backward()
            optimizer.step()
        return probe.frame() if dist.get_rank() == 0 else None


class Twice(optim.SGD):
    """Steps twice as far as its parent's rule says."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] *= 2
        super().step(closure)
        for group in self.param_groups:
            group["lr"] /= 2


class Odd(optim.SGD):
    """Has a rule that raises on the last rank."""


def unexplained() -> Any:
    """Rules that do not hold, or raise on one rank, or are not there."""

    def raises(s: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ArithmeticError
        return lrprobe.rules.Update(s.lr, s.grad)

    class Unknown(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(0.1 * p.grad.sign())

    lrprobe.register_rule(Odd, raises)
    result = {}
    for cls in (Twice, Odd, Unknown):
        model, part = fsdp2(net())
        if cls is Unknown:
            optimizer: Any = cls(model.parameters())
        else:
            optimizer = cls(model.parameters(), lr=0.1)
        with lrprobe.attach(optimizer, model, every=1) as probe:
            train(model, optimizer, part=part)
            if dist.get_rank() == 0:
                result[cls.__name__] = frames(probe)
    return result


def flat() -> Any:
    """FSDP1 that hides the original parameters; beside it the flat ones, gathered."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    optimizer = OPTIMIZERS["adamw"](model)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, part=(dist.get_rank(), dist.get_world_size()))
        (param,) = model.parameters()
        parts = [torch.empty_like(param) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, param.detach())
        whole = torch.cat(parts)
        return (probe.frame(), len(whole), float(whole.norm())) if dist.get_rank() == 0 else None


def mixed_precision() -> Any:
    """bf16 compute; beside it, in one process, the gathered gradients on the gathered weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model, twin = net(torch.float32), net(torch.float32)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer, beside = (OPTIMIZERS["adamw"](m) for m in (model, twin))
    probe = lrprobe.attach(optimizer, model, every=1, track=3)
    single = lrprobe.attach(beside, twin, every=1, track=3, process_group=groups[dist.get_rank()])
    for step in range(STEPS):
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in data(step, torch.float32))
        optimizer.zero_grad()
        (model(x).float() - y).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.full_tensor()
        optimizer.step()
        beside.step()
    result = (frames(probe), frames(single)) if dist.get_rank() == 0 else None
    probe.close()
    single.close()
    return result


def samples() -> dict[str, float]:
    """What ``samples`` says after two backward passes."""
    result = {}
    for wrap in (ddp, fsdp2, hsdp, fsdp1):
        model, part = wrap(net())
        optimizer = OPTIMIZERS["sgd"](model)
        with lrprobe.attach(optimizer, model, every=1, batch_size=BATCH // part[1]) as probe:
            for step in range(2):
                optimizer.zero_grad()
                for _ in range(2):
                    x, y = (t.chunk(part[1])[part[0]] for t in data(step, torch.float64))
                    (model(x) - y).square().mean().backward()
                optimizer.step()
            if dist.get_rank() == 0:
                (result[wrap.__name__],) = probe.frame()["samples"].unique()
    return result


def resumed(folder: Path) -> int:
    """Goes on in one dataset, wherever the last run of any size stood."""
    model, part = fsdp2(net())
    optimizer = OPTIMIZERS["adamw"](model)
    at = folder / "state.pkl"
    with lrprobe.attach(optimizer, model, every=1, to=folder / "run.parquet") as probe:
        if at.exists():
            probe.load_state_dict(pickle.loads(at.read_bytes()))  # noqa: S301 - our own
        train(model, optimizer, part=part, steps=3)
        dist.barrier()
        if dist.get_rank() == 0:
            at.write_bytes(pickle.dumps(probe.state_dict()))
        return probe.step


def killed(folder: Path) -> None:
    """The last rank dies in mid-run."""
    model, part = fsdp2(net())
    optimizer = OPTIMIZERS["adamw"](model)
    sink = lrprobe.sinks.Parquet(folder / "killed.parquet", flush_secs=0.5)
    lrprobe.attach(optimizer, model, every=1, to=sink)
    train(model, optimizer, part=part, steps=6)
    end = time.monotonic() + 60
    while dist.get_rank() == 0 and time.monotonic() < end:  # for what is written in the background
        if lrprobe.read(folder / "killed.parquet")["step"].nunique() >= 5:
            break
        time.sleep(0.05)
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, optimizer, part=part, steps=6)


def strangers() -> Any:
    """Flat buffers of which each rank has a part, beside a tensor that all ranks have the same.

    Returns the frame, what was said, and the norms of this rank's part and of the other tensor.
    """
    model, rank, ranks = net(), dist.get_rank(), dist.get_world_size()
    whole = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    part = whole.chunk(ranks)[rank].clone().requires_grad_()
    beside = nn.Parameter(torch.linspace(1.0, 2.0, 6, dtype=torch.float64))
    optimizer = optim.SGD([part, beside], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = lrprobe.attach(optimizer, model, every=1)
    for _ in range(2):
        part.grad, beside.grad = torch.ones_like(part), torch.ones_like(beside)
        optimizer.step()
        dist.barrier()
    said = [str(each.message) for each in caught if "rank0.group0.param0" in str(each.message)]
    frame = probe.frame() if rank == 0 else None
    probe.close()
    return frame, said, float(part.detach().norm()), float(beside.detach().norm())
