"""What a run is told of its own wiring: who steps which parameter, and how steps are counted.

Looked at in the training thread, at recorded steps, on the host alone: no device is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks
    from lrprobe.watching import Watching

_COUNTED = 64
"""Parameters of an optimizer whose count is read in one recorded step; the next have others."""

MOMENTS = ("exp_avg", "exp_avg_sq", "square_avg", "sum", "exp_inf", "ax", "prev", "row_var")
"""What remembers gradients: where it is 0, a count that is 0 too is right."""


class Membership:
    """Parameters of a model that no optimizer with a probe has, and those that two step.

    Attributes:
        missing: names of the first; None where it cannot be said, for want of a model or since
            the optimizers have copies of its parameters.
        twice: names of the others, and of the optimizers that step them.
    """

    def __init__(self) -> None:
        self.missing: list[str] | None = None
        self.twice: dict[str, list[str]] = {}
        self._looks: dict[int, int] = {}
        self._steps: dict[int, dict[int, int]] = {}

    def look(self, hooks: Hooks, own: Iterable[Hooks], living: Iterable[Hooks]) -> bool:
        """Look anew after a recorded step, more and more seldom; whether something is new.

        Args:
            hooks: of the optimizer that took the step.
            own: of the probe that it belongs to.
            living: of all probes that are open.
        """
        looks = self._looks[id(hooks)] = self._looks.get(id(hooks), 0) + 1
        if looks > 4 and looks & (looks - 1):
            return False
        owners: dict[int, list[Hooks]] = {}
        for each in living:
            for param in each.parameters():
                owners.setdefault(id(param), []).append(each)
        missing = self._missing(hooks, own, owners)
        twice = self._twice(hooks, owners)
        changed = missing != self.missing or not twice.items() <= self.twice.items()
        self.missing = missing
        self.twice |= twice
        return changed

    def _missing(
        self, hooks: Hooks, own: Iterable[Hooks], owners: Mapping[int, Any]
    ) -> list[str] | None:
        names = hooks.options.names
        model = names.model
        if model is None:
            return None
        params = list(model.parameters())
        inside = {id(param) for param in params}
        if any(id(param) not in inside for each in own for param in each.parameters()):
            return None  # master copies, flat partitions: whose they are cannot be told
        left = {
            id(param)
            for param in params
            if id(param) not in owners
            and param.requires_grad
            and param.grad is not None
            and any(_takes(each, param) for each in own)
        }
        return [name for at, name in names.now().items() if at in left] if left else []

    def _twice(self, hooks: Hooks, owners: Mapping[int, list[Hooks]]) -> dict[str, list[str]]:
        """Those that another optimizer has, which stepped too since this one's last look."""
        counts = {id(each): each.count.taken for all_ in owners.values() for each in all_}
        before = self._steps.get(id(hooks), counts)
        self._steps[id(hooks)] = counts
        result = {}
        for param in hooks.parameters():
            rivals = [
                each.name
                for each in owners.get(id(param), ())
                if each is not hooks and counts[id(each)] > before.get(id(each), counts[id(each)])
            ]
            if rivals and param.grad is not None:
                result[hooks.name_of(param)] = sorted([hooks.name, *rivals])
        return result


class StepCount:
    """Compares the steps that an optimizer counts in its state with those that it takes.

    Attributes:
        taken: steps so far.
        wrong: what is wrong with the count, in plain values; None while nothing is.
        changed: whether that is new since it was last looked at.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.wrong: dict[str, Any] | None = None
        self.changed = False
        self._start = 0
        self._before: dict[int, float] = {}
        self._after: dict[int, tuple[float, int, int]] = {}
        self._odd_at = -1

    def before(self, optimizer: Optimizer, number: int, watching: Watching) -> None:
        """Read the counts before a step that is recorded, and compare them with the last ones."""
        names = watching.names
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if watching.repeated:  # which count more than one
            params = [param for param in params if id(param) not in watching.repeated]
        if len(params) > _COUNTED:
            at = self._start % len(params)
            self._start = at + _COUNTED
            params = (params[at:] + params[:at])[:_COUNTED]
        found = list(_counts(optimizer, params))
        self._before = {at: count for at, count, _ in found}
        for at, count, state in found:
            last, taken, moment = self._after.get(at, (count, self.taken, 0))
            most = last + self.taken - taken
            if count < last:
                # Once, a return to a checkpoint does so too; back to 0 with its moments kept, none.
                kept = moment == _moment(state)
                if count or (kept and _remembers(state)):
                    sure = kept and count <= self.taken - taken
                    self._note(names.get(at, ""), number, last, count, most, sure=sure)
                return
            if count > most:
                self._note(names.get(at, ""), number, last, count, most, sure=False)
                return

    def after(self, optimizer: Optimizer, number: int, watching: Watching) -> None:
        """Read them after it: each parameter with a gradient has taken one step."""
        names = watching.names
        before, self._before = self._before, {}
        if not before:
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if id(p) in before]
        found = getattr(optimizer, "found_inf", None)  # a fused step that a scaler may skip
        may_skip = found is not None and (found.device.type != "cpu" or _value(found) != 0)
        with_grad = {id(param) for param in params if param.grad is not None}
        for at, count, state in _counts(optimizer, params):
            self._after[at] = count, self.taken, _moment(state)
            was, step = before[at], count - before[at]
            if at in with_grad and step != 1 and not (may_skip and step == 0):
                self._note(names.get(at, ""), number, was, count, was + 1, sure=True)

    def _note(
        self, name: str, number: int, was: float, now: float, expected: float, *, sure: bool
    ) -> None:
        """Count a step in which the count was wrong; what is not sure has to be so twice."""
        again = self._odd_at not in (-1, number)
        self._odd_at = number
        if self.wrong is None:
            if not (sure or again):
                return
            times = 1
            self.wrong = {"parameter": name, "step": number, "was": was, "is": now}
            self.wrong["expected"] = expected
        elif number == self.wrong["last"]:
            return
        else:
            times = self.wrong["times"] + 1
        self.wrong = {**self.wrong, "last": number, "times": times}
        if times & (times - 1) == 0:  # each description begins a part of a dataset
            self.changed = True


def _takes(hooks: Hooks, param: Tensor) -> bool:
    """Whether an optimizer is for such parameters; the others are left to one without a probe."""
    kind = hooks.kind.lower()
    if "muon" in kind:
        return param.ndim == 2
    return "sparseadam" not in kind or (param.grad is not None and param.grad.is_sparse)


def _counts(
    optimizer: Optimizer, params: Iterable[Tensor]
) -> Iterator[tuple[int, float, Mapping[str, Any]]]:
    """id, count and state of those whose state has a count that the host can read."""
    for param in params:
        state = optimizer.state.get(param)
        if not isinstance(state, Mapping):
            continue
        count = state.get("step")
        if isinstance(count, Tensor):
            if count.device.type != "cpu" or count.numel() != 1:
                continue
            count = _value(count)
        if isinstance(count, int | float) and math.isfinite(count):
            yield id(param), float(count), state


def _value(number: Tensor) -> float:
    """A number that is on the host; NumPy reads it where it lies, without an operation of torch."""
    if number.dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
        return float(number.detach().numpy().reshape(())[()])
    return float(number)


def _moment(state: Mapping[str, Any]) -> int:
    """id of the tensor in a state that remembers gradients; another one after a load."""
    return next((id(state[name]) for name in MOMENTS if name in state), 0)


def _remembers(state: Mapping[str, Any]) -> bool:
    """Whether a state has gradients of earlier steps in it."""
    found = [state[name] for name in MOMENTS if isinstance(state.get(name), Tensor)]
    with torch.no_grad():
        return any(bool(each.any()) for each in found)
