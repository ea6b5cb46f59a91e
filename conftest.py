"""Runs the examples of README, docs/ and docstrings as doctests, and chooses the quick tests."""

import os
from collections import Counter
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


SAMPLED = 11
"""Of a test marked ``sampled``, every so many cases run without ``--all``: no period of a table.
A test whose cases each compile a program says a larger number, and may say the first case."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all`` runs what takes long, too: ``make test-all``."""
    parser.addoption("--all", action="store_true", help="also slow tests, and all cases of tables")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless it is asked for by ``--all`` or by name."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    seen: Counter[str] = Counter()
    chosen, others = [], []
    for item in items:
        takes = item.get_closest_marker("slow") is None
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            test = item.nodeid.partition("[")[0]
            every, first = (*sampled.args, *(SAMPLED, 0)[len(sampled.args) :])
            takes = takes and seen[test] % every == first
            seen[test] += 1
        (chosen if takes else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
