"""Accelerate: its trackers as sinks. A prepared optimizer goes to ``lrprobe.attach`` as it is."""

from __future__ import annotations

from typing import Any

from lrprobe import sinks
from lrprobe.sinks import Sink
from lrprobe.sinks.tags import TagStyle


def trackers(accelerator: Any, *, prefix: str = "", tag_style: TagStyle = "lrprobe") -> list[Sink]:
    """The trackers of an ``Accelerator``, for ``lrprobe.attach(..., to=trackers(accelerator))``.

    TensorBoard, Weights & Biases, MLflow, Trackio and Comet receive what lrprobe's own sinks write.
    Any other tracker receives the scalars, through its ``log``, in a background thread. Close the
    probe before ``accelerator.end_training()``.

    Args:
        accelerator: after its ``init_trackers``.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: ``"lrprobe"``, ``"composer"`` or ``"olmo"``.

    Returns:
        A sink for each tracker; none in a process that is not the main one.

    Raises:
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """
    if not accelerator.is_main_process:
        return []
    return [_sink(tracker, prefix, tag_style) for tracker in accelerator.trackers]


def _sink(tracker: Any, prefix: str, style: TagStyle) -> Sink:
    if tracker.name == "tensorboard":
        return sinks.TensorBoard(tracker.writer, prefix=prefix, tag_style=style)
    if tracker.name == "wandb":
        return sinks.WandB(tracker.tracker, prefix=prefix, tag_style=style)
    if tracker.name == "mlflow":
        run = tracker.tracker.info.run_id
        return sinks.MLflow(run, prefix=prefix, tag_style=style)
    if tracker.name == "trackio":
        return sinks.Trackio(tracker.tracker, prefix=prefix, tag_style=style)
    if tracker.name == "comet_ml":
        return sinks.Comet(tracker.tracker, prefix=prefix, tag_style=style)
    return sinks.Scalars(tracker.log, prefix=prefix, tag_style=style)
