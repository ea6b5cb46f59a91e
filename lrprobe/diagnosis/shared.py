"""Helpers that several checks share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lrprobe.series import Bools, Floats, Ints, Series, quantile
from lrprobe.text import parts_of

FEW = 3
"""Minimum number of recorded steps for a statement about all steps."""
MANY = 10
"""Minimum number of recorded steps for a statement about how rates develop."""
ADAM_FAMILY = ("adam", "nadam", "radam", "adamax", "sparse_adam")


class Hit(NamedTuple):
    """One occurrence of a problem that a check found.

    Attributes:
        parameter: name of the parameter.
        steps: the recorded steps in which it was seen.
        evidence: a format string; its fields are the keys of ``numbers``.
        numbers: the numbers in the evidence, by name.
        weight: its importance among the hits of the same check.
        note: whether it is a note although the check yields findings.
        meaning: what it usually means, if that differs from the check's meaning.
        advice: what to try, if that differs from the check's advice.
    """

    parameter: str
    steps: Ints
    evidence: str
    numbers: Mapping[str, float]
    weight: float = 0.0
    note: bool = False
    meaning: str = ""
    advice: str = ""


def lasting(where: Bools, known: Bools) -> Ints:
    """The longest run of known rows, up to the last one, in which the condition holds."""
    rows = np.flatnonzero(known)
    result: Ints = rows[len(rows) - np.logical_and.accumulate(where[rows][::-1]).sum() :]
    return result


def groups(series: Series) -> tuple[list[str], Floats]:
    """Names of the parameter groups, and their rates: (steps, groups)."""
    return group_figures(series, "lr")


def group_figures(series: Series, column: str) -> tuple[list[str], Floats]:
    """Names of the parameter groups, and the column's maximum in each: (steps, groups)."""
    numbers = np.unique(series.group[~np.isnan(series.group)])
    figures = np.full((len(series.steps), len(numbers)), np.nan)
    if column in series:
        for at, number in enumerate(numbers):
            figures[:, at] = np.fmax.reduce(series[column][:, series.group == number], axis=1)
    return [f"group {int(number)}" for number in numbers], figures


def medians(matrix: Floats, above: float) -> Iterator[tuple[int, float]]:
    """(parameter, median) of those with at least ``FEW`` values and a median above a bound."""
    median = quantile(matrix, 0.5)
    enough = (~np.isnan(matrix)).sum(axis=0) >= FEW
    for column in np.flatnonzero(enough & (median > above)):
        yield int(column), float(median[column])


def adam_family(series: Series) -> Bools:
    """Where a parameter is stepped by Adam or a variant, judged by rule or optimizer name."""
    family = series.ruled_by(*ADAM_FAMILY)
    rectifying = np.zeros_like(family)
    if "effective_lr_p50" in series:
        plain = abs(series["effective_lr_p50"] / series["lr"] - 1) < 1e-6
        rectifying = series.ruled_by("radam") & plain
    measured = series.ruled_by("measured")
    if re.search("adam(?!ax)", series.optimizer, re.IGNORECASE):
        family = family | measured
    family = family | (measured & family.any(axis=0))
    return family & series.stepped & ~rectifying


def matrices(series: Series) -> Bools:
    """Which parameters are matrices, judged by name and size: (parameters,).

    The frame has no shapes. A vector is called ``bias``, or is no larger than the bias of the same
    module (the weight of a norm). Without names, a vector is a small parameter. Rows of modules and
    groups count as matrices.
    """
    if "matrices" not in series.memo:
        series.memo["matrices"] = _matrices(series)
    result: Bools = series.memo["matrices"]
    return result


def _matrices(series: Series) -> Bools:
    if series.key != "parameter":
        return np.ones(len(series.names), dtype=bool)
    numel = dict(zip(series.names, series.numel, strict=True))
    result = np.zeros(len(series.names), dtype=bool)
    for at, (name, size) in enumerate(numel.items()):
        path, separator, own = parts_of(name)
        if re.fullmatch(r"group\d+\.param\d+", name):
            result[at] = size >= 1024
        else:
            beside = numel.get(f"{path}{separator}bias", 0.0)
            result[at] = not re.search(r"bias(_|$)", own) and not size <= beside
    return result
