"""A frame as matrices, recorded steps × parameters, one set for each optimizer of each run."""

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
"""Share of equal gaps between recorded steps from which on they have a period."""

_KEYS = ("parameter", "module", "group")


class Series:
    """What one optimizer of one run recorded, as matrices of steps × parameters.

    Made by :func:`series_of`. Where the frame is by module, group or model, its columns stand for
    those.

    Attributes:
        run: name of the run; empty where the frame has no column ``run``.
        optimizer: name of the optimizer.
        steps: the recorded steps, ascending: (steps,).
        names: the parameters, in the model's order: (parameters,).
        about: what describes the run, as in the frame's ``attrs["lrprobe"]``; empty where it is not
            known.
        ongoing: whether more steps may come.
        siblings: those of all optimizers of the run, itself among them.
        memo: what checks have made of it, for other checks.
        superseded: what an earlier attempt recorded that this one recorded anew, latest last.
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
        """A column of figures: (steps, parameters), NaN where there is no row."""
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
        if "stepped" not in self:  # a TensorBoard logdir has rows for what stepped only
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

        The norm of a gradient with a NaN in it is NaN, too: then it has elements that are not
        finite.
        """
        known = np.logical_not(np.isnan(self["grad_norm"]))
        bad = self["nonfinite"] > 0 if "nonfinite" in self else False
        result: Bools = np.asarray((known | bad) & self.present)
        return result

    @cached_property
    def skipped(self) -> Bools:
        """Steps that a gradient scaler had a fused optimizer skip: (steps,)."""
        if "grad_norm" not in self:
            return np.zeros(len(self.steps), dtype=bool)
        result: Bools = np.asarray(self.with_gradient.any(axis=1) & ~self.stepped.any(axis=1))
        return result

    @property
    def optimizer_about(self) -> Mapping[str, Any]:
        """What describes the optimizer; empty where it is not known."""
        found: Mapping[str, Any] = self.about.get("optimizers", {}).get(self.optimizer, {})
        return found

    @property
    def optimizer_class(self) -> str:
        """Name of the optimizer's class, as far as it is known."""
        name: str = self.optimizer_about.get("class", self.optimizer)
        return name.rpartition(".")[2]

    def option(self, name: str) -> list[Any]:
        """A hyperparameter of each parameter's group: (parameters,), None where it is unknown."""
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
        """Rows in which a resume begins: another attempt or probe, or a step off the period."""
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
        """Names of rules, and which holds where: (steps, parameters), −1 where there is no row."""
        if "rule" not in self:
            return np.full(self.shape, -1, dtype=np.int64), []
        codes, names = self._frame["rule"].factorize()
        return self._matrix(codes, -1, np.int64), [str(name) for name in names]

    def ruled_by(self, *names: str) -> Bools:
        """Where one of these rules holds: (steps, parameters)."""
        codes, known = self.rules
        wanted = [known.index(name) for name in names if name in known]
        result: Bools = np.isin(codes, wanted) if wanted else np.zeros(self.shape, dtype=bool)
        return result

    @cached_property
    def numel(self) -> Floats:
        """Elements of each parameter: (parameters,); NaN where the frame does not tell."""
        if "numel" not in self:
            return np.full(self.shape[1], np.nan)
        return last(self["numel"])

    @cached_property
    def group(self) -> Floats:
        """Parameter group of each parameter: (parameters,); NaN where the frame does not tell."""
        if self.key == "module" or "group" not in self:
            return np.full(self.shape[1], np.nan)
        return last(self["group"])

    @cached_property
    def near_peak(self) -> Bools:
        """Where the learning rate is at least half of its highest: (steps, parameters).

        Warmup's beginning and annealing's end are left out: small updates are meant there.
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
    frame.attrs = {}  # of which pandas makes a deep copy for each column that is looked at
    # Codes instead of a groupby: one run of one optimizer is the usual case, and copies nothing.
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
    """The series of one optimizer; what a later attempt replaces is set aside."""
    superseded = []
    keep = _kept(rows)
    if not keep.all():
        attempt = rows["attempt"].to_numpy()
        again = np.unique(attempt[~keep])
        superseded = [Series(rows[attempt == one], run, optimizer, (), about) for one in again]
        rows = rows[keep].reset_index(drop=True)
    return Series(rows, run, optimizer, superseded, about)


def _kept(rows: pd.DataFrame) -> Bools:
    """Of one optimizer's rows, those that no later attempt recorded anew: (rows,)."""
    keep = np.ones(len(rows), dtype=bool)
    if "attempt" in rows:
        attempt, step = rows["attempt"].to_numpy(), rows["step"].to_numpy()
        for later in np.unique(attempt)[1:]:
            keep &= (attempt >= later) | (step < step[attempt == later].min())
    return keep


def latest(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that no later attempt of the same run and optimizer recorded anew."""
    if "attempt" not in frame or frame["attempt"].nunique() < 2:
        return frame
    keys = [key for key in ("run", "optimizer") if key in frame]
    keep = np.ones(len(frame), dtype=bool)
    for at in frame.groupby(keys, observed=True).indices.values():
        keep[at] = _kept(frame.iloc[at])
    return frame[keep].reset_index(drop=True)


def last(matrix: Floats) -> Floats:
    """The last value of each parameter that is not NaN: (parameters,)."""
    known = ~np.isnan(matrix)
    at = len(matrix) - 1 - known[::-1].argmax(axis=0)
    result: Floats = matrix[at, np.arange(matrix.shape[1])]
    return result


def first(matrix: Floats) -> Floats:
    """The first value of each parameter that is not NaN: (parameters,)."""
    result: Floats = matrix[(~np.isnan(matrix)).argmax(axis=0), np.arange(matrix.shape[1])]
    return result


def peak(matrix: Floats) -> Floats:
    """The highest value of each parameter, NaN where it has none: (parameters,)."""
    result: Floats = np.fmax.reduce(matrix, axis=0)
    return result


def quantile(matrix: Floats, share: float) -> Floats:
    """A quantile of each parameter's figures, NaN where it has none: (parameters,)."""
    if not len(matrix):
        return np.full(matrix.shape[1], np.nan)
    ordered = np.sort(matrix, axis=0)  # NaN comes last
    at = share * (np.maximum((~np.isnan(matrix)).sum(axis=0), 1) - 1)
    below = at.astype(np.int64)
    columns = np.arange(matrix.shape[1])
    low, high = ordered[below, columns], ordered[np.ceil(at).astype(np.int64), columns]
    # Two equal values may be infinite, whose difference is NaN.
    result: Floats = np.where(low == high, low, low + (at - below) * (high - low))
    return result
