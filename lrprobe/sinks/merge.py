"""Several parameters of a record as one, for backends that cannot show each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrprobe.record import QUANTILES, Columns, Record

COLUMNS = (
    "effective_lr_p50",
    "effective_lr_p05",
    "effective_lr_p95",
    "update_ratio",
    "update_norm",
    "grad_norm",
    "param_norm",
    "update_grad_cosine",
)
"""The figures that can be merged here."""

_RATES = ("p05", "p50", "p95")
_FACTORS = ("update_norm", "grad_norm")


@dataclass(frozen=True, slots=True)
class MergedRows:
    """Several parameters of a record as one.

    Attributes:
        stepped: whether any of them did.
        figures: ``COLUMNS``.
        edges: of a histogram of the effective rate, as in ``Record``.
        counts: that belong to them, in elements; not whole numbers.
    """

    stepped: bool
    figures: Mapping[str, float]
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]


def merge_rows(record: Record, rows: Sequence[int], module: int | None = None) -> MergedRows:
    """Merge parameters: rates weighted by ``numel``, norms by the sum of their squares.

    Args:
        record: the record.
        rows: of its parameter table. Those that did not step count for the norm of the parameters
            only.
        module: the row of its module table that has just these parameters, where there is one: its
            figures are of all elements, while a histogram knows them to an eighth of an octave.
    """
    table = record.tables["parameter"]
    stepped = [row for row in rows if table["stepped"][row]]
    known = [piece for row in stepped if (piece := _distribution(record, row)) is not None]
    grid, share = _mixture(known) if known else (np.empty(0), np.empty(0))
    if module is not None:
        figures = {name: float(record.tables["module"][name][module]) for name in COLUMNS}
    else:
        figures = dict.fromkeys(COLUMNS, float("nan")) | _norms(table, rows, stepped)
        if known:
            values = np.interp([QUANTILES[name] for name in _RATES], share, grid)
            figures |= {f"effective_lr_{k}": float(v) for k, v in zip(_RATES, values, strict=True)}
    if not known:
        return MergedRows(bool(stepped), figures, grid, share)
    picks = np.unique(np.linspace(0, len(grid) - 1, 65).round().astype(int))
    numel = sum(weight for _, _, weight in known)
    edges, at = grid[picks], share[picks]
    if len(edges) == 1:  # all elements have one rate
        edges, at = np.repeat(edges, 2), np.array([0.0, 1.0])
    counts = np.diff(at) * numel
    counts[0] += at[0] * numel
    return MergedRows(True, figures, edges, counts)


def _norms(table: Columns, rows: Sequence[int], stepped: Sequence[int]) -> dict[str, float]:
    """Norms, their ratio and the cosine, as far as they are known."""

    def norm(column: str, of: Sequence[int]) -> float:
        # hypot would cost a call per row; scaling keeps the squares in range all the same.
        values = table[column][of]
        top = float(np.max(values, initial=0.0))
        if not 0 < top < np.inf:
            return top
        return top * float(np.sqrt(np.sum(np.square(values / top))))

    figures = {"param_norm": norm("param_norm", list(rows))}
    with_grad = [row for row in rows if not np.isnan(table["grad_norm"][row])]
    if stepped or with_grad:
        figures["grad_norm"] = norm("grad_norm", stepped or with_grad)
    if stepped:
        figures["update_norm"] = norm("update_norm", stepped)
        size = figures["param_norm"]
        figures["update_ratio"] = figures["update_norm"] / size if size else float("nan")
        sizes = figures["update_norm"] * figures["grad_norm"]
        if 0 < sizes < np.inf:
            of_each = [table[name][stepped] for name in ("update_grad_cosine", *_FACTORS)]
            # A parameter that did not move, or had a gradient of 0, has no angle and adds nothing.
            figures["update_grad_cosine"] = float(np.nansum(np.prod(of_each, axis=0)) / sizes)
    return figures


_LEVELS = {"min": 0.0, **QUANTILES, "max": 1.0}
_Distribution = tuple[NDArray[np.float64], NDArray[np.float64], float]


def _distribution(record: Record, row: int) -> _Distribution | None:
    """Rates, the share of the elements up to each, and their number; None where it is unknown.

    The quantiles are such, and so are the edges of the histogram, whose bins are wide.
    """
    table = record.tables["parameter"]
    weight = float(table["numel"][row])
    edges, counts = np.asarray(record.edges[row]), np.asarray(record.counts[row])
    rates = np.array([table[f"effective_lr_{suffix}"][row] for suffix in _LEVELS])
    share = np.array(list(_LEVELS.values()))
    if len(counts) and counts.sum() > 0:
        up_to = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        edges = np.clip(edges, np.fmax(rates[0], edges[0]), np.fmin(rates[-1], edges[-1]))
        finite = np.isfinite(rates)
        rates = np.concatenate([edges, rates[finite]])
        share = np.concatenate([up_to, share[finite]])
        order = np.lexsort((share, rates))
        rates, share = rates[order], np.maximum.accumulate(share[order])
    else:
        share, rates = share[~np.isnan(rates)], rates[~np.isnan(rates)]
        if not len(rates):
            return None
        share[0], share[-1] = 0.0, 1.0
    if not np.isfinite(rates).all() or weight <= 0:
        return None
    return rates, share, weight


def _mixture(pieces: Sequence[_Distribution]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the distribution of all elements together has its knots, and the share up to each."""
    grid = np.unique(np.concatenate([edges for edges, _, _ in pieces]))
    if len(grid) > 1024:
        grid = grid[np.linspace(0, len(grid) - 1, 1024).round().astype(int)]
    # Where many elements have one and the same rate the share jumps: a knot just below keeps it
    # from being smeared down to the next one.
    jumps = [edges[1:][edges[1:] == edges[:-1]] for edges, _, _ in pieces]
    grid = np.union1d(grid, np.nextafter(np.concatenate(jumps), -np.inf))
    total = sum(weight for _, _, weight in pieces)
    share = np.zeros(len(grid))
    for edges, up_to, weight in pieces:
        share += weight / total * np.interp(grid, edges, up_to, left=0.0, right=1.0)
    return grid, share
