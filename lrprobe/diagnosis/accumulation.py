"""The check for gradients that are not set to 0 between steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrprobe.diagnosis.shared import FEW, Hit, matrices
from lrprobe.series import Bools, Floats, Ints, Series, quantile

GROWTH, ALONG, MOST = 0.9, 0.3, 2.0
"""How much of what a sum of independent gradients has, in its norm and in its cosine; and how many
times what a sum of equal ones has in its norm."""
PERSISTENT, LASTING_GROWTH = 0.6, 1.5
TERMS, DISTANT_TERMS, ONGOING_ROWS = 4, 40, 8


def gradients_accumulate(series: Series) -> Iterator[Hit]:
    """A sum of n gradients has √n to n times the norm of one, and √(m/n) of the cosine at least.

    A gradient over all of the data keeps its direction, too, but its norm does not grow so.
    """
    if series.ongoing and len(series.steps) < ONGOING_ROWS:
        return
    norm = np.where(series.stepped, series["grad_norm"], np.nan)
    along = np.where(series.stepped, series["grad_persistence"], np.nan)
    large = matrices(series)
    for start in (0, *series.resumes.tolist()):
        if len(norm) - start < FEW:
            continue
        terms = series.steps[start:] - series.steps[start] + 1.0
        grown = norm[start:] / norm[start]
        count = _as_a_sum(terms, grown, along[start:])
        summed = count >= _rows_of(terms)
        lasting = (quantile(along[start + 1 :], 0.5) >= PERSISTENT) & (
            quantile(grown[1:], 0.5) >= LASTING_GROWTH
        )
        wrong = large & summed & lasting
        for column in np.flatnonzero(wrong):
            rows = slice(start, start + int(count[column]))
            values = {
                "terms": terms[count[column] - 1],
                "growth": grown[count[column] - 1, column],
                "along": float(quantile(along[start + 1 :, column, None], 0.5)[0]),
            }
            evidence = "over its first {terms:,.0f} steps its norm grew {growth:.3g} times, as a "
            evidence += "sum of gradients grows, and the cosine with that of the recorded step "
            evidence += "before is {along:.2f} in the median"
            steps = series.steps[rows]
            yield Hit(series.names[column], steps, evidence, values, values["growth"])
        if wrong.any():
            return


def _rows_of(terms: Floats) -> int:
    """Rows that have to behave as a sum does: four, and more where they are far apart."""
    far = len(terms) > 2 and terms[2] > TERMS
    most = DISTANT_TERMS if far else TERMS
    return max(FEW + 1, min(len(terms), int(np.searchsorted(terms, most)) + 1))


def _as_a_sum(terms: Floats, grown: Floats, along: Floats) -> Ints:
    """How many rows from the first on behave as sums do: (parameters,)."""
    fits: Bools = np.ones(grown.shape, dtype=bool)
    shared = np.sqrt(terms[:-1] / terms[1:])[:, None]
    fits[1:] = (grown[1:] >= GROWTH * np.sqrt(terms[1:, None])) & (
        (along[1:] >= ALONG * shared) | (shared < 0.5)  # of few common terms a cosine says little
    )
    fits[1:] &= grown[1:] <= MOST * terms[1:, None]  # else it diverges
    result: Ints = np.logical_and.accumulate(fits, axis=0).sum(axis=0)
    return result
