"""Static pictures for a printed page, and for a browser without JavaScript."""

from __future__ import annotations

import base64
import html
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lrprobe.diagnosis import Findings
from lrprobe.series import series_of

if TYPE_CHECKING:
    import pandas as pd

_PANELS = 12
"""Maximum number of layers with a panel."""

_HEATMAPS = 6
"""Maximum number of runs with a heatmap."""

_HEATMAP = "All layers"
"""Heading of the heatmaps; a dark page does not invert their colours."""


def pictures(frame: pd.DataFrame, found: Findings) -> Iterator[tuple[str, str, bytes]]:
    """Yield the heading, the caption and the PNG data of each picture."""
    import lrprobe.plot as draw

    layers = _layers(frame, found)
    total = len(_names(frame))
    key = next((k for k in ("parameter", "module", "group") if k in frame), None)
    part = frame if key is None else frame[frame[key].isin(layers)]
    if "effective_lr_p50" in frame:
        some = f" {len(layers)} of {total:,}." if len(layers) < total else ""
        yield (
            "Effective learning rate",
            f"The step of each layer per unit of direction: median and p05–p95 band.{some}",
            _png(lambda: draw.rate(part, layers)[0].figure),
        )
    if "update_ratio" in frame and frame["update_ratio"].notna().any():
        chosen = layers if "run" in frame else None
        yield (
            "Update ratio",
            "Norm of a step relative to that of the parameter. About 1e-3 is typical of matrices.",
            _png(lambda: draw.update_ratio(frame, chosen).figure),
        )
    if "lr" in frame and frame["lr"].notna().any():
        yield (
            "Learning rate of the groups",
            "The learning rate of each step.",
            _png(lambda: _lr(frame)),
        )
    if "effective_lr_p50" in frame:
        runs = frame["run"].unique().tolist() if "run" in frame else [""]
        for run in runs[:_HEATMAPS]:
            one = frame[frame["run"] == run] if run else frame
            yield (
                f"{_HEATMAP}{' of ' + run if run else ''}",
                "The median effective rate of every parameter over time.",
                _png(lambda one=one: draw.heatmap(one).figure),  # type: ignore[misc]
            )


def _names(frame: pd.DataFrame) -> list[Any]:
    key = next((k for k in ("parameter", "module", "group") if k in frame), None)
    return [] if key is None else frame[key].unique().tolist()


def _layers(frame: pd.DataFrame, found: Findings) -> list[Any]:
    """Choose the parameters with a panel: those with findings, then the larger half, in order."""
    names = _names(frame)
    if len(names) <= _PANELS // 2:
        return names
    grave = {each.parameter for each in found.findings}
    large = {
        name
        for series in series_of(frame)
        for name, size in zip(series.names, series.numel, strict=True)
        if not size < np.median(series.numel)  # an unknown size (NaN) counts as large
    }
    first = [name for name in names if name in grave][: _PANELS // 2]
    others = [name for name in names if name in large and name not in first]
    room = _PANELS - len(first)
    if len(others) > room:  # evenly spread over the depth of the model
        others = [others[at] for at in np.linspace(0, len(others) - 1, room).round().astype(int)]
    chosen = {*first, *others}
    return [name for name in names if name in chosen] or names[:_PANELS]


def _lr(frame: pd.DataFrame) -> Any:
    """Plot the lr of each group over time; groups with equal rates share a line."""
    from matplotlib import pyplot as plt

    from lrprobe import drawing as draw

    figure, ax = plt.subplots(figsize=(8.0, 3.2), layout="constrained")
    keys = [key for key in ("run", "optimizer", "group") if key in frame]
    lines = frame.drop_duplicates([*keys, "step"])
    styles = itertools.cycle(draw.STYLES)
    seen: dict[bytes, list[str]] = {}
    drawn: dict[bytes, Any] = {}
    for values, line in lines.groupby(keys, sort=False, observed=True):
        rate = line["lr"].to_numpy(dtype=np.float64)
        words = [
            f"group {v}" if k == "group" else str(v) for k, v in zip(keys, values, strict=True)
        ]
        same = rate.tobytes() + line["step"].to_numpy().tobytes()
        seen.setdefault(same, []).append(", ".join(words))
        if same not in drawn:
            (drawn[same],) = ax.plot(line["step"], rate, **next(styles))
    for same, line in drawn.items():
        more = f" and {len(seen[same]) - 1} more" if len(seen[same]) > 1 else ""
        line.set_label(seen[same][0] + more)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(draw.unit("lr"))
    if (frame["lr"] > 0).any():
        ax.set_yscale("log", nonpositive="clip")
    ax.grid(visible=True, alpha=0.3)
    if len(drawn) <= 12:
        handles = {draw.short(line.get_label()): line for line in drawn.values()}
        draw.legend(ax, handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    return figure


def _png(draw: Callable[[], Any]) -> bytes:
    """Render a picture with a transparent background, for light and dark pages."""
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names in any script
        figure = draw()
        try:
            figure.savefig(buffer, format="png", dpi=110, transparent=True)
        finally:
            plt.close(figure)
    return buffer.getvalue()


def figure(heading: str, caption: str, png: bytes) -> str:
    """The markup of a picture, with embedded data."""
    data = base64.b64encode(png).decode()
    kind = ' class="colours"' if heading.startswith(_HEATMAP) else ""
    heading = html.escape(heading)
    return (
        f'<figure{kind}><h3>{heading}</h3><p>{html.escape(caption)}</p><img alt="{heading}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )
