"""Ignite: attaches a probe that an engine's events flush."""

from __future__ import annotations

from typing import Any

from torch import nn

import lrprobe
from lrprobe import Probe
from lrprobe.optional import extra

with extra("ignite"):
    from ignite.engine import Engine, Events


def attach(engine: Engine, optimizer: Any, model: nn.Module | None = None, **options: Any) -> Probe:
    """Record the optimizer that an engine's process function steps.

    Records are written when a run of the engine ends or is interrupted; if an exception ends it, a
    few seconds later. The probe stays open for the next run of the engine; close it yourself. It
    counts steps of the optimizer, or iterations of the engine with
    ``step=lambda: engine.state.iteration``. It can be one of the objects of an
    ``ignite.handlers.Checkpoint``.

    Args:
        engine: the trainer.
        optimizer: as for ``lrprobe.attach``.
        model: as for ``lrprobe.attach``.
        options: further arguments of ``lrprobe.attach``.

    Raises:
        TypeError: as ``lrprobe.attach`` does.
        ValueError: the same.
        OSError: the same.
    """
    probe = lrprobe.attach(optimizer, model, **options)
    # Not EXCEPTION_RAISED: if that has a handler, the engine does not re-raise the exception.
    ends = Events.COMPLETED | Events.TERMINATE | Events.INTERRUPT
    engine.add_event_handler(ends, probe.flush)
    return probe
