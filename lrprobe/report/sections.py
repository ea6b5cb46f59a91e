"""The text sections of a report: runs, findings, table."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np

from lrprobe.diagnosis import Finding, Findings
from lrprobe.runs import Runs
from lrprobe.series import series_of
from lrprobe.text import shorter, shown

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 3000
"""Maximum number of rows in the table, for the sake of the browser."""

_SHOWN = 8
"""Maximum number of parameters that a finding lists openly."""

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
    "reconstruction_error": "reconstruction error",
}
"""Maps the columns of the table to their headings."""


def runs_table(frame: pd.DataFrame, runs: Runs) -> str:
    """A table with a row for each run and optimizer."""
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


def findings_list(found: Findings, title: Callable[[Finding], str]) -> str:
    """List the findings, linked to the view; ``title`` gives the name of the run there."""
    parts = [f"<p class=summary>{html.escape(found.summary())}</p>"]
    parts += [f"<p>{html.escape(sentence)}.</p>" for sentence in found.left_out]
    if not found.findings:
        parts.append("<p>No check found anything wrong in these runs.</p>")
    parts += [_card(same, title) for same in found.grouped()]
    return "".join(parts)


def _card(same: Sequence[Finding], title: Callable[[Finding], str]) -> str:
    head = same[0]
    where = " of ".join(shown(word) for word in (head.optimizer, head.run) if word)
    items = "".join(
        f"<li>{_link(each, title)}, {html.escape(str(each.steps))}: "
        f"{html.escape(each.evidence)}</li>"
        for each in same[:_SHOWN]
    )
    if len(same) > _SHOWN:
        names = "".join(
            f"<li>{_link(each, title)}: {html.escape(each.evidence)}</li>" for each in same[_SHOWN:]
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


def _link(finding: Finding, title: Callable[[Finding], str]) -> str:
    """The name of the parameter, as a link to the steps of the finding in the view."""
    steps = finding.steps
    state = urlencode(
        {
            "run": title(finding),
            "parameter": shorter(finding.parameter),
            "step": steps.first,
            "mark": f"{steps.first}~{steps.last}",
        }
    )
    name = html.escape(shown(finding.parameter) or "all")
    return f'<a href="#{html.escape(state)}"><code>{name}</code></a>'


def last_table(frame: pd.DataFrame) -> str:
    """A table of the last recorded step of each parameter."""
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
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
