"""A self-contained HTML page about one or several runs: findings, view, pictures, table.

The view is that of TensorBoard's tab, with its data embedded. Needs Matplotlib and Plotly:
``pip install 'lrprobe[plot]'``.
"""

from __future__ import annotations

import dataclasses
import html
import os
import time
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrprobe.diagnosis import Finding, Findings, diagnose
from lrprobe.report.pictures import figure, pictures
from lrprobe.report.sections import findings_list, last_table, runs_table
from lrprobe.runs import Runs, load
from lrprobe.series import latest
from lrprobe.text import shorter
from lrprobe.view import page
from lrprobe.view.answers import document, titles
from lrprobe.view.table import COLUMNS, tables_of
from lrprobe.view.torn import torn

if TYPE_CHECKING:
    import pandas as pd

_STEPS = 400
"""Maximum number of recorded steps per run in a static picture, with the first and the last."""


def write(to: str | os.PathLike[str], *paths: str | os.PathLike[str]) -> Findings:
    """Write a report about one or several runs.

    Args:
        to: the HTML file.
        paths: Parquet datasets, TensorBoard logdirs, or folders of these.

    Returns:
        The findings in the report.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path contains no run, or a run has no recorded step.
        ImportError: Matplotlib or Plotly is not installed.
        OSError: the file cannot be written.
    """
    missing = [name for name in ("Matplotlib", "Plotly") if find_spec(name.lower()) is None]
    if missing:
        raise ImportError(f"a report needs {' and '.join(missing)}: pip install 'lrprobe[plot]'")
    if not Path(to).parent.is_dir():  # check this before minutes of work
        raise FileNotFoundError(f"the folder of {os.fspath(to)!r} does not exist")
    runs = load(*paths, also=(*COLUMNS, "group_name"))
    notes = [note for path in paths if Path(path).is_dir() for note in torn(Path(path))]
    text, found = render(runs, notes)
    Path(to).write_text(text, encoding="utf-8")
    return found


def render(runs: Runs, notes: Sequence[str] = ()) -> tuple[str, Findings]:
    """Return the page and its findings.

    Args:
        runs: the runs, as loaded.
        notes: remarks about them, one sentence each.
    """
    if not len(runs.frame):
        raise ValueError(
            f"{', '.join(runs.names)}: no step was recorded yet; by default, attach records the "
            "first step and every tenth"
        )
    found = diagnose(runs.frame)
    frame = latest(runs.frame)
    drawn = thinned(frame, _STEPS)
    tables = [
        dataclasses.replace(table, run=table.run or shorter(runs.names[0]))
        for table in tables_of(frame)
    ]
    names = titles([(table.run, table.optimizer) for table in tables])
    title_of = {(t.run, t.optimizer): name for t, name in zip(tables, names, strict=True)}

    def where(finding: Finding) -> str:
        key = shorter(finding.run) or shorter(runs.names[0]), shorter(finding.optimizer)
        return title_of.get(key, names[0])

    title = "lrprobe: " + ", ".join(runs.names[:4]) + (", …" if len(runs.names) > 4 else "")
    text = _PAGE.format(
        title=html.escape(title),
        policy=page.POLICY,
        style=page.style() + _style(),
        runs=runs_table(frame, runs),
        notes="".join(f"<p class=note>{html.escape(note)}.</p>" for note in notes),
        findings=findings_list(found, where),
        pictures="".join(figure(*picture) for picture in pictures(drawn, found)),
        table=last_table(frame),
        made=time.strftime("%Y-%m-%d %H:%M"),
        live=page.live(document(tables, findings=False)),
    )
    return text, found


def thinned(frame: pd.DataFrame, max_steps: int) -> pd.DataFrame:
    """Limit the steps of each run and optimizer, evenly spread, including first and last."""
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
        if len(steps) > max_steps:
            steps = steps[np.linspace(0, len(steps) - 1, max_steps).round().astype(np.int64)]
        keep |= rows & np.isin(step, steps)
    return frame if keep.all() else frame[keep].reset_index(drop=True)


def _style() -> str:
    folder = Path(str(files("lrprobe.report")))
    return (folder / "report.css").read_text(encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
{policy}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body class="report">
<h1>{title}</h1>
{notes}
{runs}
<h2 id="findings">Findings</h2>
{findings}
<h2 id="view">Layers over time</h2>
<div id="lrprobe"><p class="still">This view needs a browser with JavaScript. Static pictures
are below.</p></div>
<section class="still">
<h2 id="pictures">Pictures</h2>
{pictures}
</section>
<h2 id="table">The last recorded step</h2>
{table}
<p><small>Made by lrprobe, {made}. Every column is explained in docs/columns.md.</small></p>
{live}</body></html>
"""
