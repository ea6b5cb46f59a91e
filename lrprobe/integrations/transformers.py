"""Transformers: a callback that records the optimizer of ``Trainer.train``."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lrprobe
from lrprobe import Probe, sinks
from lrprobe.optional import extra
from lrprobe.sinks import Sink
from lrprobe.sinks.tags import TagStyle

with extra("transformers"):
    from transformers import TrainerCallback


class LRProbeCallback(TrainerCallback):
    """Records the optimizer of a ``Trainer``: ``Trainer(..., callbacks=[LRProbeCallback()])``.

    Steps have the numbers of ``state.global_step``, also in a resumed training.
    ``callback.probe.frame()`` returns the frame, also after the training.

    Args:
        to: as for ``lrprobe.attach``; None follows ``report_to``: for ``"tensorboard"`` the logdir
            ``runs/lrprobe`` in ``output_dir`` (``lrprobe`` in ``$TENSORBOARD_LOGGING_DIR`` if that
            is set), for ``"wandb"``, ``"mlflow"``, ``"trackio"``, ``"comet_ml"`` and ``"clearml"``
            the active run, if there is one. Other values receive nothing.
        tag_style: of the tags in the trackers of ``report_to``.
        options: further arguments of ``lrprobe.attach``: ``every``, ``on_finding`` and others.
    """

    probe: Probe | None = None
    """The probe of the current training, or of the last one."""

    def __init__(self, to: Any = None, *, tag_style: TagStyle = "lrprobe", **options: Any) -> None:
        self._to = to
        self._tag_style = tag_style
        self._options = options
        self._opened: list[Sink] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; a checkpoint's optimizer is restored by now."""
        self.on_train_end(args, state, control)  # of a training that was interrupted
        main = state.is_world_process_zero
        if main and self._to is None:
            self._opened = self._report_to(args)
        self.probe = lrprobe.attach(
            kwargs["optimizer"],
            kwargs["model"],
            to=(self._opened if self._to is None else self._to) if main else None,
            # `global_step` counts completed steps; `step` is the number of the current one.
            **{"step": lambda: state.global_step + 1, **self._options},
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        if self.probe is not None:
            self.probe.close()
        while self._opened:
            self._opened.pop().close()

    def _report_to(self, args: Any) -> list[Sink]:
        found: list[Sink] = []
        style = self._tag_style
        if "tensorboard" in args.report_to:
            default = Path(args.output_dir, "runs")
            folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", default)).expanduser()
            found.append(sinks.TensorBoard(folder / "lrprobe", tag_style=style))
        with suppress(RuntimeError):  # no active run: the tracker's own callback is off
            if "wandb" in args.report_to:
                found.append(sinks.WandB(step_metric="train/global_step", tag_style=style))
        with suppress(RuntimeError):
            if "mlflow" in args.report_to:
                found.append(sinks.MLflow(tag_style=style))
        with suppress(RuntimeError):
            if "trackio" in args.report_to:
                found.append(sinks.Trackio(tag_style=style))
        with suppress(RuntimeError):
            if "comet_ml" in args.report_to:
                found.append(sinks.Comet(tag_style=style))
        with suppress(RuntimeError):
            if "clearml" in args.report_to:
                found.append(sinks.ClearML(tag_style=style))
        return found
