"""Scalars for Weights & Biases."""

from __future__ import annotations

from typing import Any

from lrprobe.optional import extra
from lrprobe.record import Record
from lrprobe.sinks.tags import Tags, TagStyle


class WandB:
    """Logs the scalars of each record to a run of Weights & Biases, which it does not close.

    The charts use ``step_metric`` as the x-axis, which is logged with the scalars. It therefore
    does not matter what else the run logs and when, and no value is dropped for arriving late.
    Close the probe before ``run.finish()``.

    Args:
        run: what ``wandb.init`` returned; None uses the active run.
        step_metric: the metric that has the optimizer step; charts of others may share it.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: as in ``Scalars``.

    Raises:
        ModuleNotFoundError: the package is not installed (``pip install 'lrprobe[wandb]'``).
        RuntimeError: no run is active.
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        step_metric: str = "lrprobe/step",
        prefix: str = "",
        tag_style: TagStyle = "lrprobe",
    ) -> None:
        with extra("wandb"):
            import wandb

        self._tags = Tags(prefix, tag_style)
        self._step_metric = step_metric
        self._run: Any = wandb.run if run is None else run
        if self._run is None:
            raise RuntimeError("no Weights & Biases run is active; call wandb.init() first")
        self._defined: set[str] = set()

    def __repr__(self) -> str:
        return f"WandB({self._run.id!r})"

    @property
    def destination(self) -> str:
        """The run, and the prefix if there is one."""
        return f"wandb:{self._run.id}:{self._tags.prefix}"

    def write(self, record: Record) -> None:
        """Log one record."""
        values = self._tags.values(record)
        for tag in values.keys() - self._defined:
            self._run.define_metric(tag, step_metric=self._step_metric)
            self._defined.add(tag)
        self._run.log({self._step_metric: record.step, **values})

    def close(self) -> None:
        """Do nothing: the run belongs to its owner."""
