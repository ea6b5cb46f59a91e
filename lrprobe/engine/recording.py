"""Records a rule and a table of figures as one program for all pieces of a batch."""

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
    """What a backend computes for a batch in one call.

    Attributes:
        program: the operations.
        table: the figures.
        values: the value of each figure: a symbol, a scalar if all elements share it, or None.
        rate: the rate that is counted in logarithmic bins; None if nothing is counted.
        moves: the elements that are counted, and that figures of moving elements include.
        device: the device of the elements.
    """

    program: Program
    table: Sequence[Figure]
    values: list[Any]
    rate: Symbol | None
    moves: Symbol | None
    device: torch.device

    @property
    def key(self) -> tuple[Any, ...]:
        """A cache key; equal keys generate the same code."""
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
    """Run the rule on symbols, then compute the table's figures from its update.

    Args:
        table: which figures.
        entries: pieces of one batch, with the same rule, group and state entries.
        group: their parameter group.
        rule: their rule; None if the rate is measured.
        rates: whether to count the rates.
        kept: for each piece, the tensors known from before the step; empty if no figure needs
            them.
        memo: caches scalars for other programs of the same entries.
        known: the program of an earlier step; it is reused if the operations are the same.

    Raises:
        UnknownOperationError: if no code can be generated for an operation of the rule.
        Exception: what the rule raises.
    """
    if known is not None and known.rows == len(entries):
        known.rewind()
        again = _record_into(known, table, entries, group, rule, rates, kept, memo)
        if known.repeated:
            return again
    return _record_into(Program(len(entries)), table, entries, group, rule, rates, kept, memo)


def _record_into(
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
    if kept:  # samples that a piece lacks are read as zeros, so that every step has the same code
        names = {"param", "previous", *entries[0].wide_state(), *kept[0]}

    def had(name: str) -> Scalar:
        return column([float(name in each) for each in kept], entries[0].param.device)

    fetch: Any = program.leaf  # symbols stand for the tensors that a rule reads
    s = Slice(entries, group, fetch, memo, kept=names, had=had)
    e = Elements(s, rule)
    values = [figure.value(e) for figure in table]
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
