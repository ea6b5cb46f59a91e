"""Chromium, headless, and a TensorBoard to look at in it."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import lrprobe

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: Debian's chromium and chromium-driver"
)
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update", "window-size=1500,1000"),
)
LONG = 60  # seconds for a page on a busy machine


def train(
    model: nn.Module, to: Path, steps: int = 40, *, eps: float = 1e-8, width: int = 4
) -> lrprobe.Probe:
    """A few steps under Adam, each recorded; gives back the probe."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    with lrprobe.attach(optimizer, model, to=str(to), every=1) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, width)).square().mean().backward()
            optimizer.step()
    return probe


def small_net() -> nn.Module:
    """Four parameters."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """A TensorBoard server on a free port; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0"]
    options = ("--host", "localhost", *(options or ("--load_fast", "false")))
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"http://\S+", line):
                    break
            yield found[0].rstrip("/")
        finally:
            server.terminate()


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser as a new user has it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


def until(what: Callable[[], object], message: str, seconds: float = LONG) -> object:
    """Wait until something is true, and give it back."""
    end = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, message
        time.sleep(0.1)


def errors(browser: webdriver.Chrome) -> list[str]:
    """What the console has of errors since the last look."""
    return [each["message"] for each in browser.get_log("browser") if each["level"] == "SEVERE"]
