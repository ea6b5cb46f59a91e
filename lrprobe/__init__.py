"""See the learning rate that a PyTorch optimizer really uses, element by element."""

from lrprobe import plot, report, sinks, testing
from lrprobe.diagnosis import Finding, Findings, diagnose
from lrprobe.inspect import StepView, effective_lr, inspect_step
from lrprobe.probe import Probe, attach
from lrprobe.read import read
from lrprobe.record import Record
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
    "inspect_step",
    "plot",
    "read",
    "register_rule",
    "report",
    "show_versions",
    "sinks",
    "testing",
]
