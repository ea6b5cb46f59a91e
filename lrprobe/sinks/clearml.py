"""Scalars for ClearML."""

from __future__ import annotations

from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle, clean


class ClearML:
    """Reports the scalars of each record to a ClearML task, which it does not close.

    Each metric is a plot, and each parameter a series in it: ``effective_lr/0.weight`` is the
    series ``0.weight`` of the plot ``effective_lr``. A ``/`` in a parameter's name becomes a ``.``.
    Close the probe before ``task.close()``.

    Args:
        task: what ``Task.init`` returned; None uses the task of this process.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[clearml]'``).
        RuntimeError: this process has no task.
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """

    def __init__(
        self, task: Any = None, *, prefix: str = "", tag_style: TagStyle = "lrprobe"
    ) -> None:
        with extra("clearml"):
            from clearml import Task

        self._tags = Tags(prefix, tag_style, _name)
        self._task: Any = Task.current_task() if task is None else task
        if self._task is None:
            raise RuntimeError("this process has no ClearML task; call Task.init() first")
        self._logger: Any = self._task.get_logger()

    def __repr__(self) -> str:
        return f"ClearML({self._task.id!r})"

    @property
    def destination(self) -> str:
        """The task, and the prefix if there is one."""
        return f"clearml:{self._task.id}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Report one record."""
        for tag, value in self._tags.values(record).items():
            plot, _, series = tag.rpartition("/")
            self._logger.report_scalar(plot or series, series, value, record.step)

    def close(self) -> None:
        """Do nothing: the task belongs to its owner."""


def _name(name: str) -> str:
    return clean(name).replace("/", ".")
