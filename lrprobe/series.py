"""A frame as matrices of recorded steps × parameters, one set per optimizer and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrprobe.about import description

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_REGULAR = 0.7
"""Recording is periodic if at least this share of the gaps between steps is equal."""

_KEYS = ("parameter", "module", "group")


class Series:
    """The records of one optimizer of one run, as matrices of steps × parameters.

    Made by :func:`series_of`. If the frame is by module, group or model, the columns of a matrix
    stand for those instead of parameters.

    Attributes:
        run: name of the run; empty where the frame has no column ``run``.
        optimizer: name of the optimizer.
        steps: the recorded steps, ascending: (steps,).
        names: the parameters, in the model's order: (parameters,).
        about: the description of the run, as in the frame's ``attrs["lrprobe"]``; empty if
            unknown.
        ongoing: whether the run may record more steps.
        siblings: the series of all optimizers of the run, including this one.
        memo: results that checks share.
        superseded: the records of earlier attempts that a later attempt replaced, latest last.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        run: str,
        optimizer: str,
        superseded: Sequence[Series] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.optimizer = optimizer
        self.superseded = superseded
        self.about = description(frame, run) if about is None else about
        self.memo: dict[str, Any] = {}
        self.ongoing = False
        self.siblings: Sequence[Series] = (self,)
        self._frame = frame
        key = next((key for key in _KEYS if key in frame), None)
        if key is None:
            names, column = ["model"], np.zeros(len(frame), dtype=np.int64)
        else:
            column, found = frame[key].factorize()
            names = [f"group {name}" if key == "group" else str(name) for name in found]
        self.key = key or "model"
        self.names: list[str] = names
        step = frame["step"].to_numpy()
        self.steps: Ints
        self.steps, row = np.unique(step, return_inverse=True)
        self.shape = len(self.steps), len(names)
        flat = row * len(names) + column
        size = self.shape[0] * self.shape[1]
        self._dense = len(flat) == size and bool((flat == np.arange(size)).all())
        self._flat = flat

    def __contains__(self, column: str) -> bool:
        return column in self._frame

    def __getitem__(self, column: str) -> Floats:
        """Return a column of figures: (steps, parameters), NaN without a row."""
        if column not in self._cache:
            self._cache[column] = self._matrix(self._frame[column], np.nan, np.float64)
        return self._cache[column]

    @cached_property
    def _cache(self) -> dict[str, Floats]:
        return {}

    def _matrix(self, values: Any, fill: Any, dtype: Any) -> Any:
        array = np.asarray(values, dtype=dtype)
        if self._dense:
            return array.reshape(self.shape)
        matrix = np.full(self.shape[0] * self.shape[1], fill, dtype=dtype)
        matrix[self._flat] = array
        return matrix.reshape(self.shape)

    @cached_property
    def present(self) -> Bools:
        """Whether there is a row: (steps, parameters)."""
        result: Bools = self._matrix(np.ones(len(self._flat), dtype=bool), fill=False, dtype=bool)
        return result

    @cached_property
    def stepped(self) -> Bools:
        """Whether the parameter took the step: (steps, parameters)."""
        if "stepped" not in self:  # a TensorBoard logdir has rows only for steps taken
            return self.present
        result: Bools = self._matrix(self._frame["stepped"], fill=False, dtype=bool)
        return result

    @cached_property
    def attempt(self) -> Ints:
        """Attempt of each recorded step: (steps,)."""
        if "attempt" not in self:
            return np.zeros(len(self.steps), dtype=np.int64)
        matrix: Ints = self._matrix(self._frame["attempt"], -1, np.int64)
        highest: Ints = matrix.max(axis=1)
        return highest

    @cached_property
    def with_gradient(self) -> Bools:
        """Whether the parameter had a gradient, finite or not: (steps, parameters).

        A gradient with a NaN has the norm NaN, but also elements that are not finite.
        """
        known = np.logical_not(np.isnan(self["grad_norm"]))
        bad = self["nonfinite"] > 0 if "nonfinite" in self else False
        result: Bools = np.asarray((known | bad) & self.present)
        return result

    @cached_property
    def skipped(self) -> Bools:
        """Steps that a fused optimizer skipped for a gradient scaler: (steps,)."""
        if "grad_norm" not in self:
            return np.zeros(len(self.steps), dtype=bool)
        result: Bools = np.asarray(self.with_gradient.any(axis=1) & ~self.stepped.any(axis=1))
        return result

    @property
    def optimizer_about(self) -> Mapping[str, Any]:
        """The description of the optimizer; empty if unknown."""
        found: Mapping[str, Any] = self.about.get("optimizers", {}).get(self.optimizer, {})
        return found

    def option(self, name: str) -> list[Any]:
        """A hyperparameter of each parameter's group: (parameters,), None if unknown."""
        groups = self.optimizer_about.get("groups") or []
        values = [group.get(name) for group in groups]
        if not values:
            return [None] * len(self.names)
        if np.isnan(self.group).all():
            same = all(value == values[0] for value in values)
            return [values[0] if same else None] * len(self.names)
        return [
            values[int(at)] if at == at and int(at) < len(values) else None  # noqa: PLR0124 - NaN
            for at in self.group
        ]

    @cached_property
    def resumes(self) -> Ints:
        """Rows at which a resume begins: another attempt or probe, or a step off the period."""
        rows = np.diff(self.attempt) > 0
        for begin in self.optimizer_about.get("begins", ()):
            rows |= ((self.steps == begin["step"]) & (self.attempt == begin["attempt"]))[1:]
        gaps = np.diff(self.steps)
        if len(gaps) >= 4:
            found, count = np.unique(gaps, return_counts=True)
            period = int(found[count.argmax()])
            if period > 1 and count.max() >= _REGULAR * len(gaps):
                rows |= (self.steps % period != 0)[1:]
        result: Ints = np.flatnonzero(rows) + 1
        return result

    @cached_property
    def rules(self) -> tuple[NDArray[np.int64], list[str]]:
        """Index of each row's rule: (steps, parameters), −1 without a row; and the rules' names."""
        if "rule" not in self:
            return np.full(self.shape, -1, dtype=np.int64), []
        codes, names = self._frame["rule"].factorize()
        return self._matrix(codes, -1, np.int64), [str(name) for name in names]

    def ruled_by(self, *names: str) -> Bools:
        """Whether one of these rules holds: (steps, parameters)."""
        codes, known = self.rules
        wanted = [known.index(name) for name in names if name in known]
        result: Bools = np.isin(codes, wanted) if wanted else np.zeros(self.shape, dtype=bool)
        return result

    @cached_property
    def numel(self) -> Floats:
        """Number of elements of each parameter: (parameters,); NaN if unknown."""
        if "numel" not in self:
            return np.full(self.shape[1], np.nan)
        return last(self["numel"])

    @cached_property
    def group(self) -> Floats:
        """Parameter group of each parameter: (parameters,); NaN if unknown."""
        if self.key == "module" or "group" not in self:
            return np.full(self.shape[1], np.nan)
        return last(self["group"])

    @cached_property
    def near_peak(self) -> Bools:
        """Whether the learning rate is at least half of its peak: (steps, parameters).

        This excludes the start of a warmup and the end of annealing, where updates are small on
        purpose.
        """
        lr = self["lr"]
        with np.errstate(invalid="ignore"):
            result: Bools = lr >= 0.5 * peak(lr)
        return result & self.stepped


def series_of(frame: pd.DataFrame) -> Iterator[Series]:
    """The series of a frame, in its order."""
    keys = [key for key in ("run", "optimizer") if key in frame]
    if not len(frame):
        return
    whole = frame
    frame = frame.copy(deep=False)
    frame.attrs = {}  # pandas makes a deep copy of it at each access to a column
    # Faster than groupby: the usual case, one optimizer of one run, copies nothing.
    label = np.zeros(len(frame), dtype=np.int64)
    for key in keys:
        codes, found = frame[key].factorize()
        label = label * len(found) + codes
    values, first = np.unique(label, return_index=True)
    result: list[Series] = []
    for value in values[np.argsort(first)]:
        rows = frame if len(values) == 1 else frame[label == value].reset_index(drop=True)
        run = str(rows["run"].iloc[0]) if "run" in rows else ""
        optimizer = str(rows["optimizer"].iloc[0]) if "optimizer" in rows else ""
        result.append(_one(rows, run, optimizer, description(whole, run)))
    for series in result:
        series.siblings = [each for each in result if each.run == series.run]
    yield from result


def _one(rows: pd.DataFrame, run: str, optimizer: str, about: Mapping[str, Any]) -> Series:
    """The series of one optimizer; replaced records go to ``superseded``."""
    superseded = []
    keep = _kept(rows)
    if not keep.all():
        attempt = rows["attempt"].to_numpy()
        again = np.unique(attempt[~keep])
        superseded = [Series(rows[attempt == one], run, optimizer, (), about) for one in again]
        rows = rows[keep].reset_index(drop=True)
    return Series(rows, run, optimizer, superseded, about)


def _kept(rows: pd.DataFrame) -> Bools:
    """Whether no later attempt replaced the row of one optimizer: (rows,)."""
    keep = np.ones(len(rows), dtype=bool)
    if "attempt" in rows:
        attempt, step = rows["attempt"].to_numpy(), rows["step"].to_numpy()
        for later in np.unique(attempt)[1:]:
            keep &= (attempt >= later) | (step < step[attempt == later].min())
    return keep


def latest(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows that a later attempt of the same run and optimizer replaced."""
    if "attempt" not in frame or frame["attempt"].nunique() < 2:
        return frame
    keys = [key for key in ("run", "optimizer") if key in frame]
    keep = np.ones(len(frame), dtype=bool)
    for at in frame.groupby(keys, observed=True).indices.values():
        keep[at] = _kept(frame.iloc[at])
    return frame[keep].reset_index(drop=True)


def last(matrix: Floats) -> Floats:
    """The last value of each parameter other than NaN: (parameters,)."""
    known = ~np.isnan(matrix)
    at = len(matrix) - 1 - known[::-1].argmax(axis=0)
    result: Floats = matrix[at, np.arange(matrix.shape[1])]
    return result


def first(matrix: Floats) -> Floats:
    """The first value of each parameter other than NaN: (parameters,)."""
    result: Floats = matrix[(~np.isnan(matrix)).argmax(axis=0), np.arange(matrix.shape[1])]
    return result


def peak(matrix: Floats) -> Floats:
    """The highest value of each parameter, NaN if it has none: (parameters,)."""
    result: Floats = np.fmax.reduce(matrix, axis=0)
    return result


def quantile(matrix: Floats, share: float) -> Floats:
    """A quantile of each parameter's figures, NaN if it has none: (parameters,)."""
    if not len(matrix):
        return np.full(matrix.shape[1], np.nan)
    ordered = np.sort(matrix, axis=0)  # NaN comes last
    at = share * (np.maximum((~np.isnan(matrix)).sum(axis=0), 1) - 1)
    below = at.astype(np.int64)
    columns = np.arange(matrix.shape[1])
    low, high = ordered[below, columns], ordered[np.ceil(at).astype(np.int64), columns]
    # Two equal values may both be infinite; their difference would be NaN.
    result: Floats = np.where(low == high, low, low + (at - below) * (high - low))
    return result
