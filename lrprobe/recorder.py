"""From the hooks to the delivery: figures that wait, attempts, and what describes the run."""

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
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from lrprobe.about import IN_TWO_OPTIMIZERS, NOT_IN_OPTIMIZER
from lrprobe.census import Membership
from lrprobe.delivery import Delivery
from lrprobe.diagnosis.live import LiveDiagnosis
from lrprobe.distributed import finish
from lrprobe.engine.flight import StepInFlight
from lrprobe.hooks import Hooks
from lrprobe.record import SCHEMA_VERSION
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.parquet import Parquet
from lrprobe.text import warn

if TYPE_CHECKING:
    import pandas as pd


class Recorder:
    """What hooks belong to: it takes the figures of their steps, and has them written in order.

    Attributes:
        memory: what a frame is made of; None on a rank that has none.
        places: what must not be recorded to twice.
        shared: sinks of the user's, also on ranks that do not write to them.
        rank: of this process among those that record together.
        attempt: of the records to come.
        hooks: of each optimizer.
        run: hyperparameters and versions, which travel with every record.
        closed: whether it has ended.
        history: gives what earlier attempts recorded in a dataset that is continued.
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
        """Begin with no hooks."""
        self.memory = memory
        self.places = places
        self.shared = shared
        self.rank = rank
        self.attempt = attempt
        self.hooks: list[Hooks] = []
        self.run: dict[str, Any] = {}
        self.closed = False
        self.history: Callable[[], pd.DataFrame | None] | None = None
        self._attached = time.time()
        self._membership = Membership()
        self._delivery = delivery
        self._waiting: deque[tuple[Hooks, StepInFlight]] = deque()
        self._lock = threading.RLock()  # a frame may be asked for beside the training
        open_recorders.add(self)

    def __del__(self) -> None:
        """Write what is on its way from a device all the same, where a probe was dropped."""
        if getattr(self, "_waiting", None) and not sys.is_finalizing():
            alone = all(hooks.exchange is None for hooks in self.hooks)
            self.collect(wait=alone, last=True)

    @property
    def step(self) -> int:
        """The last step taken, recorded or not; of several optimizers, the furthest."""
        return max((hooks.schedule.step for hooks in self.hooks), default=0)

    def wait(self) -> None:
        """For all that was recorded so far to be in memory."""
        if not self.closed:
            self.collect(wait=True)
            self._delivery.drain(near=True)
            self._tell()

    def flush(self) -> None:
        """Write all that was recorded so far, and make sinks that buffer do the same."""
        self.collect(wait=True)
        self._delivery.flush()
        self._tell()

    def close(self) -> None:
        """Remove the hooks, write what is left, and close the sinks opened here; idempotent."""
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
            if hooks.failures > 1:  # of the first it was told when it happened
                warn(f"{hooks.failures:,} steps of {hooks.name} could not be recorded")
        self._tell()

    def steps(self) -> dict[str, int]:
        """Where the count of each optimizer stands."""
        self.collect(wait=True)
        return {hooks.name: hooks.schedule.step for hooks in self.hooks}

    def go_on_from(self, steps: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self.collect(wait=True)
        for hooks in self.hooks:
            hooks.schedule.go_on_from(int(steps[hooks.name]))
        if any(hooks.schedule.step < hooks.recorded for hooks in self.hooks):
            self._begin_attempt()

    @property
    def live(self) -> LiveDiagnosis | None:
        """What reports findings while the run is in progress."""
        sinks = self._delivery.sinks
        return next((sink for sink in sinks if isinstance(sink, LiveDiagnosis)), None)

    @property
    def waiting(self) -> bool:
        """Whether figures are still on their way to the host."""
        return bool(self._waiting)

    def describe(self) -> None:
        """Hyperparameters and versions, which travel with every record."""
        self.run = {
            "schema_version": SCHEMA_VERSION,
            "lrprobe": _version("lrprobe"),
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
        """See who steps what, and how the optimizer counts, after a step that is recorded."""
        living = [each for one in list(open_recorders) for each in one.hooks]
        new = self._membership.look(hooks, self.hooks, living)
        if new or hooks.count.changed:
            hooks.count.changed = False
            self.describe()

    def add(self, hooks: Hooks, pending: StepInFlight) -> None:
        """Take the figures of a step, still on the device."""
        with self._lock:
            self._waiting.append((hooks, pending))
        self.collect()

    def collect(self, wait: bool = False, last: bool = False) -> None:
        """Pass on what has arrived on the host; the rest is asked again at a later hook.

        Args:
            wait: for what is on its way. Other ranks are not waited for without end.
            last: what has not arrived then never will.
        """
        with self._lock:
            while self._waiting:
                hooks, pending = self._waiting[0]
                try:
                    if not (pending.ready() or (wait and (pending.wait() or last))):
                        break
                except Exception as error:  # noqa: BLE001 - it never arrives, and training goes on
                    self._waiting.popleft()
                    hooks.failed(error)
                    continue
                self._waiting.popleft()
                try:
                    self._pass_on(hooks, pending)
                except Warning:  # the user wants warnings to be errors
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                    hooks.failed(error)
            if wait:
                for hooks in self.hooks:
                    hooks.settle()
        self._tell()

    def _pass_on(self, hooks: Hooks, pending: StepInFlight) -> None:
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
            finally:  # last, since the thread that makes the record holds up this one
                self._delivery.put(pending.record, pending.nbytes)

    def _begin_attempt(self) -> None:
        self.attempt += 1
        for hooks in self.hooks:
            hooks.recorded = -1

    def forked(self) -> None:
        """In a child process: what waits is the parent's."""
        self._lock = threading.RLock()
        self._waiting.clear()

    def _tell(self) -> None:
        for message in self._delivery.problems():
            warn(message)


_version = cache(version)  # which else searches all that is installed, at each attach

open_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _in_child() -> None:
    """A lock that another thread held when the process was forked is never released."""
    for recorder in list(open_recorders):
        recorder.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _at_exit() -> None:
    """Pass on what is still on its way from a device, before the delivery ends."""
    for recorder in list(open_recorders):
        recorder.collect(wait=True, last=True)
