"""The usual case, planned once: dense tensors in host memory that stay where they are.

Of each step, the check sample is copied before and after it, in one call each. Of a small net that
is all of its elements, so that its figures can be computed later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrprobe.engine.batch import Backends, describe
from lrprobe.engine.check import Place, Samples
from lrprobe.engine.pieces import (
    PLAIN,
    SAMPLE,
    WatchedParameter,
    host_value,
    is_strided,
    sample_runs,
)
from lrprobe.rules.base import Entry, Rule, overwrites_gradient

MAX_BYTES = 1 << 18
"""Bytes of parameters, gradients and state up to which a step is copied whole."""
_ALIGNED = 16
_PLAIN_VALUES = (bool, int, float, str, type(None))


class UnusualError(Exception):
    """A step needs more than dense tensors in host memory."""


@dataclass(slots=True)
class Piece:
    """One parameter of a plan.

    Attributes:
        at: its index.
        group: index of its group.
        rule: its rule; None if its rate is measured.
        like: tensors of its dtypes and shapes, without its values.
        tensors: address of the parameter, and of each element-wise tensor of its state.
        numbers: its state entries that are one number, and whether they are tensors.
        nothing: its state entries that are None.
        names: all entries of its state.
    """

    at: int
    group: int
    rule: Rule | None
    like: Entry
    tensors: dict[str, int]
    numbers: dict[str, bool]
    nothing: list[str]
    names: frozenset[str]


class _Layout:
    """Where check samples of tensors lie in a buffer.

    Attributes:
        places: per piece and name of a tensor.
        size: bytes of the buffer.
    """

    def __init__(self) -> None:
        self.places: dict[int, dict[str, Place]] = {}
        self.size = 0
        self._rows: list[tuple[int, ...]] = []
        self._moving: list[int] = []

    def add(self, at: int, name: str, tensor: Tensor, address: int | None = None) -> None:
        """Add a tensor at this address, or one that is elsewhere at each step."""
        runs, run, stride = sample_runs(tensor.numel())
        self.places.setdefault(at, {})[name] = 0, self.size, tensor.dtype, runs * run
        if address is None:
            self._moving.append(len(self._rows))
        self._rows.append((address or 0, self.size, tensor.element_size(), runs, run, stride))
        self.size += -(-runs * run * tensor.element_size() // _ALIGNED) * _ALIGNED

    def finish(self) -> None:
        """Prepare to copy, after everything was added."""
        columns = np.array(self._rows, np.int64).T
        self._addresses, self._starts, self._bytes = columns[:3].copy()
        self._runs = np.ascontiguousarray(columns[3:].T)

    def copy(self, backend: ModuleType, moving: Sequence[int]) -> Tensor:
        """Copy the tensors; ``moving`` has the addresses of those that are elsewhere each time."""
        addresses = self._addresses.copy()
        addresses[self._moving] = moving
        buffer: Tensor = backend.copied(addresses, self._runs, self._bytes, self._starts, self.size)
        return buffer


class Plan:
    """How an optimizer's steps are read, while it keeps its tensors and hyperparameters.

    It holds none of these tensors: what is at the same address, of the same dtype and size, is read
    the same way.

    Attributes:
        watched: the parameters.
        closure: whether steps have a closure.
        groups: per group, its hyperparameters except the rate.
        pieces: one per parameter, in their order.
        small: whether the copies have all elements, and may wait.
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
        self.groups = [_fixed(group) for group in optimizer.param_groups]
        self.pieces: list[Piece] = []
        self.before, self.after = _Layout(), _Layout()
        self.previous: dict[int, dict[str, Place]] = {}
        self._kinds: dict[Any, list[Piece]] = {}
        self._overwritten: list[int] = []
        known: dict[Any, Tensor] = {}
        for i, w in enumerate(watched):
            self._add(backends, i, w, optimizer, known)
        likes = [piece.like for piece in self.pieces]
        size = sum(t.nbytes for e in likes for t in (e.param, e.param, *e.state.values()))
        self.small = size <= MAX_BYTES and all(e.param.numel() <= SAMPLE for e in likes)
        for piece in self.pieces:
            self._lay_out(piece, optimizer.param_groups[piece.group])
        if self._overwritten and not self.small:
            raise UnusualError  # the copies lack elements of gradients that are lost in the step
        self.before.finish()
        self.after.finish()

    def _add(
        self,
        backends: Backends,
        i: int,
        w: WatchedParameter,
        optimizer: Any,
        known: dict[Any, Tensor],
    ) -> None:
        param, rule = w.place(), w.rule
        if param is None or w.span is not None or w.tracked is not None:
            raise UnusualError
        if rule is not None and (rule.before is not None or rule.whole is not None):
            raise UnusualError
        if type(param) not in PLAIN or not param.dim() or not param.numel():
            raise UnusualError
        state = optimizer.state.get(param, _NO_STATE)
        kind, states, numbers = _state_of(backends, param, state)
        tensors = {"param": param, **states}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        like = _like(param, states, known)
        nothing = [name for name, value in state.items() if value is None]
        piece = Piece(i, w.group, rule, like, addresses, numbers, nothing, frozenset(state))
        self.pieces.append(piece)
        self._kinds.setdefault((w.group, rule, kind), []).append(piece)

    def _lay_out(self, piece: Piece, group: Mapping[str, Any]) -> None:
        """Copy what a step overwrites, and after it what cannot be read where it is."""
        at, rule, param = piece.at, piece.rule, piece.like.param
        whole = self.small or param.numel() > SAMPLE
        for name, address in piece.tensors.items():
            tensor = param if name == "param" else piece.like.state[name]
            if name == "param" or (rule is not None and rule.advance is not None):
                self.before.add(at, name, tensor, address)
            if whole:
                self.after.add(at, name, tensor, address)
        self.after.add(at, "grad", param)
        number, layout = 1, self.after
        if overwrites_gradient(rule, group) and not self.closure:
            self.before.add(at, "grad", param)
            self._overwritten.append(at)
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

    def fits(self, optimizer: Any) -> bool:
        """Whether the hyperparameters are the same, except for the rates."""
        try:
            return self.groups == [_fixed(group) for group in optimizer.param_groups]
        except UnusualError:
            return False

    def find(self, watched: Sequence[WatchedParameter], optimizer: Any) -> list[Entry] | None:
        """Parameters with their gradients and state; None if they are not where they were."""
        if watched is not self.watched:
            return None
        found, states = [], optimizer.state
        for w, piece in zip(watched, self.pieces, strict=True):
            param = w.place()
            if param is None or w.rule is not piece.rule:
                return None
            state = states.get(param, _NO_STATE)
            if state.keys() != piece.names or not _is_there(param, state, piece):
                return None
            found.append(Entry(param, param.grad, state))
        return found

    def copy_before(self, entries: Sequence[Entry]) -> Tensor | None:
        """Copy what the step will overwrite; None if that is a gradient of an unusual kind."""
        found = self._grads(self._overwritten, entries)
        return None if found is None else self.before.copy(self._backend, found)

    def copy_after(self, entries: Sequence[Entry]) -> Tensor | None:
        """Copy the step after it was taken; None if it lacks a gradient of the usual kind."""
        found = self._grads(range(len(self.pieces)), entries)
        return None if found is None else self.after.copy(self._backend, found)

    def numbers(self, entries: Sequence[Entry]) -> list[list[Any]]:
        """The values of each piece's ``numbers``."""
        return [
            [
                host_value(entry.state[name]) if is_tensor else entry.state[name]
                for name, is_tensor in piece.numbers.items()
            ]
            for piece, entry in zip(self.pieces, entries, strict=True)
        ]

    def _grads(self, at: Sequence[int], entries: Sequence[Entry]) -> list[int] | None:
        """Addresses of gradients, all of the usual kind."""
        result = []
        for i in at:
            grad, param = entries[i].grad, self.pieces[i].like.param
            if not isinstance(grad, Tensor) or type(grad) not in PLAIN:
                return None
            if grad.dtype is not param.dtype or grad.shape != param.shape:
                return None
            if not grad.is_contiguous() or not self._backend.is_addressable(grad):
                return None
            result.append(grad.data_ptr())
        return result


_NO_STATE: Mapping[str, Any] = {}


def _state_of(
    backends: Backends, param: Tensor, state: Any
) -> tuple[Any, dict[str, Tensor], dict[str, bool]]:
    """The kind of a piece, its element-wise state, and the names of its numbers."""
    if not isinstance(state, Mapping) or param.dtype.is_complex or not param.is_cpu:
        raise UnusualError
    kind, addresses, contiguous = describe(backends, Entry(param, param, state))
    if not addresses or not contiguous:
        raise UnusualError
    states, numbers = {}, {}
    for name, value in state.items():
        if name in addresses:
            states[name] = value
        elif isinstance(value, bool | int | float):
            numbers[name] = False
        elif is_strided(value) and value.is_cpu and value.numel() == 1:
            numbers[name] = True
        elif value is not None:
            raise UnusualError
    return kind, states, numbers


def _is_there(param: Tensor, state: Mapping[str, Any], piece: Piece) -> bool:
    """Whether the tensors of a piece are at their addresses, and of their dtypes and sizes."""
    numel = piece.like.param.numel()
    for name, address in piece.tensors.items():
        tensor = param if name == "param" else state[name]
        like = piece.like.param if name == "param" else piece.like.state[name]
        if (
            type(tensor) not in PLAIN
            or tensor.data_ptr() != address
            or tensor.dtype is not like.dtype
            or tensor.numel() != numel
            or not tensor.is_contiguous()
        ):
            return False
    if any(state[name] is not None for name in piece.nothing):
        return False
    return all(isinstance(state[name], Tensor) == known for name, known in piece.numbers.items())


def _like(param: Tensor, states: Mapping[str, Tensor], known: dict[Any, Tensor]) -> Entry:
    """Tensors of the same dtypes and shapes, without values, and without memory of their own."""

    def empty(tensor: Tensor) -> Tensor:
        key = tensor.shape, tensor.dtype
        if key not in known:
            known[key] = torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return known[key]

    return Entry(empty(param), empty(param), {name: empty(t) for name, t in states.items()})


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group except its rate, all of them plain values."""
    fixed = {
        key: tuple(value) if type(value) is list else value  # which may be changed in place
        for key, value in group.items()
        if key not in ("params", "lr")
    }
    flat = [each for v in fixed.values() for each in (v if type(v) is tuple else (v,))]
    if not all(isinstance(each, _PLAIN_VALUES) for each in (*flat, group.get("lr"))):
        raise UnusualError
    if fixed.get("capturable") or fixed.get("differentiable"):
        raise UnusualError  # then rules compute with tensors in float32, as torch does
    return fixed


@dataclass(slots=True, eq=False)
class Copy:
    """One step.

    Attributes:
        plan: how it was read.
        buffers: copies from before the step, and from after it.
        numbers: the values of each piece's ``numbers``; none with ``entries``.
        rates, initial: ``lr`` and ``initial_lr`` of each piece's group.
        previous: per piece, where the gradient of the last recorded step is.
        entries: the optimizer's tensors; none if the step may wait.
    """

    plan: Plan
    buffers: list[Tensor]
    numbers: list[list[Any]]
    rates: list[Any]
    initial: list[Any]
    previous: list[tuple[Samples, int] | None]
    entries: Sequence[Entry]

    def addresses(self, at: int) -> dict[str, int]:
        """Addresses of a piece's copies from after the step, by name."""
        begin = self.buffers[1].data_ptr()
        return {name: begin + place[1] for name, place in self.plan.after.places[at].items()}

    def entry(self, at: int) -> Entry:
        """A piece with its values: the optimizer's tensors, or those that were copied."""
        if self.entries:
            return self.entries[at]
        after = Samples.over({}, self.buffers[1:], self.plan.after.places)
        shape = self.plan.pieces[at].like.param.shape
        tensors = {name: after.tensor(at, name).view(shape) for name in after.names(at)}
        param, grad = tensors.pop("param"), tensors.pop("grad")
        return Entry(param, grad, {**tensors, **self.numbers_of(at, as_tensors=True)})

    def numbers_of(self, at: int, *, as_tensors: bool) -> dict[str, Any]:
        """The numbers in the state of a piece; rules that see one piece alone want tensors."""
        numbers = self.plan.pieces[at].numbers
        values = dict(zip(numbers, self.numbers[at], strict=True))
        if as_tensors:
            for name, was_tensor in numbers.items():
                if was_tensor:
                    values[name] = torch.tensor(values[name], dtype=torch.float64, device="cpu")
        return values
