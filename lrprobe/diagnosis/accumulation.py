"""The check for gradients that are not zeroed between steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lrprobe.diagnosis.shared import FEW, Hit, matrices
from lrprobe.series import Bools, Floats, Ints, Series, quantile

MIN_COSINE, MAX_NORM = 0.3, 1.1
"""Bounds on a sum of gradients: minimum of its cosine, over that of a sum of independent gradients;
maximum of its norm, over that of a sum of equal gradients."""
HORIZON, DISTANT = 9, 40
"""Steps over which the norm's growth is checked; the second if recorded steps are far apart."""
MAX_RISE, MAX_RISE_DISTANT = 1.2, 1.4
"""Maximum factor by which the norm per term may rise again. A gradient that leaves a saddle grows
faster and faster; a sum does not."""
MIN_ADDED = 0.4
"""Minimum norm that a recorded step adds, over the first norm. A slowly changing gradient adds
little."""
MIN_PERSISTENCE = 0.6
ONGOING_ROWS = 8


class _GrowthLaw(NamedTuple):
    """A minimum growth of the norms of sums.

    Attributes:
        growth: minimum norm after n steps, over √n times the first.
        terms: steps over which it must hold; ``DISTANT`` if recorded steps are far apart.
        lasting: minimum norm of the median step, over the first.
        share: minimum share of the matrices that follow it.
    """

    growth: float
    terms: int
    lasting: float
    share: float


TERMS = 4
GROWTH_LAWS = (_GrowthLaw(0.9, TERMS, 1.5, 0.0), _GrowthLaw(0.5, HORIZON, 2.0, 2 / 3))
"""One matrix has to follow the first, stricter law; or most matrices have to follow the second."""


def gradients_accumulate(series: Series) -> Iterator[Hit]:
    """Find parameters whose gradient behaves like a sum of all gradients so far.

    A sum of n gradients has √n to n times the norm of one. Its cosine with the sum of the first m
    is at least √(m/n). A full-batch gradient also keeps its direction, but its norm does not grow
    this way.
    """
    if series.ongoing and len(series.steps) < ONGOING_ROWS:
        return
    norm = np.where(series.stepped, series["grad_norm"], np.nan)
    along = np.where(series.stepped, series["grad_persistence"], np.nan)
    for start in (0, *series.resumes.tolist()):
        if len(norm) - start <= FEW:
            continue
        terms = series.steps[start:] - series.steps[start] + 1.0
        grown = norm[start:] / norm[start]
        cosine = quantile(along[start + 1 :], 0.5)
        rows, wrong = _sums(series, terms, grown, along[start:], cosine)
        for column in np.flatnonzero(wrong):
            last = int(rows[column]) - 1
            values = {
                "terms": terms[last],
                "growth": grown[last, column],
                "along": cosine[column],
            }
            evidence = "over the first {terms:,.0f} steps the gradient norm grew by a factor of "
            evidence += "{growth:.3g}, as a sum of gradients does; the median cosine with the "
            evidence += "gradient of the previous recorded step is {along:.2f}"
            steps = series.steps[start : start + last + 1]
            yield Hit(series.names[column], steps, evidence, values, values["growth"])
        if wrong.any():
            return


def _sums(
    series: Series, terms: Floats, grown: Floats, along: Floats, cosine: Floats
) -> tuple[Ints, Bools]:
    """The number of rows that behave like sums, and which matrices are sums: (parameters,) each."""
    large = matrices(series)
    usual = quantile(grown[1:], 0.5)
    far = len(terms) > 2 and bool(terms[2] > TERMS)
    early = terms <= (DISTANT if far else HORIZON)
    each = (grown / terms[:, None])[early]
    limit = (MAX_RISE_DISTANT if far else MAX_RISE) * np.fmin.accumulate(each, axis=0)
    large = large & ~(each > limit).any(axis=0)
    old, new = grown[:-1], grown[1:]
    added = np.sqrt(np.maximum(old**2 + new**2 - 2 * along[1:] * old * new, 0.0))
    large &= quantile(added[early[1:]], 0.5) >= MIN_ADDED
    for law in GROWTH_LAWS:
        rows = _as_a_sum(law.growth, terms, grown, along)
        wrong = large & (rows >= _least_rows(law, terms))
        wrong &= (cosine >= MIN_PERSISTENCE) & (usual >= law.lasting)
        if wrong.any() and wrong.sum() >= law.share * matrices(series).sum():
            return rows, wrong
    return rows, np.zeros(len(large), dtype=bool)


def _least_rows(law: _GrowthLaw, terms: Floats) -> int:
    """Minimum number of rows that behave like a sum: four, or more if they are far apart."""
    far = len(terms) > 2 and terms[2] > law.terms
    limit = DISTANT if far else law.terms
    return max(FEW + 1, min(len(terms), int(np.searchsorted(terms, limit)) + 1))


def _as_a_sum(growth: float, terms: Floats, grown: Floats, along: Floats) -> Ints:
    """The number of rows, from the first on, that behave like sums: (parameters,)."""
    fits: Bools = np.ones(grown.shape, dtype=bool)
    shared = np.sqrt(terms[:-1] / terms[1:])[:, None]
    fits[1:] = (grown[1:] >= growth * np.sqrt(terms[1:, None])) & (
        (along[1:] >= MIN_COSINE * shared) | (shared < 0.5)  # with few common terms, it is noise
    )
    fits[1:] &= grown[1:] <= MAX_NORM * terms[1:, None]  # else it diverges
    result: Ints = np.logical_and.accumulate(fits, axis=0).sum(axis=0)
    return result
