"""Versions for a bug report: ``lrprobe.show_versions()``."""

from __future__ import annotations

import os
import platform

import torch

from lrprobe.optional import version_of

_PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "tensorboard", "numba", "triton")


def versions() -> dict[str, str]:
    """Name to version, of lrprobe, of its dependencies, and of the machine."""
    return {
        "lrprobe": version_of("lrprobe"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version_of(name) for name in _PACKAGES},
        "torch": torch.__version__,  # which names the build: 2.13.0+cpu
        "cuda": _cuda(),
        "LRPROBE_ENGINE": os.environ.get("LRPROBE_ENGINE", "not set"),
    }


def show_versions() -> None:
    """Print the versions that a bug report needs.

    >>> show_versions()
    lrprobe         ...
    python          ...
    platform        ...
    """
    for name, value in versions().items():
        print(f"{name:<15} {value}")  # noqa: T201 - printing is what it is for


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"
    built = torch.version.cuda
    return f"not available (torch is built for {built})" if built else "not available"
