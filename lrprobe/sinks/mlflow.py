"""Scalars for MLflow."""

from __future__ import annotations

import posixpath
from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle, clean

_BATCH = 1000  # metrics that MLflow takes at once


class MLflow:
    """Logs the scalars of each record as metrics of an MLflow run, which it does not close.

    A metric has the record's step and time. A ``/`` in a parameter's name becomes a ``.``, because
    MLflow treats it as a folder separator.

    Args:
        run_id: of the run; None uses the active run of this thread.
        client: an ``MlflowClient``; None creates one for the current tracking URI.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[mlflow]'``).
        RuntimeError: no run is active.
        ValueError: ``prefix`` has other characters, or makes no path in a folder; there is no such
            style.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        client: Any = None,
        prefix: str = "",
        tag_style: TagStyle = "lrprobe",
    ) -> None:
        with extra("mlflow"):
            import mlflow

        self._tags = Tags(prefix, tag_style, _name)
        if posixpath.normpath(f"_/{prefix}_") != f"_/{prefix}_" or prefix.startswith(".."):
            raise ValueError(
                f"prefix={prefix!r}: MLflow treats the name of a metric as a path in a folder"
            )
        if run_id is None:
            run = mlflow.active_run()
            if run is None:
                raise RuntimeError("no MLflow run is active; call mlflow.start_run() first")
            run_id = run.info.run_id
        self._run_id = run_id
        # Not mlflow.log_metrics, which would begin another run in the background thread.
        self._client = mlflow.MlflowClient() if client is None else client

    def __repr__(self) -> str:
        return f"MLflow({self._run_id!r})"

    @property
    def destination(self) -> str:
        """The run, and the prefix if there is one."""
        return f"mlflow:{self._run_id}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Log one record."""
        from mlflow.entities import Metric

        time = round(record.time * 1000)
        values = self._tags.values(record)
        metrics = [Metric(tag, value, time, record.step) for tag, value in values.items()]
        for at in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[at : at + _BATCH])

    def close(self) -> None:
        """Do nothing: the run belongs to its owner."""


def _name(name: str) -> str:
    result = clean(name).replace("/", ".")
    return result if result.strip(".") else "_"  # "." and ".." are folders
