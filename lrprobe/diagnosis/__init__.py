"""Finds what is wrong with a training, from its frame.

A check is one function and one row of ``CHECKS``. It searches one optimizer of one run, as matrices
of recorded steps × parameters, and yields a hit for each problem. The same checks run on a frame
(:func:`diagnose`) and during a run (``attach(on_finding=...)``). Every threshold has a name;
``docs/findings.md`` says how it was measured.
"""

from lrprobe.diagnosis.check import Check
from lrprobe.diagnosis.findings import Finding, Findings, Severity, Steps
from lrprobe.diagnosis.run import diagnose
from lrprobe.diagnosis.shared import matrices
from lrprobe.diagnosis.table import CHECKS

__all__ = ["CHECKS", "Check", "Finding", "Findings", "Severity", "Steps", "diagnose", "matrices"]
