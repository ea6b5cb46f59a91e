"""lrprobe.plot draws what the frame says, on the axes it is given."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import lrprobe.plot

STEPS = [1, 10, 20, 30]


def frame_of(parameters: list[str], **columns: object) -> pd.DataFrame:
    """Four steps of some parameters, whose median rate is 0.1 times the step."""
    frame = pd.DataFrame([(step, name) for step in STEPS for name in parameters])
    frame.columns = ["step", "parameter"]
    frame = frame.assign(optimizer="Adam", attempt=0)
    for quantile, factor in (("p05", 0.01), ("p50", 0.1), ("p95", 1.0)):
        frame[f"effective_lr_{quantile}"] = frame["step"] * factor
    return frame.assign(**columns)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_one_panel_for_each_parameter_with_its_median() -> None:
    """The line is the median over the steps; the scale is logarithmic and says what it is."""
    axes = lrprobe.plot.rate(frame_of(["weight", "bias"]))
    assert [ax.get_title() for ax in axes] == ["weight", "bias"]
    (line,) = axes[0].lines
    assert line.get_xdata().tolist() == STEPS
    assert line.get_ydata().tolist() == pytest.approx([0.1, 1.0, 2.0, 3.0])
    assert axes[0].get_yscale() == "log"
    assert "step" in axes[0].get_xlabel()
    assert "effective learning rate" in axes[0].get_ylabel()
    assert axes[0].get_legend() is None


def test_the_band_goes_from_p05_to_p95() -> None:
    """Its lowest and highest points are those of the quantiles."""
    (ax,) = lrprobe.plot.rate(frame_of(["weight"]))
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.01, 30.0))


def test_the_frame_stays_as_it_was() -> None:
    """Drawing changes nothing of it."""
    frame = frame_of(["weight"])
    before = frame.copy()
    lrprobe.plot.rate(frame)
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("wanted", ["^b", ["bias"]])
def test_parameters_are_chosen_by_expression_or_by_name(wanted: str | list[str]) -> None:
    """As `include` does."""
    (ax,) = lrprobe.plot.rate(frame_of(["weight", "bias"]), wanted)
    assert ax.get_title() == "bias"


def test_what_is_drawn_on_is_given_back() -> None:
    """One Axes, or an array of them, of any shape."""
    _, ax = plt.subplots()
    assert list(lrprobe.plot.rate(frame_of(["weight"]), axes=ax)) == [ax]
    _, grid = plt.subplots(2, 1)
    assert list(lrprobe.plot.rate(frame_of(["weight", "bias"]), axes=grid)) == list(grid)


@pytest.mark.parametrize(("key", "title"), [("module", "0"), ("group", "group 0"), (None, "model")])
def test_every_level_has_its_panels(key: str | None, title: str) -> None:
    """A frame made by module, by group or by model is drawn by those."""
    frame = frame_of(["0"])
    if key == "group":
        frame["parameter"] = 0
    frame = frame.drop(columns="parameter") if key is None else frame.rename(
        columns={"parameter": key}
    )  # fmt: skip
    (ax,) = lrprobe.plot.rate(frame)
    assert ax.get_title() == title


def test_runs_optimizers_and_attempts_are_told_apart() -> None:
    """By whatever differs, and by no more, each with a colour and a dash of its own."""
    one = frame_of(["weight"], run="a", optimizer="SGD")
    two = frame_of(["weight"], run="b", optimizer="Adam")
    again = frame_of(["weight"], run="b", optimizer="Adam", attempt=1)
    (ax,) = lrprobe.plot.rate(pd.concat([one, two]))
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    (ax,) = lrprobe.plot.rate(pd.concat([one, two, again]))
    assert [line.get_label() for line in ax.lines] == [
        "a, attempt 0",
        "b, attempt 0",
        "b, attempt 1",
    ]


def test_rates_of_nothing_and_zero_are_no_error() -> None:
    """A parameter that never stepped has no figures; a rate of 0 has no logarithm."""
    columns = {f"effective_lr_{q}": np.nan for q in ("p05", "p50", "p95")}
    axes = lrprobe.plot.rate(frame_of(["weight"], **columns))
    axes[0].figure.canvas.draw()
    axes = lrprobe.plot.rate(frame_of(["weight"], **dict.fromkeys(columns, 0.0)))
    axes[0].figure.canvas.draw()


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (frame_of(["weight"]).iloc[:0], {}, "no rows"),
        (frame_of(["weight"]), {"parameters": "x"}, "no parameter matches 'x': there are 'weight'"),
        (frame_of(["weight"]), {"parameters": ["x"]}, "no parameter matches 'x'"),
        (frame_of(["weight"]), {"axes": []}, "1 panels need as many axes; 0 were given"),
        (frame_of([str(i) for i in range(25)]), {}, "25 panels are too many"),
    ],
)
def test_bad_input_says_what_came_and_what_may(
    frame: pd.DataFrame, options: dict[str, object], message: str
) -> None:
    """A ValueError at the call."""
    with pytest.raises(ValueError, match=message):
        lrprobe.plot.rate(frame, **options)


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    """And not before: it is optional. Without it the error says what to install."""
    program = (
        "import sys, lrprobe.plot, pandas as pd\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    lrprobe.plot.rate(pd.DataFrame({'step': [1], 'optimizer': 'Adam'}))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "lrprobe.plot needs Matplotlib: pip install 'lrprobe[plot]'"
