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
ActionChains = webdriver.ActionChains

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


EVIL = '<img src=x onerror="alert(1)">&\'\u202e{{7*7}}%{y}'


class Evil(nn.Module):
    """A network with names that are markup, or very long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.odd = [EVIL, "m" * 10**6, "m" * 10**6 + "n"]
        for name in self.odd:
            self.register_parameter(name, nn.Parameter(torch.ones(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * sum(self._parameters[name] for name in self.odd)


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


def of(frame, parameter: str, column: str = "effective_lr_p50") -> list[float]:
    """A parameter's figures."""
    return frame.loc[frame["parameter"] == parameter, column].tolist()


# --- The view ---

READY = "return document.getElementById('lrprobe')?.dataset.ready === 'true'"
# The heatmap of a run: what Plotly draws, and where its cells are on the screen.
HEATMAP = "const map = [...lrprobe.heatmaps.values()][arguments[0] ?? 0].heatmap; "
CHARTS = "const chart = (name) => document.querySelector('.chart.' + name); "


class Page:
    """The view in a browser, whether in TensorBoard's frame or a page of its own."""

    def __init__(self, browser) -> None:
        self.browser = browser

    def run(self, script: str, *arguments: object) -> object:
        return self.browser.execute_script(script, *arguments)

    def ready(self) -> None:
        until(lambda: self.run(READY), "the view is not drawn")
        found = "return !lrprobe.options.findings || lrprobe.found.querySelector('.found')"
        until(lambda: self.run(found), "the findings are not there")
        self.settle()

    def settle(self) -> None:
        self.browser.execute_async_script("lrprobe.busy.then(arguments[0])")

    def text(self) -> str:
        return str(self.run("return document.body.textContent"))

    def cells(self, at: int = 0) -> list[int]:
        return self.run(
            HEATMAP + "const [t] = map.element.data; return [t.z.length, t.z[0].length]", at
        )

    def move(self, row: int, column: int, at: int = 0) -> ActionChains:
        """The mouse to a cell; what follows is done there."""
        element, x, y = self.run(
            HEATMAP + "map.element.scrollIntoView({block: 'center'});"
            "const box = map.element.getBoundingClientRect();"
            "const { x, y } = map.place({row: arguments[1], column: arguments[2]});"
            "return [map.element, x - box.x - box.width / 2, y - box.y - box.height / 2]",
            at,
            row,
            column,
        )
        mouse = ActionChains(self.browser, duration=50)
        return mouse.move_to_element_with_offset(element, round(x), round(y))

    def tip(self) -> str:
        shown = "const tip = document.querySelector('.tip'); return tip.hidden ? '' : tip.innerText"
        return str(until(lambda: self.run(shown), "nothing is shown of the cell"))

    def chosen(self) -> list[str]:
        self.settle()
        return self.run(
            "return [...document.querySelectorAll('.chosen code')].map(e => e.textContent)"
        )

    def line(self, chart: str, trace: int = -1) -> list[float]:
        return self.run(
            CHARTS + "return Array.from(chart(arguments[0]).data.at(arguments[1]).y)", chart, trace
        )


def open_tab(browser, address: str, state: str = "") -> Page:
    """The tab, once it is drawn."""
    enter_tab(browser, address, state).ready()
    return Page(browser)


def enter_tab(browser, address: str, state: str = "") -> Page:
    """The tab's frame."""
    browser.switch_to.default_content()
    browser.get("about:blank")
    browser.get(f"{address}/#lrprobe{'&' if state else ''}{state}")
    until(lambda: browser.find_elements("css selector", "iframe"), "TensorBoard has no such tab")
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    until(lambda: browser.find_elements("id", "lrprobe"), "the tab's module does not run")
    return Page(browser)
