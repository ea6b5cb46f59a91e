"""Scalars for Trackio."""

from __future__ import annotations

from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle


class Trackio:
    """Logs the scalars of each record to a Trackio run, which it does not close.

    They have the optimizer's step. Trackio numbers metrics without a step from the highest step
    that it has seen, so pass a step with your own (``trackio.log(metrics, step=...)``). Close the
    probe before ``trackio.finish()``.

    Args:
        run: what ``trackio.init`` returned; None uses the active run of this thread.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[trackio]'``).
        RuntimeError: no run is active.
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """

    def __init__(
        self, run: Any = None, *, prefix: str = "", tag_style: TagStyle = "lrprobe"
    ) -> None:
        with extra("trackio"):
            from trackio import context_vars

        self._tags = Tags(prefix, tag_style)
        self._run: Any = context_vars.current_run.get() if run is None else run
        if self._run is None:
            raise RuntimeError("no Trackio run is active; call trackio.init() first")

    def __repr__(self) -> str:
        return f"Trackio({self._run.project!r}, {self._run.name!r})"

    @property
    def destination(self) -> str:
        """The run, and the prefix if there is one."""
        return f"trackio:{self._run.project}/{self._run.name}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Log one record."""
        self._run.log(self._tags.values(record), step=record.step)

    def close(self) -> None:
        """Do nothing: the run belongs to its owner."""
