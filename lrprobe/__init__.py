"""Show the learning rate that a PyTorch optimizer really uses, element by element.

Modules that need torch are imported on first use: commands that read a dataset, and TensorBoard,
which imports every plugin at startup, do without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrprobe.diagnosis import Finding, Findings, diagnose
from lrprobe.read import read
from lrprobe.record import Record

if TYPE_CHECKING:
    from lrprobe import plot, report, sinks, testing
    from lrprobe.inspect import StepView, effective_lr, inspect_step
    from lrprobe.notebook import explore
    from lrprobe.probe import Probe, attach
    from lrprobe.rules import Rule, Slice, Update, Whole, register_rule
    from lrprobe.versions import show_versions

__all__ = [
    "Finding",
    "Findings",
    "Probe",
    "Record",
    "Rule",
    "Slice",
    "StepView",
    "Update",
    "Whole",
    "attach",
    "diagnose",
    "effective_lr",
    "explore",
    "inspect_step",
    "plot",
    "read",
    "register_rule",
    "report",
    "show_versions",
    "sinks",
    "testing",
]

_HOMES = {
    **dict.fromkeys(("StepView", "effective_lr", "inspect_step"), "inspect"),
    **dict.fromkeys(("Probe", "attach"), "probe"),
    **dict.fromkeys(("Rule", "Slice", "Update", "Whole", "register_rule"), "rules"),
    "explore": "notebook",
    "show_versions": "versions",
}
"""Name to the module from which it is imported on first use."""

_MODULES = ("plot", "report", "sinks", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
