"""Layouts of parameters over ranks: which elements of a parameter a rank holds."""

from __future__ import annotations

import hashlib
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Cuts: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of a parameter that a rank holds, as ranges of indices in each dimension.

    Attributes:
        shape: of the whole parameter (complex: with a last dimension of 2).
        cuts: per dimension, the ascending (start, stop) ranges.
    """

    shape: tuple[int, ...]
    cuts: Cuts

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Region:
        """The whole parameter."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local shard."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.cuts)

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return math.prod(self.local_shape)

    @property
    def whole(self) -> bool:
        """Whether the rank holds the whole parameter."""
        return self.local_shape == self.shape

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Find global flat positions on this rank: their indices, and local flat positions."""
        if self.whole:
            return torch.arange(len(wanted)), wanted
        held = torch.ones_like(wanted, dtype=torch.bool)
        flat, stride, rest = torch.zeros_like(wanted), 1, wanted
        for size, ranges in zip(reversed(self.shape), reversed(self.cuts), strict=True):
            index, rest = rest % size, rest // size
            local, seen = torch.full_like(index, -1), 0
            for start, stop in ranges:
                inside = (start <= index) & (index < stop)
                local = torch.where(inside, index - start + seen, local)
                seen += stop - start
            held &= local >= 0
            flat += local * stride
            stride *= seen
        at = held.nonzero().squeeze(1)
        return at, flat[at]


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one parameter over the ranks.

    Attributes:
        shape: of the whole parameter (complex: with a last dimension of 2).
        region: the elements on this rank.
        key: equal on all ranks that hold parts of one copy; "" for a plain tensor.
        first: the first of these ranks; −1 for a plain tensor.
        sharded: whether the parameter is cut into shards.
        contributes: whether this rank belongs to the first replica.
        parts: global ranks that hold the shards of the first replica.
    """

    shape: tuple[int, ...]
    region: Region
    key: str = ""
    first: int = -1
    sharded: bool = False
    contributes: bool = True
    parts: tuple[int, ...] = ()


class Layouts:
    """Determines layouts from the types of parameters and of the model's wrappers."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._keys: dict[Any, tuple[str, int, Any]] = {}

    def of(self, param: Tensor, flat: Mapping[int, tuple[Any, int | None]]) -> Layout:
        """The layout of one parameter; ``flat`` is the result of ``flat_shards``."""
        if id(param) in flat:
            return self._flat(param, *flat[id(param)])
        module = sys.modules.get("torch.distributed.tensor")
        if module is not None and isinstance(param, module.DTensor):
            return self._dtensor(param)
        shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
        return Layout(shape, Region.all_of(shape))

    def flat_shards(self) -> dict[int, tuple[Any, int | None]]:
        """id of each FSDP1 parameter to its handle and its index in the flat parameter.

        The index is None for the flat parameter itself.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
        model = self._model() if self._model is not None else None
        if fsdp is None or model is None:
            return {}
        found: dict[int, tuple[Any, int | None]] = {}
        for module in model.modules():
            handle: Any = getattr(module, "_handle", None)
            if not isinstance(module, fsdp.FullyShardedDataParallel) or handle is None:
                continue
            flat = handle.flat_param
            if not handle.uses_sharded_strategy:
                continue
            found[id(flat)] = handle, None
            params = flat._params or ()  # noqa: SLF001 - torch has no public name for it
            found |= {id(param): (handle, at) for at, param in enumerate(params)}
        return found

    def _flat(self, param: Tensor, handle: Any, at: int | None) -> Layout:
        flat = handle.flat_param
        ranks = tuple(ranks_of(handle.process_group))
        key = self._key(handle.process_group, (), ranks)
        if at is None:
            size, rank = param.numel(), torch.distributed.get_rank(handle.process_group)
            padded = size * torch.distributed.get_world_size(handle.process_group)
            region = Region((padded,), (((rank * size, (rank + 1) * size),),))
            return Layout((padded,), region, *key, sharded=True, parts=ranks)
        shape, info = tuple(flat._shapes[at]), flat._shard_param_infos[at]  # noqa: SLF001 - as above
        held = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else ()
        cuts: Any = ((held,) if held else (),)
        length: tuple[int, ...] = (math.prod(shape),)
        if param.is_complex():
            shape, length, cuts = (*shape, 2), (*length, 2), (*cuts, ((0, 2),))
        return Layout(shape, Region(length, cuts), *key, sharded=True, parts=ranks)

    def _dtensor(self, param: Any) -> Layout:
        mesh, placements = param.device_mesh, param.placements
        shape = tuple(param.shape)
        coordinate = mesh.get_coordinate()
        key = self._key(mesh, tuple(placements), mesh.mesh.flatten().tolist())
        cuts = [[(0, size)] for size in shape]
        contributes, sharded, parts = coordinate is not None, False, mesh.mesh
        for dim, placement in enumerate(placements):
            where = coordinate[dim] if coordinate is not None else 0
            if hasattr(placement, "dim"):  # Shard and _StridedShard
                sharded |= mesh.size(dim) > 1
                factor = getattr(placement, "split_factor", 1)
                ranges = cuts[placement.dim]
                pieces = _chunks(ranges, factor) if factor > 1 else [ranges]
                cuts[placement.dim] = [
                    r for piece in pieces for r in _chunks(piece, mesh.size(dim))[where]
                ]
            else:
                parts = parts.narrow(dim, 0, 1)
                contributes &= where == 0
        if param.is_complex():
            shape, cuts = (*shape, 2), [*cuts, [(0, 2)]]
        region = Region(shape, tuple(map(tuple, cuts)))
        first = tuple(parts.flatten().tolist()) if sharded else ()
        return Layout(shape, region, *key, sharded=sharded, contributes=contributes, parts=first)

    def _key(self, over: Any, how: tuple[Any, ...], ranks: Sequence[int]) -> tuple[str, int]:
        if (id(over), how) not in self._keys:
            # Hash the ranks, not the object: every rank has its own.
            digest = key_of(f"{how} {getattr(over, 'shape', '')}", ranks)
            self._keys[id(over), how] = digest, ranks[0], over  # stored so its id is not reused
        return self._keys[id(over), how][:2]


def key_of(how: str, ranks: Sequence[int]) -> str:
    """A key that is equal for equal layouts over the same ranks."""
    return hashlib.sha256(f"{how} {list(ranks)}".encode()).hexdigest()[:16]


def _chunks(ranges: Sequence[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """Cut ranges of indices into ``count`` pieces like ``torch.chunk``; some may be empty."""
    total = sum(stop - start for start, stop in ranges)
    size = -(-total // count)
    result: list[list[tuple[int, int]]] = []
    for piece in range(count):
        low, high, seen = min(piece * size, total), min((piece + 1) * size, total), 0
        inside = []
        for start, stop in ranges:
            a, b = start + max(low - seen, 0), start + min(high - seen, stop - start)
            if a < b:
                inside.append((a, b))
            seen += stop - start
        result.append(inside)
    return result


def has_ranks() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ranks_of(group: Any) -> list[int]:
    """Global ranks of a process group."""
    return list(torch.distributed.get_process_group_ranks(group))


def data_parallel(model: nn.Module | None) -> int | None:
    """Number of ranks over which a model's wrapper spreads samples; None without a wrapper."""
    if model is None:
        return None
    ddp = sys.modules.get("torch.nn.parallel.distributed")
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    fsdp2 = sys.modules.get("torch.distributed.fsdp._fully_shard")
    for module in model.modules():
        each: Any = module
        if ddp is not None and isinstance(each, ddp.DistributedDataParallel):
            return int(each.process_group.size())
        if fsdp1 is not None and isinstance(each, fsdp1.FullyShardedDataParallel):
            between = getattr(each, "_inter_node_pg", None)
            return int(each.process_group.size()) * (1 if between is None else between.size())
        if fsdp2 is not None and isinstance(each, fsdp2.FSDPModule):
            state = each._get_fsdp_state()  # noqa: SLF001 - torch has no public name for it
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # older releases have at most one
                groups = [one] if (one := getattr(state, "_fsdp_param_group", None)) else []
            if groups:
                mesh = groups[0].mesh_info
                sizes = (getattr(mesh, f"{part}_mesh_size", 1) for part in ("shard", "replicate"))
                return math.prod(sizes)
    return None
