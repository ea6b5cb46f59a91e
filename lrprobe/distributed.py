"""Shards and replicas of the parameters, over ``torch.distributed``: one frame, on rank 0.

At ``attach`` the ranks tell each other the names of their parameters and how these are laid out
over the ranks. From that each knows which part of which row it contributes, so that nothing is
counted twice and positions never matter. A recorded step is then two collectives on a process
group of our own (a third where tensor parallelism leaves partial gradients): a maximum and a sum,
issued in the optimizer's hook and picked up at a later one.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrprobe.record import Record
from lrprobe.summary.pending import Crossing, StepInfo
from lrprobe.summary.reading import local
from lrprobe.summary.shards import SUMS, Buffers, Kept, Region, Row, Share, Table
from lrprobe.summary.snapshot import Watched, tolerance

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks

PATIENCE = 60.0
"""Seconds to wait for the other ranks, where the figures of a step have to be waited for."""


# ---- what one rank holds ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How one parameter is laid out over the ranks.

    Attributes:
        shape: of the whole parameter, as a real one (complex: with a last dimension of 2).
        region: what this rank holds of it.
        key: the same on all ranks that hold parts of one copy; "" for a plain tensor.
        first: the rank that comes first in those; −1 for a plain tensor.
        sharded: whether it is cut into parts.
        contributes: whether this rank is one of the first replica.
    """

    shape: tuple[int, ...]
    region: Region
    key: str = ""
    first: int = -1
    sharded: bool = False
    contributes: bool = True


class Layouts:
    """Layouts of the parameters of a model, by their type and by the modules that hold them."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._keys: dict[Any, tuple[str, int, Any]] = {}

    def of(self, param: Tensor, flat: Mapping[int, tuple[Any, int | None]]) -> Layout:
        """The layout of one parameter; ``flat`` is of ``flat_shards``."""
        if id(param) in flat:
            return self._flat(param, *flat[id(param)])
        module = sys.modules.get("torch.distributed.tensor")
        if module is not None and isinstance(param, module.DTensor):
            return self._dtensor(param)
        shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
        return Layout(shape, Region.all_of(shape))

    def flat_shards(self) -> dict[int, tuple[Any, int | None]]:
        """id of each sharded parameter of FSDP1 to its handle and place in the flat parameter."""
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
            params = flat._params or ()  # noqa: SLF001 - torch tells it nowhere else
            found |= {id(param): (handle, at) for at, param in enumerate(params)}
        return found

    def _flat(self, param: Tensor, handle: Any, at: int | None) -> Layout:
        flat = handle.flat_param
        key = self._key(handle.process_group, (), _ranks(handle.process_group))
        if at is None:
            size, rank = param.numel(), torch.distributed.get_rank(handle.process_group)
            padded = size * torch.distributed.get_world_size(handle.process_group)
            region = Region((padded,), (((rank * size, (rank + 1) * size),),))
            return Layout((padded,), region, *key, sharded=True)
        shape, info = tuple(flat._shapes[at]), flat._shard_param_infos[at]  # noqa: SLF001 - as above
        held = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else ()
        cuts: Any = ((held,) if held else (),)
        length: tuple[int, ...] = (math.prod(shape),)
        if param.is_complex():
            shape, length, cuts = (*shape, 2), (*length, 2), (*cuts, ((0, 2),))
        return Layout(shape, Region(length, cuts), *key, sharded=True)

    def _dtensor(self, param: Any) -> Layout:
        mesh, placements = param.device_mesh, param.placements
        shape = tuple(param.shape)
        coordinate = mesh.get_coordinate()
        key = self._key(mesh, tuple(placements), mesh.mesh.flatten().tolist())
        cuts = [[(0, size)] for size in shape]
        contributes, sharded = coordinate is not None, False
        for dim, placement in enumerate(placements):
            where = coordinate[dim] if coordinate is not None else 0
            if hasattr(placement, "dim"):  # Shard and _StridedShard
                sharded |= mesh.size(dim) > 1
                parts = getattr(placement, "split_factor", 1)
                ranges = cuts[placement.dim]
                pieces = _chunks(ranges, parts) if parts > 1 else [ranges]
                cuts[placement.dim] = [
                    r for piece in pieces for r in _chunks(piece, mesh.size(dim))[where]
                ]
            elif where != 0:
                contributes = False
        if param.is_complex():
            shape, cuts = (*shape, 2), [*cuts, [(0, 2)]]
        region = Region(shape, tuple(map(tuple, cuts)))
        return Layout(shape, region, *key, sharded=sharded, contributes=contributes)

    def _key(self, over: Any, how: tuple[Any, ...], ranks: Sequence[int]) -> tuple[str, int]:
        if (id(over), how) not in self._keys:
            # Which ranks, not which object, since every rank has one of its own.
            text = f"{how} {getattr(over, 'shape', '')} {list(ranks)}"
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._keys[id(over), how] = digest, ranks[0], over  # kept alive, for its id
        return self._keys[id(over), how][:2]


def _chunks(ranges: Sequence[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """Cut ranges of indices into ``count`` pieces as ``torch.chunk`` does; some may be empty."""
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


def _ranks(group: Any) -> list[int]:
    return list(torch.distributed.get_process_group_ranks(group))


# ---- who holds what -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holding:
    """One parameter as a rank tells the others of it; see ``Layout`` and ``Row``."""

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: str
    rule: str
    key: str
    first: int
    sharded: bool
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Spec:
    """What a rank tells the others.

    Attributes:
        holdings: optimizer to its parameters.
        options: arguments of ``attach`` that must be the same everywhere.
        device: type of the parameters' device.
        samples: what tells ranks that see other samples apart; see ``data_parallel``.
        unused: patterns that match no name on this rank.
        error: why ``attach`` failed on this rank; empty where it did not.
    """

    holdings: tuple[tuple[str, tuple[Holding, ...]], ...]
    options: tuple[tuple[str, str], ...] = ()
    device: str = ""
    samples: str = ""
    unused: tuple[str, ...] = ()
    error: str = ""

    def digests(self) -> tuple[bytes, bytes]:
        """Of all that is here, over whichever ranks it is laid out; and of that too."""
        anywhere = replace(
            self,
            holdings=tuple(
                (
                    name,
                    tuple(
                        replace(each, key="laid out" if each.key else "", first=-1) for each in held
                    ),
                )
                for name, held in self.holdings
            ),
        )
        texts = (repr(spec).encode("utf-8", "backslashreplace") for spec in (anywhere, self))
        first, second = (hashlib.sha256(text).digest() for text in texts)
        return first, second


@dataclass(frozen=True, slots=True)
class Kind:
    """Ranks that hold the same: their numbers in the group, and what the first of them told.

    The others may hold it in replicas of their own, over other ranks.
    """

    ranks: tuple[int, ...]
    spec: Spec


class World:
    """The ranks that record together."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)
        self.ranks = _ranks(group if group is not None else torch.distributed.group.WORLD)

    def kinds(self, spec: Spec, device: torch.device) -> list[Kind]:
        """What all ranks hold, by the lowest rank of each kind. A collective."""
        distributed = torch.distributed
        with _on(device):
            digests: list[Any] = [None] * self.size
            distributed.all_gather_object(digests, spec.digests(), group=self._group)
            members: dict[bytes, list[int]] = {}
            for rank, (what, _) in enumerate(digests):
                members.setdefault(what, []).append(rank)
            if len(set(digests)) == 1:
                return [Kind(tuple(range(self.size)), spec)]
            kinds = []
            for ranks in members.values():
                told: list[Any] = [spec if self.rank == ranks[0] else None]
                distributed.broadcast_object_list(told, src=self.ranks[ranks[0]], group=self._group)
                kinds.append(Kind(tuple(ranks), told[0]))
        return kinds

    def new_group(self) -> Any:
        """A process group of these ranks that nobody else uses. A collective."""
        if self._group is None:
            return torch.distributed.new_group()
        return torch.distributed.new_group(self.ranks, use_local_synchronization=True)


def world(process_group: Any) -> World | None:
    """The ranks that record together; None where this process is alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_rank(process_group) < 0:
        raise ValueError("process_group= does not contain this rank")
    found = World(process_group)
    return found if found.size > 1 else None


def _on(device: torch.device) -> Any:
    """Objects travel through the current device."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


# ---- the frame of all ranks ---------------------------------------------------------------------


@dataclass(slots=True)
class Union:
    """All rows of one optimizer, in order of first appearance.

    Attributes:
        rows: as the frame has them.
        owners: row to the holding that counts, and the rank that counts where it is not sharded.
    """

    rows: list[Row]
    owners: list[tuple[Holding, int]]

    @property
    def alone(self) -> bool:
        """Whether rank 0 holds everything, so that there is nothing to merge."""
        return all(not holding.key and rank == 0 for holding, rank in self.owners)


def union(optimizer: str, kinds: Sequence[Kind], ranks: Sequence[int], track: int) -> Union:
    """Merge by name what all ranks hold of an optimizer.

    Args:
        optimizer: its name.
        kinds: what all ranks hold.
        ranks: global rank of each rank in the group.
        track: elements to track of each parameter.

    Raises:
        ValueError: if a name stands for different things; the same on every rank.
    """
    from lrprobe.hooks import draw

    found = Union([], [])
    index: dict[str, int] = {}
    where: list[Kind] = []
    conflicts: list[str] = []
    for kind in kinds:
        for holding in dict(kind.spec.holdings).get(optimizer, ()):
            at = index.setdefault(holding.name, len(found.rows))
            if at == len(found.rows):
                row = Row(
                    name=holding.name,
                    group=holding.group,
                    shape=holding.shape,
                    rule=holding.rule,
                    tolerance=holding.tolerance,
                )
                row.tracked = draw(row.name, row.numel, track)
                found.rows.append(row)
                first = kind.ranks[0]
                if holding.key and holding.first in ranks:
                    first = ranks.index(holding.first)
                found.owners.append((holding, first))
                where.append(kind)
            other = found.owners[at][0]
            if (other.shape, other.dtype) != (holding.shape, holding.dtype):
                conflicts.append(
                    f"{holding.name} is {_described(other)} on {_numbers(where[at].ranks)}, "
                    f"{_described(holding)} on {_numbers(kind.ranks)}"
                )
            if holding.rule == "measured":
                found.rows[at].rule = "measured"
    if conflicts:
        raise ValueError(
            f"the parameters of {optimizer} differ between ranks: {'; '.join(conflicts[:10])}"
            f"{f'; and {len(conflicts) - 10} more' if len(conflicts) > 10 else ''}. One name must "
            "stand for one parameter on all ranks: attach(optimizer, model) with the wrapped model "
            "gives the names, and tells which part of a parameter a rank holds"
        )
    return found


def check_alike(kinds: Sequence[Kind]) -> None:
    """What must not differ between ranks.

    Raises:
        RuntimeError: if ``attach`` failed on some rank.
        ValueError: if arguments of ``attach`` or names of optimizers differ; the same on every
            rank.
    """
    for kind in kinds:
        if kind.spec.error:
            raise RuntimeError(f"attach failed on {_numbers(kind.ranks)}: {kind.spec.error}")
    for name, value in kinds[0].spec.options:
        for kind in kinds[1:]:
            other = dict(kind.spec.options)[name]
            if other != value:
                raise ValueError(
                    f"attach has {name}={value} on {_numbers(kinds[0].ranks)}, {name}={other} on "
                    f"{_numbers(kind.ranks)}; it must be the same on all ranks"
                )
    names = [name for name, _ in kinds[0].spec.holdings]
    for kind in kinds[1:]:
        others = [name for name, _ in kind.spec.holdings]
        if set(names) != set(others):
            raise ValueError(
                f"attach has the optimizers {', '.join(names)} on {_numbers(kinds[0].ranks)}, "
                f"{', '.join(others)} on {_numbers(kind.ranks)}; the ranks of a probe must have "
                "the same: give each set of ranks its own, with attach(process_group=...)"
            )


def _described(holding: Holding) -> str:
    return f"{'×'.join(map(str, holding.shape)) or 'a scalar'} {holding.dtype}"


def _numbers(ranks: Sequence[int]) -> str:
    """Ranks as people write them: ranks 0-3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


# ---- a recorded step ----------------------------------------------------------------------------


class Exchange:
    """One optimizer whose parameters are spread over ranks."""

    def __init__(
        self, hooks: Hooks, layouts: Layouts, world: World, merged: Union, device: torch.device
    ) -> None:
        self._hooks = hooks
        self._layouts = layouts
        self._world = world
        self._group = world.new_group()
        self._device = device
        self._previous: Merging | None = None
        self._error = ""
        self.until = math.inf
        """When it is over with waiting for other ranks, as ``time.monotonic`` tells it."""
        self._take(merged)

    def _take(self, merged: Union) -> None:
        self._union = merged
        self._table = Table(merged.rows, self._hooks.options.sample)
        self._told = tuple(h for h, *_ in holdings_of(self._hooks.watched, self._layouts))
        self._changed = False
        self._watched: list[Watched] = []

    def _follow(self, watched: list[Watched]) -> None:
        """The parameters that this rank holds may have changed."""
        if watched is self._watched:
            return
        self._watched = watched
        here = holdings_of(watched, self._layouts)
        self._changed = tuple(holding for holding, *_ in here) != self._told
        index = {row.name: at for at, row in enumerate(self._table.rows)}
        held = []
        for holding, w, layout in here:
            at = index.get(holding.name)
            if at is None:  # it came since: the next recorded step has it
                continue
            if self._table.rows[at].rule == "measured":
                w.rule = None
            owner, first = self._union.owners[at]
            if holding.sharded:
                mine = holding.key == owner.key and layout.contributes
            else:
                mine = not owner.sharded and self._world.rank == first
            if mine and holding.shape == owner.shape:
                held.append((at, w, layout.region))
        self._share = Share(self._table, held, self._device, compile=self._hooks.options.compile)

    def before(
        self, watched: list[Watched], optimizer: torch.optim.Optimizer, *, closure: bool = False
    ) -> Kept:
        """In the pre-hook of a recorded step: what the last one told, and what to keep."""
        if self._error:
            raise RuntimeError(self._error)
        try:
            self._settle(watched)
        except Exception as error:
            self._error = f"recording over ranks has ended: {error}"
            raise
        self._follow(watched)
        return self._share.before(optimizer, closure=closure)

    def after(
        self, optimizer: torch.optim.Optimizer, kept: Kept, info: StepInfo, *, still: bool
    ) -> Merging | None:
        """In the post-hook: start the collectives. All that this rank has may be nothing.

        ``still`` tells whether every rate and gradient here was 0.
        """
        if self._error:
            return None
        failure = None
        try:
            buffers = self._share.after(optimizer, kept, self._partial())
        except Exception as error:  # noqa: BLE001 - the other ranks must not wait
            buffers, failure = self._table.blank(self._device), error
        buffers.maxima[-1, 0] = float(self._changed)
        buffers.maxima[-1, 1] = float(not still)
        works = [
            self._reduce(buffers.maxima, torch.distributed.ReduceOp.MAX),
            self._reduce(buffers.sums, torch.distributed.ReduceOp.SUM),
        ]
        merging = Merging(self, self._table, buffers, works, info, still=still)
        self._previous = merging
        if failure is not None:
            raise failure
        return merging if self.leads else None

    def none_taken(self) -> bool:
        """Whether the last recorded step was none, as all ranks find; told once.

        Where it may have been one, as far as is known here, the other ranks are waited for.
        """
        previous = self._previous
        if previous is None or not previous.still:
            return False
        previous.still = False
        try:
            return previous.none_taken
        except Exception as error:  # noqa: BLE001 - the step about to be taken counts all the same
            self._error = f"recording over ranks has ended: {error}"
            return False

    def finish(self, until: float) -> None:
        """Wait for what this rank still owes to the others, which it must not take down with it."""
        self.until = until
        if self._previous is not None:
            self._previous.wait()

    @property
    def leads(self) -> bool:
        """Whether this rank writes."""
        return self._world.rank == 0

    def _reduce(self, tensor: Tensor, op: Any) -> Any:
        return torch.distributed.all_reduce(tensor, op, group=self._group, async_op=True)

    def _partial(self) -> dict[int, Tensor | None]:
        """Gradients that tensor parallelism has left as a part of a sum on each rank, summed.

        The optimizer did the same in its step, among the same ranks. It is done for one mesh; None
        stands for a gradient over another one, which stays unknown.
        """
        module = sys.modules.get("torch.distributed.tensor")
        if module is None:
            return {}
        found: list[tuple[Any, Any]] = []
        for w in self._watched:
            param = w.ref()
            grad: Any = None if param is None else param.grad
            if grad is not None and isinstance(grad, module.DTensor):
                parts = [dim for dim, how in enumerate(grad.placements) if how.is_partial()]
                if parts:
                    found.append((param, (id(grad.device_mesh), parts)))
        if not found:
            return {}
        chosen = next((over for _, over in found if len(over[1]) == 1), None)
        result: dict[int, Tensor | None] = {id(p): None for p, over in found if over != chosen}
        mine = [param for param, over in found if over == chosen]
        if chosen is None or not mine:
            return result
        grads = [param.grad.to_local() for param in mine]
        flat = torch.cat([grad.reshape(-1).to(grads[0].dtype) for grad in grads])
        (dim,) = chosen[1]
        mesh, how = mine[0].grad.device_mesh, mine[0].grad.placements[dim]
        torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        if how.reduce_op == "avg":
            flat /= mesh.size(dim)
        pieces = torch.split(flat, [grad.numel() for grad in grads])
        for param, grad, piece in zip(mine, grads, pieces, strict=True):
            result[id(param)] = piece.view(grad.shape).to(grad.dtype)
        return result

    def _settle(self, watched: list[Watched]) -> None:
        """What the last recorded step says of the rules, and whether some rank has new parameters.

        All ranks do so at the same recorded step, and come to the same.
        """
        previous, self._previous = self._previous, None
        if previous is None:
            return
        maxima, sums = previous.figures()
        failed = self._table.judge(maxima, sums)
        if failed:
            names = {self._table.rows[at].name for at in failed}
            for w in watched:
                if w.name in names:
                    w.rule = None
            if self.leads:
                self._hooks.tell_unexplained(sorted(names), next(iter(failed.values())))
        if maxima[-1, 0] > 0:
            self._join_again()

    def _join_again(self) -> None:
        name = self._hooks.name
        told = tuple(h for h, *_ in holdings_of(self._hooks.watched, self._layouts))
        kinds = self._world.kinds(Spec(((name, told),)), self._device)
        known = {row.name: row for row in self._table.rows}
        merged = union(name, kinds, self._world.ranks, self._hooks.options.track)
        for row in merged.rows:
            if row.name in known and known[row.name].rule == "measured":
                row.rule = "measured"
        self._take(merged)


def finish(exchanges: Sequence[Exchange]) -> None:
    """Wait for what this rank still owes to the others, a minute in all; then for nothing more."""
    until = time.monotonic() + PATIENCE
    for exchange in exchanges:
        exchange.finish(until)


class Merging:
    """The figures of one step on their way over the process group.

    Attributes:
        info: what the hooks know of the step.
        still: whether every rate and gradient of this rank was 0.
    """

    def __init__(
        self,
        exchange: Exchange,
        table: Table,
        buffers: Buffers,
        works: Sequence[Any],
        info: StepInfo,
        *,
        still: bool,
    ) -> None:
        self.info = info
        self.still = still
        self._exchange = exchange
        self._table = table
        self._rules = [row.rule for row in table.rows]
        self._buffers = buffers
        self._works = works
        # The other ranks need no more than what tells whether the rules hold.
        self._wanted = None if exchange.leads else len(table.rows) * len(SUMS)
        self._crossing: Crossing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that wait until the record is made."""
        return sum(self._table.nbytes)

    @property
    def none_taken(self) -> bool:
        """Whether every rate and every gradient of all ranks was 0, as in ``Pending``."""
        maxima, _ = self.figures()
        return bool(maxima[-1, 1] <= 0)

    def ready(self) -> bool:
        """Whether the figures have arrived, or never will."""
        if self._crossing is None:
            if not all(work.is_completed() for work in self._works):
                return False
            with _side_stream(self._buffers.sums.device):
                for work in self._works:
                    work.wait()
                sums = self._buffers.sums[: self._wanted]
                self._crossing = Crossing([self._buffers.maxima, sums])
        return self._crossing.ready()

    def wait(self) -> bool:
        """Wait for the other ranks, but not forever; whether the figures have arrived."""
        until, pause = min(self._exchange.until, time.monotonic() + PATIENCE), 1e-4
        while not self.ready():
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def figures(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The merged maxima and sums.

        Raises:
            TimeoutError: if the other ranks do not take part.
            RuntimeError: if the process group has failed.
        """
        if not self.wait() or self._crossing is None:
            raise TimeoutError(
                f"the other ranks have not recorded their part of step {self.info.step} within "
                f"{PATIENCE:g} s"
            )
        maxima, sums = self._crossing.arrays()
        return maxima, sums

    def record(self) -> Record:
        """Finish the figures of every level."""
        return self._table.arrived(*self.figures(), self._rules).record(self.info)


def _side_stream(device: torch.device) -> Any:
    """So that what waits for the process group does not hold up the training's own stream."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return module.stream(module.Stream(device))


# ---- at attach ----------------------------------------------------------------------------------


def holdings_of(
    watched: Sequence[Watched], layouts: Layouts
) -> list[tuple[Holding, Watched, Layout]]:
    """What this rank holds, in the order of the optimizer."""
    found = []
    flat = layouts.flat_shards()
    for w in watched:
        param = w.ref()
        if param is None:
            continue
        layout = layouts.of(param, flat)
        rule = w.rule
        if rule is None or (layout.sharded and rule.whole is not None):
            name = "measured"  # a part does not tell what such a rule asks of the whole
        else:
            name = rule.name
        dtype = str(param.dtype).removeprefix("torch.")
        holding = Holding(
            name=w.name,
            group=w.group,
            shape=layout.shape,
            dtype=dtype,
            rule=name,
            key=layout.key,
            first=layout.first,
            sharded=layout.sharded,
            tolerance=0.0 if rule is None else tolerance(param.dtype, rule),
        )
        found.append((holding, w, layout))
    return found


def join(
    found: World | None,
    hooks: Sequence[Hooks],
    model: nn.Module | None,
    error: Exception | None = None,
) -> None:
    """Tell the other ranks what is here, and give each of ``hooks`` its part. A collective.

    Args:
        found: the ranks; None where this process is alone.
        hooks: of all optimizers.
        model: whose wrappers tell how parameters are laid out.
        error: why ``attach`` failed here, if it did, so that it fails everywhere.

    Raises:
        Exception: ``error``.
        RuntimeError: if ``attach`` failed on another rank.
        ValueError: if what the ranks have cannot be merged; the same on every rank.
    """
    chosen = hooks[0].options.chosen if hooks else None
    if found is None:
        if error is not None:
            raise error
        if chosen is not None:
            chosen.warn_unused()
        return
    if error is not None:  # which may be the model's
        what = f"{type(error).__name__}: {error}"
        found.kinds(Spec((), error=what), torch.device("cpu"))
        raise error
    layouts = Layouts(model)
    params = [p for each in hooks for w in each.watched if (p := w.ref()) is not None]
    device = local(params[0]).device if params else torch.device("cpu")
    options = hooks[0].options if hooks else None
    every = options.every if options is not None else 0
    spec = Spec(
        holdings=tuple(
            (each.name, tuple(h for h, *_ in holdings_of(each.watched, layouts))) for each in hooks
        ),
        options=(
            ("every", "a function" if callable(every) else str(every)),
            ("track", str(options.track if options is not None else 0)),
            ("sample", str(options.sample if options is not None else None)),
        ),
        device=device.type,
        samples=_samples_key(model),
        unused=() if chosen is None else chosen.unused,
    )
    kinds = found.kinds(spec, device)
    check_alike(kinds)
    if chosen is not None and found.rank == 0:  # a pattern may be for parameters of another rank
        chosen.warn_unused(set(chosen.unused).intersection(*(kind.spec.unused for kind in kinds)))
    own = next(kind for kind in kinds if found.rank in kind.ranks)
    alike = sum(len(kind.ranks) for kind in kinds if kind.spec.samples == own.spec.samples)
    size = data_parallel(model)
    if size is None:
        dtensors = any(h.key for each in spec.holdings for h in each[1])
        size = 1 if dtensors else alike
    device = _buffers_on({kind.spec.device for kind in kinds}, device)
    flat = list({id(h): h.flat_param for h, _ in layouts.flat_shards().values()}.values())
    for each in hooks:
        merged = union(each.name, kinds, found.ranks, each.options.track)
        each.join(size, flat, silent=merged.alone and found.rank > 0)
        if not merged.alone:
            each.exchange = Exchange(each, layouts, found, merged, device)


def _buffers_on(types: set[str], own: torch.device) -> torch.device:
    """Where the figures merge: on an accelerator where some rank has its parameters there."""
    kind = min(types, key=lambda name: (name == "cpu", name))
    if kind == own.type:
        return own
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _samples_key(model: nn.Module | None) -> str:
    """The same on ranks whose models have the same parameters, which then see other samples."""
    if model is None:
        return ""
    names = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(names).encode("utf-8", "backslashreplace")).hexdigest()


def data_parallel(model: nn.Module | None) -> int | None:
    """Over how many ranks a model's wrapper spreads the samples; None where there is none."""
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
            state = each._get_fsdp_state()  # noqa: SLF001 - torch tells it nowhere else
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # in older ones there is at most one
                groups = [one] if (one := getattr(state, "_fsdp_param_group", None)) else []
            if groups:
                mesh = groups[0].mesh_info
                sizes = (getattr(mesh, f"{part}_mesh_size", 1) for part in ("shard", "replicate"))
                return math.prod(sizes)
    return None
