"""A pytest plugin for the test suites of other projects: every optimizer gets a probe.

    python -m pytest -p peers_plugin --peers=found.jsonl --peers-probe <their tests>

Without ``--peers-probe`` nothing is attached, and the same is written: one line of JSON a test.
Each test begins with the same random state in both runs, so that whatever differs is the probe's
doing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers_watch import Watch, declare_operators, seed_all


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write, whether to attach, and where tensors go."""
    parser.addoption("--peers", type=Path, help="file of JSON lines, one a test")
    parser.addoption("--peers-probe", action="store_true", help="attach a probe to every optimizer")
    parser.addoption("--peers-cpu", action="store_true", help="what is sent to cuda stays here")


def pytest_configure(config: pytest.Config) -> None:
    """Begin where a file is given."""
    if config.getoption("--peers-cpu"):
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        torch.nn.Module.cuda = lambda module, *_, **__: module  # type: ignore[method-assign]
    if config.getoption("--peers"):
        declare_operators()
        config.pluginmanager.register(Peers(config), "lrprobe-peers")


class Peers:
    """Watches one session."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--peers")
        self.path.write_text("")
        self.watch = Watch(attaches=config.getoption("--peers-probe"))
        self.watch.install()
        # Processes that a test starts are watched too: see sitecustomize.py.
        os.environ["LRPROBE_PEERS"] = "probe" if self.watch.attaches else "bare"
        self.outcome, self.why = "passed", ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around a test with its fixtures."""
        seed = int.from_bytes(hashlib.sha256(item.nodeid.encode()).digest()[:4], "big")
        seed_all(seed)
        self.outcome, self.why = "passed", ""
        self.watch.begin()
        start = time.process_time()
        result = yield
        about: dict[str, Any] = {"test": item.nodeid, "outcome": self.outcome, "why": self.why}
        seconds = time.process_time() - start - self.watch.own_seconds
        about |= self.watch.end()
        about["seconds"] = seconds + about.pop("closing")
        with self.path.open("a") as file:
            file.write(json.dumps(about) + "\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How it ended."""
        if report.outcome != "passed":
            self.outcome, self.why = report.outcome, str(report.longrepr)[-800:]

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        """An error in a thread, or in a finalizer, is a warning of pytest's."""
        text = str(warning_message.message)
        if text.startswith(("Exception in thread", "Exception ignored")) and "lrprobe" in text:
            self.watch.errors.append(text[-500:])
