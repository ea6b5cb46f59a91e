"""What the ranks of a process group exchange at ``attach``, and the rows that they agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrprobe.distributed import rendezvous
from lrprobe.distributed.layouts import Layout, Layouts, data_parallel, has_ranks, ranks_of
from lrprobe.distributed.unknown_tensors import rename_differing, unmerged_warning
from lrprobe.engine.columns import Row
from lrprobe.engine.pieces import WatchedParameter, draw_tracked, local
from lrprobe.rules.base import tolerance
from lrprobe.text import warn

if TYPE_CHECKING:
    from lrprobe.arguments import Filter
    from lrprobe.hooks import Hooks


@dataclass(frozen=True, slots=True)
class Holding:
    """A rank's description of one parameter, for the other ranks; see ``Layout`` and ``Row``."""

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: str
    rule: str
    key: str
    first: int
    sharded: bool
    group_name: str = ""
    tolerance: float = 0.0
    shared_rate: bool = False
    content: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a rank sends to the others.

    Attributes:
        holdings: optimizer name to its parameters.
        options: arguments of ``attach`` that must be equal on all ranks.
        device: type of the parameters' device.
        samples: equal on ranks with the same model, which see different samples.
        unused: patterns that match no name on this rank.
        error: why ``attach`` failed on this rank; empty if it did not.
    """

    holdings: tuple[tuple[str, tuple[Holding, ...]], ...]
    options: tuple[tuple[str, str], ...] = ()
    device: str = ""
    samples: str = ""
    unused: tuple[str, ...] = ()
    error: str = ""

    def digests(self) -> tuple[bytes, bytes]:
        """Hashes of the spec: without the ranks of each layout, and with them."""
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
    """Ranks with the same spec, apart from the ranks of their layouts.

    Attributes:
        ranks: their indices in the process group.
        spec: that of the first of these ranks; the others may belong to other replicas.
    """

    ranks: tuple[int, ...]
    spec: Spec


class World:
    """The ranks that record together."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)
        self.ranks = ranks_of(group if group is not None else torch.distributed.group.WORLD)

    def kinds(self, spec: Spec, device: torch.device) -> list[Kind]:
        """Group all ranks by their specs. A collective call."""
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
                received: list[Any] = [spec if self.rank == ranks[0] else None]
                distributed.broadcast_object_list(
                    received, src=self.ranks[ranks[0]], group=self._group
                )
                kinds.append(Kind(tuple(ranks), received[0]))
        return kinds

    def new_group(self) -> Any:
        """Create a process group of these ranks for lrprobe's own use. A collective call."""
        if self._group is None:
            return torch.distributed.new_group()
        return torch.distributed.new_group(self.ranks, use_local_synchronization=True)


@dataclass(frozen=True, slots=True)
class Alone:
    """One process that records alone.

    Attributes:
        missing: ranks that did not attach together with this one.
        rank: its rank among those that record, which is 0.
    """

    missing: tuple[int, ...] = ()
    rank: int = 0

    @property
    def ranks(self) -> list[int]:
        """The global rank of this process."""
        return [torch.distributed.get_rank()]


def world(process_group: Any) -> World | Alone:
    """The ranks that record together.

    Raises:
        ValueError: if this rank is not in the process group.
    """
    if not has_ranks():
        return Alone()
    if torch.distributed.get_rank(process_group) < 0:
        raise ValueError("process_group= does not contain this rank")
    found = World(process_group)
    missing = rendezvous.missing_from(found.ranks) if found.size > 1 else []
    return Alone(tuple(missing)) if missing or found.size == 1 else found


def _on(device: torch.device) -> Any:
    """Make a device current, because collectives of Python objects use the current device."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


@dataclass(slots=True)
class MergedRows:
    """All rows of one optimizer, in order of first appearance.

    Attributes:
        rows: the rows of the frame.
        owners: per row, the holding that counts, and the rank that contributes it if not sharded.
    """

    rows: list[Row]
    owners: list[tuple[Holding, int]]

    @property
    def alone(self) -> bool:
        """Whether rank 0 holds everything, so there is nothing to merge."""
        return all(not holding.key and rank == 0 for holding, rank in self.owners)


def merge_rows(
    optimizer: str, kinds: Sequence[Kind], ranks: Sequence[int], track: int
) -> MergedRows:
    """Merge the holdings of all ranks in an optimizer, by name.

    Args:
        optimizer: its name.
        kinds: the specs of all ranks.
        ranks: global rank of each rank in the group.
        track: elements to track of each parameter.

    Raises:
        ValueError: if a name has different shapes or dtypes; the same error on every rank.
    """
    found = MergedRows([], [])
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
                    group_name=holding.group_name,
                    shape=holding.shape,
                    rule=holding.rule,
                    tolerance=holding.tolerance,
                    shared_rate=holding.shared_rate,
                )
                row.tracked = draw_tracked(row.name, row.numel, track)
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
            f"{f'; and {len(conflicts) - 10} more' if len(conflicts) > 10 else ''}. A name must "
            "mean the same parameter on all ranks: call attach(optimizer, model) with the wrapped "
            "model, which provides the names and the shards that a rank holds"
        )
    return found


def check_alike(kinds: Sequence[Kind]) -> None:
    """Check what must be equal on all ranks.

    Raises:
        RuntimeError: if ``attach`` failed on a rank.
        ValueError: if arguments of ``attach`` or names of optimizers differ; the same error on
            every rank.
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
    """Ranks as text: ``ranks 0-3, 6``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def holdings_of(
    watched: Sequence[WatchedParameter], layouts: Layouts
) -> list[tuple[Holding, WatchedParameter, Layout]]:
    """The parameters on this rank, in the order of the optimizer."""
    found = []
    flat = layouts.flat_shards()
    for w in watched:
        param = w.place()
        if param is None:
            continue
        layout = layouts.of(param, flat) if w.layout is None else w.layout
        rule = w.rule
        if rule is None or (layout.sharded and rule.whole is not None):
            name = "measured"  # a shard is not enough for statistics of the whole parameter
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
            group_name=w.group_name,
            tolerance=0.0 if rule is None else tolerance(param.dtype, rule),
            shared_rate=rule is not None and rule.shared_rate,
            content=w.content,
        )
        found.append((holding, w, layout))
    return found


def _missing_shards(found: World | Alone, hooks: Sequence[Hooks], layouts: Layouts) -> str:
    """An error message if a parameter has shards on ranks that did not attach; else empty."""
    if not has_ranks():
        return ""
    here = set(found.ranks)
    for each in hooks:
        for holding, _, layout in holdings_of(each.watched, layouts):
            others = sorted(set(layout.parts) - here)
            if layout.sharded and others:
                return (
                    f"{holding.name} is sharded over {_numbers(layout.parts)}, of which "
                    f"{_numbers(others)} did not attach with this one, and a shard alone cannot "
                    "be recorded. Call attach on all ranks that hold a shard"
                )
    return ""


def _record_alone(found: Alone, chosen: Filter | None, error: Exception | None) -> None:
    if error is not None:
        raise error
    if found.missing:
        warn(
            f"{_numbers(found.missing)} did not attach within {rendezvous.patience():.3g} s: this "
            "rank records alone. To record all ranks as one, call attach on each of them"
        )
    if chosen is not None:
        chosen.warn_unused()


def join(
    found: World | Alone,
    hooks: Sequence[Hooks],
    model: nn.Module | None,
    error: Exception | None = None,
) -> None:
    """Exchange specs with the other ranks, and set up each of ``hooks``. A collective call.

    Args:
        found: the ranks.
        hooks: those of all optimizers.
        model: its wrappers determine how parameters are laid out.
        error: why ``attach`` failed here, if it did, so that it fails on every rank.

    Raises:
        Exception: ``error``.
        RuntimeError: if ``attach`` failed on another rank, or if parameters are sharded over ranks
            that did not attach.
        ValueError: if the ranks' parameters cannot be merged; the same error on every rank.
    """
    chosen = hooks[0].options.chosen if hooks else None
    layouts = Layouts(model if error is None else None)
    if error is None and (message := _missing_shards(found, hooks, layouts)):
        error = RuntimeError(message)
    if isinstance(found, Alone):
        _record_alone(found, chosen, error)
        for each in hooks:
            _name_by_rank(
                each,
                {
                    w.name: f"rank{torch.distributed.get_rank()}.{w.name}"
                    for w in each.watched
                    if w.content
                },
            )
        return
    if error is not None:  # the parameters may be unusable, so use the CPU
        what = f"{type(error).__name__}: {error}"
        found.kinds(Spec((), error=what), torch.device("cpu"))
        raise error
    params = [p for each in hooks for w in each.watched if (p := w.place()) is not None]
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
        ),
        device=device.type,
        samples=_samples_key(model),
        unused=() if chosen is None else chosen.unused,
    )
    kinds = found.kinds(spec, device)
    check_alike(kinds)
    if chosen is not None and found.rank == 0:  # a pattern may match on another rank
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
        merged = merge_rows(
            each.name, rename_by_rank(each, kinds, found), found.ranks, each.options.track
        )
        if each.parts is not None:
            size = each.parts.ranks
        each.join(size, flat, silent=merged.alone and found.rank > 0)
        if not merged.alone:
            from lrprobe.distributed.exchange import Exchange

            each.exchange = Exchange(each, layouts, found, merged, device)


def rename_by_rank(hooks: Hooks, kinds: Sequence[Kind], found: World) -> list[Kind]:
    """Rename tensors whose contents differ between ranks, in ``kinds`` and in ``hooks``."""
    kinds, renamed = rename_differing(kinds, hooks.name, found.ranks)
    own = next(new for kind, new in zip(kinds, renamed, strict=True) if found.rank in kind.ranks)
    _name_by_rank(hooks, own, quiet=found.rank > 0)
    return kinds


def _name_by_rank(hooks: Hooks, names: Mapping[str, str], *, quiet: bool = False) -> None:
    """Rename parameters that are not merged over ranks, with a warning unless ``quiet``."""
    if names and not quiet:
        warn(unmerged_warning(names, "" if hooks.parts is None else hooks.parts.unknown))
    if names and hooks.optimizer is not None:
        hooks.watching.rename(names, hooks.optimizer)


def _buffers_on(types: set[str], own: torch.device) -> torch.device:
    """The device on which figures merge: an accelerator if a rank's parameters are on one."""
    kind = min(types, key=lambda name: (name == "cpu", name))
    if kind == own.type:
        return own
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _samples_key(model: nn.Module | None) -> str:
    """A key that is equal on ranks with the same model, which then see different samples."""
    if model is None:
        return ""
    names = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(names).encode("utf-8", "backslashreplace")).hexdigest()
