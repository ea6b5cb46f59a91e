"""A recorded step on its way to the host: the only place where device values are read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.buffers import MAXIMA, Arrived, Buffers
from lrprobe.engine.columns import Row, StepInfo, record_of, rule_errors, summaries_of
from lrprobe.engine.distribution import Bins, unfold
from lrprobe.record import Record

PATIENCE = 60.0
"""Maximum seconds to wait for the other ranks' figures."""

CHANGED, MOVED = 0, 1
"""Flags in the last row of the maxima: whether the parameters of a rank have changed since it
described them, and whether a rate and a gradient were not 0."""


class StepInFlight:
    """The figures of one step, until they are on the host.

    Attributes:
        info: what the hooks know about the step.
        rows: the parameters of the frame.
        until: deadline for waiting, on the ``time.monotonic`` clock.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        buffers: Buffers,
        info: StepInfo,
        works: Sequence[Any] = (),
        *,
        reads_rates: bool = True,
    ) -> None:
        """Start the copy to the host, or wait for the collectives in ``works`` first.

        ``reads_rates`` is whether to copy the distributions, which only the rank that creates
        records needs.
        """
        self.info = info
        self.rows = rows
        self.until = math.inf
        self._rules = [row.rule for row in rows]
        self._buffers = buffers
        self._works = works
        self._reads_rates = reads_rates
        self._crossing: Crossing | None = None
        self._arrived: Arrived | None = None
        if not works:
            self._cross()

    @property
    def nbytes(self) -> int:
        """Bytes held until the record is created."""
        buffers = self._buffers
        tensors = (buffers.sums, buffers.maxima, buffers.tracked, buffers.folded)
        known = 0 if buffers.bins is None else 24 * len(buffers.bins.owner)
        return known + sum(t.nbytes for t in tensors if t is not None)

    @property
    def is_dummy(self) -> bool:
        """Whether every rate or every gradient was 0, as when a checkpoint library makes state."""
        return bool(self.arrived().maxima[-1, MOVED] <= 0)

    @property
    def changed(self) -> bool:
        """Whether the parameters of a rank have changed since it described them."""
        return bool(self.arrived().maxima[-1, CHANGED] > 0)

    def settled(self) -> bool:
        """Whether it is known if it was a dummy step."""
        return self.ready()

    def ready(self) -> bool:
        """Whether the figures have arrived."""
        crossing = self._begun()
        return crossing is not None and crossing.ready()

    def _begun(self) -> Crossing | None:
        """The copy to the host; None until the collectives are done."""
        if self._crossing is None and all(work.is_completed() for work in self._works):
            with _side_stream(self._buffers.sums.device):
                for work in self._works:
                    work.wait()
                self._cross()
        return self._crossing

    def wait(self) -> bool:
        """Wait for the collectives, at most until the deadline; whether they are done."""
        until, pause = min(self.until, time.monotonic() + PATIENCE), 1e-4
        while self._begun() is None:
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def arrived(self) -> Arrived:
        """The figures on the host; waits for them.

        Raises:
            TimeoutError: if other ranks do not take part in the collectives.
            RuntimeError: if the process group has failed.
        """
        if self._arrived is None:
            if not self.wait() or self._crossing is None:
                raise TimeoutError(
                    f"the other ranks have not recorded their part of step {self.info.step} "
                    f"within {PATIENCE:g} s"
                )
            sums, maxima, tracked, *folded = self._crossing.arrays()
            each = [] if self._buffers.bins is None else [self._buffers.bins]
            rows = self._buffers.folded_rows
            each += [unfold(table, rows) for table in folded]
            self._arrived = Arrived(sums, maxima, tracked, Bins.joined(each))
        return self._arrived

    def rule_errors(self) -> list[float]:
        """The reconstruction error of each row."""
        return rule_errors(self.arrived())

    def record(self) -> Record:
        """Create the record."""
        (summary,) = summaries_of(self.rows, self._rules, self.arrived())
        return record_of(summary, self.info)

    def _cross(self) -> None:
        buffers = self._buffers
        tensors = [buffers.sums, buffers.maxima, buffers.tracked]
        if buffers.folded is not None and self._reads_rates:
            tensors.append(buffers.folded)
        self._crossing = Crossing(tensors)


class Crossing:
    """An asynchronous copy of tensors to the host, with one buffer per device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._buffers: dict[torch.device, Tensor] = {}
        self._events: list[Any] = []
        devices = {t.device for t in tensors if t.device.type != "cpu"}
        for device in devices:
            flat = [
                t.contiguous().reshape(-1).view(torch.uint8) for t in tensors if t.device == device
            ]
            buffer = torch.cat(flat)
            host = torch.empty_like(buffer, device="cpu", pin_memory=True)
            host.copy_(buffer, non_blocking=True)
            event = torch.get_device_module(device).Event()
            event.record(torch.get_device_module(device).current_stream(device))
            self._buffers[device] = host
            self._events.append(event)

    def ready(self) -> bool:
        """Whether the copy is complete."""
        return all(event.query() for event in self._events)

    def arrays(self) -> list[NDArray[Any]]:
        """The values of the tensors, in order; waits for the copy."""
        for event in self._events:
            event.synchronize()
        start = dict.fromkeys(self._buffers, 0)
        result = []
        for tensor in self._tensors:
            host = tensor
            if tensor.device in self._buffers:
                end = start[tensor.device] + tensor.numel() * tensor.element_size()
                piece = self._buffers[tensor.device][start[tensor.device] : end]
                host = piece.clone().view(tensor.dtype).reshape(tensor.shape)
                start[tensor.device] = end
            result.append(np.asarray(host.numpy()))
        return result


def _side_stream(device: torch.device) -> Any:
    """A separate stream, so that waiting for the process group does not block the training's."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return module.stream(module.Stream(device))


__all__ = ["CHANGED", "MAXIMA", "MOVED", "PATIENCE", "Crossing", "StepInFlight"]
