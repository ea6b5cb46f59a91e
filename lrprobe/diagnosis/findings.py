"""The result of a diagnosis: findings and notes, with a readable ``repr``."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from lrprobe.text import counted, shown

if TYPE_CHECKING:
    import pandas as pd

Severity: TypeAlias = Literal["finding", "note"]

PAGE = "docs/findings.md"
"""The page of the documentation that has a section for each code."""

_SHOWN = 3  # maximum parameters printed per finding


@dataclass(frozen=True, slots=True)
class Steps:
    """The recorded steps of a finding: the first, the last, and how many."""

    first: int
    last: int
    count: int

    def __str__(self) -> str:
        """Phrase for a sentence: ``steps 10 to 90 (9 recorded)``."""
        if self.first == self.last:
            return f"step {self.first:,}"
        return f"steps {self.first:,} to {self.last:,} ({self.count:,} recorded)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem, or one noteworthy fact, about one parameter.

    Attributes:
        severity: ``"finding"``, or ``"note"`` for something that is good to know but not a fault.
        code: its name, and the name of its section in ``docs/findings.md``.
        title: the finding in a few words.
        run: name of the run; empty if the frame has no column ``run``.
        optimizer: name of the optimizer.
        parameter: name of the parameter, or of the module or group that it concerns.
        steps: the recorded steps in which it was seen.
        evidence: what was seen, in numbers.
        numbers: the numbers in the evidence, by name.
        meaning: what it usually means.
        advice: what to try.
    """

    severity: Severity
    code: str
    title: str
    run: str
    optimizer: str
    parameter: str
    steps: Steps
    evidence: str
    numbers: Mapping[str, float] = field(hash=False)
    meaning: str
    advice: str

    @property
    def link(self) -> str:
        """The section of the documentation that explains it."""
        return f"{PAGE}#{self.code}"

    def __str__(self) -> str:
        """One line."""
        where = ", ".join(
            shown(word) for word in (self.run, self.optimizer, self.parameter) if word
        )
        return f"{self.title}: {where}, {self.steps}: {self.evidence}"


class Findings(Sequence[Finding]):
    """Findings, most severe first, then notes: a sequence with a readable ``repr``."""

    def __init__(
        self, found: Sequence[Finding], looked_at: str = "", left_out: Sequence[str] = ()
    ) -> None:
        self._found = tuple(found)
        self._looked_at = looked_at
        self._left_out = tuple(left_out)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Probable faults, without the notes."""
        return tuple(each for each in self if each.severity == "finding")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Facts that are good to know but not faults."""
        return tuple(each for each in self if each.severity == "note")

    @property
    def looked_at(self) -> str:
        """The scope of the diagnosis: how many steps of how many parameters."""
        return self._looked_at

    @property
    def left_out(self) -> tuple[str, ...]:
        """Which checks were skipped, and why: one sentence each."""
        return self._left_out

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Finding]: ...
    def __getitem__(self, index: int | slice) -> Finding | Sequence[Finding]:
        return self._found[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per finding, with the fields of :class:`Finding`; steps take three columns."""
        import pandas as pd

        kinds = dict.fromkeys(
            ("severity", "code", "title", "run", "optimizer", "parameter"), "str"
        ) | dict.fromkeys(("first", "last", "count"), "int64")
        kinds |= dict.fromkeys(("evidence", "meaning", "advice", "link"), "str")
        rows = [
            {
                **{name: getattr(each, name) for name in kinds if hasattr(each, name)},
                **asdict(each.steps),
            }
            for each in self
        ]
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)

    def grouped(self) -> Iterator[list[Finding]]:
        """Group findings with the same code, run and optimizer."""
        for _, same in groupby(self, lambda each: (each.code, each.run, each.optimizer)):
            yield list(same)

    def summary(self) -> str:
        """Count the findings and notes, in one line."""
        groups = list(self.grouped())
        notes = sum(same[0].severity == "note" for same in groups)
        found = len(groups) - notes
        text = f"{counted(found, 'finding')}, {counted(notes, 'note')}" if groups else "No findings"
        return f"{text} ({self._looked_at})" if self._looked_at else text

    def __repr__(self) -> str:
        lines = [self.summary(), *self.left_out]
        for same in self.grouped():
            head = same[0]
            where = " of ".join(shown(word) for word in (head.optimizer, head.run) if word)
            lines += ["", f"{head.severity.upper()} {head.title}  [{head.code}]  {where}".rstrip()]
            lines += [
                f"  {shown(each.parameter)}, {each.steps}: {each.evidence}"
                for each in same[:_SHOWN]
            ]
            if len(same) > _SHOWN:
                lines.append(f"  and {len(same) - _SHOWN} more")
            lines += [f"  Usually: {head.meaning}", f"  Try: {head.advice}", f"  See {head.link}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.summary())}</b></p>"]
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in self.left_out]
        for same in self.grouped():
            head = same[0]
            where = " of ".join(word for word in (head.optimizer, head.run) if word)
            parts.append(f'<section class="lrprobe-{head.severity}"><h4>')
            parts.append(f"{head.severity.capitalize()}: {html.escape(head.title)}")
            parts.append(f" <small>{html.escape(where)}</small></h4><ul>")
            parts += [
                f"<li><code>{html.escape(shown(each.parameter))}</code>, "
                f"{html.escape(f'{each.steps}: {each.evidence}')}</li>"
                for each in same[:_SHOWN]
            ]
            if len(same) > _SHOWN:
                parts.append(f"<li>and {len(same) - _SHOWN} more</li>")
            parts.append(f"</ul><p>Usually: {html.escape(head.meaning)}</p>")
            parts.append(f"<p>Try: {html.escape(head.advice)}</p>")
            parts.append(f"<p>See <code>{html.escape(head.link)}</code></p></section>")
        return "".join(parts)
