"""The interface of a sink."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lrprobe.record import Record


@runtime_checkable
class Sink(Protocol):
    """Receives records: called by one thread at a time, in order; closes only what it opened.

    lrprobe also uses these, if a sink has them:

    - ``flush()`` makes everything written durable and visible to readers. It is called within
      ``flush_secs`` (an attribute; 1 second if there is none) after a ``write``, by
      ``Probe.flush``, and before ``close``. If it raises, it keeps what it could not write for the
      next call.
    - ``attempt``: how often the destination had been continued.
    - ``destination``: a string that is the same for two sinks that write to the same place.
    - ``problems()``: messages since the last call, which lrprobe turns into warnings. A sink must
      not warn by itself, because it runs in a background thread.
    """

    def write(self, record: Record) -> None:
        """Write one record; if this raises, lrprobe offers the record again later."""

    def close(self) -> None:
        """Finish; called once, after the last ``write``."""
