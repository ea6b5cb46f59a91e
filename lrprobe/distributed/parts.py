"""Optimizers of flat tensors, each of which has ranges of many parameters.

ZeRO keeps its master weights so, this rank's share of them, and gives them to the optimizer one
after another: one step of the training is then several calls of ``optimizer.step()``. Which range
is whose is known to the library that made them; see ``deepspeed.py``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrprobe.distributed.layouts import Layout, Region, key_of
from lrprobe.names import Located


@dataclass(frozen=True, slots=True)
class Piece:
    """What a flat tensor has of one parameter.

    Attributes:
        name: the parameter's.
        numel: elements of the whole parameter.
        span: where in the flat tensor; None for all of it.
        layout: which elements of the parameter these are, and which ranks have the others.
    """

    name: str
    numel: int
    span: slice | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor that an optimizer steps, and what is in it.

    Attributes:
        tensor: the master weights of this rank.
        group: number of its parameter group.
        pieces: of all parameters that it has parts of on some rank; some may be empty here.
    """

    tensor: Tensor
    group: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """Where a flat tensor is, which is not kept alive; see ``names.Place``.

    Attributes:
        tensor: reference to it.
        id: the tensor's.
        now: ids of the tensors that are being stepped; empty outside of steps.
    """

    tensor: weakref.ref[Tensor]
    id: int
    now: set[int]

    def __call__(self) -> Tensor | None:
        """The tensor; None where another one is being stepped."""
        return self.tensor() if not self.now or self.id in self.now else None


@dataclass(frozen=True, slots=True)
class Watchable:
    """One parameter that hooks may watch: ``WatchedParameter`` says what the fields mean."""

    name: str
    group: int
    place: Located
    numel: int
    span: slice | None = None
    layout: Layout | None = None


@dataclass(slots=True)
class Parts:
    """An optimizer of flat tensors, seen as one that has all of them all the time.

    It has what is read of an ``Optimizer``: ``param_groups``, ``state`` and whatever else that has.

    Attributes:
        optimizer: reference to it.
        flats: its tensors, in the order in which they are stepped.
        skips: tells how many steps were skipped since it was last asked, with no step of the
            optimizer's to tell of them.
        ranks: over how many the samples are spread.
        leaves: parameters that autograd sees.
        unknown: why it is not known whose the elements are; empty where it is.
        last: whether the call of ``step`` that was begun is the last of a step of the training.
    """

    optimizer: weakref.ref[Optimizer]
    flats: Sequence[Flat]
    skips: Callable[[], int]
    ranks: int = 1
    leaves: Sequence[weakref.ref[Tensor]] = ()
    unknown: str = ""
    last: bool = True
    _now: set[int] = field(default_factory=set)
    _groups: list[dict[str, Any]] = field(default_factory=list)
    _held: list[list[weakref.ref[Tensor]]] = field(default_factory=list)
    _order: list[int] = field(default_factory=list)
    _watchable: list[Watchable] = field(default_factory=list)
    _next: set[int] = field(default_factory=set)
    _seen: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Keep references to the tensors instead of the tensors."""
        optimizer = self.optimizer()
        self._groups = [] if optimizer is None else list(optimizer.param_groups)
        self._held = [[] for _ in self._groups]
        for flat in self.flats:
            reference = weakref.ref(flat.tensor)
            self._held[flat.group].append(reference)
            self._order.append(id(flat.tensor))
            place = FlatPlace(reference, id(flat.tensor), self._now)
            self._watchable += [
                Watchable(piece.name, flat.group, place, piece.numel, piece.span, piece.layout)
                for piece in flat.pieces
            ]
        self.flats = ()

    def __getattr__(self, name: str) -> Any:
        """What the optimizer has beside its groups."""
        return getattr(self.optimizer(), name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups with all their tensors, also while one of them is being stepped."""
        if self._seen is not None:
            return self._seen
        groups = [
            {**group, "params": [tensor for ref in held if (tensor := ref()) is not None]}
            for group, held in zip(self._groups, self._held, strict=True)
        ]
        if self._now:  # later they would keep the tensors alive
            self._seen = groups
        return groups

    def watchable(self) -> list[Watchable]:
        """The parameters in it."""
        return self._watchable

    def begin(self, optimizer: Optimizer) -> bool:
        """A call of ``step`` begins; whether it is the first of a step of the training."""
        groups = optimizer.param_groups
        now = {id(tensor) for group in groups for tensor in group["params"]}
        if len(groups) == len(self._groups):
            self._groups = list(groups)
        else:  # stages 1 and 2 take the other groups out for the time being
            for group in groups:
                ids = {id(tensor) for tensor in group["params"]}
                for at, held in enumerate(self._held):
                    if any(id(ref()) in ids for ref in held):
                        self._groups[at] = group
        self._seen = None
        self._now.clear()
        self._next = now & set(self._order)
        self.last = self._order[-1] in now
        return self._order[0] in now

    def enter(self) -> None:
        """From here on only the tensors of that call are seen."""
        self._now.update(self._next)

    def end(self) -> None:
        """That call has ended."""
        self._now.clear()
        self._seen = None


def part_of(shape: Sequence[int], start: int, stop: int, ranks: Sequence[int]) -> Layout:
    """The layout of a parameter that is cut into ranges of its flat elements.

    Args:
        shape: of the whole parameter.
        start: first of its elements that this rank has.
        stop: end of these.
        ranks: global ranks that have the parts of one copy, in order.
    """
    if len(ranks) == 1:
        return whole(shape)
    cuts = ((start, stop),) if start < stop else ()
    region = Region((math.prod(shape),), (cuts,))
    key = key_of("flat", ranks)
    return Layout(tuple(shape), region, key, ranks[0], sharded=True, parts=tuple(ranks))


def whole(shape: Sequence[int]) -> Layout:
    """The layout of a parameter that this rank has whole."""
    return Layout(tuple(shape), Region.all_of((math.prod(shape),)))


def numel_of(param: Tensor) -> int:
    """Real elements (a complex one counts twice); −1 of a lazy parameter that has none yet."""
    if torch.nn.parameter.is_lazy(param):
        return -1
    return param.numel() * (2 if param.is_complex() else 1)
