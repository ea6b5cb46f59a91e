"""Runs the examples of the README, of docs/ and of the docstrings as doctests."""

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Sybil, SybilCollection
from sybil.parsers import myst, rest


def enter_empty_folder(namespace: dict[str, Any]) -> None:
    """Let what an example writes land where nothing is."""
    namespace["_home"] = Path.cwd()
    namespace["_folder"] = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.chdir(namespace["_folder"].name)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Go back, and remove it."""
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


pytest_collect_file = SybilCollection(
    [
        Sybil(
            parsers=[myst.PythonCodeBlockParser(), myst.SkipParser()],
            patterns=["*.md"],
            setup=enter_empty_folder,
            teardown=leave_folder,
        ),
        Sybil(
            parsers=[rest.DocTestParser(), rest.SkipParser()],
            patterns=["lrprobe/*.py", "lrprobe/**/*.py"],
            setup=enter_empty_folder,
            teardown=leave_folder,
        ),
    ]
).pytest()
