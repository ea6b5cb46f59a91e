"""See the learning rate that a PyTorch optimizer really uses, element by element."""

from lrprobe import sinks, testing
from lrprobe.inspect import StepView, effective_lr, inspect_step
from lrprobe.probe import Probe, attach
from lrprobe.read import read
from lrprobe.record import Record
from lrprobe.rules import Rule, Slice, Update, Whole, register_rule

__all__ = [
    "Probe",
    "Record",
    "Rule",
    "Slice",
    "StepView",
    "Update",
    "Whole",
    "attach",
    "effective_lr",
    "inspect_step",
    "read",
    "register_rule",
    "sinks",
    "testing",
]
