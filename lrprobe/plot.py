"""Pictures of a frame: a function takes one and gives back the Matplotlib axes it drew on.

``rate``, ``compare``, ``update_ratio`` and ``heatmap`` draw a frame, ``histograms`` and ``traces``
what ``Probe.histograms`` and ``Probe.elements`` give; ``lrprobe.read`` gives all three. What has a
panel for each parameter takes and gives back an array of ``axes``; what is one picture, one ``ax``.
Matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm

AxesArray: TypeAlias = NDArray[np.object_]
"""Matplotlib axes in an array, as ``pyplot.subplots`` gives them."""

# Okabe and Ito's colours, which any colour vision tells apart, with grey for their black, which a
# dark background would hide; the dashes serve grey print.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "-"},
    {"color": "#56B4E9", "linestyle": "--"},
    {"color": "#777777", "linestyle": "-."},
)
_PALE = "#999999"
_COLOURS = "viridis"  # evenly lighter, for any colour vision and in grey print
_MISSING = "#d9d9d9"
_LINES = ("run", "optimizer", "attempt")  # columns that tell lines apart
_PANELS = ("parameter", "module", "group")  # and panels: the first that there is
_MAX_PANELS = 24
_PANELS_A_ROW = 3
_MAX_LABELS = 40  # names down the side of a heatmap
_MAX_COLUMNS = 1000  # of a heatmap; a screen has no more

_STEPS = "optimizer step"
_RATE = "effective learning rate\n(step per unit of direction)"
_RATIO = "update ratio ‖Δθ‖ / ‖θ‖\n(no unit)"
_UNITS = {
    "lr": "lr of the group\n(step per unit of direction)",
    "lr_per_sample": "lr per sample\n(step per unit of direction and sample)",
    "samples": "samples behind a step",
    "update_norm": "norm of the update ‖Δθ‖\n(units of the parameter)",
    "update_ratio": _RATIO,
    "update_grad_cosine": "cosine of update and gradient\n(1 follows the gradient)",
    "param_norm": "norm of the parameter ‖θ‖\n(units of the parameter)",
    "grad_norm": "norm of the gradient ‖g‖\n(loss per unit of the parameter)",
    "rms_grad_mean": "RMS of the gradient\n(loss per unit of the parameter)",
    "rms_update_mean": "RMS of the update\n(units of the parameter)",
    "numel": "elements",
}
_SHARES = ("zero_grad_fraction", "eps_fraction", "lost_fraction")


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
            panels; or there are more than 24 panels and neither says that this is meant. (For more,
            there is ``heatmap``.)

    Example:
        >>> import torch, lrprobe
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
    return _over_steps(frame, "effective_lr_p50", parameters, axes, band=True)


def compare(
    frame: pd.DataFrame,
    value: str = "effective_lr_p50",
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Axes | Iterable[Any] | None = None,
) -> AxesArray:
    """Draw one column over the steps, to compare runs: a panel a parameter, a line a run.

    Args:
        frame: from ``lrprobe.read`` of several paths, whose column ``run`` names the lines. Made
            ``by="model"``, it has one panel.
        value: the column.
        parameters: which panels, as for ``rate``.
        axes: where to draw, as for ``rate``.

    Returns:
        The axes, one for each panel, in a one-dimensional array.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: as for ``rate``; or the frame has no such column of figures.

    Example:
        >>> import pandas as pd, lrprobe
        >>> frame = pd.DataFrame({"run": ["a", "a", "b", "b"], "step": [1, 2, 1, 2]})
        >>> frame = frame.assign(optimizer="SGD", grad_norm=[3.0, 2.0, 3.0, 1.0])
        >>> (ax,) = lrprobe.plot.compare(frame, "grad_norm")
        >>> [line.get_label() for line in ax.lines]
        ['a', 'b']
    """
    return _over_steps(frame, value, parameters, axes, band=False)


def update_ratio(
    frame: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw the update ratio ‖Δθ‖/‖θ‖ of all parameters over the steps, with a guide at 1e-3.

    About 1e-3 is what a weight matrix often has while it learns well: a rule of thumb (Karpathy's),
    not a law. Up to seven lines have a colour each; of more, the three that end lowest and the
    three that end highest have, and the others are grey.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``.
        parameters: which lines, as ``rate`` chooses panels.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: the frame is empty, or has no such parameter or no update ratio.
    """
    frame = _only(frame, "update_ratio")
    panels = _panels(frame, parameters)
    keys = _line_keys(frame)
    keys = keys if len(frame[keys].drop_duplicates()) > 1 else []
    lines = {
        ", ".join(filter(None, (label if keys else "", title))): line[line["update_ratio"].notna()]
        for title, rows in panels.items()
        for label, line in _lines(rows, keys or ["optimizer"])
    }
    ax = _single(ax)
    shown = list(lines)
    if len(shown) > len(STYLES):
        order = sorted(
            (label for label, line in lines.items() if len(line)),
            key=lambda label: lines[label]["update_ratio"].iloc[-1],
        )
        shown = order[:3] + order[-3:]
        for label in lines.keys() - set(shown):
            line = lines[label]
            ax.plot(line["step"], line["update_ratio"], color=_PALE, linewidth=0.5, alpha=0.5)
    for label, style in zip(reversed(shown), STYLES, strict=False):
        ax.plot(lines[label]["step"], lines[label]["update_ratio"], label=label, **style)
    _span(ax, frame["step"], frame.loc[frame["update_ratio"] > 0, "step"])
    ink = ax.xaxis.label.get_color()  # light on a dark background
    ax.axhline(1e-3, color=ink, linestyle=(0, (1, 2)), zorder=3, label="1e-3, the guide")
    ax.set_yscale("log", nonpositive="clip")
    _annotate(np.array([ax], dtype=object), _STEPS, _RATIO)
    handles = {short(label): line for line, label in _legend(ax)}
    legend(ax, handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def heatmap(
    frame: pd.DataFrame,
    value: str = "effective_lr_p50",
    parameters: str | Sequence[str | int] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw one column of all parameters over the steps as colours, on a logarithmic scale.

    A row is a parameter, in the order of the frame. Grey is where there is nothing to show on such
    a scale: no step, or a figure that is 0. Of thousands of steps, 1,000 are drawn; of hundreds of
    names, 40 are written.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run.
        value: the column.
        parameters: which rows, as ``rate`` chooses panels.
        ax: where to draw; by default a new figure. The colour bar takes its room from it.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: the frame is empty, has several runs, or has no such parameter or column.
    """
    frame = _only(frame, value)
    panels = _panels(frame, parameters)
    names = frame["run"].unique().tolist() if "run" in frame else []
    if len(names) > 1:
        raise ValueError(
            f"there are {len(names)} runs in the frame; a heatmap shows one: "
            f'frame[frame["run"] == {names[0]!r}]'
        )
    several = len(frame["optimizer"].unique()) > 1
    rows = {
        f"{optimizer}: {title}" if several else title: line.drop_duplicates("step", keep="last")
        for title, panel in panels.items()
        for optimizer, line in panel.groupby("optimizer", sort=False, observed=True)
    }
    steps = np.unique(np.concatenate([line["step"] for line in rows.values()]))
    steps = steps[_thinned(len(steps), _MAX_COLUMNS)]
    cells = np.array(
        [line.set_index("step")[value].reindex(steps).to_numpy() for line in rows.values()],
        dtype=float,
    )
    ax = _single(ax, (8.0, min(1.6 + 0.18 * len(rows), 9.0)))
    mesh = _mesh(ax, _edges(steps), np.arange(len(rows) + 1) - 0.5, cells, _scale(cells))
    ax.figure.colorbar(mesh, ax=ax, label=unit(value))
    ax.invert_yaxis()
    picks = _thinned(len(rows), _MAX_LABELS)
    labels = list(rows)
    ax.set_yticks(picks, [short(labels[at]) for at in picks], fontsize="small", parse_math=False)
    ax.set_xlabel(_STEPS)
    return ax


def histograms(
    table: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Axes | Iterable[Any] | None = None,
) -> AxesArray:
    """Draw how the effective rates of a parameter's elements are spread, over the steps.

    There is one panel for each parameter (and run and optimizer); across are the steps, up the
    rate, and the colour is the share of the elements.

    Args:
        table: from ``Probe.histograms`` or ``lrprobe.read(..., table="histograms")``.
        parameters: which, as ``rate`` chooses panels; each has one for each run and optimizer.
        axes: as many as there are panels, in any shape. By default a new figure.

    Returns:
        The axes of the panels, in a one-dimensional array.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: as for ``rate``; or the table has no histograms.
    """
    _need(table, ("edges", "counts"), "Probe.histograms()")
    keys = _line_keys(table)
    several = len(table[keys].drop_duplicates()) > 1
    panels = {
        f"{title} ({label})" if several else title: line.drop_duplicates("step", keep="last")
        for title, panel in _panels(table, parameters).items()
        for label, line in _lines(panel, keys)
    }
    drawn = _axes(_not_too_many(panels, parameters, axes), axes)
    panels = {title: line.iloc[_thinned(len(line), _MAX_COLUMNS)] for title, line in panels.items()}
    grid = _grid([edges for line in panels.values() for edges in line["edges"]])
    cells = [
        np.array(
            [_rebin(*pair, grid) for pair in zip(line["edges"], line["counts"], strict=True)]
        ).T
        for line in panels.values()
    ]
    scale = _scale(*cells)
    for ax, (title, line), shares in zip(drawn, panels.items(), cells, strict=True):
        mesh = _mesh(ax, _edges(line["step"].to_numpy()), grid, shares, scale)
        ax.set_yscale("log")
        _entitle(ax, title)
    ax.figure.colorbar(mesh, ax=list(drawn), label="share of the elements")
    _annotate(drawn, _STEPS, _RATE)
    return drawn


def traces(
    table: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Iterable[Any] | None = None,
) -> AxesArray:
    """Draw the tracked elements over the steps: their rates left, their updates right.

    This is Fig. 2 of Zeiler (2012). There is a row of two panels for each parameter, and a line for
    each element.

    Args:
        table: from ``Probe.elements`` of a probe that was attached with ``track``, or from
            ``lrprobe.read(..., table="elements")``.
        parameters: which rows of panels, as ``rate`` chooses panels.
        axes: where to draw: two for each parameter, in any shape. By default a new figure.

    Returns:
        The axes in an array with a row for each parameter and two columns.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: as for ``rate``; or the table has no elements.
    """
    _need(table, ("element", "effective_lr", "update"), "Probe.elements()")
    panels = _panels(table, parameters)
    _not_too_many(panels, parameters, axes)
    drawn = _axes(2 * len(panels), axes, columns=2, share_y="col").reshape(-1, 2)
    keys = [*_line_keys(table), "element"]
    for pair, (title, rows) in zip(drawn, panels.items(), strict=True):
        for (_, line), style in zip(
            rows.groupby(keys, sort=False, observed=True), cycle(STYLES), strict=False
        ):
            for ax, column in zip(pair, ("effective_lr", "update"), strict=True):
                ax.plot(line["step"], line[column], **style, linewidth=0.8, alpha=0.8)
        if (rows["effective_lr"] > 0).any():
            pair[0].set_yscale("log", nonpositive="clip")
        for ax in pair:
            _entitle(ax, title)
            ax.autoscale_view()  # to the limits of the scale it has now
    _annotate(drawn[:, 0], _STEPS, _RATE)
    _annotate(drawn[:, 1], _STEPS, "update Δθ\n(units of the parameter)")
    return drawn


# What the functions above have in common: lines over the steps, and colours over the steps.


def _over_steps(
    frame: pd.DataFrame,
    value: str,
    parameters: str | Sequence[str | int] | None,
    axes: Axes | Iterable[Any] | None,
    *,
    band: bool,
) -> AxesArray:
    frame = _only(frame, value, *(("effective_lr_p05", "effective_lr_p95") if band else ()))
    panels = _panels(frame, parameters)
    drawn = _axes(_not_too_many(panels, parameters, axes), axes)
    keys = _line_keys(frame)
    styles = dict(zip((label for label, _ in _lines(frame, keys)), cycle(STYLES), strict=False))
    for ax, (title, rows) in zip(drawn, panels.items(), strict=True):
        for label, line in _lines(rows, keys):
            if band:
                low, high = line["effective_lr_p05"], line["effective_lr_p95"]
                colour = styles[label]["color"]
                ax.fill_between(line["step"], low, high, color=colour, alpha=0.2, linewidth=0.8)
            ax.plot(line["step"], line[value], label=label, **styles[label])
        shown = rows["effective_lr_p95" if band else value]
        if (shown > 0).any() and not (shown < 0).any() and value not in _SHARES:
            ax.set_yscale("log", nonpositive="clip")
        _entitle(ax, title)
        _span(ax, frame["step"], rows.loc[rows[value].notna(), "step"])
        ax.autoscale_view()  # to the limits of the scale it has now
    _annotate(drawn, _STEPS, unit(value))
    return drawn


def _span(ax: Axes, steps: pd.Series, known: pd.Series) -> None:
    """Show all recorded steps, and in grey the last of them where nothing is known any more.

    Else a run that became NaN would look like a shorter one.
    """
    first, last = float(steps.min()), float(steps.max())
    ax.update_datalim([(first, 1.0), (last, 1.0)], updatey=False)
    end = float(known.max()) if len(known) else first
    if end < last:
        ax.axvspan(end, last, color=_MISSING, alpha=0.5, linewidth=0, label="no figure")


def _scale(*cells: NDArray[np.float64]) -> LogNorm:
    """A logarithmic scale of colours that has room for all the cells."""
    from matplotlib.colors import LogNorm

    seen = np.concatenate([c[np.isfinite(c) & (c > 0)] for c in cells])
    low, high = (seen.min(), seen.max()) if len(seen) else (0.1, 1.0)
    return LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2)


def _mesh(
    ax: Axes, x: NDArray[Any], y: NDArray[Any], cells: NDArray[np.float64], scale: LogNorm
) -> QuadMesh:
    """Cells as colours; grey where there is no figure or no logarithm."""
    from matplotlib import colormaps

    shown = np.ma.masked_where(~(np.isfinite(cells) & (cells > 0)), cells)
    ax.set_facecolor(_MISSING)
    return ax.pcolormesh(x, y, shown, cmap=colormaps[_COLOURS], norm=scale, rasterized=True)


def _edges(steps: NDArray[Any]) -> NDArray[np.float64]:
    """The borders of columns whose middles are the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = 2 * steps[0] - middles[0], 2 * steps[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _thinned(count: int, most: int) -> NDArray[np.int64]:
    """Indices of at most so many, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _grid(edges: Sequence[Any], bins: int = 80) -> NDArray[np.float64]:
    """The borders of rows, evenly spread over the logarithm, that hold every histogram."""
    every = np.concatenate([np.asarray(e, dtype=float) for e in edges])
    every = every[np.isfinite(every) & (every > 0)]
    low, high = (every.min(), every.max()) if len(every) else (0.1, 1.0)
    if high < 1.05 * low:
        low, high = low / 2, high * 2
    return np.geomspace(low / 1.01, high * 1.01, bins + 1)


def _rebin(edges: Any, counts: Any, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of a histogram's elements between each two borders of the grid."""
    total = np.cumsum(np.asarray(counts, dtype=float))
    if len(total) == 0 or not total[-1]:
        return np.full(len(grid) - 1, np.nan)
    share = np.concatenate([[0.0], total / total[-1]])
    at = np.log(np.clip(np.asarray(edges, dtype=float), grid[0], grid[-1]))
    return np.diff(np.interp(np.log(grid), at, share, left=0.0, right=1.0))


def unit(column: str) -> str:
    """What an axis of this column says."""
    if column.startswith("effective_lr"):
        kind = column.removeprefix("effective_lr_")
        return _RATE if kind == "p50" else _RATE.replace("\n", f", {kind}\n")
    return _UNITS.get(column, column.replace("_fraction", ": share of the elements"))


def _only(frame: pd.DataFrame, *figures: str) -> pd.DataFrame:
    """The columns that are drawn, and those that tell rows apart: each panel is a copy of them."""
    _need_rows(frame)
    numbers = [name for name, kind in frame.dtypes.items() if kind.kind in "iuf"]
    for name in figures:
        if name not in numbers:
            there = ", ".join(map(str, numbers))
            raise ValueError(f"no figures {name!r} in the frame: there are {there}")
    keys = [key for key in ("step", *_LINES, *_PANELS) if key in frame]
    return frame[list(dict.fromkeys((*keys, *figures)))]


def _need_rows(frame: pd.DataFrame) -> None:
    if len(frame) == 0:
        raise ValueError("the frame has no rows: no step was recorded yet, or all were filtered")


def _need(table: pd.DataFrame, columns: Sequence[str], source: str) -> None:
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"the table has no {missing[0]!r}; one from {source} has")


def short(name: str, most: int = 40) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


# In a name a "$" is no formula, and may be none that Matplotlib could parse.


def _entitle(ax: Axes, name: str) -> None:
    """Put a name above its panel, in letters that leave room for the neighbours' names."""
    size = "large" if len(name) <= 30 else "small"
    ax.set_title(short(name), fontsize=size, parse_math=False)


def legend(ax: Axes, handles: Mapping[str, Any], **options: Any) -> None:
    """Draw a legend, label by label; Matplotlib's options say where."""
    legend = ax.legend(handles.values(), handles.keys(), **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _not_too_many(panels: Mapping[str, Any], parameters: object, axes: object) -> int:
    if len(panels) > _MAX_PANELS and parameters is None and axes is None:
        raise ValueError(
            f"{len(panels)} panels are too many to read: choose with `parameters=`, a regular "
            "expression or a list of names, draw a heatmap, or take a frame made by="
            '"module" or by="model"'
        )
    return len(panels)


# What every plot needs: which panels, which lines in them, axes to draw on, and what they say.


def _panels(
    frame: pd.DataFrame, wanted: str | Sequence[str | int] | None
) -> dict[str, pd.DataFrame]:
    """The rows of each panel, by its title."""
    _need_rows(frame)
    key = next((k for k in _PANELS if k in frame), None)
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
        raise ValueError(f"no {key} matches {', '.join(map(repr, missing))}: there are {known}")
    title = "group {}" if key == "group" else "{}"
    return {title.format(name): rows[name] for name in chosen}


def _line_keys(frame: pd.DataFrame) -> list[str]:
    """The columns that tell the lines of a panel apart."""
    keys: list[str] = []
    lines = 1
    for key in _LINES:
        if key in frame and len(frame[[*keys, key]].drop_duplicates()) > lines:
            keys.append(key)
            lines = len(frame[keys].drop_duplicates())
    return keys or ["optimizer"]


def _lines(rows: pd.DataFrame, keys: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The label and the rows of each line."""
    for values, line in rows.groupby(keys, sort=False, observed=True):
        words = (
            f"attempt {v}" if k == "attempt" else str(v) for k, v in zip(keys, values, strict=True)
        )
        yield ", ".join(words), line.sort_values("step", kind="stable")


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("lrprobe.plot needs Matplotlib: pip install 'lrprobe[plot]'") from error
    return plt


def _single(ax: Axes | None, size: tuple[float, float] = (8.0, 4.5)) -> Axes:
    """The axes given, or that of a new figure."""
    plt = _pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def _axes(
    count: int,
    given: Axes | Iterable[Any] | None,
    columns: int = _PANELS_A_ROW,
    share_y: bool | Literal["col"] = True,
) -> AxesArray:
    """One axes a panel: those given, or those of a new figure."""
    plt = _pyplot()
    from matplotlib.axes import Axes

    if given is not None:
        array = np.array([given] if isinstance(given, Axes) else given, dtype=object).ravel()
        if len(array) != count:
            raise ValueError(f"{count} panels need as many axes; {len(array)} were given")
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


def _annotate(axes: AxesArray, x: str, y: str) -> None:
    """Name and unit of a scale beside its numbers, and one legend where there is a choice."""
    for ax in axes:
        if ax.xaxis.get_tick_params().get("labelbottom", True):
            ax.set_xlabel(x)
        if ax.yaxis.get_tick_params().get("labelleft", True):
            ax.set_ylabel(y)
        ax.grid(visible=True, alpha=0.3)
    handles = {short(label): line for ax in axes for line, label in _legend(ax)}
    if len(handles) > 1:
        points = sum(len(line.get_xdata()) for line in axes[0].lines)
        where = "best" if points < 10_000 else "upper right"  # searching takes Matplotlib long
        legend(axes[0], handles, loc=where, fontsize="small")


def _legend(ax: Axes) -> Iterator[tuple[Any, str]]:
    return zip(*ax.get_legend_handles_labels(), strict=True)
