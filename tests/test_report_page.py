"""The report and ``explore`` in a real browser, from a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import (
    CHARTS,
    EVIL,
    HEATMAP,
    Evil,
    Page,
    chromium,
    errors,
    needs_browser,
    of,
    small_net,
    train,
    until,
)

import lrprobe
from lrprobe import report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Chromium, as a new user has it."""
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and the report about them; a run with odd names and its own."""
    folder = tmp_path_factory.mktemp("runs")
    paths = folder / "sound.parquet", folder / "faulty.parquet"
    train(small_net(), paths[0])
    train(small_net(), paths[1], eps=1e3)
    report.write(folder / "report.html", *paths)
    train(Evil(), folder / "evil.parquet", 5)
    report.write(folder / "evil.html", folder / "evil.parquet")
    return folder


@pytest.fixture
def page(browser, folder: Path) -> Iterator[Page]:
    """The report, freshly opened; the console has no error in the end."""
    errors(browser)
    yield open_file(browser, folder / "report.html")
    assert errors(browser) == []


def open_file(browser, path: Path, state: str = "") -> Page:
    """A page of ours, once its view is drawn."""
    browser.get("about:blank")
    browser.get(f"file://{path}{'#' if state else ''}{state}")
    page = Page(browser)
    page.ready()
    return page


def test_it_is_the_view_of_the_tab(page: Page, folder: Path) -> None:
    """As many cells; a hover shows the value of the frame; a click changes the charts."""
    frame = lrprobe.read(folder / "sound.parquet")
    assert [page.cells(at) for at in (0, 1)] == [[4, 40], [4, 40]]
    page.move(1, 30).perform()
    lines = page.tip().splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("0.bias", "step 31", "sound")
    value = float(lines[2].removeprefix("median rate: "))
    assert value == pytest.approx(of(frame, "0.bias")[30], rel=1e-3)
    page.move(3, 12).click().perform()
    assert page.chosen() == ["2.bias", "2.bias"]
    assert page.line("rate", 2) == pytest.approx(of(frame, "2.bias"), rel=1e-6)
    assert page.run(CHARTS + "return chart('rate')._fullLayout.yaxis.type") == "log"
    assert "parameter=2.bias" in page.browser.current_url


def test_findings_lead_to_the_view(page: Page) -> None:
    """A click on a finding's parameter opens it there, at its steps."""
    links = page.browser.find_elements("css selector", "article.finding a")
    wanted = next(each for each in links if each.text == "2.weight")
    page.run("arguments[0].click()", wanted)
    until(lambda: page.chosen() == ["2.weight"], "the parameter is not opened")
    state = page.run("return lrprobe.state")
    assert state["runs"] == ["faulty"]
    assert state["step"] == state["mark"][0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_as_the_browser_is(browser, folder: Path, scheme: str) -> None:
    """The page and what is drawn in it."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = open_file(browser, folder / "report.html")
    colour = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert (max(page.run(colour)) < 60) == (scheme == "dark")
    font = page.run(HEATMAP + "return map.element.layout.font.color")
    assert font == ("#e6e9ee" if scheme == "dark" else "#1b1f24")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


SEEN = (
    "const seen = (what) => [...document.querySelectorAll(what)].some(e => e.checkVisibility());"
    "return [seen('article.finding'), seen('#pictures ~ figure img'), seen('.heatmap')]"
)


def test_a_resized_window_keeps_the_height_of_each_plot(page: Page) -> None:
    """However often it is resized; Plotly would shrink a plot to nothing."""
    heights = "return [...document.querySelectorAll('.plot')].map(e => e.offsetHeight)"
    before, size = page.run(heights), page.browser.get_window_size()
    for width in (1300, 1200, size["width"]):
        page.browser.set_window_size(width, size["height"])
        until(lambda width=width: page.run("return outerWidth") == width, "it has another size")
        page.browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert page.run(heights) == before
    assert min(before) > 90


def test_on_paper_there_are_findings_and_still_pictures(page: Page) -> None:
    """Instead of what can be clicked."""
    assert page.run(SEEN) == [True, False, True]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert page.run(SEEN) == [True, True, False]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_without_scripts_there_are_findings_and_still_pictures(browser, folder: Path) -> None:
    """And a word on what is missing."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"file://{folder / 'report.html'}")
        shown = browser.find_element("css selector", "#lrprobe").text
        assert "needs a browser with JavaScript" in shown
        assert browser.find_element("css selector", "article.finding").is_displayed()
        assert browser.find_element("css selector", "#pictures ~ figure img").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_hostile_names_stay_text(browser, folder: Path) -> None:
    """In the report's own text, in the view, and in the address."""
    errors(browser)
    page = open_file(browser, folder / "evil.html")
    row = page.run("return lrprobe.tables[0].names.indexOf(arguments[0])", EVIL)
    page.move(row, 2).click().perform()
    assert page.chosen() == [EVIL]
    assert page.run("return document.querySelectorAll('[onerror]').length") == 0
    assert (folder / "evil.html").stat().st_size < 8e6
    assert errors(browser) == []


def test_what_explore_gives_is_such_a_page(browser, tmp_path: Path) -> None:
    """Inline in a notebook, and as a file; with its findings."""
    probe = train(small_net(), tmp_path / "run.parquet", eps=1e3)
    explored = lrprobe.explore(probe.frame())
    assert repr(explored).startswith("<lrprobe.explore of 4 parameters × 40 steps")
    explored.save(tmp_path / "view.html")
    errors(browser)
    page = open_file(browser, tmp_path / "view.html")
    assert page.cells() == [4, 40]
    assert page.run("return document.querySelectorAll('.finding').length") > 0
    cell = f"<!doctype html><title>a notebook</title>{explored._repr_html_()}"
    (tmp_path / "cell.html").write_text(cell, encoding="utf-8")
    browser.get(f"file://{tmp_path / 'cell.html'}")
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    page.ready()
    page.move(2, 5).click().perform()
    assert page.chosen() == ["2.weight"]
    browser.switch_to.default_content()
    assert errors(browser) == []
