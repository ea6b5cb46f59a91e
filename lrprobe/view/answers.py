"""What the front end asks for, as JSON: little enough for a screen, whatever was recorded."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrprobe.text import shorter
from lrprobe.view.table import FIGURES, Matrix, Table

if TYPE_CHECKING:
    from lrprobe.diagnosis import Finding, Findings

_CELLS = 200_000
"""Cells of a heatmap, about; a screen has not many more."""

_COLUMNS = 60, 500
"""Columns of a heatmap, at least and at most."""

_POINTS = 600
"""Points of a line at most."""

_TINY = 1e-38


def overview(tables: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> dict[str, Any]:
    """What there is: tables, the figures to pick from, and what is to be said of them."""
    names = titles([(table["run"], table["optimizer"]) for table in tables])
    return {
        "tables": [{**table, "title": name} for table, name in zip(tables, names, strict=True)],
        "figures": {name: figure._asdict() for name, figure in FIGURES.items()},
        "notes": list(notes),
    }


def titles(keys: Sequence[tuple[str, str]]) -> list[str]:
    """What each run and optimizer is called: the run, and the optimizer where it has several."""
    runs = [run for run, _ in keys]
    return [
        optimizer if not run else run if runs.count(run) == 1 else f"{run} · {optimizer}"
        for run, optimizer in keys
    ]


def about(table: Table) -> dict[str, Any]:
    """One table without its figures."""
    return {
        "run": table.run,
        "optimizer": table.optimizer,
        "level": table.level,
        "names": list(table.names),
        "groups": list(table.groups),
        "figures": list(table.figures),
    }


def heatmap(
    table: Table, figure: str, low: float = -math.inf, high: float = math.inf
) -> dict[str, Any]:
    """A figure of all parameters at some recorded steps.

    Args:
        table: of what.
        figure: which column.
        low: the first step, and
        high: the last that is asked for.

    Returns:
        ``steps``, and ``values``: parameters × steps; how many recorded steps there are in all, and
        the first and the last of them.

    Raises:
        KeyError: the table has no such figure.
    """
    matrix = table.figures[figure]
    fewest, most = _COLUMNS
    most = min(max(_CELLS // max(len(table.names), 1), fewest), most)
    at = picked(table.steps, matrix, low, high, most)
    steps = table.steps
    return {
        "steps": steps[at].tolist(),
        "values": packed(matrix[at].T),
        "recorded": len(steps),
        "first": int(steps[0]) if len(steps) else 0,
        "last": int(steps[-1]) if len(steps) else 0,
    }


def detail(
    table: Table, name: str, low: float = -math.inf, high: float = math.inf, step: int | None = None
) -> dict[str, Any]:
    """All figures of one parameter at some recorded steps.

    Args:
        table: of what.
        name: the parameter's.
        low: the first step, and
        high: the last that is asked for.
        step: one that must be among them, or the recorded one before it.

    Returns:
        ``steps``, and ``figures``: column to values.

    Raises:
        ValueError: there is no such parameter.
    """
    row = list(table.names).index(name)
    lead = next((c for c in FIGURES if c in table.figures), None)
    matrix = table.figures[lead][:, [row]] if lead else np.empty((len(table.steps), 0), np.float32)
    at = picked(table.steps, matrix, low, high, _POINTS)
    if step is not None and len(table.steps):
        nearest = max(int(np.searchsorted(table.steps, step, side="right")) - 1, 0)
        at = np.union1d(at, [nearest])
    return {
        "steps": table.steps[at].tolist(),
        "figures": {column: packed(m[at, row]) for column, m in table.figures.items()},
    }


def found(findings: Findings) -> dict[str, Any]:
    """Findings, as the front end shows them."""
    return {
        "summary": findings.summary(),
        "left_out": list(findings.left_out),
        "groups": [
            {
                **{name: getattr(same[0], name) for name in ("severity", "code", "title")},
                **{name: getattr(same[0], name) for name in ("meaning", "advice")},
                "run": shorter(same[0].run),
                "optimizer": shorter(same[0].optimizer),
                "items": [
                    {
                        "parameter": shorter(each.parameter),
                        "steps": str(each.steps),
                        "evidence": each.evidence,
                        "first": int(each.steps.first),
                        "last": int(each.steps.last),
                    }
                    for each in same
                ],
            }
            for same in findings.grouped()
        ],
    }


def divided(findings: Findings, keys: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Findings of several runs and optimizers, as the front end shows them with each table.

    Args:
        findings: of all of them.
        keys: run and optimizer of each table. Findings about an optimizer without a table go to
            the first one of the run, what was left out to the first of all.
    """
    from lrprobe.diagnosis import Findings

    parts: list[list[Finding]] = [[] for _ in keys]
    runs = [run for run, _ in keys]
    for each in findings:
        key = shorter(each.run), shorter(each.optimizer)
        place = keys.index(key) if key in keys else runs.index(key[0]) if key[0] in runs else 0
        parts[place].append(each)
    return [
        found(Findings(part, left_out=() if at else findings.left_out))
        for at, part in enumerate(parts)
    ]


def picked(
    steps: NDArray[np.int64], matrix: Matrix, low: float, high: float, most: int
) -> NDArray[np.int64]:
    """Which recorded steps to show: all, or of each so many in a row the most unusual one.

    Evenly spread ones would hide what happened once. Each that is shown is one that was recorded,
    not a mean; the first and the last are among them.

    Args:
        steps: the recorded ones.
        matrix: the figures, steps × parameters.
        low: the first step, and
        high: the last that is asked for; one more is given on either side.
        most: how many, about.
    """
    start = max(int(np.searchsorted(steps, low)) - 1, 0)
    end = min(int(np.searchsorted(steps, high, side="right")) + 1, len(steps))
    count = end - start
    if count <= most:
        return np.arange(start, end)
    edges = np.linspace(start, end, most + 1).astype(np.int64)
    logs = np.log10(np.maximum(np.nan_to_num(np.abs(matrix[start:end]), posinf=1e38), _TINY))
    width = np.diff(edges)
    means = np.add.reduceat(logs, edges[:-1] - start, axis=0) / width[:, None]
    unusual = np.abs(logs - np.repeat(means, width, axis=0)).max(axis=1, initial=0.0)
    best = [
        int(edge) + int(unusual[edge - start : edge - start + size].argmax())
        for edge, size in zip(edges[:-1], width, strict=True)
    ]
    return np.unique(np.array([start, *best, end - 1]))


def packed(values: NDArray[np.float32]) -> str:
    """Little-endian float32 as base64: a third of the size of numbers as text, and no NaN lost."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def document(
    tables: Sequence[Table], *, findings: bool, most_bytes: int = 3_400_000, most_steps: int = 400
) -> dict[str, Any]:
    """All that a page needs which has its figures inside.

    Args:
        tables: what was recorded.
        findings: whether the view shows findings itself.
        most_bytes: of all figures, about, and
        most_steps: of each table; of more recorded steps the most unusual ones are in it.
    """
    share = most_bytes / max(len(tables), 1)
    inside = []
    for table in tables:
        row = 4 * len(table.figures) * max(len(table.names), 1)
        most = max(min(most_steps, int(share / max(row, 1))), 20)
        lead = next((c for c in FIGURES if c in table.figures), None)
        matrix = table.figures[lead] if lead else np.zeros((len(table.steps), 1), np.float32)
        at = picked(table.steps, matrix, -math.inf, math.inf, most)
        inside.append(
            {
                **about(table),
                "steps": table.steps[at].tolist(),
                "recorded": len(table.steps),
                "values": {column: packed(m[at].T) for column, m in table.figures.items()},
            }
        )
    return {**overview(inside), "options": {"findings": findings}}
