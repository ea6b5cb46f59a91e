"""Builds one HTML page from the front end and its data; it needs no network."""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STATIC = Path(str(files("lrprobe.view"))) / "static"
"""Folder of the front end's modules and style sheet."""

_MODULES = (
    "data.js",
    "state.js",
    "folding.js",
    "heatmap.js",
    "charts.js",
    "findings.js",
    "view.js",
)
"""Each imports only from earlier ones."""


@cache
def plotly_gzipped() -> bytes:
    """Plotly's JavaScript from its Python package, gzipped.

    Raises:
        ImportError: the package is not installed.
    """
    if find_spec("plotly") is None:
        raise ImportError("the view needs Plotly: pip install 'lrprobe[plot]'")
    path = Path(str(files("plotly"))) / "package_data" / "plotly.min.js"
    return gzip.compress(path.read_bytes(), compresslevel=6, mtime=0)


def style() -> str:
    """The style sheet."""
    return (STATIC / "style.css").read_text(encoding="utf-8")


def script() -> str:
    """All modules in one script, because a page from file:// cannot import modules."""
    source = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in _MODULES)
    source = re.sub(r"^import [^;]*;\n", "", source, flags=re.MULTILINE)
    source = re.sub(r"^export ", "", source, flags=re.MULTILINE)
    return source.replace("</script", "<\\/script")


def live(data: dict[str, Any]) -> str:
    """The elements that start the view in a page with ``<div id="lrprobe">``.

    Data and Plotly are gzipped text that the browser unpacks. Nothing from a log is ever part of a
    script or of markup.
    """
    packed = gzip.compress(json.dumps(data, allow_nan=False).encode(), compresslevel=6, mtime=0)
    return (
        _packed("lrprobe-plotly", plotly_gzipped())
        + _packed("lrprobe-data", packed)
        + f'<script type="module">{script()}\nembedded();</script>\n'
    )


def alone(data: dict[str, Any]) -> str:
    """A page with only the view."""
    return _PAGE.format(style=style(), live=live(data), policy=POLICY)


def _packed(name: str, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    return f'<script type="application/gzip" id="{name}">{text}</script>\n'


POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "img-src data: blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'\">"
)
"""Forbids the browser to load anything, whatever the page contains."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{policy}<title>lrprobe</title>
<style>{style}</style></head><body><main id="lrprobe">This view needs a browser with JavaScript.
</main>{live}</body></html>
"""
