"""The HTTP routes of the tab: JSON data, and the files of the front end."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard import errors, plugin_util  # type: ignore[import-untyped]
from tensorboard.backend.http_util import Respond  # type: ignore[import-untyped]
from tensorboard.context import RequestContext  # type: ignore[import-untyped]
from tensorboard.plugins.base_plugin import (  # type: ignore[import-untyped]
    FrontendMetadata,
    TBPlugin,
)
from werkzeug import Request, Response

from lrprobe.sinks.tab import PLUGIN
from lrprobe.tab.frames import frame_of
from lrprobe.tab.store import Entry, Series, Store
from lrprobe.text import shorter
from lrprobe.view import answers, page
from lrprobe.view.table import COLUMNS
from lrprobe.view.torn import torn

if TYPE_CHECKING:
    import pandas as pd

    from lrprobe.diagnosis import Findings

_DIAGNOSED_ROWS = 400_000
"""Findings are based on this many rows of a run; more would take seconds."""

_CHECK_SECONDS = 0.2
"""Seconds to wait for the check of all event files; a later result goes into the next answer."""

_TYPES = {".js": "application/javascript", ".css": "text/css"}

_NOTHING = (
    "No run in this logdir has data for this tab. A probe writes such data: "
    'lrprobe.attach(optimizer, model, to="<logdir>/<run>").'
)
_NO_PLOTLY = "The tab needs Plotly, which is not installed: pip install 'lrprobe[plot]'"


class Plugin(TBPlugin):  # type: ignore[misc]
    """Shows the records that ``sinks.TensorBoard`` writes, of every parameter.

    Args:
        context: the context that TensorBoard provides.
    """

    plugin_name = "lrprobe"

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        self._store = Store(context.data_provider)
        self._found: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}
        self._diagnosing = threading.Lock()
        self._truncated: list[str] = []
        self._checking: threading.Thread | None = None
        logdir = Path(context.logdir).expanduser() if context.logdir else None
        self._folder = logdir if logdir is not None and logdir.is_dir() else None

    def _notes_on_files(self) -> list[str]:
        """Report the truncated files that the last check found, and start another check."""
        if self._checking is None or not self._checking.is_alive():
            self._checking = threading.Thread(target=self._check_files, daemon=True)
            self._checking.start()
            self._checking.join(_CHECK_SECONDS)
        return self._truncated

    def _check_files(self) -> None:
        self._truncated = list(torn(self._folder)) if self._folder is not None else []

    def is_active(self) -> bool:
        """Whether to show the tab without data. TensorBoard checks for data first.

        The tab appears, and says that there are no data, if the logdir is empty or not yet loaded,
        or if a probe's files have no records yet. With only foreign runs, it is hidden.
        """
        folder = self._folder
        if folder is not None and any(folder.rglob("*tfevents*.lrprobe")):
            return True
        return not self._provider.list_runs(RequestContext(), experiment_id="")

    def data_plugin_names(self) -> tuple[str, ...]:
        """Plugin names of the summaries that make the tab appear."""
        return (PLUGIN,)

    def frontend_metadata(self) -> Any:
        """Name of the tab, and its JavaScript module."""
        return FrontendMetadata(es_module_path="/main.js", tab_name="LRPROBE", disable_reload=True)

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        """Map paths to WSGI applications."""
        apps: dict[str, Callable[..., Any]] = {
            f"/{path.name}": _file(path)
            for path in sorted(page.STATIC.iterdir())
            if path.suffix in _TYPES
        }
        apps["/plotly.min.js"] = _plotly
        apps["/overview"] = _json(self._overview)
        apps["/heatmap"] = _json(self._heatmap)
        apps["/detail"] = _json(self._detail)
        apps["/findings"] = _json(self._findings)
        return apps

    def _overview(self, request: Request) -> dict[str, Any]:
        ctx, experiment = _where(request)
        runs = self._store.runs(ctx, experiment)
        notes = [] if runs else [_NOTHING]
        if find_spec("plotly") is None:
            notes.append(_NO_PLOTLY)
        if self._folder is not None:
            notes += [f"{note}." for note in self._notes_on_files()]
        tables = []
        for (run, optimizer), series in runs.items():
            newest = max(series, key=lambda each: each.version[2] or 0)
            about = newest.about
            groups: dict[str, str] = {}
            for each in (series_.about for series_ in series):
                of = each.get("groups") or [""] * len(each["names"])
                for name, group in zip(each["names"], map(str, of), strict=True):
                    groups[name] = each["group_names"].get(group, group)
            tables.append(
                {
                    "run": run,
                    "optimizer": optimizer,
                    "level": about["level"],
                    "names": list(groups),
                    "groups": list(groups.values()),
                    "figures": [c for c in COLUMNS if c in about["columns"]],
                    "version": repr(sorted(each.version for each in series)),
                }
            )
        return answers.overview(tables, notes)

    def _heatmap(self, request: Request) -> dict[str, Any]:
        figure = _argument(request, "figure")
        table = self._entry(request).table
        if figure not in table.figures:
            raise errors.NotFoundError(f"the figure {figure[:80]!r} does not exist")
        return answers.heatmap(table, figure, *_range(request))

    def _detail(self, request: Request) -> dict[str, Any]:
        name = _argument(request, "name")
        table = self._entry(request).table
        if name not in table.names:
            raise errors.NotFoundError(f"the parameter {name[:80]!r} does not exist")
        step = _number(request, "step", math.nan)
        return answers.detail(
            table, name, *_range(request), step=None if math.isnan(step) else int(step)
        )

    def _findings(self, request: Request) -> dict[str, Any]:
        """Diagnose all optimizers of the run, because some checks compare them."""
        ctx, experiment = _where(request)
        run, optimizer = _argument(request, "run"), _argument(request, "optimizer")
        runs = self._store.runs(ctx, experiment)
        of_run = {key[1]: series for key, series in runs.items() if key[0] == run}
        if optimizer not in of_run:
            raise errors.NotFoundError("the run does not exist")
        with self._diagnosing:
            entries = [
                self._store.entry(ctx, experiment, run, name, series)
                for name, series in of_run.items()
            ]
            version = [entry.version for entry in entries]
            known, found = self._found.get((experiment, run), (None, {}))
            if known != version:
                blocks = [block for entry in entries for block in entry.blocks]
                told = self._store.descriptions(ctx, experiment, run, blocks)
                findings = _diagnosed(frame_of(run, blocks, _DIAGNOSED_ROWS, told))
                by_table = answers.divided(findings, [(shorter(run), name) for name in of_run])
                found = dict(zip(of_run, by_table, strict=True))
                self._found[experiment, run] = version, found
        result: dict[str, Any] = found[optimizer]
        return result

    def _entry(self, request: Request) -> Entry:
        ctx, experiment = _where(request)
        key = _argument(request, "run"), _argument(request, "optimizer")
        series: list[Series] | None = self._store.runs(ctx, experiment).get(key)
        if series is None:
            raise errors.NotFoundError("the run does not exist")
        return self._store.entry(ctx, experiment, *key, series)


def _diagnosed(frame: pd.DataFrame) -> Findings:
    """Diagnose a frame; if the description of its run breaks a check, without the description."""
    from lrprobe.diagnosis import Findings, diagnose

    if frame.empty:  # no record has the shape in its metadata
        return Findings([])
    try:
        return diagnose(frame)
    except Exception:  # noqa: BLE001 - anything may be in a log
        frame.attrs.clear()
        return diagnose(frame)


def _where(request: Request) -> tuple[Any, str]:
    environ = request.environ
    return plugin_util.context(environ), plugin_util.experiment_id(environ)


def _argument(request: Request, name: str) -> str:
    value = request.args.get(name)
    if value is None:
        raise errors.InvalidArgumentError(f"{name} is missing")
    return value


def _number(request: Request, name: str, default: float) -> float:
    try:
        return float(request.args.get(name) or default)
    except ValueError as error:
        raise errors.InvalidArgumentError(f"{name} is not a number") from error


def _range(request: Request) -> tuple[float, float]:
    return _number(request, "low", -math.inf), _number(request, "high", math.inf)


def _json(answer: Callable[[Request], dict[str, Any]]) -> Callable[..., Any]:
    @Request.application
    def app(request: Request) -> Response:
        content = json.dumps(answer(request), allow_nan=False)
        response: Response = Respond(request, content, "application/json")
        return response

    return app


def _file(path: Path) -> Callable[..., Any]:
    @Request.application
    def app(request: Request) -> Response:
        response: Response = Respond(request, path.read_bytes(), _TYPES[path.suffix])
        return response

    return app


@Request.application
def _plotly(request: Request) -> Response:
    if find_spec("plotly") is None:
        raise errors.NotFoundError(_NO_PLOTLY)
    response: Response = Respond(
        request, page.plotly_gzipped(), _TYPES[".js"], content_encoding="gzip", expires=86400
    )
    return response
