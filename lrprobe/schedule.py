"""Counts the steps of an optimizer, and decides which are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lrprobe.arguments import Every, Step


class Schedule:
    """The step count of one optimizer, and its recording schedule."""

    def __init__(self, every: Every, step: Step, optimizer: Optimizer) -> None:
        self._every = every
        self._source = step if callable(step) else None
        self._first: int | None = None
        self.step = _steps_taken(optimizer) if step is None or callable(step) else int(step)

    def next(self) -> int:
        """The number of the step that is about to be taken."""
        number = int(self._source()) if self._source is not None else self.step + 1
        if self._first is None:
            self._first = number
        return number

    def skipped(self, count: int) -> Sequence[int]:
        """Count ``count`` steps that were skipped since the last one; return their numbers."""
        if self._source is None:
            numbers = range(self.step + 1, self.step + count + 1)
        else:  # the trainer may not count skipped steps
            now = int(self._source())
            numbers = range(max(now - count, self.step + 1), now)
        if numbers:
            self.step = numbers[-1]
            if self._first is None:
                self._first = numbers[0]
        return numbers

    def go_on_from(self, step: int) -> None:
        """Continue counting from ``step``; the next step counts as the first one again."""
        self.step, self._first = step, None

    def take_back(self) -> int:
        """Uncount the last step; by how much to decrement the numbers of the steps after it."""
        if self._source is not None:
            return 0
        self.step -= 1
        return 1

    def due(self, step: int) -> bool:
        """Whether a step is recorded: with a period, the first step and every multiple of it."""
        if callable(self._every):
            return bool(self._every(step))
        return step == self._first or step % self._every == 0

    def __repr__(self) -> str:
        if callable(self._every):
            return "step chosen"
        return "step" if self._every == 1 else f"{self._every} steps"


def _steps_taken(optimizer: Optimizer) -> int:
    states = (state for state in optimizer.state.values() if isinstance(state, Mapping))
    steps = [state["step"] for state in states if "step" in state]
    return max(map(_as_count, steps), default=0)


def _as_count(step: Any) -> int:
    try:
        return int(step)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return 0  # not a count
