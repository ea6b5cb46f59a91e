"""What one process gathers of a step, which may be several calls of ``optimizer.step()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrprobe.dummy_steps import device_of, step_moved
from lrprobe.engine import PreStep, empty_pre_step
from lrprobe.engine.buffers import Buffers, blank, fill
from lrprobe.engine.columns import StepInfo, slots_of
from lrprobe.engine.flight import MOVED, StepInFlight

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks


class LocalGatherer:
    """The steps of one optimizer whose parameters one process has; see ``Exchange``."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._buffers: Buffers | None = None
        self._broken = False

    @property
    def under_way(self) -> bool:
        """Whether a step has begun that was not sent."""
        return self._buffers is not None or self._broken

    def catch_up(self) -> None:
        """Nobody else has anything to tell."""

    def before(self, optimizer: Any, *, closure: bool) -> PreStep:
        """In the pre-hook: what to keep."""
        return self._hooks.engine.before(self._hooks.watched, optimizer, closure=closure)

    def add(self, optimizer: Any, kept: PreStep) -> None:
        """In the post-hook: the figures of what was stepped."""
        hooks, buffers = self._hooks, self._buffers
        first = not self.under_way
        self._broken = True  # until all is well
        figures = hooks.engine.after(hooks.watched, optimizer, kept)
        slots, end = slots_of(hooks.rows)
        if first:
            hooks.reasons = {}
            buffers = blank(len(hooks.rows), end, device_of(optimizer))
        if buffers is None:
            return
        fill(buffers, figures, range(len(hooks.rows)), slots, folds=False)
        hooks.reasons |= {hooks.rows[i].name: why for i, why in figures.failed.items()}
        if hooks.parts is None:  # libraries that step flat tensors have taken such steps before
            buffers.set_flag(MOVED, step_moved(optimizer, buffers.maxima.device))
        else:
            buffers.set_flag(MOVED, 1.0)
        self._buffers, self._broken = buffers, False

    def skipped(self, optimizer: Any, info: StepInfo, since: int) -> StepInFlight | None:  # noqa: ARG002 - all is known here
        """A step that was skipped after the last one; its parameters are as they were."""
        self.add(optimizer, empty_pre_step())
        return self.send(info)

    def send(self, info: StepInfo, *, dummy: bool = False) -> StepInFlight | None:  # noqa: ARG002 - the device tells
        """At the end of the step: what was added is on its way."""
        buffers, self._buffers, self._broken = self._buffers, None, False
        return None if buffers is None else StepInFlight(self._hooks.rows, buffers, info)


def unrecorded_step(optimizer: Any, info: StepInfo) -> StepInFlight:
    """Of a step that is not recorded: whether it was one at all."""
    buffers = blank(0, 0, device_of(optimizer))
    buffers.set_flag(MOVED, step_moved(optimizer, buffers.maxima.device))
    return StepInFlight((), buffers, info)
