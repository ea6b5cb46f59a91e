"""Helpers that the functions of ``plot`` share: panels, lines, axes, colours, labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm

AxesArray: TypeAlias = NDArray[np.object_]
"""An array of Matplotlib axes, as ``pyplot.subplots`` returns it."""

# Okabe and Ito's palette, which is safe for colour-blind readers, with grey instead of black, which
# would be invisible on a dark background. Line styles differ for printing in grey.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "-"},
    {"color": "#56B4E9", "linestyle": "--"},
    {"color": "#777777", "linestyle": "-."},
)
PALE = "#999999"
COLOURS = "viridis"  # perceptually uniform, also for colour-blind readers and in grey
MISSING = "#d9d9d9"
LINES = ("run", "optimizer", "attempt")  # columns that distinguish lines
PANELS = ("parameter", "module", "group")  # the first of these columns distinguishes panels
MAX_PANELS = 24
PANELS_A_ROW = 3
MAX_LABELS = 40  # names down the side of a heatmap
MAX_COLUMNS = 1000  # of a heatmap: about the width of a screen

STEPS = "optimizer step"
RATE = "effective learning rate\n(step per unit of direction)"
RATIO = "update ratio ‖Δθ‖ / ‖θ‖\n(no unit)"
UNITS = {
    "lr": "lr of the group\n(step per unit of direction)",
    "lr_per_sample": "lr per sample\n(step per unit of direction and sample)",
    "samples": "samples behind a step",
    "update_norm": "norm of the update ‖Δθ‖\n(units of the parameter)",
    "update_ratio": RATIO,
    "update_grad_cosine": "cosine of update and gradient\n(1 follows the gradient)",
    "param_norm": "norm of the parameter ‖θ‖\n(units of the parameter)",
    "grad_norm": "norm of the gradient ‖g‖\n(loss per unit of the parameter)",
    "rms_grad_mean": "RMS of the gradient\n(loss per unit of the parameter)",
    "rms_update_mean": "RMS of the update\n(units of the parameter)",
    "numel": "elements",
}
SHARES = ("zero_grad_fraction", "eps_fraction", "lost_fraction")


def span(ax: Axes, steps: pd.Series, known: pd.Series) -> None:
    """Extend the axis to all recorded steps, and shade the last ones if they have no values.

    Otherwise a run that became NaN would look like a shorter run.
    """
    first, last = float(steps.min()), float(steps.max())
    ax.update_datalim([(first, 1.0), (last, 1.0)], updatey=False)
    end = float(known.max()) if len(known) else first
    if end < last:
        ax.axvspan(end, last, color=MISSING, alpha=0.5, linewidth=0, label="no figure")


def scale_of(*cells: NDArray[np.float64]) -> LogNorm:
    """A logarithmic colour scale that covers all cells."""
    from matplotlib.colors import LogNorm

    seen = np.concatenate([c[np.isfinite(c) & (c > 0)] for c in cells])
    low, high = (seen.min(), seen.max()) if len(seen) else (0.1, 1.0)
    return LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2)


def coloured(
    ax: Axes, x: NDArray[Any], y: NDArray[Any], cells: NDArray[np.float64], scale: LogNorm
) -> QuadMesh:
    """Draw cells as colours, and cells without a positive finite value in grey."""
    from matplotlib import colormaps

    shown = np.ma.masked_where(~(np.isfinite(cells) & (cells > 0)), cells)
    ax.set_facecolor(MISSING)
    return ax.pcolormesh(x, y, shown, cmap=colormaps[COLOURS], norm=scale, rasterized=True)


def edges_of(steps: NDArray[Any]) -> NDArray[np.float64]:
    """The edges of columns that are centred on the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = 2 * steps[0] - middles[0], 2 * steps[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def thinned(count: int, limit: int) -> NDArray[np.int64]:
    """At most ``limit`` of ``count`` indices, evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def grid_of(edges: Sequence[Any], bins: int = 80) -> NDArray[np.float64]:
    """The edges of logarithmically spaced rows that cover every histogram."""
    every = np.concatenate([np.asarray(e, dtype=float) for e in edges])
    every = every[np.isfinite(every) & (every > 0)]
    low, high = (every.min(), every.max()) if len(every) else (0.1, 1.0)
    if high < 1.05 * low:
        low, high = low / 2, high * 2
    return np.geomspace(low / 1.01, high * 1.01, bins + 1)


def rebin(edges: Any, counts: Any, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of a histogram's elements between adjacent edges of the grid."""
    total = np.cumsum(np.asarray(counts, dtype=float))
    if len(total) == 0 or not total[-1]:
        return np.full(len(grid) - 1, np.nan)
    share = np.concatenate([[0.0], total / total[-1]])
    at = np.log(np.clip(np.asarray(edges, dtype=float), grid[0], grid[-1]))
    return np.diff(np.interp(np.log(grid), at, share, left=0.0, right=1.0))


def unit(column: str) -> str:
    """The axis label of a column."""
    if column.startswith("effective_lr"):
        kind = column.removeprefix("effective_lr_")
        return RATE if kind == "p50" else RATE.replace("\n", f", {kind}\n")
    return UNITS.get(column, column.replace("_fraction", ": share of the elements"))


def only(frame: pd.DataFrame, *figures: str) -> pd.DataFrame:
    """Select the columns to draw and the key columns, because each panel copies its rows."""
    need_rows(frame)
    numbers = [name for name, kind in frame.dtypes.items() if kind.kind in "iuf"]
    for name in figures:
        if name not in numbers:
            available = ", ".join(map(str, numbers))
            raise ValueError(f"the frame has no numeric column {name!r}; it has {available}")
    keys = [key for key in ("step", *LINES, *PANELS) if key in frame]
    return frame[list(dict.fromkeys((*keys, *figures)))]


def need_rows(frame: pd.DataFrame) -> None:
    """Raise an error for a frame without rows."""
    if len(frame) == 0:
        raise ValueError(
            "the frame has no rows: no step was recorded yet, or all were filtered out"
        )


def need(table: pd.DataFrame, columns: Sequence[str], source: str) -> None:
    """Raise an error for a table without these columns."""
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"the table has no column {missing[0]!r}; a table from {source} has it")


def short(name: str, limit: int = 40) -> str:
    """The end of a name, if it is too long for a label."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


# Matplotlib would parse text between "$" signs in a name as a formula, so that is turned off.


def entitle(ax: Axes, name: str) -> None:
    """Set the title of a panel, in a smaller font if it is long."""
    size = "large" if len(name) <= 30 else "small"
    ax.set_title(short(name), fontsize=size, parse_math=False)


def legend(ax: Axes, handles: Mapping[str, Any], **options: Any) -> None:
    """Draw a legend from labels and handles, without parsing formulas."""
    legend = ax.legend(handles.values(), handles.keys(), **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def not_too_many(panels: Mapping[str, Any], parameters: object, axes: object) -> int:
    """The number of panels; an error if there are too many and the user did not ask for them."""
    if len(panels) > MAX_PANELS and parameters is None and axes is None:
        raise ValueError(
            f"{len(panels)} panels are too many to read: select some with `parameters=` (a regular "
            "expression or a list of names), draw a heatmap, or use a frame with by="
            '"module" or by="model"'
        )
    return len(panels)


# Panels, the lines in them, axes to draw on, and their labels.


def panels_of(
    frame: pd.DataFrame, wanted: str | Sequence[str | int] | None
) -> dict[str, pd.DataFrame]:
    """The rows of each panel, by its title."""
    need_rows(frame)
    key = next((k for k in PANELS if k in frame), None)
    if key is None:
        return {"model": frame}
    rows = dict(iter(frame.groupby(key, sort=False, observed=True)))
    names: list[Any] = list(rows)
    if isinstance(wanted, str):
        chosen = [name for name in names if re.search(wanted, str(name))]
        missing = [] if chosen else [wanted]
    else:
        chosen = names if wanted is None else list(wanted)
        missing = [name for name in chosen if name not in names]
    if missing:
        known = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
        raise ValueError(f"no {key} matches {', '.join(map(repr, missing))}; there are {known}")
    title = "group {}" if key == "group" else "{}"
    return {title.format(name): rows[name] for name in chosen}


def line_keys(frame: pd.DataFrame) -> list[str]:
    """The columns that distinguish the lines of a panel."""
    keys: list[str] = []
    lines = 1
    for key in LINES:
        if key in frame and len(frame[[*keys, key]].drop_duplicates()) > lines:
            keys.append(key)
            lines = len(frame[keys].drop_duplicates())
    return keys or ["optimizer"]


def lines_of(rows: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The label and the rows of each line."""
    for values, line in rows.groupby(keys, sort=False, observed=True):
        words = (
            f"attempt {v}" if k == "attempt" else str(v) for k, v in zip(keys, values, strict=True)
        )
        yield ", ".join(words), line.sort_values("step", kind="stable")


def pyplot() -> Any:
    """Import Matplotlib's pyplot, or raise an error that says how to install it."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("lrprobe.plot needs Matplotlib: pip install 'lrprobe[plot]'") from error
    return plt


def single(ax: Axes | None, size: tuple[float, float] = (8.0, 4.5)) -> Axes:
    """The given axes, or those of a new figure."""
    plt = pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def axes_of(
    count: int,
    given: Axes | Iterable[Any] | None,
    columns: int = PANELS_A_ROW,
    share_y: bool | Literal["col"] = True,
) -> AxesArray:
    """One ``Axes`` per panel: the given ones, or those of a new figure."""
    plt = pyplot()
    from matplotlib.axes import Axes

    if given is not None:
        array = np.array([given] if isinstance(given, Axes) else given, dtype=object).ravel()
        if len(array) != count:
            raise ValueError(f"{count} panels need as many axes; got {len(array)}")
        return array
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    grid: AxesArray
    _, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 3.0 * columns, 0.8 + 2.4 * rows),
        sharex=True,
        sharey=share_y,
        squeeze=False,
        layout="constrained",
    )
    for spare in grid.flat[count:]:
        spare.remove()
    for lowest in grid.flat[max(count - columns, 0) : count]:
        lowest.tick_params(labelbottom=True)
    return grid.ravel()[:count]


def annotate(axes: AxesArray, x: str, y: str) -> None:
    """Label the visible scales, and draw one legend if there are several lines."""
    for ax in axes:
        if ax.xaxis.get_tick_params().get("labelbottom", True):
            ax.set_xlabel(x)
        if ax.yaxis.get_tick_params().get("labelleft", True):
            ax.set_ylabel(y)
        ax.grid(visible=True, alpha=0.3)
    handles = {short(label): line for ax in axes for line, label in entries(ax)}
    if len(handles) > 1:
        points = sum(len(line.get_xdata()) for line in axes[0].lines)
        where = "best" if points < 10_000 else "upper right"  # "best" is slow for many points
        legend(axes[0], handles, loc=where, fontsize="small")


def entries(ax: Axes) -> Iterator[tuple[Any, str]]:
    """Handles and labels of a legend."""
    return zip(*ax.get_legend_handles_labels(), strict=True)
