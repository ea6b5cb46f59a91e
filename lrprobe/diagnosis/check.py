"""A row of the table of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lrprobe.diagnosis.findings import Finding, Severity, Steps
from lrprobe.diagnosis.shared import Hit
from lrprobe.series import Series


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table of checks.

    Attributes:
        severity: of its findings, unless a hit is marked as a note.
        code: name of the finding.
        find: yields the hits in one series.
        needs: columns that ``find`` requires.
        title: the finding in a few words.
        meaning: what it usually means.
        advice: what to try.
        asks: entries of the run's description that it needs, such as ``"groups"`` for
            hyperparameters.
    """

    severity: Severity
    code: str
    find: Callable[[Series], Iterator[Hit]]
    needs: tuple[str, ...]
    title: str
    meaning: str
    advice: str
    asks: tuple[str, ...] = ()

    def finding(self, series: Series, hit: Hit) -> Finding:
        """Turn a hit into a finding."""
        numbers = {name: float(value) for name, value in hit.numbers.items()}
        seen = hit.steps if len(hit.steps) else series.steps
        steps = Steps(int(seen[0]), int(seen[-1]), len(seen)) if len(seen) else Steps(0, 0, 0)
        return Finding(
            severity="note" if hit.note else self.severity,
            code=self.code,
            title=self.title,
            run=series.run,
            optimizer=series.optimizer,
            parameter=hit.parameter,
            steps=steps,
            evidence=hit.evidence.format(**numbers),
            numbers=numbers,
            meaning=hit.meaning or self.meaning,
            advice=hit.advice or self.advice,
        )
