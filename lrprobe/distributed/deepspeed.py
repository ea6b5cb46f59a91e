"""DeepSpeed's optimizers: maps ranges of their flat tensors to parameters.

Everything that is specific to DeepSpeed is here. Its wrappers do not give a torch optimizer the
model's parameters but flat fp32 master weights, one tensor per parameter group, of which ZeRO gives
each rank only a part. The attributes are those of DeepSpeed 0.19. If they are missing, or do not
lead to the parameter's values, the tensors stay unnamed.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrprobe.distributed.layouts import ranks_of
from lrprobe.distributed.parts import Flat, Parts, Piece, part_of, whole
from lrprobe.names import Names


class UnknownError(Exception):
    """The elements of a tensor cannot be mapped to parameters; the message says why."""


def parts_of(optimizer: Optimizer, names: Names) -> Parts | None:
    """The flat tensors that DeepSpeed gave to a torch optimizer; None without DeepSpeed."""
    wrapper = _holder(optimizer, "deepspeed.runtime.base_optimizer", "DeepSpeedOptimizer")
    if wrapper is None:
        return None
    engine = _holder(wrapper, "deepspeed.runtime.engine", "DeepSpeedEngine")
    unknown = ""
    try:
        flats = list(_flats(wrapper, names.now(), getattr(engine, "param_names", {})))
    except (UnknownError, AttributeError, KeyError) as error:
        unknown = f"DeepSpeed's {type(wrapper).__name__}: {error}"
        flats = list(_nameless(wrapper, optimizer))
    if not flats:
        return None  # no tensors to read
    group = getattr(wrapper, "dp_process_group", None)
    return Parts(
        weakref.ref(optimizer),
        flats,
        _Skips(engine),
        ranks=torch.distributed.get_world_size(group),
        leaves=[weakref.ref(param) for param in _params(wrapper)],
        unknown=unknown,
    )


def _holder(inner: Any, module: str, name: str) -> Any:
    """The instance of a class whose ``optimizer`` is ``inner``; None if there is none.

    A torch optimizer does not refer to its wrapper, and the user may have only the optimizer.
    """
    cls = getattr(sys.modules.get(module), name, None)
    if cls is None:
        return None
    for each in gc.get_objects():
        if issubclass(type(each), cls) and getattr(each, "optimizer", None) is inner:
            return each
    return None


class _Skips:
    """Counts the steps that the engine skipped for non-finite gradients, which run no hook."""

    def __init__(self, engine: Any) -> None:
        self._engine = None if engine is None else weakref.ref(engine)
        self._seen = self._counts()

    def __call__(self) -> int:
        """The number of skipped steps since the last call."""
        (steps, skipped), now = self._seen, self._counts()
        self._seen = now
        new = now[1] - skipped
        # Loading a checkpoint changes both counts in a way that training does not.
        return new if 0 < new <= now[0] - steps <= new + 1 else 0

    def _counts(self) -> tuple[int, int]:
        engine = None if self._engine is None else self._engine()
        return (0, 0) if engine is None else (engine.global_steps, engine.skipped_steps)


def _is(thing: Any, module: str, name: str) -> bool:
    """Whether it is exactly of this class, because a subclass may store its tensors differently."""
    return type(thing) is getattr(sys.modules.get(f"deepspeed.runtime.{module}"), name, None)


def _flats(wrapper: Any, names: Mapping[int, str], given: Mapping[Any, str]) -> Iterator[Flat]:
    """The flat tensors in step order; names from the user's model override DeepSpeed's."""

    def name_of(param: Tensor, group: int, at: int) -> str:
        name = names.get(id(param)) or given.get(param, f"group{group}.param{at}")
        # In DeepSpeed's mixture of experts, experts on different ranks have the same names.
        return name if getattr(param, "allreduce", True) else f"{_expert(param)}.{name}"

    if _is(wrapper, "zero.stage_1_and_2", "DeepSpeedZeroOptimizer"):
        master = wrapper.single_partition_of_fp32_groups
        return _partitions(
            wrapper, master, wrapper.bit16_groups, wrapper.bit16_groups_flat, name_of
        )
    if _is(wrapper, "bf16_optimizer", "BF16_Optimizer"):
        master = wrapper.fp32_groups_flat_partition
        return _partitions(wrapper, master, wrapper.bf16_groups, wrapper.bf16_groups_flat, name_of)
    if _is(wrapper, "zero.stage3", "DeepSpeedZeroOptimizer_Stage3"):
        return _sub_groups(wrapper, name_of)
    if _is(wrapper, "fp16.fused_optimizer", "FP16_Optimizer"):
        return _copies(wrapper.fp32_groups_flat, wrapper.fp16_groups, name_of)
    if _is(wrapper, "fp16.unfused_optimizer", "FP16_UnfusedOptimizer"):
        return _separate(wrapper.fp32_groups, wrapper.fp16_groups, name_of)
    raise UnknownError("lrprobe does not know where this class keeps its master weights")


_APART = 0.05
"""Maximum relative difference between the master weights and the model's weights."""

_Name = Callable[[Tensor, int, int], str]


def _partitions(
    wrapper: Any,
    master: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    flattened: Sequence[Tensor],
    name_of: _Name,
) -> Iterator[Flat]:
    """Stages 1 and 2: each group is flattened and cut into equal partitions, one per rank.

    The model's parameters are views of the flattened group, in any order.
    """
    for group, (flat, params, both) in enumerate(zip(master, groups, flattened, strict=True)):
        ranks = ranks_of(wrapper.real_dp_process_group[group])
        size = flat.numel()
        begin = ranks.index(torch.distributed.get_rank()) * size
        pieces = []
        for at, param in enumerate(params):
            if param.untyped_storage().data_ptr() != both.untyped_storage().data_ptr():
                raise UnknownError("its parameters are not views of its flattened groups")
            offset = int(param.storage_offset() - both.storage_offset())
            start, stop = max(offset, begin), min(offset + param.numel(), begin + size)
            stop = max(start, stop)
            span = slice(start - begin, stop - begin) if start < stop else slice(0, 0)
            layout = part_of(param.shape, start - offset, stop - offset, ranks)
            piece = Piece(name_of(param, group, at), param.numel(), span, layout)
            _check(piece, flat, param.detach().reshape(-1)[start - offset : stop - offset])
            pieces.append(piece)
        yield Flat(flat, group, pieces)


def _sub_groups(wrapper: Any, name_of: _Name) -> Iterator[Flat]:
    """Stage 3: each parameter is cut into equal parts; each sub-group flattens the rank's parts."""
    if wrapper.swap_optimizer:
        raise UnknownError("its master weights are on NVMe, and in memory only during their step")
    for number, (flat, params) in enumerate(
        zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
    ):
        pieces = []
        for at, param in enumerate(params):
            _, offset, size = wrapper.grad_position[wrapper.get_param_id(param)]
            ranks = ranks_of(param.ds_process_group)
            start = ranks.index(torch.distributed.get_rank()) * size
            count = max(min(size, param.ds_numel - start), 0)  # the last parts are padded
            layout = part_of(tuple(param.ds_shape), start, start + count, ranks)
            group = wrapper.sub_group_to_group_id[number]
            name = name_of(param, group, at)
            piece = Piece(name, param.ds_numel, slice(offset, offset + count), layout)
            if param.ds_tensor.numel() >= count:  # else it is swapped out
                _check(piece, flat, param.ds_tensor.detach().reshape(-1)[:count])
            pieces.append(piece)
        yield Flat(flat, wrapper.sub_group_to_group_id[number], pieces)


def _copies(
    master: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], name_of: _Name
) -> Iterator[Flat]:
    """Without ZeRO, fused optimizer: every rank has each group as one flat tensor."""
    for group, (flat, params) in enumerate(zip(master, groups, strict=True)):
        pieces, offset = [], 0
        for at, param in enumerate(params):
            span = slice(offset, offset + param.numel())
            name = name_of(param, group, at)
            pieces.append(Piece(name, param.numel(), span, whole(param.shape)))
            _check(pieces[-1], flat, param.detach().reshape(-1))
            offset = span.stop
        yield Flat(flat, group, pieces)


def _separate(
    master: Sequence[Sequence[Tensor]], groups: Sequence[Sequence[Tensor]], name_of: _Name
) -> Iterator[Flat]:
    """Without ZeRO, unfused 16-bit optimizer: every rank has an fp32 copy of each parameter."""
    for group, (copies, params) in enumerate(zip(master, groups, strict=True)):
        for at, (copy, param) in enumerate(zip(copies, params, strict=True)):
            piece = Piece(name_of(param, group, at), param.numel(), None, whole(param.shape))
            yield Flat(copy, group, [piece])


def _check(piece: Piece, flat: Tensor, param: Tensor) -> None:
    """Check that a piece of the flat tensor has the values of the model's parameter.

    They may differ slightly: some releases create the optimizer's state by a step without
    gradients, whose weight decay changes the master weights.

    Raises:
        UnknownError: if the values differ.
    """
    master, param = flat.detach()[piece.span].to(param.device).double(), param.double()
    apart = (master - param).nan_to_num().norm()
    if apart > _APART * param.nan_to_num().norm():
        raise UnknownError(f"its master weights do not match {piece.name}")


def _nameless(wrapper: Any, optimizer: Optimizer) -> Iterator[Flat]:
    """The tensors under names by group and position, if they cannot be mapped to parameters."""
    count = [0] * len(optimizer.param_groups)
    for group, flat in _tensors(wrapper, optimizer):
        name = f"group{group}.param{count[group]}"
        count[group] += 1
        yield Flat(flat, group, [Piece(name, flat.numel(), None, whole(flat.shape))])


def _tensors(wrapper: Any, optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """(group, tensor) of each tensor; between steps, those of stage 3 are in no group."""
    sub_groups = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    if sub_groups is not None:
        yield from ((wrapper.sub_group_to_group_id[at], flat) for at, flat in enumerate(sub_groups))
        return
    for at, group in enumerate(optimizer.param_groups):
        yield from ((at, tensor) for tensor in group["params"])


def _params(wrapper: Any) -> list[Tensor]:
    """The model's parameters, which autograd sees."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        groups = getattr(wrapper, name, None)
        if groups:
            return [param for group in groups for param in group]
    return []


def _expert(param: Any) -> str:
    """A prefix for the names of this rank's experts, which are not unique across ranks."""
    ranks = ranks_of(getattr(param, "ds_process_group", None) or param._dp_group)  # noqa: SLF001 - set by DeepSpeed
    return f"rank{ranks[0]}"
