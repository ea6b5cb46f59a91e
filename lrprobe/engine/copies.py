"""A step that was copied as planned, from which its figures are computed, now or later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrprobe.engine.check import Samples
from lrprobe.engine.plan import Plan
from lrprobe.rules.base import Entry, Scalar


def is_number(value: Any) -> bool:
    """Whether a hyperparameter may differ between the steps of one batch."""
    return type(value) in (int, float)


def _shared(name: str, value: Any, own: bool) -> tuple[Any, ...]:
    """What steps have to share of a hyperparameter; rules may ask whether a number is 0.

    A number that differs becomes a column. A user's rule may do with it what no column can.
    """
    if is_number(value) and (own or name == "lr"):
        return name, "number", bool(value)
    return name, type(value), value


@dataclass(slots=True, eq=False)
class Copy:
    """One step.

    Attributes:
        plan: how it was read.
        buffers: copies from before the step, and from after it.
        numbers: the values of each piece's ``numbers``; none with ``entries``.
        groups: the hyperparameters of each group.
        initial: ``initial_lr`` of each piece's group.
        scalars: what ``Rule.before`` returned, by index of the piece.
        previous: per piece, where the gradient of the last recorded step is.
        entries: the optimizer's tensors; none if the step may wait.
    """

    plan: Plan
    buffers: list[Tensor]
    numbers: list[list[Any]]
    groups: list[dict[str, Any]]
    initial: list[Any]
    scalars: Mapping[int, Mapping[str, Scalar]]
    previous: list[tuple[Samples, int] | None]
    entries: Sequence[Entry]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What steps that are computed together share."""
        own = self.plan.rules_are_own
        groups = [
            tuple([_shared(name, value, own) for name, value in group.items()])
            for group in self.groups
        ]
        return self.plan, *groups

    def entry(self, at: int) -> Entry:
        """A piece with its values: the optimizer's tensors, or those that were copied."""
        if self.entries:
            entry = self.entries[at]
            return Entry(entry.param, entry.grad, {**entry.state, **self.scalars.get(at, {})})
        after = Samples.over({}, self.buffers[1:], self.plan.after.places)
        shape = self.plan.pieces[at].like.param.shape
        tensors = {name: after.tensor(at, name).view(shape) for name in after.names(at)}
        param, grad = tensors.pop("param"), tensors.pop("grad")
        return Entry(param, grad, {**tensors, **self.numbers_of(at, as_tensors=True)})

    def entry_for_rules(self, at: int, *, one: bool) -> Entry:
        """A piece whose values are read by address; ``one`` if it is all that a rule sees."""
        if self.entries:
            return self.entry(at)
        like = self.plan.pieces[at].like
        numbers = self.numbers_of(at, as_tensors=one)
        return Entry(like.param, like.grad, {**like.state, **numbers})

    def numbers_of(self, at: int, *, as_tensors: bool) -> dict[str, Any]:
        """The numbers in the state of a piece; rules that see one piece alone want tensors."""
        numbers = self.plan.pieces[at].numbers
        values = dict(zip(numbers, self.numbers[at], strict=True))
        if as_tensors:
            for name, kind in numbers.items():
                if kind == "tensor" and not isinstance(values[name], Tensor):
                    values[name] = torch.tensor(values[name], dtype=torch.float64, device="cpu")
        return {**values, **self.scalars.get(at, {})}
