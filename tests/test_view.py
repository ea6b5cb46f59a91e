"""What the interactive view is given: tables, and what is cut from them for a screen."""

import base64
import math
import re

import numpy as np
import pandas as pd
import pytest

import lrprobe
from lrprobe.text import shorter
from lrprobe.view import answers, page
from lrprobe.view.table import COLUMNS, FIGURES, tables_of, unique

STEPS = [1, 10, 20, 30, 40]


def frame_of(parameters: list[str], **columns: object) -> pd.DataFrame:
    """Five steps of some parameters, whose figures tell step and row."""
    rows = [(step, at, name) for step in STEPS for at, name in enumerate(parameters)]
    frame = pd.DataFrame(rows, columns=["step", "row", "parameter"])
    frame = frame.assign(optimizer="Adam", attempt=0, group=frame["row"] % 2, numel=10)
    for place, column in enumerate(COLUMNS):
        frame[column] = frame["step"] + frame["row"] / 10 + place / 1000
    return frame.drop(columns="row").assign(**columns)


def numbers(text: str) -> list[float]:
    """What the front end makes of packed figures."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").tolist()


def test_a_table_has_the_figures_of_the_frame() -> None:
    """Steps × parameters, in the model's order, with the group's name of each."""
    frame = frame_of(["b", "a"])
    (table,) = tables_of(frame)
    assert (table.optimizer, table.level, table.names) == ("Adam", "parameter", ["b", "a"])
    assert table.groups == ["group0", "group1"]
    assert table.steps.tolist() == STEPS
    wanted = frame["grad_norm"].to_numpy().reshape(5, 2)
    assert table.figures["grad_norm"] == pytest.approx(wanted, rel=1e-6)
    named = frame.assign(group_name=frame["group"].map({0: "body", 1: "head"}))
    (table,) = tables_of(named)
    assert table.groups == ["body", "head"]


def test_a_frame_without_a_column_has_no_such_figure() -> None:
    """As older runs have no idle share, and a logdir has little."""
    (table,) = tables_of(frame_of(["a"]).drop(columns=["idle_fraction", "group", "numel"]))
    assert "idle_fraction" not in table.figures
    assert table.groups == [""]
    assert set(table.figures) == set(COLUMNS) - {"idle_fraction"}


def test_each_run_and_optimizer_is_a_table() -> None:
    """Called by the run, and by the optimizer too where a run has several."""
    one = frame_of(["a"]).assign(run="x")
    two = pd.concat([frame_of(["a"]), frame_of(["b"], optimizer="SGD")]).assign(run="y")
    tables = list(tables_of(pd.concat([one, two], ignore_index=True)))
    keys = [(table.run, table.optimizer) for table in tables]
    assert answers.titles(keys) == ["x", "y · Adam", "y · SGD"]
    assert answers.titles([("", "Adam"), ("", "SGD")]) == ["Adam", "SGD"]


def test_what_a_later_attempt_recorded_anew_is_shown_once() -> None:
    """The latest."""
    first, again = frame_of(["a"]), frame_of(["a"], attempt=1, grad_norm=7.0)
    again = again[again["step"] >= 30]
    (table,) = tables_of(pd.concat([first, again], ignore_index=True))
    assert table.steps.tolist() == STEPS
    assert table.figures["grad_norm"][-2:, 0].tolist() == [7.0, 7.0]


def test_names_are_short_and_each_its_own() -> None:
    """Whatever a user called them."""
    assert unique(["a", "b", "a"]) == ["a", "b", "a#1"]
    (table,) = tables_of(frame_of(["x" * 10**6, "x" * 10**6 + "y"]))
    assert len(set(table.names)) == 2
    assert max(map(len, table.names)) < 250
    assert shorter("\ud800").isascii()


def test_a_heatmap_has_a_cell_for_each_figure() -> None:
    """Parameters × steps, NaN where there is none."""
    frame = frame_of(["a", "b"])
    frame.loc[3, "update_ratio"] = math.nan
    (table,) = tables_of(frame)
    answer = answers.heatmap(table, "update_ratio")
    assert answer["steps"] == STEPS
    assert (answer["recorded"], answer["first"], answer["last"]) == (5, 1, 40)
    found = np.array(numbers(answer["values"])).reshape(2, 5)
    wanted = frame["update_ratio"].to_numpy().reshape(5, 2).T
    assert found == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_a_zoom_gives_the_steps_in_it_and_one_on_either_side() -> None:
    """So that lines go on to the edge."""
    (table,) = tables_of(frame_of(["a"]))
    assert answers.heatmap(table, "grad_norm", 15, 25)["steps"] == [10, 20, 30]
    assert answers.detail(table, "a", 15, 25)["steps"] == [10, 20, 30]
    assert answers.detail(table, "a", 15, 25, step=40)["steps"] == [10, 20, 30, 40]


def test_details_are_all_figures_of_one_parameter() -> None:
    """Of the one that was asked for."""
    frame = frame_of(["a", "b"])
    (table,) = tables_of(frame)
    answer = answers.detail(table, "b")
    assert set(answer["figures"]) == set(COLUMNS)
    wanted = frame.loc[frame["parameter"] == "b", "effective_lr_p95"].tolist()
    assert numbers(answer["figures"]["effective_lr_p95"]) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="is not in list"):
        answers.detail(table, "c")


def test_of_many_steps_the_unusual_are_shown() -> None:
    """One spike, a zero and a NaN in ten thousand records are among a few hundred."""
    steps = np.arange(10_000)
    matrix = np.full((10_000, 3), 1e-3, dtype=np.float32)
    matrix[1234, 1], matrix[5678, 2], matrix[7777, 0] = 1e-1, 0.0, math.nan
    at = answers.picked(steps, matrix, -math.inf, math.inf, 400)
    assert {0, 1234, 5678, 7777, 9999} <= set(at.tolist())
    assert len(at) <= 402
    assert np.diff(at).max() <= 2 * 10_000 / 400
    assert answers.picked(steps, matrix, 100, 200, 400).tolist() == list(range(99, 202))


def test_a_page_has_as_much_inside_as_it_may() -> None:
    """Fewer steps of more parameters; never none."""
    tables = list(tables_of(frame_of([f"p{at}" for at in range(50)])))
    (inside,) = answers.document(tables, findings=True)["tables"]
    assert inside["steps"] == STEPS
    steps = answers.document(tables, findings=True, most_steps=3)["tables"][0]["steps"]
    assert steps[0] == 1
    assert steps[-1] == 40


def test_findings_are_as_diagnose_has_them() -> None:
    """Grouped, with the steps as numbers to go to."""
    frame = frame_of(["a.weight"], nonfinite=1.0, stepped=True, rule="adam")
    findings = lrprobe.diagnose(frame)
    answer = answers.found(findings)
    assert answer["summary"] == findings.summary()
    assert sum(len(group["items"]) for group in answer["groups"]) == len(findings) > 0
    item = answer["groups"][0]["items"][0]
    assert (item["parameter"], item["first"], item["last"]) == ("a.weight", 1, 40)


def test_the_front_end_is_in_one_script_without_its_imports() -> None:
    """Every module is in it, none ends it, and no file is long."""
    script = page.script()
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    assert "</script" not in script
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script, re.MULTILINE)
    assert len(names) == len(set(names))
    for path in page.STATIC.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 500


def test_explore_says_what_it_cannot_show() -> None:
    """A frame without rows, or of something else."""
    with pytest.raises(ValueError, match="no rows"):
        lrprobe.explore(frame_of(["a"]).iloc[:0])
    with pytest.raises(ValueError, match="none of the columns effective_lr_p50"):
        lrprobe.explore(frame_of(["a"])[["step", "optimizer", "parameter"]])


def test_figures_have_titles_and_units() -> None:
    """Each that one can pick."""
    assert next(iter(FIGURES)) == "effective_lr_p50"
    assert all(figure.title and figure.unit for figure in FIGURES.values())


def test_a_notebook_shows_small_tables() -> None:
    """A probe, a step and findings; names are text in them."""
    import torch

    model = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam([{"params": list(model.parameters())}])
    probe = lrprobe.attach({"<b>": adam}, model, every=1)
    with lrprobe.inspect_step(adam, model) as step:
        model(torch.ones(1, 3)).sum().backward()
        adam.step()
    shown = probe._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "step 1" in shown
    assert "every step<" in shown
    shown = step["weight"]._repr_html_()
    assert "StepView 2×3, rule adam" in shown
    assert shown.count("<tr>") == 4
    assert "0.001" in shown
    probe.close()
    assert "closed" in probe._repr_html_()
    assert "<b>" in lrprobe.diagnose(frame_of(["a"], nonfinite=1.0))._repr_html_()
