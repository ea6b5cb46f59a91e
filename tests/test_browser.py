"""What a probe writes, seen in TensorBoard in a real browser: Chromium, headless."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import lrprobe

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: Debian's chromium and chromium-driver"
)
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update", "window-size=1500,1000"),
)
# TensorBoard's charts stand in shadow trees, where no selector of the whole page reaches.
EVERYWHERE = """
const every = (root) => [...root.querySelectorAll(arguments[0])].concat(
    ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot).map(e => every(e.shadowRoot)));
return every(document).map(e => e.getAttribute("d") || e.textContent);
"""
LONG = 60  # seconds for a page on a busy machine


def train(model: nn.Module, logdir: Path, steps: int = 40) -> None:
    """A few steps under Adam, recorded each."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())
    with lrprobe.attach(optimizer, model, to=logdir, every=1):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """A TensorBoard server on a free port; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "localhost", "--load_fast", "false"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"http://\S+", line):
                    break
            yield found[0].rstrip("/")
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Chromium, as a new user has it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard on a run with two layers."""
    logdir = tmp_path_factory.mktemp("small")
    train(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), logdir)
    with tensorboard(logdir) as address:
        yield address


def wait_for(browser, page: str, selector: str, count: int) -> list[str]:
    """Open a page, and wait until so many elements are there whose path or text is no stub."""
    browser.get("about:blank")
    browser.get(page)
    end = time.monotonic() + LONG
    while True:
        found = [text for text in browser.execute_script(EVERYWHERE, selector) if len(text) > 40]
        if len(found) >= count:
            return found
        assert time.monotonic() < end, f"{len(found)} of {count} {selector} on {page}"
        time.sleep(0.2)


def test_custom_scalars_draw_bands_and_an_overview(browser, small: str) -> None:
    """Each parameter has its median in a band; all update ratios stand in one chart, the first."""
    page = f"{small}/#custom_scalars"
    assert len(wait_for(browser, page, "path.area", 4)) == 4
    lines = wait_for(browser, page, "path.line", 4 + 4 + 4 + 1)
    assert not any("NaN" in line for line in lines)
    charts = browser.execute_script(EVERYWHERE, "tf-card-heading, .heading-label")
    assert next(filter(None, map(str.strip, charts))).startswith("update ratio of all")


def test_scalars_begin_with_the_rate_of_each_parameter(browser, small: str) -> None:
    """The first group is the effective rate, with a line drawn for each of the four."""
    wait_for(browser, f"{small}/#scalars", "path.line", 4)
    groups = browser.execute_script(EVERYWHERE, ".category-name")
    assert groups[0].strip() == "effective_lr"


def test_histograms_draw_outlines(browser, small: str) -> None:
    """Of the rate's logarithm: one for each of the first steps."""
    outlines = wait_for(browser, f"{small}/#histograms", "path.outline", 40)
    assert not any("NaN" in outline for outline in outlines)


def test_the_card_explains_the_tags(browser, small: str) -> None:
    """As text, in words and a table."""
    tables = wait_for(browser, f"{small}/#text", "table", 1)
    assert any("median of the effective rate over the elements" in table for table in tables)


def test_a_thousand_parameters_load_in_seconds(browser, tmp_path: Path) -> None:
    """The tags are rolled up to the ten blocks."""
    blocks = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(50)]) for _ in range(10)]
    model = nn.Sequential(*blocks)
    assert len(list(model.parameters())) == 1000
    train(model, tmp_path, steps=10)
    with tensorboard(tmp_path) as address:
        start = time.monotonic()
        assert len(wait_for(browser, f"{address}/#custom_scalars", "path.area", 10)) == 10
        assert time.monotonic() - start < LONG / 2
