"""Checks which optimizer steps which parameter, and how optimizers count their steps.

This runs in the training thread at recorded steps, and reads values on the host only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrprobe.engine.pieces import host_value

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks
    from lrprobe.watching import Watching

_COUNTED = 16
"""Parameters whose step count is read per recorded step; the next recorded step reads others."""

MOMENTS = ("exp_avg", "exp_avg_sq", "square_avg", "sum", "exp_inf", "ax", "prev", "row_var")
"""State entries that accumulate gradients; if they are 0, a step count of 0 is correct."""


class Membership:
    """Finds parameters that are in no optimizer with a probe, or in two optimizers.

    Attributes:
        missing: names of parameters in no optimizer; None if unknown, because there is no model or
            the optimizers hold copies of its parameters.
        twice: names of parameters in two optimizers, with the names of these optimizers.
    """

    def __init__(self) -> None:
        self.missing: list[str] | None = None
        self.twice: dict[str, list[str]] = {}
        self._looks: dict[int, int] = {}
        self._steps: dict[int, dict[int, int]] = {}

    def look(self, hooks: Hooks, own: Iterable[Hooks], living: Iterable[Hooks]) -> bool:
        """Check again after a recorded step, at growing intervals; whether the result changed.

        Args:
            hooks: those of the optimizer that took the step.
            own: those of all optimizers of the same probe.
            living: those of all open probes.
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
            return None  # master copies or flat partitions, which do not map to parameters here
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
        """Parameters in another optimizer that has also stepped since the last check."""
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
    """Compares the step count in an optimizer's state with the steps that it takes.

    Attributes:
        taken: steps so far.
        wrong: what is wrong with the count, as plain values; None if nothing is.
        changed: whether ``wrong`` has changed since the run was last described.
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
        """Before a recorded step, read the counts and compare them with the previous ones."""
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
            expected = last + self.taken - taken
            if count < last:
                # Loading a checkpoint also lowers the count, but not to 0 with the same moments.
                kept = moment == _moment(state)
                if count or (kept and _remembers(state)):
                    sure = kept and count <= self.taken - taken
                    self._note(names.get(at, ""), number, last, count, expected, sure=sure)
                return
            if count > expected:
                self._note(names.get(at, ""), number, last, count, expected, sure=False)
                return

    def after(self, optimizer: Optimizer, number: int, watching: Watching) -> None:
        """After a recorded step, check that each parameter with a gradient counted one step."""
        names = watching.names
        before, self._before = self._before, {}
        if not before:
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if id(p) in before]
        found = getattr(optimizer, "found_inf", None)  # a fused step that a scaler may skip
        may_skip = found is not None and (found.device.type != "cpu" or host_value(found) != 0)
        with_grad = {id(param) for param in params if param.grad is not None}
        for at, count, state in _counts(optimizer, params):
            self._after[at] = count, self.taken, _moment(state)
            was, step = before[at], count - before[at]
            if at in with_grad and step != 1 and not (may_skip and step == 0):
                self._note(names.get(at, ""), number, was, count, was + 1, sure=True)

    def _note(
        self, name: str, number: int, was: float, now: float, expected: float, *, sure: bool
    ) -> None:
        """Note a step with a wrong count; if it is not ``sure``, report only a second one."""
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
        if times & (times - 1) == 0:  # seldom, as each description starts a new part of a dataset
            self.changed = True


def _takes(hooks: Hooks, param: Tensor) -> bool:
    """Whether an optimizer handles such a parameter; Muon and SparseAdam take only some."""
    kind = hooks.kind.lower()
    if "muon" in kind:
        return param.ndim == 2
    return "sparseadam" not in kind or (param.grad is not None and param.grad.is_sparse)


def _counts(
    optimizer: Optimizer, params: Iterable[Tensor]
) -> Iterator[tuple[int, float, Mapping[str, Any]]]:
    """(id, count, state) of the parameters whose step count is on the host."""
    for param in params:
        state = optimizer.state.get(param)
        if not isinstance(state, Mapping):
            continue
        count = state.get("step")
        if isinstance(count, Tensor):
            if count.device.type != "cpu" or count.numel() != 1:
                continue
            count = host_value(count)
        if isinstance(count, int | float) and math.isfinite(count):
            yield id(param), float(count), state


def _moment(state: Mapping[str, Any]) -> int:
    """id of a state's moment tensor, which changes when a checkpoint is loaded."""
    return next((id(state[name]) for name in MOMENTS if name in state), 0)


def _remembers(state: Mapping[str, Any]) -> bool:
    """Whether a state contains gradients of earlier steps."""
    found = [state[name] for name in MOMENTS if isinstance(state.get(name), Tensor)]
    with torch.no_grad():
        return any(bool(each.any()) for each in found)
