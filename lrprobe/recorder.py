"""Connects hooks and delivery: pending figures, attempts, and the description of the run."""

from __future__ import annotations

import atexit
import os
import platform
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lrprobe.about import IN_TWO_OPTIMIZERS, NOT_IN_OPTIMIZER
from lrprobe.census import Membership
from lrprobe.delivery import Delivery
from lrprobe.diagnosis.live import LiveDiagnosis
from lrprobe.distributed import finish
from lrprobe.engine.deferred import MAX_SECONDS, CopiedStep
from lrprobe.gathering import Step
from lrprobe.hooks import Hooks
from lrprobe.optional import version_of
from lrprobe.record import SCHEMA_VERSION
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.parquet import Parquet
from lrprobe.text import redirected, warn

if TYPE_CHECKING:
    import pandas as pd


class Recorder:
    """Owns the hooks of a probe: receives the figures of their steps and delivers them in order.

    Attributes:
        memory: the sink that frames come from; None on ranks other than 0.
        places: destinations that no other probe may record to.
        shared: the user's own sinks, even on ranks that do not write to them.
        rank: of this process among those that record together.
        attempt: of the next records.
        hooks: one per optimizer.
        run: hyperparameters and versions, which every record refers to.
        closed: whether ``close`` was called.
        waiting_bytes: of the figures that are not passed on yet.
        history: returns what earlier attempts recorded in the dataset being continued.
    """

    def __init__(
        self,
        memory: Memory | None,
        delivery: Delivery,
        places: Sequence[str],
        shared: Sequence[Any],
        attempt: int = 0,
        rank: int = 0,
    ) -> None:
        """Create a recorder without hooks."""
        self.memory = memory
        self.places = places
        self.shared = shared
        self.rank = rank
        self.attempt = attempt
        self.hooks: list[Hooks] = []
        self.run: dict[str, Any] = {}
        self.closed = False
        self.waiting_bytes = 0
        self.history: Callable[[], pd.DataFrame | None] | None = None
        self._attached = time.time()
        self._membership = Membership()
        self._delivery = delivery
        self._waiting: deque[tuple[Hooks, Step]] = deque()
        self._lock = threading.RLock()  # another thread may ask for a frame during the training
        self._will_look = False
        open_recorders.add(self)

    def __del__(self) -> None:
        """Deliver pending figures if the probe was garbage-collected."""
        if getattr(self, "_waiting", None) and not sys.is_finalizing():
            alone = all(hooks.exchange is None for hooks in self.hooks)
            with suppress(Warning):  # nobody could catch it
                self.collect(wait=alone, last=True)

    @property
    def step(self) -> int:
        """The last step taken, recorded or not; with several optimizers, the highest."""
        return max((hooks.schedule.step for hooks in self.hooks), default=0)

    def wait(self) -> None:
        """Wait until everything recorded so far is in memory."""
        if not self.closed:
            self.collect(wait=True)
            self._delivery.drain(near=True)
            self._warn_problems()

    def flush(self) -> None:
        """Write everything recorded so far, and flush sinks that buffer."""
        self.collect(wait=True)
        self._delivery.flush()
        self._warn_problems()

    def close(self) -> None:
        """Remove the hooks, write the remaining records, close the owned sinks; idempotent."""
        if self.closed:
            return
        for hooks in self.hooks:
            hooks.end()
        self.closed = True
        for hooks in self.hooks:
            hooks.remove()
        try:
            finish([hooks.exchange for hooks in self.hooks if hooks.exchange is not None])
            self.collect(wait=True, last=True)
        finally:
            open_recorders.discard(self)
            self._delivery.close()
        for hooks in self.hooks:
            if hooks.failures > 1:  # the first had its own warning
                warn(f"{hooks.failures:,} steps of {hooks.name} could not be recorded")
        self._warn_problems()

    def steps(self) -> dict[str, int]:
        """The step count of each optimizer, by name."""
        self.collect(wait=True)
        return {hooks.name: hooks.schedule.step for hooks in self.hooks}

    def go_on_from(self, steps: Mapping[str, Any]) -> None:
        """Continue counting from these steps."""
        self.collect(wait=True)
        for hooks in self.hooks:
            hooks.schedule.go_on_from(int(steps[hooks.name]))
        if any(hooks.schedule.step < hooks.recorded for hooks in self.hooks):
            self._begin_attempt()

    @property
    def live(self) -> LiveDiagnosis | None:
        """The sink that reports findings while the run is in progress; or None."""
        sinks = self._delivery.sinks
        return next((sink for sink in sinks if isinstance(sink, LiveDiagnosis)), None)

    @property
    def waiting(self) -> bool:
        """Whether figures are still on their way to the host."""
        return bool(self._waiting)

    def describe(self) -> None:
        """Update ``run``, and pass it to the sinks that store it."""
        self.run = {
            "schema_version": SCHEMA_VERSION,
            "lrprobe": version_of("lrprobe"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "attached": self._attached,
            "optimizers": {hooks.name: hooks.describe() for hooks in self.hooks},
            NOT_IN_OPTIMIZER: self._membership.missing,
            IN_TWO_OPTIMIZERS: self._membership.twice,
        }
        for sink in self._delivery.sinks:
            if isinstance(sink, Memory | Parquet | LiveDiagnosis):
                sink.describe(self.run)

    def look(self, hooks: Hooks) -> None:
        """After a recorded step, check parameter membership and the optimizer's step count."""
        living = [each for one in list(open_recorders) for each in one.hooks]
        new = self._membership.look(hooks, self.hooks, living)
        if new or hooks.count.changed:
            hooks.count.changed = False
            self.describe()

    def add(self, hooks: Hooks, pending: Step) -> None:
        """Add the figures of a step, which may still be on the device."""
        with self._lock:
            if not self._took_back(hooks, pending):
                self._waiting.append((hooks, pending))
                self.waiting_bytes += pending.nbytes
        self.collect()
        if isinstance(pending, CopiedStep):
            self._look_later()

    def _took_back(self, hooks: Hooks, pending: Step) -> bool:
        """Uncount the newest step if it was a dummy step, although others wait before it."""
        dummy = hooks.exchange is None and pending.settled() and pending.is_dummy
        if dummy:
            hooks.take_back()
        return dummy

    def _look_later(self) -> None:
        """See to it that copied steps do not wait for another step, which may never come."""
        if self._waiting and not self._will_look:
            self._will_look = True
            self._delivery.call_later(MAX_SECONDS, partial(_collect_late, weakref.ref(self)))

    def collect_late(self) -> None:
        """Do what ``collect`` does, in the background thread."""
        self._will_look = False
        if self._lock.acquire(blocking=False):  # whoever has it may wait for this thread
            try:
                with redirected(self._delivery.report):
                    self.collect(background=True)
            finally:
                self._lock.release()
        self._look_later()

    def collect(self, wait: bool = False, last: bool = False, background: bool = False) -> None:
        """Pass on figures that have arrived on the host; others are polled at a later hook.

        Args:
            wait: wait for pending figures; for those of other ranks only up to a timeout.
            last: give up figures that are still pending afterwards.
            background: leave steps where a sink has no room, because its thread must not wait.
        """
        with self._lock:
            while self._waiting:
                hooks, pending = self._waiting[0]
                if background and not self._delivery.has_room(pending.nbytes):
                    break
                try:
                    if not (pending.ready() or (wait and (pending.wait() or last))):
                        break
                except Exception as error:  # noqa: BLE001 - they are lost, and training goes on
                    self._drop_first()
                    hooks.failed(error)
                    continue
                self._drop_first()
                try:
                    self._pass_on(hooks, pending)
                except Warning:  # the user wants warnings to be errors
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                    hooks.failed(error)
            if wait:
                for hooks in self.hooks:
                    hooks.settle()
        self._warn_problems()

    def _drop_first(self) -> None:
        _, pending = self._waiting.popleft()
        self.waiting_bytes -= pending.nbytes

    def _pass_on(self, hooks: Hooks, pending: Step) -> None:
        if pending.is_dummy:
            less = hooks.take_back()
            for others, later in self._waiting:
                if others is hooks:
                    later.info.step -= less
        elif pending.info.recorded:
            if pending.info.step < hooks.recorded:  # the trainer's own count went back
                self._begin_attempt()
            hooks.recorded = pending.info.step
            pending.info.attempt = self.attempt
            try:
                hooks.judge(pending)
            finally:  # last, because it wakes a thread that competes for the GIL
                self._delivery.put(pending.record, pending.nbytes)

    def _begin_attempt(self) -> None:
        self.attempt += 1
        for hooks in self.hooks:
            hooks.recorded = -1

    def forked(self) -> None:
        """In a forked child, drop pending figures: they are the parent's."""
        self._lock = threading.RLock()
        self._will_look = False
        self.waiting_bytes = 0
        self._waiting.clear()
        for hooks in self.hooks:
            hooks.forked()

    def _warn_problems(self) -> None:
        for message in self._delivery.problems():
            warn(message)


def _collect_late(recorder: weakref.ref[Recorder]) -> None:
    found = recorder()
    if found is not None and not found.closed:
        found.collect_late()


open_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _in_child() -> None:
    """Replace locks: one that another thread held during the fork is never released."""
    for recorder in list(open_recorders):
        recorder.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _at_exit() -> None:
    """Pass on pending figures before the delivery ends."""
    for recorder in list(open_recorders):
        recorder.collect(wait=True, last=True)


# As in delivery.py, for a forked multiprocessing.Process; what is registered last runs first.
getattr(threading, "_register_atexit", lambda _: None)(_at_exit)
