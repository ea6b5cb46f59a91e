"""The usual case, planned once: dense tensors in host memory.

Of each step, the check sample is copied before and after it, in one call each. Of a small net that
is all of its elements, so that its figures can be computed later.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrprobe.engine.batch import Backends
from lrprobe.engine.check import Place
from lrprobe.engine.pieces import (
    PLAIN,
    SAMPLE,
    WatchedParameter,
    host_value,
    is_dense,
    sample_runs,
)
from lrprobe.rules.base import Entry, Rule, overwrites_gradient

MAX_BYTES = 1 << 18
"""Bytes of parameters, gradients and state up to which a step is copied whole."""
_MAX_ROWS = 64
"""Rows of a tensor up to which it is copied row by row, if it is not contiguous."""
_ALIGNED = 16
_PLAIN_VALUES = (bool, int, float, str, type(None), torch.dtype)

Strides = tuple[int, ...] | None
"""Of a tensor; None if it is contiguous."""


class UnusualError(Exception):
    """A step needs more than dense tensors in host memory."""


@dataclass(slots=True)
class Piece:
    """One parameter of a plan.

    Attributes:
        at: its index.
        group: index of its group.
        rule: its rule; None if its rate is measured.
        like: tensors of its dtypes and shapes, without its values; a measured one has no state.
        strides: of the parameter, each element-wise tensor of its state, and the gradient.
        dtypes, addresses: of these tensors; the addresses are those of the last step.
        tensors: their names, but for the gradient.
        numbers: its state entries that are one number, and what they are (``_number_kind``).
        nothing: its state entries that are None.
        names: all entries of its state.
    """

    at: int
    group: int
    rule: Rule | None
    like: Entry
    strides: dict[str, Strides]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=lambda: ["param"])
    numbers: dict[str, str] = field(default_factory=dict)
    nothing: list[str] = field(default_factory=list)
    names: frozenset[str] = frozenset()

    def tensor(self, name: str) -> Tensor:
        """One of the tensors of ``like``."""
        return self.like.param if name in ("param", "grad") else self.like.state[name]

    def has_numbers(self, state: Mapping[str, Any]) -> bool:
        """Whether the entries of a state that are numbers, or None, are as planned."""
        for name in self.nothing:
            if state[name] is not None:
                return False
        return all(_number_kind(state[name]) == kind for name, kind in self.numbers.items())

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the pieces of one batch share."""
        return (
            self.group,
            self.rule,
            tuple(self.dtypes.items()),
            tuple(self.numbers.items()),
            tuple(self.nothing),
        )


class _Layout:
    """Where check samples of tensors lie in a buffer.

    Attributes:
        places: per piece and name of a tensor.
        size: bytes of the buffer.
    """

    def __init__(self) -> None:
        self.places: dict[int, dict[str, Place]] = {}
        self.size = 0
        self._names: list[tuple[int, str]] = []
        self._rows: list[tuple[int, ...]] = []

    def add(self, at: int, name: str, tensor: Tensor, strides: Strides) -> None:
        """Add a tensor."""
        bytes_, number = tensor.element_size(), len(self._names)
        runs, run, stride = sample_runs(tensor.numel())
        self.places.setdefault(at, {})[name] = 0, self.size, tensor.dtype, runs * run
        self._names.append((at, name))
        if strides is None:
            self._rows.append((number, 0, self.size, bytes_, runs, run, stride))
        else:
            begin = self.size
            for start, count, step in _rows_of(tensor.shape, strides):
                shape = (1, count, count) if step == 1 else (count, 1, step)
                self._rows.append((number, start * bytes_, begin, bytes_, *shape))
                begin += count * bytes_
        self.size += -(-runs * run * bytes_ // _ALIGNED) * _ALIGNED

    def finish(self) -> None:
        """Prepare to copy, after everything was added."""
        columns = np.array(self._rows, np.int64).T
        self._numbers, self._offsets, self._starts, self._bytes = columns[:4].copy()
        self._runs = np.ascontiguousarray(columns[4:].T)

    def addresses(self, buffers: Sequence[Tensor], name: str, pieces: Sequence[int]) -> list[int]:
        """Where each buffer has the sample of each piece, buffer by buffer; 0 if it has none."""
        places = [self.places.get(at, {}).get(name) for at in pieces]
        starts = [-1 if place is None else place[1] for place in places]
        begins = [buffer.data_ptr() for buffer in buffers]
        return [0 if start < 0 else begin + start for begin in begins for start in starts]

    def copy(self, backend: ModuleType, addresses: Sequence[Mapping[str, int]]) -> Tensor:
        """Copy the tensors, which are at these addresses in each piece."""
        begins = np.array([addresses[at][name] for at, name in self._names], np.int64)
        begins = begins[self._numbers] + self._offsets
        buffer: Tensor = backend.copied(begins, self._runs, self._bytes, self._starts, self.size)
        return buffer


class Plan:
    """How an optimizer's steps are read, while its tensors keep their dtypes and shapes.

    It holds none of these tensors.

    Attributes:
        watched: the parameters.
        closure: whether steps have a closure.
        pieces: one per parameter, in their order.
        small: whether the copies have all elements, and may wait.
        rules_are_own: whether all rules are lrprobe's.
        before, after: layouts of the copies from before a step, and from after it.
        previous: places of the gradients in these two buffers.
    """

    def __init__(
        self,
        backends: Backends,
        watched: list[WatchedParameter],
        optimizer: Any,
        *,
        closure: bool,
    ) -> None:
        """Plan the copies; with a closure, gradients do not exist before the step.

        Raises:
            UnusualError: if steps need more than dense tensors in host memory.
        """
        if "cpu" not in backends or not watched:
            raise UnusualError
        self._backend = backends["cpu"]
        self.watched = watched
        self.closure = closure
        self.before, self.after = _Layout(), _Layout()
        self.previous: dict[int, dict[str, Place]] = {}
        self._kinds: dict[Any, list[Piece]] = {}
        self._settings = dict.fromkeys((w.group, w.rule) for w in watched)
        self._overwritten = self._overwriting(optimizer)
        self._overwrites = [self._overwritten[w.group, w.rule] for w in watched]
        self.rules_are_own = all(is_own(w.rule) for w in watched)
        known: dict[Any, Tensor] = {}
        self.pieces = [self._piece(i, w, optimizer, known) for i, w in enumerate(watched)]
        likes = [piece.like for piece in self.pieces]
        size = sum(t.nbytes for e in likes for t in (e.param, e.param, *e.state.values()))
        self.small = size <= MAX_BYTES and all(e.param.numel() <= SAMPLE for e in likes)
        for piece in self.pieces:
            self._lay_out(piece)
        self.before.finish()
        self.after.finish()

    def _overwriting(self, optimizer: Any) -> dict[tuple[int, Rule | None], bool]:
        """Whether a step of each rule and group overwrites gradients that exist before it."""
        groups = optimizer.param_groups
        return {
            (group, rule): not self.closure and overwrites_gradient(rule, groups[group])
            for group, rule in self._settings
        }

    def _piece(
        self, i: int, w: WatchedParameter, optimizer: Any, known: dict[Any, Tensor]
    ) -> Piece:
        param = w.place()
        if param is None or w.span is not None or w.tracked is not None:
            raise UnusualError
        if type(param) not in PLAIN or not param.dim() or not param.numel():
            raise UnusualError
        if param.dtype.is_complex or not self._backend.is_addressable(param):
            raise UnusualError
        strides = {"param": _strides(param)}
        piece = Piece(i, w.group, w.rule, _like(param, {}, known), strides)
        if w.rule is not None:
            self._add_state(piece, param, optimizer.state.get(param, _NO_STATE), known)
        # Autograd lays a gradient out like its parameter, if that has no gaps.
        strides["grad"] = strides["param"] if is_dense(param) else None
        piece.dtypes = {name: piece.tensor(name).dtype for name in piece.strides}
        self._kinds.setdefault(piece.kind, []).append(piece)
        return piece

    def _add_state(self, piece: Piece, param: Tensor, state: Any, known: dict[Any, Tensor]) -> None:
        if not isinstance(state, Mapping):
            raise UnusualError
        tensors = {}
        for name, value in state.items():
            kind = _number_kind(value)
            if name in ("param", "grad"):
                raise UnusualError  # programs would read the tensor of that name
            if kind:
                piece.numbers[name] = kind
            elif value is None:
                piece.nothing.append(name)
            elif type(value) not in PLAIN or value.shape != param.shape:
                raise UnusualError
            if isinstance(value, Tensor) and value.shape == param.shape:
                if not self._backend.is_addressable(value):
                    raise UnusualError
                tensors[name] = value
                piece.strides[name] = _strides(value)
                piece.tensors.append(name)
        piece.like = _like(param, tensors, known)
        piece.names = frozenset(state)

    def _lay_out(self, piece: Piece) -> None:
        """Copy what a step overwrites, and after it what cannot be read where it is."""
        at, rule, param = piece.at, piece.rule, piece.like.param
        if not self.small and (
            any(piece.strides.values())
            or (rule is not None and rule.whole is not None)
            or self._overwrites[at]  # the copies lack elements of a gradient that is lost
        ):
            raise UnusualError
        whole = self.small or param.numel() > SAMPLE
        for name in piece.tensors:
            tensor, strides = piece.tensor(name), piece.strides[name]
            if name == "param" or (rule is not None and rule.advance is not None):
                self.before.add(at, name, tensor, strides)
            if whole:
                self.after.add(at, name, tensor, strides)
        self.after.add(at, "grad", param, piece.strides["grad"])
        number, layout = 1, self.after
        if self._overwrites[at]:
            self.before.add(at, "grad", param, piece.strides["grad"])
            number, layout = 0, self.before
        self.previous[at] = {"previous": (number, *layout.places[at]["grad"][1:])}

    def kinds(self) -> Iterator[tuple[Rule | None, list[Piece]]]:
        """The pieces that share a batch, and their rule, which may have been given up since."""
        for pieces in self._kinds.values():
            measured = [piece for piece in pieces if self.watched[piece.at].rule is None]
            ruled = [piece for piece in pieces if self.watched[piece.at].rule is not None]
            if measured:
                yield None, measured
            if ruled:
                yield ruled[0].rule, ruled

    def find(self, watched: Sequence[WatchedParameter], optimizer: Any) -> list[Entry] | None:
        """Parameters with their gradients and state; None if they are not as planned."""
        if watched is not self.watched or self._overwriting(optimizer) != self._overwritten:
            return None
        found, states = [], optimizer.state
        for w, piece in zip(watched, self.pieces, strict=True):
            param = w.place()
            if param is None or w.rule is not piece.rule:
                return None
            state = _NO_STATE if w.rule is None else states.get(param, _NO_STATE)
            if w.rule is not None and state.keys() != piece.names:
                return None
            tensors = [param if name == "param" else state[name] for name in piece.tensors]
            if not self._locate(piece, piece.tensors, tensors) or not piece.has_numbers(state):
                return None
            found.append(Entry(param, param.grad, state))
        return found

    def _locate(self, piece: Piece, names: Sequence[str], tensors: Sequence[Any]) -> bool:
        """Whether tensors are as planned; notes where they are."""
        shape, addresses = piece.like.param.shape, piece.addresses
        for name, tensor in zip(names, tensors, strict=True):
            if type(tensor) not in PLAIN or tensor.dtype is not piece.dtypes[name]:
                return False
            if tensor.shape != shape:
                return False
            strides = piece.strides[name]
            if not (tensor.is_contiguous() if strides is None else tensor.stride() == strides):
                return False
            address = tensor.data_ptr()
            # A view may have the negative bit where a tensor without it was.
            if address != addresses.get(name) or tensor._is_view():  # noqa: SLF001 - torch has no other way
                if not self._backend.is_addressable(tensor):
                    return False
                addresses[name] = address
        return True

    def copy_before(self, entries: Sequence[Entry]) -> Tensor | None:
        """Copy what the step will overwrite; None if that is a gradient of an unusual kind."""
        return self._copied(self.before, entries, self._overwrites)

    def copy_after(self, entries: Sequence[Entry]) -> Tensor | None:
        """Copy the step after it was taken; None if it lacks a gradient of the usual kind."""
        return self._copied(self.after, entries, [True] * len(entries))

    def _copied(
        self, layout: _Layout, entries: Sequence[Entry], with_grad: Sequence[bool]
    ) -> Tensor | None:
        for piece, entry, wanted in zip(self.pieces, entries, with_grad, strict=True):
            if wanted and not self._locate(piece, _GRAD, (entry.grad,)):
                return None
        return layout.copy(self._backend, [piece.addresses for piece in self.pieces])

    def numbers(self, entries: Sequence[Entry]) -> list[list[Any]]:
        """The values of each piece's ``numbers``."""
        return [
            [_number(entry.state[name], name in piece.tensors) for name in piece.numbers]
            for piece, entry in zip(self.pieces, entries, strict=True)
        ]


_GRAD = ("grad",)
_NO_STATE: Mapping[str, Any] = {}


def is_own(rule: Rule | None) -> bool:
    """Whether a rule is lrprobe's own, so that it is known what it does with a group."""
    module = getattr(getattr(rule, "update", None), "__module__", None)
    return rule is None or str(module).startswith("lrprobe.rules.")


def _number_kind(value: Any) -> str:
    """``number``, or ``tensor`` if it is one with one element; empty for all other values."""
    if type(value) not in PLAIN:
        return "number" if isinstance(value, bool | int | float) else ""
    plain = value.numel() == 1 and value.is_cpu and value.layout is torch.strided
    return "tensor" if plain and not value.dtype.is_complex else ""


def _number(value: Any, is_element: bool) -> Any:
    """What to keep of a number; it stays a tensor if it is also element-wise."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if is_element else host_value(value)


def _strides(tensor: Tensor) -> Strides:
    return None if tensor.is_contiguous() else tensor.stride()


def _rows_of(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, elements, stride) of the rows of a tensor that is not contiguous, in order.

    Raises:
        UnusualError: if there are too many rows.
    """
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    *outer, (count, step) = merged or [(1, 1)]
    starts = itertools.product(*([i * stride for i in range(size)] for size, stride in outer))
    rows = [(sum(each), count, step) for each in itertools.islice(starts, _MAX_ROWS + 1)]
    if len(rows) > _MAX_ROWS:
        raise UnusualError
    return rows


def _like(param: Tensor, states: Mapping[str, Tensor], known: dict[Any, Tensor]) -> Entry:
    """Tensors of the same dtypes and shapes, without values, and without memory of their own."""

    def empty(tensor: Tensor) -> Tensor:
        key = tensor.shape, tensor.dtype
        if key not in known:
            known[key] = torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return known[key]

    return Entry(empty(param), empty(param), {name: empty(t) for name, t in states.items()})


def plain_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The hyperparameters of each group.

    Raises:
        UnusualError: if they are not all plain values.
    """
    return [_plain(group) for group in optimizer.param_groups]


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        name: tuple(value) if type(value) is list else value  # which may be changed in place
        for name, value in group.items()
        if name != "params"
    }
    step = found.get("step")
    if isinstance(step, Tensor) and step.is_cpu and step.numel() == 1:
        found["step"] = host_value(step)
    flat = [each for v in found.values() for each in (v if type(v) is tuple else (v,))]
    if not all(isinstance(each, _PLAIN_VALUES) for each in flat):
        raise UnusualError
    if found.get("capturable") or found.get("differentiable"):
        raise UnusualError  # then rules compute with tensors in float32, as torch does
    return found
