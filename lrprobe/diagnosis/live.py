"""Findings during a run: the same checks, over a bounded history of its records.

The cost per record does not grow with the run. The history has the newest :data:`NEWEST` records of
each optimizer, and every second, fourth, … of the older ones, at most :data:`MAX_RECORDS` in total.
The checks run after the first few records, after a record that begins an attempt or has values that
are not finite, and otherwise after every :data:`PERIOD` records. With 150 parameters, that takes
0.6 ms per record on average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrprobe.about import KEY, Description, description, joined, merged
from lrprobe.diagnosis.findings import Finding
from lrprobe.diagnosis.run import diagnose, look
from lrprobe.record import Record
from lrprobe.runs import COLUMNS, NEWER_COLUMNS
from lrprobe.series import series_of

if TYPE_CHECKING:
    import pandas as pd

NEWEST, MAX_RECORDS = 24, 64
"""Records kept per optimizer: the newest without gaps, and in total."""
MAX_BYTES = 64 * 2**20
"""Limit of the kept records of an optimizer in bytes; the newest few are kept in any case."""
PERIOD = 40
"""Records between two runs of the checks, after the first few."""

_LOOKS = {1, 4, 8, 16}
_AGAIN = ("state-lost", "lr-jumps", "schedule-stalled", "decay-jumps")
"""Codes of findings that may occur again at each resume."""
_TEXT = ("optimizer", "parameter", "rule")
_OTHERS = ("step", "attempt", "group", "numel", "stepped")
_FIGURES = tuple(
    name for name in (*COLUMNS, *NEWER_COLUMNS) if name not in (*_TEXT, *_OTHERS, "time")
)

Key = tuple[str, str, str, int]
"""Identifies a finding: code, optimizer, parameter, and the step if it may occur at each resume."""


@dataclass(slots=True)
class _KeptRecord:
    """The columns of one record that checks need.

    Attributes:
        figures: the float columns: (columns, parameters).
        names: names of these columns.
        others: the other columns, with text encoded as integers.
    """

    figures: NDArray[np.float64]
    names: tuple[str, ...]
    others: dict[str, NDArray[Any]]

    def of(self, names: Sequence[str]) -> NDArray[np.float64]:
        """The float columns with these names."""
        if list(self.names) == names:
            return self.figures
        return self.figures[[self.names.index(name) for name in names]]


class LiveDiagnosis:
    """Reports each finding once while records arrive; a sink with its own thread.

    Args:
        callback: called with each new finding.
        history: returns what earlier attempts recorded in the dataset being continued; findings
            from them count as reported.
    """

    flush_secs = 10.0

    def __init__(
        self,
        callback: Callable[[Finding], object],
        history: Callable[[], pd.DataFrame | None] | None = None,
    ) -> None:
        self._callback = callback
        self._history = history
        self._kept: dict[str, list[_KeptRecord]] = {}
        self._names: dict[str, dict[str, int]] = {name: {} for name in _TEXT}
        self._count = 0
        self._looked_at = 0
        self._attempts: dict[str, tuple[int, int]] = {}  # latest attempt, and its records so far
        self._runs: dict[str, Mapping[str, Any]] = {}
        self._descriptions: list[Description] = []
        self._before: dict[str, Any] = {}
        self._about: Mapping[str, Any] = {}
        self._urgent: set[tuple[str, str]] = set()
        self._reported: set[Key] = set()
        self._problems: list[str] = []
        self._raised = False

    def __repr__(self) -> str:
        return f"on_finding={getattr(self._callback, '__qualname__', repr(self._callback))}"

    @property
    def reported(self) -> list[Key]:
        """Findings reported so far."""
        return sorted(self._reported)

    def mark_reported(self, keys: Iterable[Iterable[Any]]) -> None:
        """Mark findings as reported, because another instance has reported them."""
        for code, optimizer, parameter, step in keys:
            self._reported.add((str(code), str(optimizer), str(parameter), int(step)))

    def describe(self, run: Mapping[str, Any]) -> None:
        """Set the run's description, for the time before the first record."""
        self._about = run

    def write(self, record: Record) -> None:
        """Keep one record, and run the checks if they are due."""
        if self._history is not None:
            history, self._history = self._history, None
            with contextlib.suppress(OSError, ValueError):  # the history is optional
                self._begin_after(history())
        name = record.optimizer
        if self._runs.get(name) is not record.run:
            self._runs[name] = record.run
            self._descriptions.append(Description(record.attempt, record.step, name, record.run))
        latest, count = self._attempts.get(name, (record.attempt, 0))
        count = count + 1 if latest == record.attempt else 1
        self._attempts[name] = record.attempt, count
        columns = record.tables["parameter"]
        self._keep(name, columns)
        self._count += 1
        if (
            count in _LOOKS
            or self._count - self._looked_at >= PERIOD
            or self._is_urgent(name, columns)
        ):
            self._look(ongoing=True)

    def flush(self) -> None:
        """Run the checks if records have arrived since the last time."""
        if self._count > self._looked_at:
            self._look(ongoing=True)

    def close(self) -> None:
        """Check the whole run."""
        self._look(ongoing=False)

    def problems(self) -> list[str]:
        """Messages to warn the user with."""
        problems, self._problems = self._problems, []
        return problems

    def _keep(self, name: str, columns: Mapping[str, NDArray[Any]]) -> None:
        names = tuple(each for each in _FIGURES if each in columns)
        others = {each: columns[each] for each in _OTHERS}
        for each in _TEXT:
            known = self._names[each]
            numbers = [known.setdefault(str(text), len(known)) for text in columns[each].tolist()]
            others[each] = np.array(numbers, dtype=np.int32)
        figures = np.array([columns[each] for each in names], dtype=np.float64)
        kept = self._kept.setdefault(name, [])
        kept.append(_KeptRecord(figures, names, others))
        limit = max(NEWEST // 4, min(MAX_RECORDS, MAX_BYTES // max(figures.nbytes, 1)))
        if len(kept) > limit:  # drop every second of the older ones, but not the first
            older = max(2, len(kept) - min(NEWEST, limit // 2))
            kept[:older] = kept[:older:2]

    def _is_urgent(self, name: str, columns: Mapping[str, NDArray[Any]]) -> bool:
        """Whether a record shows, for the first time, something to report immediately."""
        with np.errstate(invalid="ignore"):
            signs = {
                (name, "nonfinite"): bool((columns["nonfinite"] > 0).any()),
                (name, "negative"): bool((columns["lr"] < 0).any()),
            }
        new = {sign for sign, seen in signs.items() if seen} - self._urgent
        self._urgent |= new
        return bool(new)

    def _frame(self) -> pd.DataFrame:
        """The kept records as a frame."""
        import pandas as pd

        records = [each for kept in self._kept.values() for each in kept]
        columns: dict[str, Any] = {}
        if records:
            for name in (*_OTHERS, *_TEXT):
                columns[name] = np.concatenate([each.others[name] for each in records])
            names = [n for n in records[0].names if all(n in each.names for each in records)]
            figures = np.concatenate([each.of(names) for each in records], axis=1)
            columns |= zip(names, figures, strict=True)
        for name in _TEXT:
            if name in columns:
                known = pd.Index(list(self._names[name]))
                columns[name] = pd.Categorical.from_codes(columns[name], categories=known)
        frame = pd.DataFrame(columns, copy=False)
        frame.attrs[KEY] = joined(
            self._before, merged([Description(0, 0, "", self._about), *self._descriptions])
        )
        return frame

    def _look(self, *, ongoing: bool) -> None:
        self._looked_at = self._count
        if self._kept and ongoing:
            found = []
            for series in series_of(self._frame()):
                series.ongoing = True
                found += look(series)
        elif ongoing:
            return
        else:
            frame = self._frame()
            found = list(diagnose(frame if len(frame.columns) else frame.assign(step=[])))
        for finding in found:
            key = _key(finding)
            if key not in self._reported:
                self._reported.add(key)
                self._pass_on(finding)

    def _pass_on(self, finding: Finding) -> None:
        try:
            self._callback(finding)
        except BaseException as error:  # noqa: BLE001 - a callback may raise what it likes
            if not self._raised:
                self._problems.append(
                    f"{self!r} raised {type(error).__name__}: {error}. It is still called with "
                    "further findings; later errors are not reported"
                )
            self._raised = True

    def _begin_after(self, history: pd.DataFrame | None) -> None:
        """Treat the records of earlier attempts as the beginning of this run."""
        if history is None or not len(history):
            return
        self._before = description(history)
        self._reported |= {_key(finding) for finding in diagnose(history)}
        for optimizer, rows in history.groupby("optimizer", sort=False, observed=True):
            for _, one in rows.groupby(["attempt", "step"], sort=True):
                self._keep(str(optimizer), {str(name): one[name].to_numpy() for name in one})


def _key(finding: Finding) -> Key:
    step = finding.steps.first if finding.code in _AGAIN else 0
    return finding.code, finding.optimizer, finding.parameter, step
