"""Gathers the figures of a step, which may consist of several calls of ``optimizer.step()``."""

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
    """Gathers the steps of an optimizer if this process holds all its parameters.

    ``Exchange`` is its counterpart for parameters that are spread over ranks.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._buffers: Buffers | None = None
        self._broken = False

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and has not been sent."""
        return self._buffers is not None or self._broken

    def catch_up(self) -> None:
        """Do nothing: there are no other ranks to agree with."""

    def before(self, optimizer: Any, *, closure: bool) -> PreStep:
        """Keep what the step will overwrite; called in the pre-hook."""
        return self._hooks.engine.before(self._hooks.watched, optimizer, closure=closure)

    def add(self, optimizer: Any, kept: PreStep) -> None:
        """Add the figures of one call of ``step``; called in the post-hook."""
        hooks, buffers = self._hooks, self._buffers
        first = not self.under_way
        self._broken = True  # stays so if an error interrupts this method
        figures = hooks.engine.after(hooks.watched, optimizer, kept)
        slots, end = slots_of(hooks.rows)
        if first:
            hooks.reasons = {}
            buffers = blank(len(hooks.rows), end, device_of(optimizer))
        if buffers is None:
            return
        fill(buffers, figures, range(len(hooks.rows)), slots, folds=False)
        hooks.reasons |= {hooks.rows[i].name: why for i, why in figures.failed.items()}
        if hooks.parts is None:  # libraries that step flat tensors took dummy steps before `attach`
            buffers.set_flag(MOVED, step_moved(optimizer, buffers.maxima.device))
        else:
            buffers.set_flag(MOVED, 1.0)
        self._buffers, self._broken = buffers, False

    def skipped(self, optimizer: Any, info: StepInfo, since: int) -> StepInFlight | None:  # noqa: ARG002 - as in Exchange
        """Gather a step that was skipped after the last one; the parameters are unchanged."""
        self.add(optimizer, empty_pre_step())
        return self.send(info)

    def send(self, info: StepInfo, *, dummy: bool = False) -> StepInFlight | None:  # noqa: ARG002 - as in Exchange
        """Finish the step: start the copy of its figures to the host."""
        buffers, self._buffers, self._broken = self._buffers, None, False
        return None if buffers is None else StepInFlight(self._hooks.rows, buffers, info)


def unrecorded_step(optimizer: Any, info: StepInfo) -> StepInFlight:
    """A step in flight without figures, which only shows whether it was a dummy step."""
    buffers = blank(0, 0, device_of(optimizer))
    buffers.set_flag(MOVED, step_moved(optimizer, buffers.maxima.device))
    return StepInFlight((), buffers, info)
