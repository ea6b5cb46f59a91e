"""A rule and a table of figures, recorded as one program over all pieces of a kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrprobe.engine.figures import Elements, Figure
from lrprobe.engine.program import Program, Symbol
from lrprobe.rules.base import Entry, Rule, Scalar, Slice, column


@dataclass(slots=True)
class Recorded:
    """What one call computes of every element.

    Attributes:
        program: the operations.
        table: the figures.
        values: of each figure, a symbol; a scalar where all elements share it; None where there
            is none.
        rate: what is counted in logarithmic bins; None where nothing is.
        moves: which elements count there, and for figures of moving elements.
        device: where the elements are.
    """

    program: Program
    table: Sequence[Figure]
    values: list[Any]
    rate: Symbol | None
    moves: Symbol | None
    device: torch.device

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for programs with the same text."""
        names = tuple(v.label if isinstance(v, Symbol) else v is None for v in self.values)
        rate = None if self.rate is None else self.rate.label
        moves = None if self.moves is None else self.moves.label
        return self.program.number, names, rate, moves


def record(
    table: Sequence[Figure],
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule | None,
    *,
    rates: bool,
    kept: Sequence[Collection[str]] = (),
    memo: dict[Any, Any] | None = None,
    known: Program | None = None,
) -> Recorded:
    """Run the rule on symbols, and the table on what it says.

    Args:
        table: which figures.
        entries: pieces of one kind: the same rule, group, and names of state entries.
        group: their parameter group.
        rule: their rule; None where there is none.
        rates: whether the rates are to be counted.
        kept: of each piece, names of what is known from before the step; nothing for figures that
            do not ask.
        memo: keeps scalars for other programs of the same entries.
        known: what was recorded at an earlier step, which is likely to be the same and is then
            used again.

    Raises:
        UnknownOperationError: if the rule does something that cannot be printed.
        Exception: what the rule raises.
    """
    if known is not None and known.rows == len(entries):
        known.rewind()
        again = _noted(known, table, entries, group, rule, rates, kept, memo)
        if known.repeated:
            return again
    return _noted(Program(len(entries)), table, entries, group, rule, rates, kept, memo)


def _noted(
    program: Program,
    table: Sequence[Figure],
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule | None,
    rates: bool,
    kept: Sequence[Collection[str]],
    memo: dict[Any, Any] | None,
) -> Recorded:
    names: set[str] = set()
    if kept:  # what some pieces lack is read as zeros, so that all steps have one text
        names = {"param", "previous", *entries[0].wide_state(), *kept[0]}

    def had(name: str) -> Scalar:
        return column([float(name in each) for each in kept], entries[0].param.device)

    fetch: Any = program.leaf  # symbols stand for the tensors that a rule reads
    s = Slice(entries, group, fetch, memo, kept=names, had=had)
    e = Elements(s, rule)
    values = [figure.of(e) for figure in table]
    counted: Any = None
    moves: Any = None
    if rates:
        counted = e.measured_rate if rule is None else e.rate
        moves = e.has_grad if rule is None else e.moves
        if not isinstance(counted, Symbol):
            counted = None
    elif any(isinstance(v, Symbol) and f.moving for f, v in zip(table, values, strict=True)):
        moves = e.moves
    return Recorded(program, table, values, counted, moves, entries[0].param.device)
