"""What a sink receives: one recorded step as columns. Independent of torch and backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1
"""Version of the columns below, which every dataset stores."""

Level: TypeAlias = Literal["parameter", "module", "group", "model"]
"""What one row of a table describes."""

LEVELS: tuple[Level, ...] = ("parameter", "module", "group", "model")

KEYS: Mapping[Level, Mapping[str, str]] = {
    "parameter": {"group": "int64", "group_name": "str", "parameter": "str"},
    "module": {"module": "str"},
    "group": {"group": "int64"},
    "model": {},
}
"""Per level, the columns that distinguish its rows within one step of one optimizer."""

QUANTILES: Mapping[str, float] = {
    "p01": 0.01,
    "p05": 0.05,
    "p25": 0.25,
    "p50": 0.50,
    "p75": 0.75,
    "p95": 0.95,
    "p99": 0.99,
}
"""Suffix of the column to the share of elements below its value."""

RATE = tuple(
    f"effective_lr_{suffix}"
    for suffix in ("mean", "gmean", "std", "min", *QUANTILES, "max", "applied")
)
FIGURES = (
    "lr",
    "initial_lr",
    "decay",
    "samples",
    "lr_per_sample",
    *RATE,
    "idle_fraction",
    "update_norm",
    "update_ratio",
    "update_grad_cosine",
    "param_norm",
    "grad_norm",
    "zero_grad_fraction",
    "grad_persistence",
    "rms_grad_mean",
    "rms_update_mean",
    "eps_fraction",
    "nonfinite",
    "lost_fraction",
    "reconstruction_error",
    "state_error",
)
"""The float64 columns of a frame, in order."""

_STEP = {"step": "int64", "time": "float64", "attempt": "int64", "optimizer": "str"}


def frame_columns(level: Level) -> dict[str, str]:
    """Name to type (``int64``, ``float64``, ``bool``, ``str``) of a frame's columns, in order."""
    return {
        **_STEP,
        **KEYS[level],
        "numel": "int64",
        "rule": "str",
        "stepped": "bool",
        **dict.fromkeys(FIGURES, "float64"),
    }


_SIZES = {"int64": 8, "float64": 8, "bool": 1, "str": 0}
"""Bytes of a value; names are shared between records and not counted."""


def _row_bytes(columns: Mapping[str, str]) -> int:
    return sum(_SIZES[kind] for kind in columns.values())


ELEMENT_COLUMNS: Mapping[str, str] = {
    **_STEP,
    **KEYS["parameter"],
    "element": "int64",
    **dict.fromkeys(("effective_lr", "update", "grad", "param"), "float64"),
}
"""Columns of ``elements()``: the tracked elements, one row each."""

HISTOGRAM_COLUMNS: Mapping[str, str] = {
    **_STEP,
    **KEYS["parameter"],
    "edges": "list<float64>",
    "counts": "list<int64>",
}
"""Columns of ``histograms()``: n + 1 edges and n counts of the effective rate per row."""

Columns: TypeAlias = Mapping[str, NDArray[Any]]
"""Column name to a 1-d array (object dtype for ``str``), all of equal length."""


@dataclass(frozen=True, slots=True)
class Record:
    """One recorded step of one optimizer.

    Attributes:
        step: the optimizer step, counted as ``Probe.step`` counts.
        time: unix seconds at the end of the step.
        attempt: 0 for a fresh dataset, one more each time it is continued.
        optimizer: name of the optimizer.
        tables: per level the columns of ``frame_columns(level)``.
        edges: per row of the parameter table, the n + 1 ascending edges of a histogram of the
            effective rate; empty if the row has no rate.
        counts: the n counts that belong to them.
        elements: ``ELEMENT_COLUMNS`` of the tracked elements; no rows if nothing is tracked.
        run: hyperparameters and versions, as plain JSON values; the same object for every record
            until a hyperparameter that is not scheduled changes.
    """

    step: int
    time: float
    attempt: int
    optimizer: str
    tables: Mapping[Level, Columns]
    edges: Sequence[NDArray[np.float64]]
    counts: Sequence[NDArray[np.int64]]
    elements: Columns
    run: Mapping[str, Any]

    def histograms(self) -> Columns:
        """``HISTOGRAM_COLUMNS`` of this record: the parameters that have a rate."""
        rows = [i for i, counts in enumerate(self.counts) if len(counts)]
        parameters = self.tables["parameter"]
        columns = {name: parameters[name][rows] for name in (*_STEP, *KEYS["parameter"])}
        for name, arrays in (("edges", self.edges), ("counts", self.counts)):
            columns[name] = np.empty(len(rows), dtype=object)
            for at, row in enumerate(rows):
                columns[name][at] = arrays[row]
        return columns

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays (names are shared between records and not counted)."""
        rows = [len(table["numel"]) * _ROW_BYTES[level] for level, table in self.tables.items()]
        elements = len(self.elements["element"]) * _ELEMENT_BYTES
        return sum(rows) + elements + sum(array.nbytes for array in (*self.edges, *self.counts))


_ROW_BYTES = {level: _row_bytes(frame_columns(level)) for level in LEVELS}
_ELEMENT_BYTES = _row_bytes(ELEMENT_COLUMNS)
