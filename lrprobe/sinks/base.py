"""What a sink is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lrprobe.record import Record


@runtime_checkable
class Sink(Protocol):
    """Takes records: called by one thread at a time, in order; closes only what it opened.

    A few more things are used where a sink has them:

    - ``flush()`` makes all that was written durable and visible to readers. It is called within
      ``flush_secs`` (an attribute; 1 second where there is none) after a ``write``, by
      ``Probe.flush``, and before ``close``. One that raises keeps what it could not write, for the
      next call.
    - ``attempt``: how often the destination was continued before.
    - ``destination``: a string that is the same for two sinks that write to the same place.
    - ``problems()``: messages since the last call that the user should be warned of. A sink must
      not warn itself: it is called in a background thread.
    """

    def write(self, record: Record) -> None:
        """Take one record; if it raises, the record was not taken, and is offered again later."""

    def close(self) -> None:
        """Finish; called once, after the last ``write``."""
