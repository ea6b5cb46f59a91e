"""What several checks need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lrprobe.series import Bools, Floats, Ints, Series, quantile
from lrprobe.text import parts_of

FEW = 3
"""Recorded steps below which nothing is said to be always so."""
MANY = 10
"""Those below which nothing is said of how rates develop."""
ADAM_FAMILY = ("adam", "nadam", "radam", "adamax", "sparse_adam")


class Hit(NamedTuple):
    """Where a check found something.

    Attributes:
        parameter: its name.
        steps: the recorded steps in which it was seen.
        evidence: in numbers, as a sentence; the words in braces are names of ``numbers``.
        numbers: the same by name.
        weight: how grave, among hits of the same check.
        note: whether it is a note here, where the check is for findings.
        meaning: what it usually means, where that is not what the check says.
        advice: what to try, likewise.
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
    """The last rows of those that are known, in all of which it is so."""
    rows = np.flatnonzero(known)
    result: Ints = rows[len(rows) - np.logical_and.accumulate(where[rows][::-1]).sum() :]
    return result


def groups(series: Series) -> tuple[list[str], Floats]:
    """Names of the parameter groups, and the rate of each: (steps, groups)."""
    return group_figures(series, "lr")


def group_figures(series: Series, column: str) -> tuple[list[str], Floats]:
    """Names of the parameter groups, and the largest figure of each: (steps, groups)."""
    numbers = np.unique(series.group[~np.isnan(series.group)])
    figures = np.full((len(series.steps), len(numbers)), np.nan)
    if column in series:
        for at, number in enumerate(numbers):
            figures[:, at] = np.fmax.reduce(series[column][:, series.group == number], axis=1)
    return [f"group {int(number)}" for number in numbers], figures


def medians(matrix: Floats, above: float) -> Iterator[tuple[int, float]]:
    """Parameters with at least ``FEW`` figures whose median is above a bound, and the median."""
    median = quantile(matrix, 0.5)
    enough = (~np.isnan(matrix)).sum(axis=0) >= FEW
    for column in np.flatnonzero(enough & (median > above)):
        yield int(column), float(median[column])


def adam_family(series: Series) -> Bools:
    """Where a parameter is stepped by Adam or a relative: by its rule, or by its name."""
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
    """Which parameters are matrices, as far as a name and a size tell: (parameters,).

    The frame has no shapes. A vector is called ``bias``, or is no larger than the bias beside it
    (the weight of a norm); where there are no names, it is small. Rows of modules and groups count.
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
