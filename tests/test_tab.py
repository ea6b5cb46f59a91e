"""The tab LRPROBE in a real TensorBoard, in a real browser."""

import os
import re
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from browsers import (
    CHARTS,
    EVIL,
    HEATMAP,
    LONG,
    Evil,
    Page,
    chromium,
    enter_tab,
    errors,
    needs_browser,
    of,
    open_tab,
    small_net,
    tensorboard,
    train,
    until,
)
from selenium.webdriver import Keys

import lrprobe

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Chromium, as a new user has it."""
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Two runs of 40 steps: what each probe's frame has, and the logdir."""
    logdir = tmp_path_factory.mktemp("runs")
    return {
        "sound": train(small_net(), logdir / "sound").frame(),
        "faulty": train(small_net(), logdir / "faulty", eps=1e3).frame(),
        "logdir": logdir,
    }


@pytest.fixture(scope="module")
def address(runs: dict[str, object]) -> Iterator[str]:
    """TensorBoard on both."""
    with tensorboard(runs["logdir"]) as address:
        yield address


@pytest.fixture
def page(browser, address: str) -> Iterator[Page]:
    """The tab, freshly opened; its console has no error in the end."""
    errors(browser)
    yield open_tab(browser, address)
    assert errors(browser) == []


def test_the_plugin_is_found_by_its_entry_point() -> None:
    """As TensorBoard looks for it."""
    found = {each.value for each in entry_points(group="tensorboard_plugins")}
    assert "lrprobe.tab:Loader" in found


def test_the_tab_appears_with_a_heatmap_for_each_run(page: Page, browser) -> None:
    """As many cells as there are parameters and recorded steps."""
    assert [page.cells(at) for at in (0, 1)] == [[4, 40], [4, 40]]
    labels = page.run(HEATMAP + "return map.element.layout.yaxis.ticktext")
    assert labels == ["0.weight", "0.bias", "2.weight", "2.bias"]
    browser.switch_to.default_content()
    tabs = [each.text for each in browser.find_elements("css selector", "[role=tab]")]
    assert "LRPROBE" in tabs


def test_a_hover_shows_the_value_of_the_frame(page: Page, runs: dict[str, object]) -> None:
    """To the digits that it shows; of the cell's parameter, step and run."""
    page.move(2, 30, at=1).perform()
    lines = page.tip().splitlines()
    assert lines[0] == "2.weight"
    assert lines[1] == "step 31"
    assert lines[-1] == "sound"
    value = float(lines[2].removeprefix("median rate: "))
    assert value == pytest.approx(of(runs["sound"], "2.weight")[30], rel=1e-3)


def test_a_click_opens_the_parameter(page: Page, runs: dict[str, object]) -> None:
    """Its median in all charts, for each run that has it, and the histogram of that step."""
    page.move(3, 19).click().perform()
    assert page.chosen() == ["2.bias", "2.bias"]
    for trace, run in ((2, "faulty"), (5, "sound")):
        assert page.line("rate", trace) == pytest.approx(of(runs[run], "2.bias"), rel=1e-6)
    ratio = of(runs["sound"], "2.bias", "update_ratio")
    assert page.line("ratio") == pytest.approx(ratio, rel=1e-6)
    assert page.line("lr") == pytest.approx([1e-3] * 40)
    captions = page.run(
        "return [...document.querySelectorAll('.side figcaption')].map(e => e.textContent)"
    )
    assert "Histogram of the rate at step 20" in captions
    assert any("1e-3 is usual" in caption for caption in captions)


def test_a_band_is_of_the_quantiles(page: Page, runs: dict[str, object]) -> None:
    """From p05 to p95, filled between."""
    page.move(0, 5).click().perform()
    page.chosen()
    for trace, at in ((3, "p05"), (4, "p95")):
        wanted = of(runs["sound"], "0.weight", f"effective_lr_{at}")
        assert page.line("rate", trace) == pytest.approx(wanted, rel=1e-6)
    assert page.run(CHARTS + "return chart('rate').data[4].fill") == "tonexty"


def test_axes_are_logarithmic_or_linear(page: Page) -> None:
    """A button changes it; the histogram's rates are on a logarithmic axis either way."""
    axis = CHARTS + "return chart(arguments[0])._fullLayout[arguments[1]].type"
    assert page.run(axis, "rate", "yaxis") == "log"
    assert page.run(axis, "histogram", "xaxis") == "log"
    labels = page.run(CHARTS + "return chart('ratio')._fullLayout.yaxis.ticktext")
    assert len(labels) >= 2
    assert all(float(label) > 0 for label in labels)
    page.browser.find_element("xpath", "//button[.='Logarithmic']").click()
    page.settle()
    assert page.run(axis, "rate", "yaxis") == "linear"
    low, high = page.run(CHARTS + "return chart('lr')._fullLayout.yaxis.range")
    assert low == 0  # a constant rate is not drawn as 0
    assert 1e-3 < high < 2e-3
    first = page.run(HEATMAP + "return [map.element.data[0].z[0][0], map.view.map.values[0]]")
    assert first[0] == first[1]


def test_dark_is_dark(page: Page, browser) -> None:
    """With TensorBoard, at once; text is light then."""
    colours = (
        "const style = getComputedStyle(document.getElementById('lrprobe'));"
        "return [style.backgroundColor, style.color].map(c => c.match(/\\d+/g).map(Number))"
    )
    for dark in (True, False):
        browser.switch_to.default_content()
        browser.execute_script("document.body.classList.toggle('dark-mode', arguments[0])", dark)
        browser.switch_to.frame(browser.find_element("css selector", "iframe"))
        time.sleep(0.2)
        page.settle()
        back, ink = (sum(colour[:3]) / 3 for colour in page.run(colours))
        assert (back < 60 and ink > 180) if dark else (back > 200 and ink < 60)
        font = page.run(HEATMAP + "return map.element.layout.font.color")
        assert font == ("#e6e9ee" if dark else "#1b1f24")


def test_another_figure_has_another_scale(page: Page, runs: dict[str, object]) -> None:
    """Of what one picks; a share goes from 0 to 1."""
    select = page.browser.find_element("css selector", ".bar select")
    select.find_element("xpath", "./option[.='gradient norm']").click()
    page.settle()
    cells = page.run(HEATMAP + "return Array.from(map.element.data[0].z[1])", 1)
    assert [10**z for z in cells] == pytest.approx(
        of(runs["sound"], "0.bias", "grad_norm"), rel=1e-5
    )
    assert page.line("figure")
    select = page.browser.find_element("css selector", ".bar select")
    select.find_element("xpath", "./option[.='lost updates']").click()
    page.settle()
    assert page.run(HEATMAP + "const [t] = map.element.data; return [t.zmin, t.zmax]") == [0, 1]


def test_zero_has_a_colour_and_nearly_equal_figures_have_one(
    page: Page, runs: dict[str, object]
) -> None:
    """Only what is missing is a gap; the scale spans a factor of two at least."""
    page.run("return void lrprobe.set({figure: 'reconstruction_error', runs: ['sound']})")
    page.settle()
    cells, low = page.run(HEATMAP + "const [t] = map.element.data; return [[...t.z[0]], t.zmin]")
    errors_found = of(runs["sound"], "0.weight", "reconstruction_error")
    zeros = [cell for cell, error in zip(cells, errors_found, strict=True) if error == 0]
    assert zeros
    assert zeros == pytest.approx([low] * len(zeros))
    page.run("return void lrprobe.set({figure: 'effective_lr_p50', runs: ['faulty']})")
    page.settle()  # with this ε, every rate is nearly 1e-6
    low, high = page.run(HEATMAP + "const [t] = map.element.data; return [t.zmin, t.zmax]")
    assert 10 ** (high - low) == pytest.approx(2)


def test_the_state_is_in_the_address(page: Page, browser, address: str) -> None:
    """Who opens it sees the same: figure, parameters, step, zoom, scale."""
    page.run("""return void lrprobe.set({figure: "update_ratio", parameters: ["2.weight", "0.bias"],
        step: 12, range: [5, 25], linear: true, runs: ["sound"]})""")
    page.settle()
    browser.switch_to.default_content()
    url = browser.current_url
    assert "figure=update_ratio" in url
    again = open_tab(browser, address, url.partition("#lrprobe&")[2])
    assert again.chosen() == ["2.weight", "0.bias"]
    state = again.run("return lrprobe.state")
    assert (state["step"], state["range"], state["linear"]) == (12, [5, 25], True)
    assert again.run("return lrprobe.heatmaps.size") == 1
    shown = again.run(HEATMAP + "return map.element.layout.xaxis.range")
    assert shown == [5, 25]
    browser.switch_to.default_content()
    assert unquote(browser.current_url) == unquote(url)


def test_a_finding_leads_to_its_parameter_and_steps(page: Page) -> None:
    """The faulty run's ε is named; a click shows where."""
    until(lambda: "ε" in page.text(), "no finding is shown")
    links = page.browser.find_elements("css selector", ".finding .link")
    wanted = next(each for each in links if "2.weight" in each.text)
    page.run("arguments[0].scrollIntoView(); arguments[0].click()", wanted)
    assert set(page.chosen()) == {"2.weight"}
    state = page.run("return lrprobe.state")
    assert state["mark"][0] == state["step"] >= 1
    shapes = page.run(CHARTS + "return chart('rate').layout.shapes.map(s => [s.x0, s.x1])")
    assert state["mark"] in shapes


def test_the_keyboard_does_what_the_mouse_does(page: Page) -> None:
    """Arrows move over the cells, which a screen reader is told; Enter opens, Shift adds."""
    heatmap = page.browser.find_element("css selector", ".heatmap")
    assert "Arrow keys" in heatmap.get_attribute("aria-label")
    heatmap.send_keys(Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    spoken = page.browser.find_element("css selector", "[aria-live]").get_attribute("textContent")
    assert spoken.startswith("0.bias, step 2, median rate: ")
    heatmap.send_keys(Keys.ENTER)
    assert set(page.chosen()) == {"0.bias"}
    heatmap.send_keys(Keys.ARROW_DOWN, Keys.SHIFT, Keys.ENTER)
    assert page.chosen() == ["0.bias", "0.bias", "2.weight", "2.weight"]
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select')].filter(e => !(e.textContent"
        ".trim() || e.ariaLabel || e.labels?.length || e.closest('[hidden]'))).length"
    )
    assert unnamed == 0


def test_a_zoom_goes_for_all_charts_and_back(page: Page) -> None:
    """Dragging over some steps shows these; the button shows all again."""
    page.move(0, 10).click_and_hold().perform()
    page.move(0, 20).release().perform()
    until(lambda: page.run("return lrprobe.state.range"), "there was no zoom")
    page.settle()
    low, high = page.run(CHARTS + "return chart('ratio').layout.xaxis.range")
    assert 9 < low < 13
    assert 19 < high < 23
    page.browser.find_element("xpath", "//button[.='All steps']").click()
    page.settle()
    assert page.run("return lrprobe.state.range") is None


def test_parameters_are_filtered_by_an_expression(page: Page) -> None:
    """As one types; half an expression is taken as text."""
    box = page.browser.find_element("css selector", "input[type=search]")
    box.send_keys("bias$")
    until(lambda: page.cells()[0] == 2, "the heatmap has other rows")
    box.send_keys("(")
    until(lambda: page.run(HEATMAP + "return map.element.hidden"), "nothing has such a name")
    box.clear()


def test_one_run_is_chosen_or_several(page: Page) -> None:
    """By the button with its name; the last one stays. Findings are of those that are shown."""
    count = "return document.querySelectorAll('.found').length"
    for name, left in (("faulty", 1), ("sound", 1), ("faulty", 2)):
        page.browser.find_element("xpath", f"//button[.='{name}']").click()
        page.settle()
        assert page.run("return document.querySelectorAll('.heatmap').length") == left
        until(lambda left=left: page.run(count) == left, "the findings are those of other runs")


# --- What is unlike the usual --------------------------------------------------------------------


def test_hostile_names_stay_text(browser, tmp_path: Path) -> None:
    """Nothing of a name is taken as markup, wherever it is shown; a megabyte is shortened."""
    train(Evil(), tmp_path / "<b>run", 5)
    with tensorboard(tmp_path) as address:
        errors(browser)
        page = open_tab(browser, address)
        assert page.cells() == [5, 5]
        row = page.run("return lrprobe.tables[0].names.indexOf(arguments[0])", EVIL)
        page.move(row, 2).click().perform()
        assert page.chosen() == [EVIL]
        assert EVIL in page.run("return document.querySelector('.tip').textContent")
        markup = (
            "return document.querySelectorAll('[onerror], img, .heatmap b, figcaption b b').length"
        )
        assert page.run(markup) == 0
        labels = page.run(
            "return [...document.querySelectorAll('.ytick text')].map(e => e.textContent)"
        )
        assert any("<img src=x" in label for label in labels)
        assert max(map(len, page.run("return lrprobe.tables[0].names"))) < 250
        assert errors(browser) == []


def test_an_empty_logdir_says_so(browser, tmp_path: Path) -> None:
    """And what would fill it."""
    with tensorboard(tmp_path) as address:
        page = enter_tab(browser, address)
        until(lambda: "lrprobe.attach(" in page.text(), "nothing is said of the empty logdir")
        assert "No run in this logdir" in page.text()
        assert not page.run("return document.querySelector('.bar').offsetParent")


def test_a_truncated_file_says_so(browser, tmp_path: Path) -> None:
    """And shows what comes before."""
    train(small_net(), tmp_path / "cut", 20)
    (path,) = (tmp_path / "cut").iterdir()
    os.truncate(path, path.stat().st_size - 100)
    os.utime(path, (time.time() - 60,) * 2)
    with tensorboard(tmp_path) as address:
        page = open_tab(browser, address)
        assert page.cells() == [4, 19]
        until(lambda: "is truncated" in page.text(), "nothing is said of it")
        assert page.run("return document.querySelector('.heatmap').offsetParent !== null")
        assert path.name in page.text()


@pytest.mark.slow
def test_it_goes_on_while_the_training_does(browser, tmp_path: Path) -> None:
    """What is recorded later is drawn, and what one looks at stays."""
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = lrprobe.attach(optimizer, model, to=str(tmp_path / "live"), every=1)

    def more(steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        probe.flush()

    more(5)
    options = ("--load_fast", "false", "--reload_interval", "1")
    with tensorboard(tmp_path, *options) as address:
        page = open_tab(browser, address, "parameter=2.bias")
        assert page.cells() == [4, 5]
        more(6)
        until(lambda: page.cells() == [4, 11], "the new steps are not drawn", LONG)
        assert page.chosen() == ["2.bias"]
        assert len(page.line("ratio")) == 11
    probe.close()


@pytest.mark.slow
def test_with_the_fast_loader(browser, runs: dict[str, object]) -> None:
    """TensorBoard's data server has the same figures as its Python."""
    pytest.importorskip("tensorboard_data_server")
    with tensorboard(runs["logdir"], "--load_fast", "true") as address:
        page = open_tab(browser, address)
        assert page.cells() == [4, 40]
        page.move(0, 39).perform()
        assert re.search(r"step 40\nmedian rate: ", page.tip())
