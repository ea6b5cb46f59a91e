"""Scalars for Comet."""

from __future__ import annotations

from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle


class Comet:
    """Logs the scalars of each record to a Comet experiment, which it does not close.

    They have the optimizer's step. Comet assigns metrics without a step the last step that it has
    seen, so pass a step with your own (``experiment.log_metric(name, value, step=...)``). Close the
    probe before ``experiment.end()``.

    Args:
        experiment: an ``Experiment``, ``OfflineExperiment`` or what ``comet_ml.start`` returned;
            None uses the running one.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[comet]'``).
        RuntimeError: no experiment is running.
        ValueError: ``prefix`` has other characters, or the style does not exist.
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
        """The experiment, and the prefix if there is one."""
        return f"comet:{self._experiment.get_key()}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Log one record."""
        self._experiment.log_metrics(self._tags.values(record), step=record.step)

    def close(self) -> None:
        """Do nothing: the experiment belongs to its owner."""
