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


@pytest.mark.parametrize("draw", [lrprobe.plot.rate, lrprobe.plot.update_ratio])
def test_a_run_that_became_nan_is_as_long_as_it_was(draw) -> None:
    """The steps of which nothing is known are there, in grey; a whole run has none such."""
    frame = frame_of(["weight"], update_ratio=1e-3)
    ruined = frame.mask(frame["step"] > 10, np.nan).assign(
        step=frame["step"], parameter="weight", optimizer="Adam", attempt=0
    )
    for each, spans in ((frame, 0), (ruined, 1)):
        ax = np.atleast_1d(draw(each))[0]
        assert ax.get_xlim()[0] <= 1
        assert ax.get_xlim()[1] >= 30
        grey = [patch for patch in ax.patches if patch.get_label() == "no figure"]
        assert len(grey) == spans
    assert grey[0].get_x() == 10
    assert grey[0].get_width() == 20


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
        (frame_of(["weight"]), {"parameters": "x"}, "no parameter matches 'x'; there are 'weight'"),
        (frame_of(["weight"]), {"parameters": ["x"]}, "no parameter matches 'x'"),
        (frame_of(["weight"])[["step", "parameter"]], {}, "no numeric column 'effective_lr_p50'"),
        (frame_of(["weight"]), {"axes": []}, "1 panels need as many axes; got 0"),
        (frame_of([str(i) for i in range(25)]), {}, "25 panels are too many"),
    ],
)
def test_bad_input_says_what_came_and_what_may(
    frame: pd.DataFrame, options: dict[str, object], message: str
) -> None:
    """A ValueError at the call."""
    with pytest.raises(ValueError, match=message):
        lrprobe.plot.rate(frame, **options)


def elements_of(parameters: list[str]) -> pd.DataFrame:
    """Ten tracked elements of each."""
    frames = [frame_of(parameters).assign(element=e, effective_lr=10.0**-e) for e in range(10)]
    return pd.concat(frames).assign(update=-1.0)


def draw_all(names: list[str]) -> None:
    """Every picture of some parameters, to the last pixel."""
    frame = frame_of(names, update_ratio=1e-3)
    histograms = frame_of(names).assign(edges=[np.array([0.1, 1.0])] * 4 * len(names))
    histograms["counts"] = [np.array([4])] * len(histograms)
    few = names[:5]
    axes = (
        lrprobe.plot.rate(frame, few)[0],
        lrprobe.plot.compare(frame, "update_ratio", few)[0],
        lrprobe.plot.update_ratio(frame),
        lrprobe.plot.heatmap(frame),
        lrprobe.plot.histograms(histograms, few)[0],
        lrprobe.plot.traces(elements_of(names), few)[0, 0],
    )
    for ax in axes:
        ax.figure.canvas.draw()
        assert ax.bbox.width > 0.2 * ax.figure.bbox.width / max(ax.get_gridspec().ncols, 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("block{}.weight", 5),
        ("block{}.weight", 500),
        (r"$\frac{}$_", 5),
        ("x" * 10**6 + "{}", 3),
        ("x" * 100 + "{}", 500),
    ],
    ids=["5", "500", "formula", "megabyte", "500-long"],
)
def test_names_leave_room_for_the_picture(name: str, count: int) -> None:
    """Formulas, a megabyte; an axis has at least a fifth of its share of the width."""
    draw_all([name.replace("{}", str(at)) for at in range(count)])


def test_a_dollar_is_no_formula() -> None:
    """Where two stand in a name, it is written as it is."""
    frame = frame_of(["$a$", "$b$"], update_ratio=1e-3)
    texts = [lrprobe.plot.rate(frame)[0].title]
    texts += lrprobe.plot.update_ratio(frame).get_legend().get_texts()[:2]
    texts += lrprobe.plot.heatmap(frame).get_yticklabels()
    assert [text.get_text() for text in texts] == ["$a$", "$b$", "$a$", "$a$", "$b$"]
    assert not any(text.get_parse_math() for text in texts)


def heat_of(ax) -> tuple[np.ma.MaskedArray, np.ndarray]:
    """The colours of a heatmap, row by row, and the steps at the borders of its columns."""
    (mesh,) = ax.collections
    return mesh.get_array(), mesh.get_coordinates()[0, :, 0]


def test_heatmap_has_a_row_for_each_parameter_and_a_column_for_each_step() -> None:
    """In the frame's order from the top, on a logarithmic scale with a bar that says the unit."""
    frame = frame_of(["weight", "bias"])
    frame.loc[frame["parameter"] == "bias", "effective_lr_p50"] *= 2
    ax = lrprobe.plot.heatmap(frame)
    cells, borders = heat_of(ax)
    assert cells.data == pytest.approx(np.array([[0.1, 1, 2, 3], [0.2, 2, 4, 6]]))
    assert borders.tolist() == [-3.5, 5.5, 15, 25, 35]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["weight", "bias"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert "step" in ax.get_xlabel()
    assert type(ax.collections[0].norm).__name__ == "LogNorm"
    assert "effective learning rate" in ax.collections[0].colorbar.ax.get_ylabel()


def test_heatmap_leaves_out_what_has_no_logarithm() -> None:
    """A zero, a missing figure, a step that a parameter does not have."""
    frame = frame_of(["weight", "bias"], update_ratio=1e-3).iloc[:-1]
    frame.loc[frame["step"] == 1, "update_ratio"] = 0.0
    frame.loc[frame["step"] == 10, "update_ratio"] = np.nan
    cells, _ = heat_of(lrprobe.plot.heatmap(frame, "update_ratio"))
    assert cells.mask.tolist() == [[True, True, False, False], [True, True, False, True]]


def test_heatmap_stays_legible_with_many_parameters_and_steps() -> None:
    """Of 500 names 40 are written, of 5,000 steps 1,000 drawn; the first and the last always."""
    names = [f"block.{number}.weight" for number in range(500)]
    ax = lrprobe.plot.heatmap(frame_of(names))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 40
    assert (labels[0], labels[-1]) == (names[0], names[-1])
    assert ax.collections[0].get_array().shape == (500, 4)
    frame = pd.DataFrame({"step": range(5000), "parameter": "w", "optimizer": "SGD", "lr": 0.1})
    cells, borders = heat_of(lrprobe.plot.heatmap(frame, "lr"))
    assert cells.shape == (1, 1000)
    assert (borders[0] <= 0, borders[-1] >= 4999) == (True, True)


def test_heatmap_tells_optimizers_apart_and_refuses_several_runs() -> None:
    """Two parameters of one name are two rows; two runs are two pictures."""
    frame = pd.concat([frame_of(["w"], optimizer="SGD"), frame_of(["w"], optimizer="Adam")])
    ax = lrprobe.plot.heatmap(frame)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SGD: w", "Adam: w"]
    runs = pd.concat([frame_of(["w"], run="a"), frame_of(["w"], run="b")])
    with pytest.raises(ValueError, match=r"2 runs .* a heatmap shows one: .*== 'a'"):
        lrprobe.plot.heatmap(runs)


def test_update_ratio_has_a_line_for_each_and_a_guide() -> None:
    """The guide is at 1e-3, and the legend says so."""
    frame = frame_of(["weight", "bias"], update_ratio=2e-3)
    ax = lrprobe.plot.update_ratio(frame)
    heights = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert set(heights) == {"weight", "bias", "1e-3, the guide"}
    assert list(heights["weight"]) == [2e-3] * 4
    assert list(heights["1e-3, the guide"]) == [1e-3, 1e-3]
    assert ax.get_yscale() == "log"
    assert "no unit" in ax.get_ylabel()
    assert len(ax.get_legend().get_texts()) == 3


def test_update_ratio_of_many_names_the_outermost() -> None:
    """Of 500 lines the three lowest and the three highest have a colour and a name."""
    frame = frame_of([f"p{number:03}" for number in range(500)])
    frame["update_ratio"] = (frame["parameter"].str[1:].astype(int) + 1) * 1e-6
    ax = lrprobe.plot.update_ratio(frame)
    assert len(ax.lines) == 501
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["p499", "p498", "p497", "p002", "p001", "p000", "1e-3, the guide"]


def test_update_ratio_draws_on_the_axes_given_and_names_runs() -> None:
    """As seaborn does: what comes in goes out."""
    frame = pd.concat([frame_of(["w"], run=run, update_ratio=1e-3) for run in "ab"])
    _, given = plt.subplots()
    assert lrprobe.plot.update_ratio(frame, ax=given) is given
    assert [line.get_label() for line in given.lines][:2] == ["b, w", "a, w"]


def test_compare_has_a_line_for_each_run() -> None:
    """Of the column asked for, with its unit; a figure that changes sign on a linear scale."""
    frames = [frame_of(["w"], run=run, grad_norm=norm) for run, norm in (("a", 1.0), ("b", 2.0))]
    (ax,) = lrprobe.plot.compare(pd.concat(frames), "grad_norm")
    assert {line.get_label(): line.get_ydata()[0] for line in ax.lines} == {"a": 1.0, "b": 2.0}
    assert "gradient" in ax.get_ylabel()
    assert ax.get_yscale() == "log"
    frames[0]["update_grad_cosine"] = [1.0, 0.5, -0.5, -1.0]
    (ax,) = lrprobe.plot.compare(frames[0], "update_grad_cosine")
    assert ax.get_yscale() == "linear"
    with pytest.raises(ValueError, match="no numeric column 'loss'; it has step"):
        lrprobe.plot.compare(frames[0], "loss")


def histograms_of(*counts: list[int]) -> pd.DataFrame:
    """One histogram a step over the rates 0.01 to 0.1 to 1."""
    edges = [np.array([0.01, 0.1, 1.0])] * len(counts)
    return pd.DataFrame(
        {"step": STEPS[: len(counts)], "parameter": "w", "optimizer": "Adam", "attempt": 0}
    ).assign(edges=edges, counts=list(map(np.array, counts)))


def test_histograms_are_shares_over_the_steps() -> None:
    """Every column has the whole parameter; the scale of the rate is logarithmic."""
    (ax,) = lrprobe.plot.histograms(histograms_of([3, 1], [0, 4]))
    cells, borders = heat_of(ax)
    assert borders.tolist() == [-3.5, 5.5, 14.5]
    assert cells.data.sum(axis=0) == pytest.approx([1.0, 1.0])
    low = ax.collections[0].get_coordinates()[1:, 0, 1] < 0.1
    assert cells.data[low].sum(axis=0) == pytest.approx([0.75, 0.0], abs=0.02)
    assert ax.get_yscale() == "log"
    assert ax.get_title() == "w"
    assert "effective learning rate" in ax.get_ylabel()
    assert ax.collections[0].colorbar.ax.get_ylabel() == "share of the elements"


def test_histograms_of_one_rate_or_of_zero_are_no_error() -> None:
    """SGD has one rate for all elements; some have 0."""
    table = histograms_of([4], [4])
    table["edges"] = [np.array([0.1, 0.1]), np.array([0.0, 0.0])]
    (ax,) = lrprobe.plot.histograms(table)
    ax.figure.canvas.draw()
    assert heat_of(ax)[0].sum(axis=0).filled(0)[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"no column 'edges'; a table from Probe\.histograms"):
        lrprobe.plot.histograms(frame_of(["w"]))


def test_traces_have_step_sizes_left_and_updates_right() -> None:
    """A row for each parameter, a line for each element, as in Zeiler's Fig. 2."""
    elements = pd.concat(
        frame_of(["w", "b"]).assign(element=e, effective_lr=10.0**-e, update=-float(e))
        for e in range(10)
    )
    axes = lrprobe.plot.traces(elements)
    assert axes.shape == (2, 2)
    left, right = axes[0]
    assert [line.get_ydata()[0] for line in left.lines] == [10.0**-e for e in range(10)]
    assert [line.get_ydata()[0] for line in right.lines] == [-float(e) for e in range(10)]
    assert list(left.lines[0].get_xdata()) == STEPS
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert "effective learning rate" in left.get_ylabel()
    assert "update" in right.get_ylabel()
    assert [ax.get_title() for ax in axes[:, 0]] == ["w", "b"]
    assert (lrprobe.plot.traces(elements, axes=axes.ravel()) == axes).all()


@pytest.mark.parametrize("draw", [lrprobe.plot.heatmap, lrprobe.plot.update_ratio])
def test_no_rows_is_said_so(draw) -> None:
    """By every function, before anything is drawn."""
    with pytest.raises(ValueError, match="no rows"):
        draw(frame_of(["w"]).iloc[:0])
    assert plt.get_fignums() == []


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    """And not by lrprobe: it is optional. Without it the error says what to install."""
    program = (
        "import sys, lrprobe, pandas as pd\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    columns = ['effective_lr_p05', 'effective_lr_p50', 'effective_lr_p95']\n"
        "    frame = pd.DataFrame({'step': [1], 'optimizer': 'Adam'})\n"
        "    lrprobe.plot.rate(frame.assign(**dict.fromkeys(columns, 0.1)))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "lrprobe.plot needs Matplotlib: pip install 'lrprobe[plot]'"
