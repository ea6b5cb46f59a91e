"""A pytest plugin for the test suites of other projects: every optimizer gets a probe.

    python -m pytest -p peers --peers=found.jsonl --peers-probe <their tests>

Without ``--peers-probe`` nothing is attached, and the same is written: for each test its outcome and
a digest of the parameters that optimizers stepped and of the random states. Each test begins with the
same random state in both runs, so that whatever differs is the probe's doing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write, and whether to attach."""
    parser.addoption("--peers", type=Path, help="file of JSON lines, one a test")
    parser.addoption("--peers-probe", action="store_true", help="attach a probe to every optimizer")


def pytest_configure(config: pytest.Config) -> None:
    """Begin where a file is given."""
    if config.getoption("--peers"):
        config.pluginmanager.register(Peers(config), "lrprobe-peers")


class Peers:
    """Watches one session."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--peers")
        self.attaches: bool = config.getoption("--peers-probe")
        self.optimizers: list[Optimizer] = []
        self.probes: list[Any] = []
        self.about: dict[str, Any] = {}
        self.path.write_text("")
        register_optimizer_step_pre_hook(self._stepping)
        register_optimizer_step_post_hook(lambda *_: None)  # the same number of hooks in both runs

    def _stepping(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if any(optimizer is known for known in self.optimizers):
            return
        self.optimizers.append(optimizer)
        if self.attaches:
            import lrprobe

            try:
                self.probes.append(lrprobe.attach(optimizer, every=1))
            except Exception as error:  # noqa: BLE001 - all are counted
                self.about["errors"].append(f"attach: {type(error).__name__}: {error}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around a test with its fixtures."""
        self.about = {"test": item.nodeid, "outcome": "passed", "errors": [], "warnings": []}
        seed = int.from_bytes(hashlib.sha256(item.nodeid.encode()).digest()[:4], "big")
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what other suites draw from
        torch.manual_seed(seed)
        threads = threading.active_count()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = yield
                self._end()
            ours = {str(w.message) for w in said if str(w.message).startswith("lrprobe")}
            self.about["warnings"] = sorted(ours)
            gc.collect()
            self.about["threads"] = threading.active_count() - threads
        finally:
            with self.path.open("a") as file:
                file.write(json.dumps(self.about) + "\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How it ended."""
        if report.outcome != "passed":
            self.about["outcome"] = report.outcome
            self.about["why"] = str(report.longrepr)[-500:]

    def _end(self) -> None:
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        digest.update(repr(random.getstate()).encode())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    value = param.detach().cpu().contiguous().reshape(-1)
                    digest.update(value.view(torch.uint8).numpy().tobytes())
        self.about["digest"] = digest.hexdigest()
        measured: set[str] = set()
        rows = 0
        for probe in self.probes:
            try:
                frame = probe.frame()
                rows += len(frame)
                measured.update(frame.loc[frame["rule"] == "measured", "optimizer"])
                probe.close()
            except Exception as error:  # noqa: BLE001 - all are counted
                self.about["errors"].append(f"{type(error).__name__}: {error}")
        self.about.update(optimizers=len(self.optimizers), rows=rows, measured=sorted(measured))
        for optimizer in self.optimizers:
            if optimizer._optimizer_step_post_hooks and self.attaches:  # noqa: SLF001
                self.about["errors"].append("hooks are left")
        self.optimizers.clear()
        self.probes.clear()
