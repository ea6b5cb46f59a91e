"""Optimizers of flat tensors, each of which contains ranges of many parameters.

ZeRO keeps a rank's share of the master weights in flat tensors, and gives them to the optimizer one
after another. One step of the training is then several calls of ``optimizer.step()``. Only the
library that made the tensors knows which range belongs to which parameter; see ``deepspeed.py``.
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
    """The part of one parameter in a flat tensor.

    Attributes:
        name: name of the parameter.
        numel: elements of the whole parameter.
        span: its range in the flat tensor; None for all of it.
        layout: which elements of the parameter it contains, and which ranks hold the others.
    """

    name: str
    numel: int
    span: slice | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat tensor that an optimizer steps, and its contents.

    Attributes:
        tensor: the master weights of this rank.
        group: index of its parameter group.
        pieces: one per parameter that has a part in it on any rank; some may be empty here.
    """

    tensor: Tensor
    group: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """A reference to a flat tensor that does not keep it alive; see ``names.Place``.

    Attributes:
        tensor: weak reference to the tensor.
        id: id of the tensor.
        now: ids of the tensors that the current call steps; empty between calls.
    """

    tensor: weakref.ref[Tensor]
    id: int
    now: set[int]

    def __call__(self) -> Tensor | None:
        """The tensor; None while the optimizer steps others."""
        return self.tensor() if not self.now or self.id in self.now else None


@dataclass(frozen=True, slots=True)
class Watchable:
    """One parameter that hooks may watch; ``WatchedParameter`` documents the fields."""

    name: str
    group: int
    place: Located
    numel: int
    span: slice | None = None
    layout: Layout | None = None


@dataclass(slots=True)
class Parts:
    """A view of an optimizer of flat tensors that has all of them, even while it steps only some.

    It can be read like an ``Optimizer``: ``param_groups``, ``state`` and other attributes.

    Attributes:
        optimizer: weak reference to the optimizer.
        flats: its tensors, in the order in which they are stepped.
        skips: returns the number of steps since the last call that were skipped without a call of
            ``optimizer.step()``.
        ranks: number of ranks over which samples are spread.
        leaves: the model's parameters, which autograd sees.
        unknown: why the tensors cannot be mapped to parameters; empty if they can.
        last: whether the current call of ``optimizer.step()`` is the last one of a training step.
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
        """Any other attribute of the optimizer."""
        return getattr(self.optimizer(), name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups with all their tensors, even while only some are being stepped."""
        if self._seen is not None:
            return self._seen
        groups = [
            {**group, "params": [tensor for ref in held if (tensor := ref()) is not None]}
            for group, held in zip(self._groups, self._held, strict=True)
        ]
        if self._now:  # cached during a call only, because it keeps the tensors alive
            self._seen = groups
        return groups

    def watchable(self) -> list[Watchable]:
        """The parameters in the flat tensors."""
        return self._watchable

    def begin(self, optimizer: Optimizer) -> bool:
        """Begin a call of ``optimizer.step()``; whether it is the first of a training step."""
        groups = optimizer.param_groups
        now = {id(tensor) for group in groups for tensor in group["params"]}
        if len(groups) == len(self._groups):
            self._groups = list(groups)
        else:  # stages 1 and 2 temporarily remove the other groups
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
        """Restrict the visible tensors to those of the current call."""
        self._now.update(self._next)

    def end(self) -> None:
        """End the current call."""
        self._now.clear()
        self._seen = None


def part_of(shape: Sequence[int], start: int, stop: int, ranks: Sequence[int]) -> Layout:
    """The layout of a parameter that is cut into ranges of its flat elements.

    Args:
        shape: of the whole parameter.
        start: first of its elements on this rank.
        stop: end of its elements on this rank.
        ranks: global ranks that hold the parts of one copy, in order.
    """
    if len(ranks) == 1:
        return whole(shape)
    cuts = ((start, stop),) if start < stop else ()
    region = Region((math.prod(shape),), (cuts,))
    key = key_of("flat", ranks)
    return Layout(tuple(shape), region, key, ranks[0], sharded=True, parts=tuple(ranks))


def whole(shape: Sequence[int]) -> Layout:
    """The layout of a parameter that this rank holds whole."""
    return Layout(tuple(shape), Region.all_of((math.prod(shape),)))


def numel_of(param: Tensor) -> int:
    """Number of real elements (a complex one counts twice); −1 for an uninitialised lazy one."""
    if torch.nn.parameter.is_lazy(param):
        return -1
    return param.numel() * (2 if param.is_complex() else 1)
