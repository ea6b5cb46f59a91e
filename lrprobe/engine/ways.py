"""Which way figures are taken: eager, or by code generated for the device the elements are on."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Literal

import torch

from lrprobe.text import warn

Way = Literal["auto", "eager", "cpu", "cuda"]
VARIABLE = "LRPROBE_ENGINE"


def chosen() -> Way:
    """What the environment variable LRPROBE_ENGINE says.

    Raises:
        ValueError: if it is none of the ways.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    for way in ("auto", "eager", "cpu", "cuda"):
        if value == way:
            return way
    raise ValueError(f"{VARIABLE}={value!r}: it may be auto, eager, cpu or cuda")


def generators(way: Way) -> dict[str, ModuleType]:
    """Type of a device to what generates code for it; a device that is not there is eager."""
    found: dict[str, ModuleType] = {}
    if way in ("auto", "cpu"):
        from lrprobe.engine import cpu

        _add(found, "cpu", cpu, cpu.unavailable())
    if way == "cuda" or (way == "auto" and torch.cuda.is_available()):
        from lrprobe.engine import cuda

        for device in cuda.DEVICES:  # Triton's interpreter takes what is on the CPU
            _add(found, device, cuda, cuda.unavailable())
    return found


def _add(found: dict[str, ModuleType], device: str, module: ModuleType, reason: str) -> None:
    if reason:
        notice(f"{reason}, so that a recorded step costs about ten times as much")
    else:
        found[device] = module


@cache
def notice(reason: str) -> None:
    """Say once why figures are taken eagerly."""
    warn(f"figures are taken by plain tensor operations, since {reason}")
