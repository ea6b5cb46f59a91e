"""Steps of small nets: copied when they are taken, and turned into figures later, many at once.

A recorded step of a small net costs so many calls, however few elements it has. So such a step is
only copied: parameters, gradients and state. The pieces of all steps that wait then go through the
same calls, as if they were pieces of one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch

from lrprobe.engine import Engine, undisturbed
from lrprobe.engine.buffers import Arrived, blank, fill
from lrprobe.engine.columns import (
    Row,
    StepInfo,
    Summary,
    record_of,
    rule_errors,
    summaries_of,
)
from lrprobe.engine.copies import Copy
from lrprobe.engine.distribution import Bins
from lrprobe.engine.planned import figures_of
from lrprobe.record import Record

AT_ONCE = 4
"""Recorded steps that do not wait, so that a rule that does not explain them is found at once."""
MAX_PIECES, MAX_SECONDS = 256, 0.25
"""How many pieces of steps wait for each other, and how long."""
MAX_WAITING_BYTES = 1 << 25
"""Bytes of all steps of a probe above which none waits for another."""
_CPU = torch.device("cpu")


class CopiedStep:
    """A recorded step whose figures are computed later; otherwise like a ``StepInFlight``.

    Attributes:
        info, rows: as there.
        copy: its tensors.
        since: when it was taken, on the ``time.monotonic`` clock.
    """

    def __init__(
        self, rows: list[Row], info: StepInfo, copy: Copy, deferred: Deferred, *, moved: bool
    ) -> None:
        self.info = info
        self.rows = rows
        self.copy = copy
        self.since = time.monotonic()
        self.is_dummy = not moved
        self._deferred = deferred
        self._found: tuple[list[str], list[float], Summary] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held until the record is created."""
        return sum(buffer.nbytes for buffer in self.copy.buffers)

    def settled(self) -> bool:
        """Whether it is known if it was a dummy step."""
        return True

    def ready(self) -> bool:
        """Whether the figures are known; computes those of all waiting steps if it is time to."""
        return (self._is_current() or self._deferred.is_due()) and self.wait()

    def wait(self) -> bool:
        """Compute the figures."""
        try:
            if not self._is_current():
                self._deferred.compute()
        except Exception:  # not an interrupt: then it is computed later
            self._deferred.drop(self)
            raise
        self._deferred.drop(self)
        return True

    def rule_errors(self) -> list[float]:
        """The reconstruction error of each row."""
        return self._known()[1]

    def record(self) -> Record:
        """Create the record."""
        return record_of(self._known()[2], self.info)

    def set(self, rules: list[str], errors: list[float], summary: Summary) -> None:
        """Set the figures, which were computed by these rules."""
        self._found = rules, errors, summary

    def _known(self) -> tuple[list[str], list[float], Summary]:
        if self._found is None:
            raise RuntimeError("the figures are not computed yet")
        return self._found

    def _is_current(self) -> bool:
        """Whether figures are known, and no rule was given up since they were computed."""
        return self._found is not None and self._found[0] == [row.rule for row in self.rows]


class Deferred:
    """The steps of one optimizer that were copied, and wait for each other.

    Attributes:
        waiting: these steps, in order.
    """

    def __init__(
        self, engine: Engine, reasons: dict[str, str], waiting_bytes: Callable[[], int]
    ) -> None:
        """Create it without steps.

        Args:
            engine: of its own, because another thread may compute.
            reasons: receives the errors that rules raise, by name of the parameter.
            waiting_bytes: of the steps of all optimizers of the probe, passed on in order.
        """
        self._engine = engine
        self._reasons = reasons
        self._waiting_bytes = waiting_bytes
        self.waiting: list[CopiedStep] = []

    def add(self, copy: Copy, rows: list[Row], info: StepInfo, *, moved: bool) -> CopiedStep:
        """Let a copied step wait, unless it was a dummy step, whose figures nobody asks for."""
        step = CopiedStep(rows, info, copy, self, moved=moved)
        if moved:
            self.waiting.append(step)
        return step

    def drop(self, step: CopiedStep) -> None:
        """Forget a step, which was passed on."""
        if step in self.waiting:
            self.waiting.remove(step)

    def forget(self) -> None:
        """Forget all steps, in a forked child: they are the parent's."""
        self.waiting = []

    def is_due(self) -> bool:
        """Whether enough steps have waited, or one for long enough."""
        waiting = self.waiting
        if not waiting:
            return True
        late = time.monotonic() - waiting[0].since >= MAX_SECONDS
        many = len(waiting) * len(waiting[0].rows) >= MAX_PIECES
        return late or many or self._waiting_bytes() >= MAX_WAITING_BYTES

    def compute(self) -> None:
        """Compute the figures of all steps that wait."""
        waiting = list(self.waiting)
        for _, run in groupby(waiting, lambda step: (id(step.rows), step.copy.kind)):
            self._compute(list(run))

    def _compute(self, steps: list[CopiedStep]) -> None:
        rows, rules = steps[0].rows, [row.rule for row in steps[0].rows]
        count = len(rows)
        buffers = blank(len(steps) * count, 0, _CPU)
        with undisturbed():
            figures = figures_of(self._engine, [step.copy for step in steps])
            fill(buffers, figures, range(len(steps) * count), {}, folds=False)
        self._reasons.clear()
        for at, why in figures.failed.items():
            self._reasons[rows[at % count].name] = why
        bins = Bins.empty() if buffers.bins is None else buffers.bins
        arrived = Arrived(buffers.sums.numpy(), buffers.maxima.numpy(), np.zeros(0), bins)
        errors = rule_errors(arrived)
        summaries = summaries_of(rows, rules, arrived, len(steps))
        for k, (step, summary) in enumerate(zip(steps, summaries, strict=True)):
            step.set(rules, errors[k * count : (k + 1) * count], summary)
