"""lrprobe report writes one page that stands alone, and says what it should."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from short_runs import record
from torch import nn

import lrprobe
import lrprobe.plot
from lrprobe import report
from lrprobe.drawing import STYLES
from lrprobe.report.pictures import _lr
from lrprobe.runs import Runs, find, load

EVIL = "<script>alert('x')</script>&\"$_2$"


class _Evil(nn.Module):
    """A network with a parameter whose name would be markup and a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(EVIL, nn.Parameter(torch.ones(3, 4)))
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + (x @ dict(self.named_parameters())[EVIL].T).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with a huge ε, one without a fault."""
    folder = tmp_path_factory.mktemp("runs")
    record(folder / "faulty.parquet", _Evil(), eps=1e3)
    record(folder / "sound.parquet", _Evil())
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """The report about both."""
    report.write(folder / "report.html", folder / "faulty.parquet", folder / "sound.parquet")
    return (folder / "report.html").read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Tags, attributes that could fetch something, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network(page: str) -> None:
    """Nothing in it is fetched, and the browser is told so; scripts and pictures are inside."""
    reader = _Reader(page)
    assert not {"link", "iframe", "object"} & set(reader.tags)
    assert reader.fetched
    assert all(each.startswith(("data:image/png;base64,", "#run=")) for each in reader.fetched)
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert len(page) < 4e6


def _stills(page: str) -> list[str]:
    return [each for each in _Reader(page).fetched if each.startswith("data:")]


def test_pictures_are_whole(page: str) -> None:
    """Each is a PNG of some size: rates, update ratio, lr, and a heatmap for each run."""
    pictures = [base64.b64decode(each.partition(",")[2]) for each in _stills(page)]
    assert len(pictures) == 5
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        width, height = np.frombuffer(picture[16:24], ">u4")
        assert width > 300
        assert height > 100


def test_findings_come_first_then_the_view_then_the_table(page: str) -> None:
    """And each finding says everything."""
    names = ("findings", "lrprobe", "pictures", "table")
    places = [page.index(f'id="{name}"') for name in names]
    assert places == sorted(places)
    finding = next(
        each for each in lrprobe.diagnose(_both(page)).findings if each.code == "eps-rules"
    )
    text = " ".join(_Reader(page).text.split())
    for part in (finding.title, finding.parameter, finding.evidence, finding.meaning, finding.link):
        assert " ".join(part.split()) in text


def _both(_page: str) -> pd.DataFrame:
    return _FRAMES["both"]


_FRAMES: dict[str, pd.DataFrame] = {}


@pytest.fixture(scope="module", autouse=True)
def _frames(folder: Path) -> None:
    paths = folder / "faulty.parquet", folder / "sound.parquet"
    _FRAMES["both"] = lrprobe.read(*paths, attempts="all")


def test_names_are_escaped(page: str) -> None:
    """A parameter's name is text, whatever is in it."""
    assert EVIL not in page
    assert EVIL in _Reader(page).text


def test_runs_are_overlaid_by_the_names_of_their_parameters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One panel for each parameter, one line in it for each run."""
    drawn = []
    rate = lrprobe.plot.rate

    def spy(*arguments: object) -> object:
        axes = rate(*arguments)
        drawn.append([[line.get_label() for line in ax.lines] for ax in axes])
        drawn.append([ax.get_title() for ax in axes])
        return axes

    monkeypatch.setattr(lrprobe.plot, "rate", spy)
    report.write(folder / "again.html", folder)
    lines, titles = drawn
    assert lines == [["faulty", "sound"]] * 3
    assert titles == [EVIL, "layer.weight", "layer.bias"]


def test_no_figure_is_left_open(folder: Path) -> None:
    """Whoever calls it in a notebook finds no picture below the cell."""
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    report.write(folder / "again.html", folder / "sound.parquet")
    assert plt.get_fignums() == before


def test_the_table_has_the_last_step(page: str) -> None:
    """One row for each run and parameter."""
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index('id="table"') :], re.DOTALL)
    assert len(rows) == 1 + 2 * 3
    assert all("<td class=n>30</td>" in row for row in rows[1:])


def test_the_rates_of_groups_are_drawn_like_all_else() -> None:
    """In colours for any eye, with dashes, with a unit; the legend says which group."""
    from matplotlib import pyplot as plt

    frame = _FRAMES["both"].assign(group=lambda f: (f["parameter"] == "layer.bias").astype(int))
    frame.loc[frame["group"] == 1, "lr"] = 0.5
    figure = _lr(frame[frame["run"] == "sound"])
    (ax,) = figure.axes
    plt.close(figure)
    styles = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
    assert styles == [(s["color"], s["linestyle"]) for s in STYLES[:2]]
    assert "per unit of direction" in ax.get_ylabel()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["sound, Adam, group 0", "sound, Adam, group 1"]


def test_light_and_dark(page: str) -> None:
    """The page follows the browser's choice, and pictures with it."""
    assert "prefers-color-scheme: dark" in page
    assert "color-scheme: dark" in page


def many(steps: int, parameters: int) -> pd.DataFrame:
    """A frame of many steps and parameters, made from a small real one."""
    frame = _FRAMES["both"]
    one = frame[(frame["run"] == "sound") & (frame["parameter"] == "layer.weight")]
    one = one.drop(columns="run").iloc[[10]]
    large = one.loc[one.index.repeat(steps * parameters)].reset_index(drop=True)
    names = [f"block{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(parameters)]
    return large.assign(
        step=np.repeat(np.arange(1, steps + 1), parameters), parameter=names * steps
    )


def test_many_parameters_and_steps_make_a_page_that_opens() -> None:
    """500 parameters and 60 steps: under 8 MB; twelve panels, and all in the heatmap."""
    page, _ = report.render(Runs(many(60, 500), ("large",), "parameter"))
    assert len(page) < 8e6
    assert "12 of 500" in page
    assert "block249.bias" in page


def test_pictures_show_a_part_of_many_steps() -> None:
    """Evenly spread, with the first and the last."""
    frame = many(1000, 3)
    steps = report.thinned(frame, 100)["step"].unique()
    assert len(steps) == 100
    assert (steps[0], steps[-1]) == (1, 1000)
    assert np.diff(steps).max() <= 11
    assert report.thinned(frame, 1000) is frame


def test_what_tensorboard_has_is_enough(tmp_path: Path) -> None:
    """A logdir's few columns make a report too, also where it has modules only."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(101)])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(sgd, model, every=1, to=str(tmp_path / "log")):
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            sgd.step()
    runs = load(tmp_path / "log")
    assert runs.level == "module"
    page, found = report.render(runs)
    assert found.findings == ()
    assert page.count("data:image/png") >= 3


def test_a_folder_of_runs_stands_for_them(folder: Path) -> None:
    """Datasets before logdirs; a run itself stands for itself."""
    assert [path.name for path in find(folder)] == ["faulty.parquet", "sound.parquet"]
    assert find(folder / "sound.parquet") == [folder / "sound.parquet"]


def test_load_reads_what_read_reads(folder: Path) -> None:
    """The columns that are needed, faster."""
    runs = load(folder / "sound.parquet")
    frame = lrprobe.read(folder / "sound.parquet")
    pd.testing.assert_frame_equal(
        runs.frame.astype(dict.fromkeys(("optimizer", "parameter", "rule"), "str")),
        frame[list(runs.frame)],
    )
    (group,) = runs.frame.attrs["lrprobe"]["optimizers"]["Adam"]["groups"]
    assert group["betas"] == [0.9, 0.999]


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    """With a word on when there will be some."""
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    lrprobe.attach(sgd, model, to=str(tmp_path / "a.parquet")).close()
    with pytest.raises(ValueError, match="a: no step was recorded yet"):
        report.write(tmp_path / "report.html", tmp_path / "a.parquet")
