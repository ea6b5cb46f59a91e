"""A function as a sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrprobe.record import Record


class Function:
    """Calls a function with each record.

    Args:
        fn: called as ``fn(record)``, in a background thread, one record after the other. If it
            raises, the user is warned, and the record is offered again later.

    Raises:
        TypeError: ``fn`` cannot be called.
    """

    def __init__(self, fn: Callable[[Record], Any]) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a function that accepts a record; got {fn!r}")
        self._fn = fn

    def __repr__(self) -> str:
        return f"Function({getattr(self._fn, '__qualname__', repr(self._fn))})"

    def write(self, record: Record) -> None:
        """Call the function."""
        self._fn(record)

    def close(self) -> None:
        """Nothing."""
