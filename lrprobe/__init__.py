"""See the learning rate that a PyTorch optimizer really uses, element by element.

What needs torch is imported when it is first asked for: a command that reads a dataset, and
TensorBoard, which imports every plugin at its start, do without.
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
"""Where a name is that is imported late."""

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
