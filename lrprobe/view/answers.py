"""The data that the front end requests, as JSON, limited to what a screen can show."""

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
"""Approximate number of cells in a heatmap, as many as a screen can show."""

_COLUMNS = 60, 500
"""Minimum and maximum number of columns in a heatmap."""

_POINTS = 600
"""Maximum number of points in a line."""

_TINY = 1e-38


def overview(tables: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The tables, the available figures, and notes."""
    names = titles([(table["run"], table["optimizer"]) for table in tables])
    return {
        "tables": [{**table, "title": name} for table, name in zip(tables, names, strict=True)],
        "figures": {name: figure._asdict() for name, figure in FIGURES.items()},
        "notes": list(notes),
    }


def titles(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Name each table: by run, and by optimizer if the run has several."""
    runs = [run for run, _ in keys]
    return [
        optimizer if not run else run if runs.count(run) == 1 else f"{run} · {optimizer}"
        for run, optimizer in keys
    ]


def about(table: Table) -> dict[str, Any]:
    """A table without its figures."""
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
    """One figure of all parameters.

    Args:
        table: the table.
        figure: its column.
        low: the first step.
        high: the last step.

    Returns:
        ``steps``; ``values``: parameters × steps; the total number of recorded steps, the first
        and the last.

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
    """All figures of one parameter.

    Args:
        table: the table.
        name: the parameter.
        low: the first step.
        high: the last step.
        step: include this step, or the last recorded one before it.

    Returns:
        ``steps``; ``figures``: maps columns to values.

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
    """Findings in the form that the front end shows."""
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
    """Divide findings among tables.

    Args:
        findings: of several runs and optimizers.
        keys: run and optimizer of each table. Findings about an optimizer without a table go to
            the first table of the run, and the skipped checks to the first of all.

    Returns:
        The findings of each table, as from ``found``.
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
    """Choose the recorded steps to show: all, or the most unusual one of each interval.

    Evenly spaced steps would hide a single event. Each step shown is a recorded one, not a mean.
    The first and the last are included.

    Args:
        steps: the recorded steps.
        matrix: the figures, steps × parameters.
        low: the first step.
        high: the last step; one more on either side is included.
        most: approximate maximum number of steps.
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
    """Encode as little-endian float32 in base64: a third of the size of text, and keeps NaN."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def document(
    tables: Sequence[Table], *, findings: bool, most_bytes: int = 3_400_000, most_steps: int = 400
) -> dict[str, Any]:
    """The data of a page with embedded figures.

    Args:
        tables: the tables.
        findings: whether the view itself shows findings.
        most_bytes: approximate maximum size of all figures.
        most_steps: maximum number of steps per table; the most unusual ones are kept.
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
