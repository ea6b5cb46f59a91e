"""One self-contained HTML page about one run or several: findings, pictures, table.

Needs Matplotlib for the pictures: ``pip install 'lrprobe[plot]'``.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrprobe.diagnosis import Finding, Findings, diagnose, matrices
from lrprobe.runs import Runs, load
from lrprobe.series import latest, series_of
from lrprobe.text import shown

if TYPE_CHECKING:
    import pandas as pd

_STEPS = 400
"""Recorded steps that a picture shows at most, of each run; the first and the last among them."""

_PANELS = 12
"""Layers that have a panel of their own."""

_HEATMAPS = 6
"""Runs that have a heatmap."""

_HEATMAP = "All layers"
"""Heading of those; a dark page leaves their colours as they are."""

_ROWS = 3000
"""Rows of the table; a browser takes longer with each."""

_SHOWN = 8
"""Parameters that one finding lists."""

_COLUMNS = {
    "run": "run",
    "optimizer": "optimizer",
    "parameter": "parameter",
    "module": "module",
    "numel": "elements",
    "rule": "rule",
    "step": "step",
    "lr": "lr",
    "effective_lr_p05": "rate p05",
    "effective_lr_p50": "rate p50",
    "effective_lr_p95": "rate p95",
    "effective_lr_applied": "rate applied",
    "update_ratio": "update ratio",
    "grad_norm": "‖gradient‖",
    "param_norm": "‖parameter‖",
    "eps_fraction": "ε share",
    "lost_fraction": "lost",
    "reconstruction_error": "error of the check",
}
"""Columns of the table, and what they are called there."""


def write(to: str | os.PathLike[str], *paths: str | os.PathLike[str]) -> Findings:
    """Write the report about some runs.

    Args:
        to: the HTML file.
        paths: Parquet datasets, TensorBoard logdirs, or folders that hold some.

    Returns:
        What it says is wrong.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path holds no run, or a run has no recorded step.
        ImportError: Matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("a report needs Matplotlib: pip install 'lrprobe[plot]'")
    if not Path(to).parent.is_dir():  # before minutes of work
        raise FileNotFoundError(f"the folder of {os.fspath(to)!r} does not exist")
    runs = load(*paths)
    page, found = render(runs)
    Path(to).write_text(page, encoding="utf-8")
    return found


def render(runs: Runs) -> tuple[str, Findings]:
    """The page, and what it says is wrong."""
    if not len(runs.frame):
        raise ValueError(
            f"{', '.join(runs.names)}: no step was recorded yet; attach records step 1 and every "
            "tenth"
        )
    found = diagnose(runs.frame, hyperparameters=runs.hyperparameters)
    frame = latest(runs.frame)
    drawn = thinned(frame, _STEPS)
    pictures = "".join(_figure(*picture) for picture in _pictures(drawn, found))
    title = "lrprobe: " + ", ".join(runs.names[:4]) + (", …" if len(runs.names) > 4 else "")
    page = _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        runs=_runs(frame, runs),
        findings=_findings(found),
        pictures=pictures,
        table=_table(frame),
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    return page, found


def thinned(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many recorded steps of each run and optimizer, evenly spread, ends included."""
    keys = [key for key in ("run", "optimizer") if key in frame]
    keep = np.zeros(len(frame), dtype=bool)
    label = np.zeros(len(frame), dtype=np.int64)
    for key in keys:
        codes, names = frame[key].factorize()
        label = label * len(names) + codes
    step = frame["step"].to_numpy()
    for value in np.unique(label):
        rows = label == value
        steps = np.unique(step[rows])
        if len(steps) > most:
            steps = steps[np.linspace(0, len(steps) - 1, most).round().astype(np.int64)]
        keep |= rows & np.isin(step, steps)
    return frame if keep.all() else frame[keep].reset_index(drop=True)


# --- Sections ---------------------------------------------------------------------------------


def _runs(frame: pd.DataFrame, runs: Runs) -> str:
    """One line for each run and optimizer."""
    rows = []
    for series in series_of(frame):
        _, rules = series.rules
        when = ""
        if "time" in series:
            seconds = series["time"]
            start, end = float(np.nanmin(seconds)), float(np.nanmax(seconds))
            when = (
                time.strftime("%Y-%m-%d %H:%M", time.localtime(start)) + f", {_span(end - start)}"
            )
        cells = (
            series.run or runs.names[0],
            series.optimizer,
            ", ".join(rules),
            f"{len(series.names):,}",
            f"{np.nansum(series.numel):,.0f}" if "numel" in series else "",
            f"{series.steps[0]:,} to {series.steps[-1]:,}",
            f"{len(series.steps):,}",
            when,
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("run", "optimizer", "rule", f"{runs.level}s", "elements", "steps", "recorded", "time")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>{''.join(rows)}</table></div>"


def _findings(found: Findings) -> str:
    parts = [f"<p class=summary>{html.escape(found.summary())}</p>"]
    parts += [f"<p>{html.escape(sentence)}.</p>" for sentence in found.left_out]
    if not found.findings:
        parts.append(
            "<p>Nothing of what was looked for is wrong in these runs, as far as their figures "
            "tell.</p>"
        )
    parts += map(_card, found.grouped())
    return "".join(parts)


def _card(same: Sequence[Finding]) -> str:
    head = same[0]
    where = " of ".join(shown(word) for word in (head.optimizer, head.run) if word)
    items = "".join(
        f"<li>{_code(each.parameter)}, {html.escape(str(each.steps))}: "
        f"{html.escape(each.evidence)}</li>"
        for each in same[:_SHOWN]
    )
    if len(same) > _SHOWN:
        names = "".join(
            f"<li>{_code(each.parameter)}: {html.escape(each.evidence)}</li>"
            for each in same[_SHOWN:]
        )
        items += (
            f"<li><details><summary>and {len(same) - _SHOWN:,} more</summary><ul>{names}</ul>"
            "</details></li>"
        )
    return (
        f'<article class="{head.severity}"><h3><span class=tag>{head.severity}</span> '
        f"{html.escape(head.title)} <small>{html.escape(where)}</small></h3><ul>{items}</ul>"
        f"<p><b>Usually:</b> {html.escape(head.meaning)}</p>"
        f"<p><b>Try:</b> {html.escape(head.advice)}</p>"
        f"<p class=link>More: <code>{html.escape(head.link)}</code></p></article>"
    )


def _code(name: str) -> str:
    return f"<code>{html.escape(shown(name))}</code>"


def _table(frame: pd.DataFrame) -> str:
    """The last recorded step of each parameter."""
    keys = [k for k in ("run", "optimizer", "parameter", "module", "group") if k in frame]
    rows = frame[~frame.duplicated(keys, keep="last")]
    present = [column for column in _COLUMNS if column in rows]
    note = f"<p>The first {_ROWS:,} of {len(rows):,} rows.</p>" if len(rows) > _ROWS else ""
    head = "".join(f"<th>{_COLUMNS[column]}</th>" for column in present)
    columns = [[_cell(v) for v in rows[column].iloc[:_ROWS].tolist()] for column in present]
    body = "".join("<tr>" + "".join(cells) + "</tr>" for cells in zip(*columns, strict=True))
    return (
        f"{note}<div class=wide><table class=figures><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(shown(value))}</td>"
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return "<td class=n></td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return f"<td class=n>{text}</td>"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# --- Pictures ---------------------------------------------------------------------------------


def _pictures(frame: pd.DataFrame, found: Findings) -> Iterator[tuple[str, str, bytes]]:
    """Heading, words below it, and the picture as PNG."""
    import lrprobe.plot as draw

    layers = _layers(frame, found)
    total = len(_names(frame))
    key = next((k for k in ("parameter", "module", "group") if k in frame), None)
    part = frame if key is None else frame[frame[key].isin(layers)]
    if "effective_lr_p50" in frame:
        some = f" {len(layers)} of {total:,}." if len(layers) < total else ""
        yield (
            "Effective learning rate",
            f"What each layer got per unit of its direction: median and p05–p95 band.{some}",
            _png(lambda: draw.rate(part, layers)[0].figure),
        )
    if "update_ratio" in frame and frame["update_ratio"].notna().any():
        chosen = layers if "run" in frame else None
        yield (
            "Update ratio",
            "How much of its norm a parameter moves in a step. About 1e-3 is usual for matrices.",
            _png(lambda: draw.update_ratio(frame, chosen).figure),
        )
    if "lr" in frame and frame["lr"].notna().any():
        yield (
            "Learning rate of the groups",
            "As it stood during each step.",
            _png(lambda: _lr(frame)),
        )
    if "effective_lr_p50" in frame:
        runs = frame["run"].unique().tolist() if "run" in frame else [""]
        for run in runs[:_HEATMAPS]:
            one = frame[frame["run"] == run] if run else frame
            yield (
                f"{_HEATMAP}{' of ' + run if run else ''}",
                "The median effective rate of every parameter over the steps.",
                _png(lambda one=one: draw.heatmap(one).figure),  # type: ignore[misc]
            )


def _names(frame: pd.DataFrame) -> list[Any]:
    key = next((k for k in ("parameter", "module", "group") if k in frame), None)
    return [] if key is None else frame[key].unique().tolist()


def _layers(frame: pd.DataFrame, found: Findings) -> list[Any]:
    """The parameters that have a panel: those with findings, then matrices, in order."""
    names = _names(frame)
    if len(names) <= _PANELS // 2:
        return names
    grave = {each.parameter for each in found.findings}
    large = {
        name
        for series in series_of(frame)
        for name, matrix in zip(series.names, matrices(series), strict=True)
        if matrix
    }
    first = [name for name in names if name in grave][: _PANELS // 2]
    rest = [name for name in names if name in large and name not in first]
    room = _PANELS - len(first)
    if len(rest) > room:  # from the bottom of the model to its top
        rest = [rest[at] for at in np.linspace(0, len(rest) - 1, room).round().astype(int)]
    chosen = {*first, *rest}
    return [name for name in names if name in chosen] or names[:_PANELS]


def _lr(frame: pd.DataFrame) -> Any:
    """The lr of each group over the steps, one line for each that differs."""
    from matplotlib import pyplot as plt

    import lrprobe.plot as draw

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
    """A picture on no background, so that it fits a light page and a dark one."""
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


def _figure(heading: str, words: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    kind = ' class="colours"' if heading.startswith(_HEATMAP) else ""
    heading = html.escape(heading)
    return (
        f'<figure{kind}><h3>{heading}</h3><p>{html.escape(words)}</p><img alt="{heading}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --card: #f6f8fa; --grave: #b42318; --note: #0b63a5 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0e1116; --ink: #e6e9ee; --soft: #9aa4b0; --line: #30363d; --card: #171b21;
    --grave: #ff8c7f; --note: #79b8ff }
  figure img { filter: invert(1) hue-rotate(180deg) brightness(1.35) }
  figure.colours img { filter: none; background: #fff; padding: .5rem; border-radius: 4px }
}
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 72rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { margin-top: 2.5rem } h3 { margin: 0 0 .4rem }
small, .link, figure p { color: var(--soft); font-weight: normal }
.summary { font-size: 1.15rem }
article { background: var(--card); border-left: 4px solid var(--note); padding: .9rem 1.1rem;
  margin: .8rem 0; border-radius: 4px; overflow-wrap: anywhere }
article.finding { border-color: var(--grave) }
.tag { font-size: .75rem; text-transform: uppercase; color: var(--note); margin-right: .4rem }
.finding .tag { color: var(--grave) }
article p { margin: .4rem 0 } article ul { margin: .3rem 0; padding-left: 1.2rem }
figure { margin: 1.5rem 0 } figure p { margin: 0 0 .4rem }
figure img { max-width: 100%; height: auto }
.wide { overflow-x: auto; max-height: 80vh } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap }
th { position: sticky; top: 0; background: var(--back) }
.n { text-align: right; font-variant-numeric: tabular-nums }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
{runs}
<h2 id="findings">Findings</h2>
{findings}
<h2 id="pictures">Pictures</h2>
{pictures}
<h2 id="table">The last recorded step</h2>
{table}
<p><small>Made by lrprobe, {made}. Every column is explained in docs/definitions.md.</small></p>
</body></html>
"""
