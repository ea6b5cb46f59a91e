"""Gathers the figures of a step, which may consist of several calls of ``optimizer.step()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lrprobe.dummy_steps import device_of, step_moved
from lrprobe.engine import Engine, PreStep, empty_pre_step
from lrprobe.engine.buffers import Buffers, blank, fill
from lrprobe.engine.columns import StepInfo, slots_of
from lrprobe.engine.copies import Copy
from lrprobe.engine.deferred import AT_ONCE, CopiedStep, Deferred
from lrprobe.engine.flight import MOVED, StepInFlight
from lrprobe.engine.planned import Planned, PlannedPreStep, figures_of

if TYPE_CHECKING:
    from lrprobe.hooks import Hooks, Owner

Step: TypeAlias = StepInFlight | CopiedStep


class LocalGatherer:
    """Gathers the steps of an optimizer if this process holds all its parameters.

    ``Exchange`` is its counterpart for parameters that are spread over ranks.
    """

    def __init__(self, hooks: Hooks, owner: Owner) -> None:
        self._hooks = hooks
        self._buffers: Buffers | None = None
        self._broken = False
        self._copy: Copy | None = None
        self._moved: Any = 1.0
        self.planned = Planned(hooks.engine)
        engine = Engine(hooks.options.engine)
        self.deferred = Deferred(engine, hooks.reasons, lambda: owner.waiting_bytes)
        self._rows: Any = None
        self._at_once = 0

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and has not been sent."""
        return self._buffers is not None or self._copy is not None or self._broken

    def clear(self) -> None:
        """Forget a step that was not finished."""
        self._buffers, self._copy, self._broken = None, None, False

    def catch_up(self) -> None:
        """Do nothing: there are no other ranks to agree with."""

    def before(self, optimizer: Any, *, closure: bool) -> PreStep:
        """Keep what the step will overwrite; called in the pre-hook."""
        hooks = self._hooks
        if hooks.parts is None:
            planned = self.planned.before(hooks.watched, optimizer, closure=closure)
            if planned is not None:
                return planned
        return hooks.engine.before(hooks.watched, optimizer, closure=closure)

    def add(self, optimizer: Any, kept: PreStep) -> None:
        """Add the figures of one call of ``step``; called in the post-hook."""
        hooks, buffers = self._hooks, self._buffers
        first = not self.under_way
        self._broken = True  # stays so if an error interrupts this method
        copy = None
        if isinstance(kept, PlannedPreStep):
            copy = self.planned.after(optimizer, kept)
            kept = kept if copy is not None else self.planned.restored(kept)
        if copy is not None and self._waits(copy):
            self._copy, self._moved = copy, step_moved(optimizer, torch.device("cpu"))
            self._broken = False
            return
        hooks.judge_waiting()
        if copy is not None:
            figures = figures_of(hooks.engine, [copy])
        else:
            figures = hooks.engine.after(hooks.watched, optimizer, kept)
        slots, end = slots_of(hooks.rows)
        if first:
            hooks.reasons.clear()
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

    def _waits(self, copy: Copy) -> bool:
        """Whether the figures of a step may be computed later."""
        if self._rows is not self._hooks.rows:  # the parameters are others
            self._rows, self._at_once = self._hooks.rows, AT_ONCE
        if self._at_once:
            self._at_once -= 1
            return False
        return copy.plan.small

    def skipped(self, optimizer: Any, info: StepInfo, since: int) -> Step | None:  # noqa: ARG002 - as in Exchange
        """Gather a step that was skipped after the last one; the parameters are unchanged."""
        self.add(optimizer, empty_pre_step())
        return self.send(info)

    def send(self, info: StepInfo, *, dummy: bool = False) -> Step | None:  # noqa: ARG002 - as in Exchange
        """Finish the step: start the copy of its figures to the host, or let it wait."""
        buffers, self._buffers, self._broken = self._buffers, None, False
        copy, self._copy = self._copy, None
        if copy is not None:
            return self.deferred.add(copy, self._hooks.rows, info, moved=bool(self._moved))
        return None if buffers is None else StepInFlight(self._hooks.rows, buffers, info)


def unrecorded_step(optimizer: Any, info: StepInfo) -> StepInFlight:
    """A step in flight without figures, which only shows whether it was a dummy step."""
    buffers = blank(0, 0, device_of(optimizer))
    buffers.set_flag(MOVED, step_moved(optimizer, buffers.maxima.device))
    return StepInFlight((), buffers, info)
