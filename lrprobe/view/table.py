"""The records of one optimizer of one run, as matrices for the view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrprobe.series import Series, latest, series_of
from lrprobe.text import shorter

if TYPE_CHECKING:
    import pandas as pd

Matrix = NDArray[np.float32]
"""Recorded steps × parameters."""


class Figure(NamedTuple):
    """A figure that a heatmap can show.

    Attributes:
        title: its name in the view.
        unit: its unit.
        share: whether it is a share from 0 to 1, which needs a linear scale.
    """

    title: str
    unit: str
    share: bool = False


FIGURES: Mapping[str, Figure] = {
    "effective_lr_p50": Figure("median rate", "step per unit of direction"),
    "update_ratio": Figure("update ratio", "‖Δθ‖ / ‖θ‖"),
    "grad_norm": Figure("gradient norm", "‖g‖"),
    "lost_fraction": Figure("lost updates", "share of the elements", share=True),
    "idle_fraction": Figure("idle elements", "share of the elements", share=True),
    "reconstruction_error": Figure("reconstruction error", "relative to the step"),
}
"""Maps columns of the frame to the figures that the view offers, in its order."""

QUANTILES = ("min", "p01", "p05", "p25", "p50", "p75", "p95", "p99", "max")
"""Quantiles of the rate that the histogram is drawn from."""

COLUMNS = (*(f"effective_lr_{at}" for at in QUANTILES), *list(FIGURES)[1:], "lr")
"""All columns that the view uses."""


@dataclass(frozen=True, slots=True)
class Table:
    """The records of one optimizer of one run.

    Attributes:
        run: name of the run; empty if there is only one.
        optimizer: name of the optimizer.
        level: what a row stands for: ``"parameter"``, ``"module"``, ``"group"`` or ``"model"``.
        names: of the parameters, in the model's order, unique and shortened.
        groups: name of each parameter's group; empty if unknown.
        numel: number of elements of each parameter; NaN if unknown.
        steps: the recorded steps, ascending.
        figures: maps those of ``COLUMNS`` that were recorded to their matrices.
    """

    run: str
    optimizer: str
    level: str
    names: Sequence[str]
    groups: Sequence[str]
    numel: Sequence[float]
    steps: NDArray[np.int64]
    figures: Mapping[str, Matrix]


def tables_of(frame: pd.DataFrame) -> Iterator[Table]:
    """The tables of a frame, one per run and optimizer, without replaced attempts."""
    frame = latest(frame)
    for series in series_of(frame):
        yield Table(
            run=shorter(series.run),
            optimizer=shorter(series.optimizer),
            level=series.key,
            names=unique([shorter(name) for name in series.names]),
            groups=_groups(frame, series),
            numel=series.numel.tolist(),
            steps=series.steps,
            figures={
                column: _single(series[column])
                for column in COLUMNS
                if column in series and frame[column].dtype.kind in "fiu"
            },
        )


def unique(names: Sequence[str]) -> list[str]:
    """Number repeated names."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        result.append(f"{name}#{seen[name]}" if seen[name] else name)
    return result


def _single(values: NDArray[np.float64]) -> Matrix:
    with np.errstate(over="ignore"):  # a value above float32's range becomes inf
        return values.astype(np.float32)


def _groups(frame: pd.DataFrame, series: Series) -> list[str]:
    """The name of each parameter's group."""
    names: dict[float, str] = {}
    if "group_name" in frame and "group" in frame:
        rows = frame[frame["optimizer"] == series.optimizer] if "optimizer" in frame else frame
        rows = rows[rows["run"] == series.run] if series.run else rows
        rows = rows[["group", "group_name"]].drop_duplicates("group", keep="last")
        names = dict(zip(rows["group"].tolist(), rows["group_name"].tolist(), strict=True))
    return [
        "" if np.isnan(group) else shorter(str(names.get(group, f"group{group:.0f}")))
        for group in series.group.tolist()
    ]
