"""Notebook output: small tables for a probe and a step, and the interactive view."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from lrprobe.inspect import StepView
    from lrprobe.probe import Probe


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> str:
    """A small table as HTML; every cell is text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def probe_html(probe: Probe) -> str:
    """A table with one line per optimizer of a probe."""
    from lrprobe.text import shown

    recorder = probe._recorder  # noqa: SLF001 - the other half of its repr
    rows = [
        (
            shown(each.name),
            f"{len(each.watched):,}",
            f"every {each.schedule}",
        )
        for each in recorder.hooks
    ]
    state = "closed" if recorder.closed else "recording"
    heads = ("optimizer", "parameters", "recorded")
    return table(heads, rows, f"lrprobe.Probe, step {probe.step:,}, {state}")


def step_html(view: StepView) -> str:
    """Statistics of one parameter's step, over its elements."""
    import torch

    rows = []
    for name in ("effective_lr", "direction", "update"):
        tensor = getattr(view, name).detach()
        values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
        values = values[~values.isnan()].double().cpu()
        figures = (
            (values.min(), values.median(), values.max(), values.norm()) if len(values) else ()
        )
        rows.append((name, *(f"{float(figure):.4g}" for figure in figures)))
    shape = "×".join(map(str, view.effective_lr.shape)) or "a scalar"
    caption = f"StepView {shape}, rule {view.rule}, decay {view.decay:.3g}, error {view.error:.2g}"
    return table(("", "min", "median", "max", "norm"), rows, caption)


class Explorer:
    """The interactive view of a frame; a notebook shows it inline.

    Made by :func:`lrprobe.explore`.

    Args:
        page: the whole page.
        height: of the view in a notebook, in pixels.
        words: summary of its contents.
    """

    def __init__(self, page: str, height: int, words: str) -> None:
        self._page = page
        self._height = height
        self._words = words

    def __repr__(self) -> str:
        return f"<lrprobe.explore of {self._words}: display it in a notebook, or save(path)>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="lrprobe: {html.escape(self._words)}" '
            f'style="width: 100%; height: {self._height}px; border: 0" '
            f'srcdoc="{html.escape(self._page)}"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one HTML file that needs no network.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(self._page, encoding="utf-8")


def explore(frame: pd.DataFrame, *, height: int = 820) -> Explorer:
    """Explore a frame interactively: heatmaps, charts of what you click on, findings.

    This is the view of TensorBoard's tab LRPROBE and of ``lrprobe report``. It contains all of its
    data, so it needs neither a network nor a running kernel.

    Args:
        frame: from ``Probe.frame`` or ``lrprobe.read``, of one run or several.
        height: of the view in a notebook, in pixels.

    Returns:
        An object that a notebook displays as the view; its ``save`` writes an HTML file.

    Raises:
        ImportError: Plotly is not installed.
        ValueError: the frame has no rows, or no numeric columns.

    Example:
        >>> import torch, lrprobe
        >>> net = torch.nn.Linear(4, 2)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> with lrprobe.attach(adam, net, every=1) as probe:
        ...     for _ in range(5):
        ...         net(torch.ones(1, 4)).sum().backward()
        ...         adam.step()
        >>> lrprobe.explore(probe.frame())
        <lrprobe.explore of 2 parameters × 5 steps: display it in a notebook, or save(path)>
    """
    from lrprobe.diagnosis import diagnose
    from lrprobe.view.answers import divided, document
    from lrprobe.view.page import alone
    from lrprobe.view.table import FIGURES, tables_of

    if not len(frame):
        raise ValueError(
            "the frame has no rows: no step was recorded yet, or all were filtered out"
        )
    tables = [each for each in tables_of(frame) if set(FIGURES) & set(each.figures)]
    if not tables:
        raise ValueError(f"the frame has none of the columns {', '.join(FIGURES)}")
    data: dict[str, Any] = document(tables, findings=True)
    parts = divided(diagnose(frame), [(each.run, each.optimizer) for each in tables])
    for each, part in zip(data["tables"], parts, strict=True):
        each["findings"] = part
    words = ", ".join(f"{len(t.names):,} {t.level}s × {len(t.steps):,} steps" for t in tables[:3])
    return Explorer(alone(data), height, words + (", …" if len(tables) > 3 else ""))
