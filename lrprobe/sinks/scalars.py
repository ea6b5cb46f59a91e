"""Scalars for any tracker that has a function to log them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle


class Scalars:
    """Hands the scalars of each record to a function, under the tags that TensorBoard has too.

    Above 200 parameters they are per module. What is NaN is left out, since trackers differ in
    what they make of it.

    Args:
        log: called as ``log({tag: value, ...}, step)``, in a background thread.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: whose names the tags have: ``"lrprobe"``, or ``"composer"`` or ``"olmo"`` for
            those figures that have a name there.

    Raises:
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float], int], Any],
        *,
        prefix: str = "",
        tag_style: TagStyle = "lrprobe",
    ) -> None:
        self._log = log
        self._tags = Tags(prefix, tag_style)

    def write(self, record: Record) -> None:
        """Log one record."""
        self._log(self._tags.values(record), record.step)

    def close(self) -> None:
        """Do nothing: what the function writes to is its owner's."""
