"""Lightning: a callback that records the optimizers of ``Trainer.fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lrprobe
from lrprobe import Probe, sinks
from lrprobe.optional import extra
from lrprobe.sinks.tags import TagStyle
from lrprobe.text import warn

try:
    from lightning.pytorch import Callback
except ImportError:  # the same package under its older name
    with extra("lightning"):
        from pytorch_lightning import Callback


class LRProbeCallback(Callback):
    """Records the optimizers of a ``Trainer``: ``Trainer(callbacks=[LRProbeCallback()])``.

    ``callback.probe.frame()`` returns the frame, also after the training. The trainer's checkpoint
    contains the step counts. A resumed training continues from them, and so does a second ``fit``
    of the same trainer.

    Args:
        to: as for ``lrprobe.attach``; None uses the trainer's own loggers. TensorBoard, Weights &
            Biases, MLflow and Comet are used directly. For another logger with a directory (CSV),
            the dataset ``lrprobe.parquet`` is written there; any other receives the scalars.
        tag_style: of the tags in the trainer's loggers.
        options: further arguments of ``lrprobe.attach``: ``every``, ``on_finding`` and others.
    """

    probe: Probe | None = None
    """The probe of the current training, or of the last one."""

    def __init__(self, to: Any = None, *, tag_style: TagStyle = "lrprobe", **options: Any) -> None:
        self._to = to
        self._tag_style = tag_style
        self._options = options
        self._state: dict[str, Any] = {}
        self._ended_at = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; a checkpoint's optimizers are restored by now."""
        to = self._to
        if not trainer.is_global_zero:
            to = None  # the trainer's loggers do nothing there either
        elif to is None:
            to = [_sink(logger, self._tag_style) for logger in trainer.loggers]
        if not self._state and 0 < trainer.global_step == self._ended_at:  # a second `fit`
            self._state = self.state_dict()
        self.probe = lrprobe.attach(trainer.optimizers, pl_module, to=to, **self._options)
        state, self._state = self._state, {}
        if state:
            try:
                self.probe.load_state_dict(state)
            except ValueError as error:  # the training continues without it
                warn(f"the step count of the checkpoint is not restored: {error}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        self._ended_at = trainer.global_step
        if self.probe is not None:
            self.probe.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The state for the trainer's checkpoint."""
        return self._state if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until ``on_train_start`` attaches the probe."""
        self._state = state_dict


def _sink(logger: Any, tag_style: TagStyle) -> Any:
    """A value of ``to=`` for a logger; compares class names, which are equal in both packages."""
    names = {cls.__name__ for cls in type(logger).__mro__}
    if "TensorBoardLogger" in names:
        return sinks.TensorBoard(logger.experiment, tag_style=tag_style)
    if "WandbLogger" in names:
        return sinks.WandB(logger.experiment, tag_style=tag_style)
    if "MLFlowLogger" in names:
        return sinks.MLflow(logger.run_id, client=logger.experiment, tag_style=tag_style)
    if "CometLogger" in names:
        return sinks.Comet(logger.experiment, tag_style=tag_style)
    folder = getattr(logger, "log_dir", None)
    if folder:
        return Path(folder, "lrprobe.parquet")
    return sinks.Scalars(logger.log_metrics, tag_style=tag_style)
