"""What is wrong with a training, as far as its frame tells, in plain words.

A check is one function and one row of ``CHECKS``. It looks at one optimizer of one run, as matrices
of recorded steps × parameters, and says where it finds what it looks for. The same checks look at a
frame (:func:`diagnose`) and at a run that still goes on (``attach(on_finding=...)``). Every
threshold has a name; ``docs/findings.md`` says how it was measured.
"""

from lrprobe.diagnosis.check import Check
from lrprobe.diagnosis.findings import Finding, Findings, Severity, Steps
from lrprobe.diagnosis.run import diagnose
from lrprobe.diagnosis.shared import matrices
from lrprobe.diagnosis.table import CHECKS

__all__ = ["CHECKS", "Check", "Finding", "Findings", "Severity", "Steps", "diagnose", "matrices"]
