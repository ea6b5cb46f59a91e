"""Which parameters each row of the frame merges, for all levels at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrprobe.engine.distribution import Bins, Bools, Floats
from lrprobe.names import module_of
from lrprobe.record import LEVELS, Level


class Parameter(NamedTuple):
    """What decides which rows a parameter belongs to."""

    name: str
    group: int
    group_name: str
    numel: int


class Levels:
    """The rows of all levels, step by step; each row merges one or more parameters of one step.

    Attributes:
        count: number of rows.
        spans: the range of rows of each level in one step.
        keys: columns that do not change from step to step: (count,).
    """

    def __init__(self, parameters: Sequence[Parameter], steps: int = 1) -> None:
        keys: Mapping[Level, Sequence[Any]] = {  # equal for parameters in one row
            "parameter": range(len(parameters)),
            "module": [module_of(each.name) for each in parameters],
            "group": [each.group for each in parameters],
            "model": [0] * len(parameters),
        }
        labels: list[int] = []
        count = 0
        spans: dict[Level, tuple[int, int]] = {}
        for level in LEVELS:
            rows: dict[Any, int] = {}
            labels += [count + rows.setdefault(key, len(rows)) for key in keys[level]]
            spans[level] = count, count + len(rows)
            count += len(rows)
        label = np.array(labels, np.int64)
        sorted_ = np.argsort(label, kind="stable")
        member = sorted_ % max(len(parameters), 1)
        of_step = np.arange(steps)[:, None]
        self.count = steps * count
        self.spans: Mapping[Level, slice] = {level: slice(*span) for level, span in spans.items()}
        self._member = (of_step * len(parameters) + member).reshape(-1)
        sorted_label = (of_step * count + label[sorted_]).reshape(-1)
        self._starts = np.searchsorted(sorted_label, np.arange(self.count))
        self._rows = [(of_step * count + np.arange(a, b)).reshape(-1) for a, b in spans.values()]
        self._at = [
            (of_step * (b - a) + own - a).reshape(-1)
            for own, (a, b) in zip(label.reshape(len(LEVELS), -1), spans.values(), strict=True)
        ]
        first = [parameters[at] for at in member[self._starts[:count]]]
        numel = np.tile(np.array([each.numel for each in parameters], np.int64), steps)
        self.keys: Mapping[str, NDArray[Any]] = {
            "group": np.tile(np.array([each.group for each in first], np.int64), steps),
            "group_name": np.tile(strings([each.group_name for each in first]), steps),
            "parameter": np.tile(strings([each.name for each in first]), steps),
            "module": np.tile(strings([module_of(each.name) for each in first]), steps),
            "numel": self.reduced(np.add, numel),
        }

    def reduced(self, merge: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Reduce values to values of rows: (steps · parameters, ...) to (count, ...)."""
        if not self.count:
            return values[:0]
        merged: NDArray[Any] = merge.reduceat(values[self._member], self._starts, axis=0)
        return merged

    def same(self, values: NDArray[Any]) -> Floats:
        """The value that the parameters of a row share, ignoring NaN; NaN if they differ.

        Args:
            values: one per step and parameter.
        """
        low, high = self.reduced(np.fmin, values), self.reduced(np.fmax, values)
        return np.where(low == high, low, np.nan)

    def distributions(self, bins: Bins, use: Bools) -> Bins:
        """The distribution of each row, level by level.

        Args:
            bins: those of the parameters, step by step.
            use: whether to use each parameter: (steps · parameters,).
        """
        found = [bins.merged(np.where(use, at, -1)) for at in self._at]
        placed = [rows[own.owner] for rows, own in zip(self._rows, found, strict=True)]
        return Bins(
            np.concatenate(placed),
            np.concatenate([own.bins for own in found]),
            np.concatenate([own.counts for own in found]),
        )


@lru_cache(maxsize=64)
def levels_of(parameters: tuple[Parameter, ...], steps: int) -> Levels:
    """The rows of these parameters in so many steps, cached."""
    return Levels(parameters, steps)


def strings(values: Sequence[str]) -> NDArray[Any]:
    """A text column, with dtype object."""
    result = np.empty(len(values), dtype=object)
    result[:] = list(values)
    return result
