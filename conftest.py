"""Runs the examples of README, docs/ and docstrings as doctests, with pyproject.toml."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are drawn, not shown
# Sphinx's configuration and a program have no examples; the others import what is not there.
collect_ignore_glob = ["docs/*.py", "lrprobe/foreign/keras.py", "lrprobe/foreign/tap.py"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an example writes lands where nothing is."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
