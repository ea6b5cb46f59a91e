"""What a probe writes, seen in TensorBoard in a real browser: Chromium, headless."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import LONG, chromium, needs_browser, small_net, tensorboard, train
from torch import nn

pytestmark = needs_browser
# TensorBoard's charts stand in shadow trees, where no selector of the whole page reaches.
EVERYWHERE = """
const every = (root) => [...root.querySelectorAll(arguments[0])].concat(
    ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot).map(e => every(e.shadowRoot)));
return every(document).map(e => e.getAttribute("d") || e.textContent);
"""
# What is seen of some elements, from the top left of the screen to the bottom right.
IN_ORDER = """
const every = (root) => [...root.querySelectorAll(arguments[0])].concat(
    ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot).map(e => every(e.shadowRoot)));
const place = (e) => e.getBoundingClientRect();
return every(document).filter(e => e.textContent.trim() && place(e).width)
    .sort((a, b) => place(a).top - place(b).top || place(a).left - place(b).left)
    .map(e => e.textContent.trim());
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Chromium, as a new user has it."""
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard on a run with two layers."""
    logdir = tmp_path_factory.mktemp("small")
    train(small_net(), logdir)
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
    """All update ratios stand in the first chart; then each parameter has its band, in order."""
    page = f"{small}/#custom_scalars"
    assert len(wait_for(browser, page, "path.area", 4)) == 4
    lines = wait_for(browser, page, "path.line", 4 + 4 + 4 + 1)
    assert not any("NaN" in line for line in lines)
    shown = browser.execute_script(IN_ORDER, "tf-card-heading, .heading-label")
    assert shown[0].startswith("update ratio of all")
    assert shown[3:] == ["0.weight", "0.bias", "2.weight", "2.bias"]


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


@pytest.mark.slow
def test_a_thousand_parameters_load_in_seconds(browser, tmp_path: Path) -> None:
    """The tags are rolled up to the ten blocks."""
    blocks = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(50)]) for _ in range(10)]
    model = nn.Sequential(*blocks)
    assert len(list(model.parameters())) == 1000
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.eye_(weight)  # or no gradient reaches the first blocks
    train(model, tmp_path, steps=10)
    with tensorboard(tmp_path) as address:
        assert len(wait_for(browser, f"{address}/#custom_scalars", "path.area", 10)) == 10
