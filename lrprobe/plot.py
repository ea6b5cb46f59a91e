"""Pictures of a frame: a function takes one and gives back the Matplotlib axes it drew on.

Matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

AxesArray: TypeAlias = NDArray[np.object_]
"""Matplotlib axes in an array, as ``pyplot.subplots`` gives them."""

# Okabe and Ito's colours, which any colour vision tells apart; the dashes serve grey print.
_STYLES = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "-"},
    {"color": "#56B4E9", "linestyle": "--"},
    {"color": "#000000", "linestyle": "-."},
)
_MAX_PANELS = 24
_PANELS_A_ROW = 3


def rate(
    frame: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Axes | Iterable[Any] | None = None,
) -> AxesArray:
    """Draw the effective learning rate over the steps: the median in a band from p05 to p95.

    There is one panel for each parameter, and in it one line for each run and optimizer.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``. Where it was made ``by`` module or group,
            the panels are those; where ``by`` model, there is one.
        parameters: which panels: a regular expression (``re.search``), or names in the order
            wanted. By default all.
        axes: where to draw: as many ``Axes`` as panels, in any shape. By default a new figure.

    Returns:
        The axes, one for each panel, in a one-dimensional array; the figure is
        ``axes[0].figure``.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: the frame is empty or has no such parameter; ``axes`` are not as many as the
            panels; or there are more than 24 panels and neither says that this is meant.

    Example:
        >>> import torch, lrprobe, lrprobe.plot
        >>> net = torch.nn.Linear(4, 2)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> with lrprobe.attach(adam, net, every=1) as probe:
        ...     for _ in range(5):
        ...         net(torch.ones(1, 4)).sum().backward()
        ...         adam.step()
        >>> axes = lrprobe.plot.rate(probe.frame())
        >>> [ax.get_title() for ax in axes]
        ['weight', 'bias']
    """
    panels = _panels(frame, parameters)
    if len(panels) > _MAX_PANELS and parameters is None and axes is None:
        raise ValueError(
            f"{len(panels)} panels are too many to read: choose with `parameters=`, a regular "
            'expression or a list of names, or take a frame made by="module" or by="model"'
        )
    drawn = _axes(len(panels), axes)
    keys = _line_keys(frame)
    styles = dict(zip((label for label, _ in _lines(frame, keys)), cycle(_STYLES), strict=False))
    for ax, (title, rows) in zip(drawn, panels.items(), strict=True):
        for label, line in _lines(rows, keys):
            low, median, high = (line[f"effective_lr_{q}"] for q in ("p05", "p50", "p95"))
            colour = styles[label]["color"]
            ax.fill_between(line["step"], low, high, color=colour, alpha=0.2, linewidth=0.8)
            ax.plot(line["step"], median, label=label, **styles[label])
        if (rows["effective_lr_p95"] > 0).any():
            ax.set_yscale("log", nonpositive="clip")
        ax.set_title(title)
    _annotate(drawn, "optimizer step", "effective learning rate\n(step per unit of direction)")
    return drawn


# What every plot needs: which panels, which lines in them, axes to draw on, and what they say.


def _panels(
    frame: pd.DataFrame, wanted: str | Sequence[str | int] | None
) -> dict[str, pd.DataFrame]:
    """The rows of each panel, by its title."""
    if len(frame) == 0:
        raise ValueError("the frame has no rows: no step was recorded yet, or all were filtered")
    key = next((k for k in ("parameter", "module", "group") if k in frame), None)
    if key is None:
        return {"model": frame}
    names = frame[key].unique().tolist()
    if isinstance(wanted, str):
        chosen = [name for name in names if re.search(wanted, str(name))]
        missing = [] if chosen else [wanted]
    else:
        chosen = names if wanted is None else list(wanted)
        missing = [name for name in chosen if name not in names]
    if missing:
        known = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
        raise ValueError(f"no {key} matches {', '.join(map(repr, missing))}: there are {known}")
    title = "group {}" if key == "group" else "{}"
    return {title.format(name): frame[frame[key] == name] for name in chosen}


def _line_keys(frame: pd.DataFrame) -> list[str]:
    """The columns that tell the lines of a panel apart."""
    keys: list[str] = []
    lines = 1
    for key in ("run", "optimizer", "attempt"):
        if key in frame and len(frame[[*keys, key]].drop_duplicates()) > lines:
            keys.append(key)
            lines = len(frame[keys].drop_duplicates())
    return keys or ["optimizer"]


def _lines(rows: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The label and the rows of each line."""
    for values, line in rows.groupby(keys, sort=False):
        words = (
            f"attempt {v}" if k == "attempt" else str(v) for k, v in zip(keys, values, strict=True)
        )
        yield ", ".join(words), line.sort_values("step", kind="stable")


def _axes(count: int, given: Axes | Iterable[Any] | None) -> AxesArray:
    """One axes a panel: those given, or those of a new figure."""
    try:
        from matplotlib import pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError("lrprobe.plot needs Matplotlib: pip install 'lrprobe[plot]'") from error
    if given is not None:
        array = np.array([given] if isinstance(given, Axes) else given, dtype=object).ravel()
        if len(array) != count:
            raise ValueError(f"{count} panels need as many axes; {len(array)} were given")
        return array
    columns = min(count, _PANELS_A_ROW)
    rows = math.ceil(count / columns)
    _, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 3.0 * columns, 0.8 + 2.4 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for spare in grid.flat[count:]:
        spare.remove()
    for lowest in grid.flat[max(count - columns, 0) : count]:
        lowest.tick_params(labelbottom=True)
    return grid.ravel()[:count]


def _annotate(axes: AxesArray, x: str, y: str) -> None:
    """Name and unit of a scale beside its numbers, and one legend where there is a choice."""
    for ax in axes:
        if ax.xaxis.get_tick_params().get("labelbottom", True):
            ax.set_xlabel(x)
        if ax.yaxis.get_tick_params().get("labelleft", True):
            ax.set_ylabel(y)
        ax.grid(visible=True, alpha=0.3)
    handles = {label: line for ax in axes for line, label in _legend(ax)}
    if len(handles) > 1:
        axes[0].legend(handles.values(), handles.keys())


def _legend(ax: Axes) -> Iterator[tuple[Any, str]]:
    return zip(*ax.get_legend_handles_labels(), strict=True)
