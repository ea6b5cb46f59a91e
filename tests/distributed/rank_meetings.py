"""Ranks that do not attach as the others do."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_net import OPTIMIZERS, Net, net, train
from rank_wrappers import ddp, fsdp1, fsdp2, hsdp, tp
from torch import nn, optim

import lrprobe
from lrprobe.distributed import exchange, rendezvous
from lrprobe.engine import flight

WAIT = 1.0


def impatient() -> None:
    """Wait for nobody longer than this."""
    rendezvous.WAIT = WAIT
    flight.PATIENCE = exchange.PATIENCE = 2.0


def attached(
    optimizer: optim.Optimizer, model: nn.Module, **options: Any
) -> tuple[lrprobe.Probe | None, float, list[str]]:
    """A probe or None, how long it took, and what was told: warnings, or the error."""
    begin = time.monotonic()
    probe = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            probe = lrprobe.attach(optimizer, model, every=1, **options)
        except RuntimeError as error:
            return None, time.monotonic() - begin, [str(error)]
    return probe, time.monotonic() - begin, [str(each.message) for each in caught]


def trained(probe: lrprobe.Probe | None, optimizer: Any, model: nn.Module) -> list[int] | None:
    """Steps that a probe has recorded of a short training."""
    train(model, optimizer, part=(dist.get_rank(), dist.get_world_size()), steps=3)
    if probe is None or probe._recorder.rank:
        return None
    return probe.frame()["step"].unique().tolist()


def first_only() -> Any:
    """``if rank == 0: attach(...)``, then on all ranks, then on the first once more."""
    impatient()
    model, _ = ddp(net())
    optimizer = OPTIMIZERS["adamw"](model)
    result = []
    for ranks in ((0,), (0, 1), (0,)):
        probe, took, told = None, 0.0, []
        if dist.get_rank() in ranks:
            probe, took, told = attached(optimizer, model)
        dist.barrier()
        result.append((took, told, trained(probe, optimizer, model)))
        if probe is not None:
            probe.close()
    return result


def late() -> Any:
    """The last rank comes when the first has given up, then both at once."""
    impatient()
    model, _ = ddp(net())
    optimizer = OPTIMIZERS["adamw"](model)
    if dist.get_rank():
        time.sleep(2 * WAIT)
    probe, took, told = attached(optimizer, model)
    steps = trained(probe, optimizer, model)
    if probe is not None:
        probe.close()
    dist.barrier()
    again, _, told_again = attached(optimizer, model)
    return took, told, steps, told_again, trained(again, optimizer, model)


def twice() -> Any:
    """The first rank attaches to shards twice, the last once: an error, and the training ends."""
    impatient()
    model, _ = fsdp2(net())
    optimizer = OPTIMIZERS["adamw"](model)
    first, _, told = attached(optimizer, model)
    again = attached(optimizer, model) if dist.get_rank() == 0 else None
    dist.barrier()
    steps = trained(first if dist.get_rank() else None, optimizer, model)
    first.close()
    return told, again and again[2], steps


def early() -> Any:
    """The last rank closes its probe in mid-run; the training ends all the same."""
    impatient()
    model, part = fsdp2(net())
    optimizer = OPTIMIZERS["adamw"](model)
    probe, _, _ = attached(optimizer, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, part=part, steps=2)
        if dist.get_rank():
            probe.close()
        train(model, optimizer, part=part, steps=3, start=2)
        begin = time.monotonic()
        probe.close()
        took = time.monotonic() - begin
    steps = probe.frame()["step"].unique().tolist() if dist.get_rank() == 0 else None
    return took, [str(each.message) for each in caught], steps


def sharded() -> Any:
    """Parts of parameters on a rank that attaches alone, or with too few others."""
    impatient()
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([each]) for each in range(size)]
    result = {}
    for wrap in (fsdp2, fsdp1, tp, hsdp):
        if wrap is hsdp and size < 4:
            continue
        model, _ = wrap(net())
        optimizer = OPTIMIZERS["sgd"](model)
        alone = attached(optimizer, model) if rank == 0 else None
        dist.barrier()
        few = attached(optimizer, model, process_group=groups[rank])
        dist.barrier()
        result[wrap.__name__] = alone and alone[2], few[2]
        probe, _, told = attached(optimizer, model)
        assert probe is not None, told
        probe.close()
    return result


def unsharded() -> list[str]:
    """A mesh of one rank cuts nothing."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    impatient()
    model = net()
    groups = [dist.new_group([each]) for each in range(dist.get_world_size())]
    mesh = DeviceMesh.from_group(groups[dist.get_rank()], "cpu")
    fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS["sgd"](model)
    probe, _, told = attached(optimizer, model, process_group=groups[dist.get_rank()])
    return [*told, *map(str, trained(probe, optimizer, model) or [])]


def dying(folder: Path) -> None:
    """The last rank dies within attach, before the ranks have met."""
    impatient()
    model: Net | nn.Module = net()
    optimizer = OPTIMIZERS["adamw"](model)
    if dist.get_rank():
        rendezvous.missing_from = lambda _: os._exit(0)  # which the launcher does not mind
    probe, took, told = attached(optimizer, model)
    assert probe is not None
    train(model, optimizer, steps=2)
    steps = probe.frame()["step"].unique().tolist()
    (folder / "survivor.txt").write_text(f"{took < 10 * WAIT} {len(told)} {steps}")
    os._exit(0)  # there is nobody to take leave of


MEETINGS: tuple[Callable[[], Any], ...] = (first_only, late, twice, early, sharded, unsharded)
