"""Scalars for Comet."""

from __future__ import annotations

from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle


class Comet:
    """Logs the scalars of each record to a Comet experiment, which stays its owner's.

    They have the optimizer's step. Comet gives what is logged without a step the last one that it
    has seen: give your own metrics a step (``experiment.log_metric(name, value, step=...)``). Close
    the probe before ``experiment.end()``.

    Args:
        experiment: an ``Experiment``, ``OfflineExperiment`` or what ``comet_ml.start`` returned;
            None takes the one that is running.
        prefix: put before each tag, as it is; of ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[comet]'``).
        RuntimeError: no experiment is running.
        ValueError: ``prefix`` has other characters; there is no such style.
    """

    def __init__(
        self, experiment: Any = None, *, prefix: str = "", tag_style: TagStyle = "lrprobe"
    ) -> None:
        with extra("comet"):
            import comet_ml

        self._tags = Tags(prefix, tag_style)
        self._experiment: Any = (
            comet_ml.get_running_experiment() if experiment is None else experiment
        )
        if self._experiment is None or self._experiment.ended:
            raise RuntimeError("no Comet experiment is running; call comet_ml.start() first")

    def __repr__(self) -> str:
        return f"Comet({self._experiment.get_key()!r})"

    @property
    def destination(self) -> str:
        """The experiment, and the prefix where there is one."""
        return f"comet:{self._experiment.get_key()}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Log one record."""
        self._experiment.log_metrics(self._tags.values(record), step=record.step)

    def close(self) -> None:
        """Do nothing: the experiment is its owner's."""
