"""Plots of a frame: each function accepts one and returns the Matplotlib axes it drew on.

``rate``, ``compare``, ``update_ratio`` and ``heatmap`` draw a frame, ``histograms`` and ``traces``
what ``Probe.histograms`` and ``Probe.elements`` return; ``lrprobe.read`` returns all three.
Functions with a panel per parameter accept and return an array of ``axes``; those with a single
panel, one ``ax``. Matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from lrprobe.drawing import (
    MAX_COLUMNS,
    MAX_LABELS,
    PALE,
    RATE,
    RATIO,
    SHARES,
    STEPS,
    STYLES,
    AxesArray,
    annotate,
    axes_of,
    coloured,
    edges_of,
    entitle,
    entries,
    grid_of,
    legend,
    line_keys,
    lines_of,
    need,
    not_too_many,
    only,
    panels_of,
    rebin,
    scale_of,
    short,
    single,
    span,
    thinned,
    unit,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def rate(
    frame: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Axes | Iterable[Any] | None = None,
) -> AxesArray:
    """Draw the effective learning rate over the steps: the median in a band from p05 to p95.

    Each parameter has a panel, with one line for each run and optimizer.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``. With ``by="module"`` or ``"group"``, the
            panels are modules or groups; with ``by="model"``, there is one panel.
        parameters: which panels: a regular expression (``re.search``), or names in the desired
            order. By default all.
        axes: where to draw: as many ``Axes`` as panels, in any shape. By default a new figure.

    Returns:
        The axes, one for each panel, in a one-dimensional array; the figure is
        ``axes[0].figure``.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: the frame is empty or has no such parameter; ``axes`` are not as many as the
            panels; or there are more than 24 panels and neither argument asks for them. (For more,
            use ``heatmap``.)

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
    """Draw one column over the steps, to compare runs: one panel per parameter, one line per run.

    Args:
        frame: from ``lrprobe.read`` of several paths, whose column ``run`` names the lines. With
            ``by="model"``, there is one panel.
        value: the column.
        parameters: which panels, as for ``rate``.
        axes: where to draw, as for ``rate``.

    Returns:
        The axes, one for each panel, in a one-dimensional array.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: as for ``rate``; or the frame has no such numeric column.

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

    A weight matrix that learns well often has about 1e-3: a rule of thumb (Karpathy's), not a law.
    Up to seven lines have their own colours. If there are more, the three that end lowest and the
    three that end highest have colours, and the others are grey.

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
    frame = only(frame, "update_ratio")
    panels = panels_of(frame, parameters)
    keys = line_keys(frame)
    keys = keys if len(frame[keys].drop_duplicates()) > 1 else []
    lines = {
        ", ".join(filter(None, (label if keys else "", title))): line[line["update_ratio"].notna()]
        for title, rows in panels.items()
        for label, line in lines_of(rows, keys or ["optimizer"])
    }
    ax = single(ax)
    shown = list(lines)
    if len(shown) > len(STYLES):
        order = sorted(
            (label for label, line in lines.items() if len(line)),
            key=lambda label: lines[label]["update_ratio"].iloc[-1],
        )
        shown = order[:3] + order[-3:]
        for label in lines.keys() - set(shown):
            line = lines[label]
            ax.plot(line["step"], line["update_ratio"], color=PALE, linewidth=0.5, alpha=0.5)
    for label, style in zip(reversed(shown), STYLES, strict=False):
        ax.plot(lines[label]["step"], lines[label]["update_ratio"], label=label, **style)
    span(ax, frame["step"], frame.loc[frame["update_ratio"] > 0, "step"])
    ink = ax.xaxis.label.get_color()  # light on a dark background
    ax.axhline(1e-3, color=ink, linestyle=(0, (1, 2)), zorder=3, label="1e-3, the guide")
    ax.set_yscale("log", nonpositive="clip")
    annotate(np.array([ax], dtype=object), STEPS, RATIO)
    handles = {short(label): line for line, label in entries(ax)}
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

    A row is a parameter, in the order of the frame. Grey means that there is nothing to show on a
    logarithmic scale: no step, or a value of 0. At most 1,000 steps are drawn, and at most 40 names
    are written.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run.
        value: the column.
        parameters: which rows, as ``rate`` chooses panels.
        ax: where to draw; by default a new figure. The colour bar takes its space from it.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: the frame is empty, has several runs, or has no such parameter or column.
    """
    frame = only(frame, value)
    panels = panels_of(frame, parameters)
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
    steps = steps[thinned(len(steps), MAX_COLUMNS)]
    cells = np.array(
        [line.set_index("step")[value].reindex(steps).to_numpy() for line in rows.values()],
        dtype=float,
    )
    ax = single(ax, (8.0, min(1.6 + 0.18 * len(rows), 9.0)))
    mesh = coloured(ax, edges_of(steps), np.arange(len(rows) + 1) - 0.5, cells, scale_of(cells))
    ax.figure.colorbar(mesh, ax=ax, label=unit(value))
    ax.invert_yaxis()
    picks = thinned(len(rows), MAX_LABELS)
    labels = list(rows)
    ax.set_yticks(picks, [short(labels[at]) for at in picks], fontsize="small", parse_math=False)
    ax.set_xlabel(STEPS)
    return ax


def histograms(
    table: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Axes | Iterable[Any] | None = None,
) -> AxesArray:
    """Draw the distribution of the effective rate over a parameter's elements, over the steps.

    Each parameter (and run and optimizer) has a panel. The x-axis is the step, the y-axis the rate,
    and the colour the fraction of the elements.

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
    need(table, ("edges", "counts"), "Probe.histograms()")
    keys = line_keys(table)
    several = len(table[keys].drop_duplicates()) > 1
    panels = {
        f"{title} ({label})" if several else title: line.drop_duplicates("step", keep="last")
        for title, panel in panels_of(table, parameters).items()
        for label, line in lines_of(panel, keys)
    }
    drawn = axes_of(not_too_many(panels, parameters, axes), axes)
    panels = {title: line.iloc[thinned(len(line), MAX_COLUMNS)] for title, line in panels.items()}
    grid = grid_of([edges for line in panels.values() for edges in line["edges"]])
    cells = [
        np.array([rebin(*pair, grid) for pair in zip(line["edges"], line["counts"], strict=True)]).T
        for line in panels.values()
    ]
    scale = scale_of(*cells)
    for ax, (title, line), shares in zip(drawn, panels.items(), cells, strict=True):
        mesh = coloured(ax, edges_of(line["step"].to_numpy()), grid, shares, scale)
        ax.set_yscale("log")
        entitle(ax, title)
    ax.figure.colorbar(mesh, ax=list(drawn), label="share of the elements")
    annotate(drawn, STEPS, RATE)
    return drawn


def traces(
    table: pd.DataFrame,
    parameters: str | Sequence[str | int] | None = None,
    *,
    axes: Iterable[Any] | None = None,
) -> AxesArray:
    """Draw the tracked elements over the steps: their rates left, their updates right.

    This is Fig. 2 of Zeiler (2012). Each parameter has a row of two panels, with a line for each
    element.

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
    need(table, ("element", "effective_lr", "update"), "Probe.elements()")
    panels = panels_of(table, parameters)
    not_too_many(panels, parameters, axes)
    drawn = axes_of(2 * len(panels), axes, columns=2, share_y="col").reshape(-1, 2)
    keys = [*line_keys(table), "element"]
    for pair, (title, rows) in zip(drawn, panels.items(), strict=True):
        for (_, line), style in zip(
            rows.groupby(keys, sort=False, observed=True), cycle(STYLES), strict=False
        ):
            for ax, column in zip(pair, ("effective_lr", "update"), strict=True):
                ax.plot(line["step"], line[column], **style, linewidth=0.8, alpha=0.8)
        if (rows["effective_lr"] > 0).any():
            pair[0].set_yscale("log", nonpositive="clip")
        for ax in pair:
            entitle(ax, title)
            ax.autoscale_view()  # to the limits of the scale it has now
    annotate(drawn[:, 0], STEPS, RATE)
    annotate(drawn[:, 1], STEPS, "update Δθ\n(units of the parameter)")
    return drawn


def _over_steps(
    frame: pd.DataFrame,
    value: str,
    parameters: str | Sequence[str | int] | None,
    axes: Axes | Iterable[Any] | None,
    *,
    band: bool,
) -> AxesArray:
    frame = only(frame, value, *(("effective_lr_p05", "effective_lr_p95") if band else ()))
    panels = panels_of(frame, parameters)
    drawn = axes_of(not_too_many(panels, parameters, axes), axes)
    keys = line_keys(frame)
    styles = dict(zip((label for label, _ in lines_of(frame, keys)), cycle(STYLES), strict=False))
    for ax, (title, rows) in zip(drawn, panels.items(), strict=True):
        for label, line in lines_of(rows, keys):
            if band:
                low, high = line["effective_lr_p05"], line["effective_lr_p95"]
                colour = styles[label]["color"]
                ax.fill_between(line["step"], low, high, color=colour, alpha=0.2, linewidth=0.8)
            ax.plot(line["step"], line[value], label=label, **styles[label])
        shown = rows["effective_lr_p95" if band else value]
        if (shown > 0).any() and not (shown < 0).any() and value not in SHARES:
            ax.set_yscale("log", nonpositive="clip")
        entitle(ax, title)
        span(ax, frame["step"], rows.loc[rows[value].notna(), "step"])
        ax.autoscale_view()  # to the limits of the scale it has now
    annotate(drawn, STEPS, unit(value))
    return drawn
