"""How figures are computed: eagerly, or by code generated for the device of the tensors."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Literal

import torch

from lrprobe.text import warn

EngineName = Literal["auto", "eager", "cpu", "cuda"]
VARIABLE = "LRPROBE_ENGINE"


def engine_from_env() -> EngineName:
    """Read the environment variable LRPROBE_ENGINE.

    Raises:
        ValueError: if its value is not an engine.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    for name in ("auto", "eager", "cpu", "cuda"):
        if value == name:
            return name
    raise ValueError(f"{VARIABLE}={value!r}: it may be auto, eager, cpu or cuda")


def backends_for(engine: EngineName) -> dict[str, ModuleType]:
    """Device type to the module that generates code for it; other devices are eager."""
    found: dict[str, ModuleType] = {}
    if engine in ("auto", "cpu"):
        from lrprobe.engine import cpu

        _add(found, "cpu", cpu, cpu.unavailable())
    if engine == "cuda" or (engine == "auto" and torch.cuda.is_available()):
        from lrprobe.engine import cuda

        for device in cuda.DEVICES:  # "cpu" under Triton's interpreter
            _add(found, device, cuda, cuda.unavailable())
    return found


def _add(found: dict[str, ModuleType], device: str, module: ModuleType, reason: str) -> None:
    if reason:
        warn_eager_once(f"{reason}; a recorded step then costs about ten times as much")
    else:
        found[device] = module


@cache
def warn_eager_once(reason: str) -> None:
    """Warn once that figures are computed eagerly, and why."""
    warn(f"figures are computed with plain tensor operations, because {reason}")
