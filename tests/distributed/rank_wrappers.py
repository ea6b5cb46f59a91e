"""A model laid out over the ranks, and which part of a batch a rank takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_net import BATCH, OPTIMIZERS, Net, frames, net, train
from torch import nn

import lrprobe


def ddp(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    return nn.parallel.DistributedDataParallel(model), (dist.get_rank(), dist.get_world_size())


def fsdp2(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.up)
    fully_shard(model)
    return model, (dist.get_rank(), dist.get_world_size())


def hsdp(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model, (dist.get_rank(), size)


def plan() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"middle": ColwiseParallel(), "down": RowwiseParallel()}


def sequence(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    """The norm's gradients stay partial sums: each rank normalises a part of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(
        model,
        mesh,
        {
            "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0),
            "middle": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        },
    )
    return model, (0, 1)


def tp(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan())
    return model, (0, 1)


def replicas(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    """Tensor parallel in pairs of ranks, which all see the same samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], plan())
    return model, (0, 1)


def fsdp2_tp(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], plan())
    fully_shard(model, mesh=mesh["dp"])
    return model, (mesh["dp"].get_local_rank(), 2)


def fsdp1(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return wrapped, (dist.get_rank(), dist.get_world_size())


def fsdp1_hybrid(model: Net) -> tuple[nn.Module, tuple[int, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    size = dist.get_world_size()
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b")),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    )
    return wrapped, (dist.get_rank(), size)


WRAPPERS = (ddp, fsdp2, hsdp, tp, replicas, sequence, fsdp2_tp, fsdp1, fsdp1_hybrid)


def wrapped(
    wrap: Callable[[Net], tuple[nn.Module, tuple[int, int]]],
    kind: str,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> dict[str, Any] | None:
    """The training over all ranks; what rank 0 has to tell."""
    model, part = wrap(net(dtype))
    optimizers = OPTIMIZERS[kind](model)
    options = {"every": 2, "track": 3, "batch_size": BATCH // part[1], **kwargs}
    with lrprobe.attach(optimizers, model, **options) as probe:
        train(model, optimizers, dtype=dtype, part=part)
        return frames(probe) if dist.get_rank() == 0 else None
