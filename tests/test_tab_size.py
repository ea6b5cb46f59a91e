"""The tab with a large model, in a real browser."""

from pathlib import Path

import numpy as np
import pytest
from browsers import Page, chromium, needs_browser, open_tab, tensorboard, until
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from test_sinks import make_record

from lrprobe.sinks.tab import TabTensors
from lrprobe.sinks.tags import Tags
from lrprobe.sinks.tensorboard import _EventFile
from lrprobe.tab import SAMPLES

pytestmark = [needs_browser, pytest.mark.slow]

PARAMETERS = 500
STEPS = SAMPLES + 500
SPIKE = 1234  # the step in which one parameter's rate is a thousandfold
OPEN, CLICK = 15.0, 1.0  # seconds; a third of it on a machine that does nothing else


def write(folder: Path) -> None:
    """What the sink writes for the tab, without scalars: these take TensorBoard minutes to read."""
    parts = [
        f"{part}.{kind}" for part in ("q", "k", "v", "o", "mlp") for kind in ("weight", "bias")
    ]
    names = tuple(f"blocks.{at // 10}.{parts[at % 10]}" for at in range(PARAMETERS))
    random = np.random.default_rng(0)
    file, tab, tags = _EventFile(str(folder)), TabTensors(""), Tags("", "lrprobe")
    record = make_record(1, names=names, track=0)
    table = record.tables["parameter"]
    usual = 10 ** random.normal(-3, 0.5, PARAMETERS)
    for step in range(1, STEPS + 1):
        rate = usual * 10 ** random.normal(0, 0.02, PARAMETERS)
        rate[77] *= 1000 if step == SPIKE else 1
        for place, at in enumerate(("min", "p01", "p05", "p25", "p50", "p75", "p95", "p99", "max")):
            table[f"effective_lr_{at}"][:] = rate * 10 ** ((place - 4) / 4)
        table["update_ratio"][:] = rate / 3
        summary = Summary()
        plan = tags.plan(record)
        tab.add(summary, record, plan, None, attempt_id="a")
        file.add(Event(summary=summary, step=step, wall_time=1e9 + step))
    file.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """The tab on 500 parameters, with TensorBoard done with reading; opened twice."""
    pytest.importorskip("tensorboard_data_server")
    folder = tmp_path_factory.mktemp("large")
    write(folder / "run")
    with (
        tensorboard(folder, "--load_fast", "true") as address,
        chromium(tmp_path_factory.mktemp("chromium")) as browser,
    ):
        page = open_tab(browser, address)
        last = "return lrprobe.heatmaps.values().next().value.heatmap.view.map.last"
        until(lambda: page.run(last) == STEPS, "TensorBoard does not read it all")
        page = open_tab(browser, address)
        yield page


def test_it_opens_in_seconds(page: Page) -> None:
    """From the frame's start to the picture; modules are folded."""
    drawn = page.run("return performance.getEntriesByName('lrprobe is drawn')[0].startTime")
    assert drawn < OPEN * 1000
    rows, columns = page.cells()
    assert rows == 50
    assert 400 <= columns <= 402
    assert "500 parameters, 4" in page.text()
    assert f"of {SAMPLES:,} recorded steps" in page.text()


def test_a_click_is_answered_at_once(page: Page) -> None:
    """The charts of a parameter are drawn; the best of five, since machines are busy."""
    taken = [
        page.browser.execute_async_script(
            "const [row, done] = arguments; const map = [...lrprobe.heatmaps.values()][0].heatmap;"
            "const start = performance.now();"
            "lrprobe.choose({ parameters: [map.view.table.names[row]], step: 100 });"
            "lrprobe.busy.then(() => requestAnimationFrame(() => done(performance.now() - start)))",
            row,
        )
        for row in (3, 100, 200, 300, 400)
    ]
    assert min(taken) < CLICK * 1000


def test_what_one_parameter_did_once_is_seen_in_its_module(page: Page) -> None:
    """Where TensorBoard kept the step: the folded row has that value, not the median."""
    answer = page.run(
        "const { view, cells } = [...lrprobe.heatmaps.values()][0].heatmap;"
        "const at = view.map.steps.indexOf(arguments[0]);"
        "return [at, view.rows[7].label, at < 0 ? 0 : cells[7][at] / cells[7][at - 1]]",
        SPIKE,
    )
    at, label, times = answer
    assert label == "blocks.7"
    assert at < 0 or times > 100


def test_modules_unfold_to_parameters(page: Page) -> None:
    """A click opens the parameter that is most unlike the others, and its module's rows."""
    page.move(20, 100).click().perform()
    (name,) = page.chosen()
    assert name.startswith("blocks.20.")
    assert page.cells()[0] == 59
    page.browser.find_element("xpath", "//button[.='Unfold modules']").click()
    page.settle()
    assert page.cells()[0] == PARAMETERS
    page.browser.find_element("xpath", "//button[.='Fold modules']").click()
    page.settle()
    assert page.cells()[0] == 50
