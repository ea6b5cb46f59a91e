"""Where records go: one backend a file, imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrprobe.sinks.base import Sink

if TYPE_CHECKING:
    from lrprobe.sinks.clearml import ClearML
    from lrprobe.sinks.comet import Comet
    from lrprobe.sinks.function import Function
    from lrprobe.sinks.jsonl import JSONL
    from lrprobe.sinks.memory import Memory
    from lrprobe.sinks.mlflow import MLflow
    from lrprobe.sinks.parquet import Parquet
    from lrprobe.sinks.scalars import Scalars
    from lrprobe.sinks.tensorboard import TensorBoard
    from lrprobe.sinks.trackio import Trackio
    from lrprobe.sinks.wandb import WandB

__all__ = [
    "JSONL",
    "ClearML",
    "Comet",
    "Function",
    "MLflow",
    "Memory",
    "Parquet",
    "Scalars",
    "Sink",
    "TensorBoard",
    "Trackio",
    "WandB",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)


def __dir__() -> list[str]:
    return __all__
