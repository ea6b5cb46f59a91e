"""The tab's server: what it reads through TensorBoard's data provider, and what it answers."""

import dataclasses
import json
import os
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard import errors
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from test_sinks import NAMES, make_record
from werkzeug.test import Client

import lrprobe
from lrprobe.sinks.tab import PLUGIN
from lrprobe.sinks.tensorboard import TensorBoard
from lrprobe.tab import SAMPLES, Loader
from lrprobe.tab.frames import frame_of
from lrprobe.tab.store import Store
from lrprobe.view.torn import torn, whole


def provider(logdir: Path, samples: int = SAMPLES) -> MultiplexerDataProvider:
    """TensorBoard's own, of what is there now."""
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: samples})
    multiplexer.AddRunsFromDirectory(str(logdir)).Reload()
    return MultiplexerDataProvider(multiplexer, str(logdir))


def entry(logdir: Path, run: str = "run", **options):
    """What the store has of the only optimizer of a run."""
    store = Store(provider(logdir, **options))
    runs = store.runs(RequestContext(), "")
    ((key, series),) = [(k, s) for k, s in runs.items() if k[0] == run]
    return store.entry(RequestContext(), "", *key, series)


def write(folder: Path, *records) -> None:
    """One life of a sink."""
    sink = TensorBoard(folder)
    for record in records:
        sink.write(record)
    sink.close()


def client(logdir: Path) -> Client:
    """The plugin's routes, as a browser asks them."""
    plugin = Loader().load(TBContext(data_provider=provider(logdir), logdir=str(logdir)))
    apps = {f"/data/plugin/lrprobe{path}": app for path, app in plugin.get_plugin_apps().items()}
    return Client(lambda environ, start: apps[environ["PATH_INFO"]](environ, start))


def ask(client: Client, path: str, **query: str):
    """The answer of a route."""
    response = client.get(f"/data/plugin/lrprobe/{path}", query_string=query)
    assert response.status_code == 200, response.text
    return json.loads(response.get_data())


def test_a_run_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    """Steps, names, groups, figures in float32."""
    records = [make_record(step) for step in (1, 2, 30)]
    write(tmp_path / "run", *records)
    table = entry(tmp_path).table
    assert table.names == list(NAMES)
    assert table.groups == ["group0", "group1", "group0"]
    assert table.steps.tolist() == [1, 2, 30]
    for row, record in enumerate(records):
        wanted = record.tables["parameter"]["update_ratio"].astype("f4")
        assert table.figures["update_ratio"][row].tolist() == wanted.tolist()


def test_a_run_that_was_continued_is_one(tmp_path: Path) -> None:
    """What was recorded anew replaces the old; parameters that came later are below."""
    write(tmp_path / "run", *(make_record(step) for step in (1, 2, 3)))
    again = [make_record(step, names=(*NAMES, "new")) for step in (3, 4)]
    write(
        tmp_path / "run",
        *(dataclasses.replace(record, time=record.time + 100) for record in again),
    )
    table = entry(tmp_path).table
    assert table.steps.tolist() == [1, 2, 3, 4]
    assert table.names == [*NAMES, "new"]
    added = table.figures["grad_norm"][:, 3]
    assert np.isnan(added).tolist() == [True, True, False, False]
    wanted = again[0].tables["parameter"]["grad_norm"].astype("f4")
    assert table.figures["grad_norm"][2].tolist() == wanted.tolist()


def test_several_optimizers_of_a_run_are_several_tables(tmp_path: Path) -> None:
    """By their names."""
    run = {"optimizers": {"G": {}, "D": {}}}
    write(tmp_path / "run", *(make_record(1, optimizer=name, run=run) for name in "GD"))
    runs = Store(provider(tmp_path)).runs(RequestContext(), "")
    assert set(runs) == {("run", "D"), ("run", "G")}


def test_the_frame_has_what_diagnose_asks_for(tmp_path: Path) -> None:
    """Every figure, names as text, which parameters stepped."""
    record, still = make_record(2), make_record(1, stepped=False)
    write(tmp_path / "run", still, record)
    found = entry(tmp_path)
    frame = frame_of("run", found.blocks, 10_000)
    assert frame["parameter"].astype(str).tolist() == [*NAMES] * 2
    assert frame["stepped"].tolist() == [False] * 3 + [True] * 3
    assert frame["step"].tolist() == [1] * 3 + [2] * 3
    last = frame[frame["step"] == 2]
    for column in ("lr", "decay", "lost_fraction", "param_norm", "nonfinite", "eps_fraction"):
        wanted = record.tables["parameter"][column]
        assert last[column].to_numpy() == pytest.approx(wanted, rel=1e-6)
    assert set(frame["rule"].astype(str)) == {"adamw"}


def test_findings_look_at_so_many_rows(tmp_path: Path) -> None:
    """Evenly spread, ends included."""
    write(tmp_path / "run", *(make_record(step) for step in range(100)))
    frame = frame_of("run", entry(tmp_path).blocks, 30 * len(NAMES))
    steps = frame["step"].unique()
    assert len(steps) == 30
    assert (steps[0], steps[-1]) == (0, 99)


def test_it_reads_anew_what_has_grown_and_only_that(tmp_path: Path) -> None:
    """An entry stays the same object as long as nothing comes."""
    sink = TensorBoard(tmp_path / "run")
    sink.write(make_record(1))
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path)).Reload()
    store = Store(MultiplexerDataProvider(multiplexer, str(tmp_path)))

    def get():
        ((key, series),) = store.runs(RequestContext(), "").items()
        return store.entry(RequestContext(), "", *key, series)

    first = get()
    assert get() is first
    sink.write(make_record(2))
    sink.close()
    multiplexer.Reload()
    assert get().table.steps.tolist() == [1, 2]


def test_a_store_keeps_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that was asked for longest ago goes first."""
    for name in "ab":
        write(tmp_path / name, make_record(1))
    store = Store(provider(tmp_path))
    runs = store.runs(RequestContext(), "")
    monkeypatch.setattr("lrprobe.tab.store._CACHE_BYTES", 1)
    kept = [store.entry(RequestContext(), "", *key, series) for key, series in runs.items()]
    assert list(store._entries.values()) == kept[1:]


def test_what_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    """Metadata that are broken, or of a later version, or have an entry of another type."""
    store = Store(provider(tmp_path))
    write(tmp_path / "run", make_record(1))
    listing = provider(tmp_path).list_tensors(
        RequestContext(), experiment_id="", plugin_name=PLUGIN
    )
    (series,) = listing["run"].values()
    sound = json.loads(series.plugin_content)
    assert store._metadata(json.dumps(sound).encode())["names"] == list(NAMES)
    for content in (b"", b"{}", b"[1]", b"null", b"[" * 100_000, series.plugin_content[:-9]):
        assert store._metadata(content) is None
    for name in sound:
        for wrong in (None, 3, [[]], {"a": []}):
            assert store._metadata(json.dumps({**sound, name: wrong}).encode()) is None


def test_the_routes_answer(tmp_path: Path) -> None:
    """Overview, heatmap, details, findings, and the front end's files."""
    write(tmp_path / "run", *(make_record(step) for step in (1, 2)))
    browser = client(tmp_path)
    overview = ask(browser, "overview")
    (table,) = overview["tables"]
    assert (table["title"], table["names"]) == ("run", list(NAMES))
    assert overview["notes"] == []
    where = {"run": "run", "optimizer": "AdamW"}
    assert ask(browser, "heatmap", **where, figure="grad_norm")["steps"] == [1, 2]
    assert ask(browser, "detail", **where, name="0.bias", step="2")["steps"] == [1, 2]
    assert ask(browser, "detail", **where, name="0.bias", low="1.5", high="9")["steps"] == [1, 2]
    assert "summary" in ask(browser, "findings", **where)
    for path in ("main.js", "view.js", "style.css", "plotly.min.js"):
        assert browser.get(f"/data/plugin/lrprobe/{path}").status_code == 200


def test_findings_leave_no_check_out_for_want_of_a_description(tmp_path: Path) -> None:
    """Hyperparameters, versions and names reach the checks, as from a dataset."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model[0].parameters())
    places = [str(tmp_path / "run"), str(tmp_path / "run.parquet")]
    with lrprobe.attach(optimizer, model, to=places, every=1):
        for _ in range(20):
            model(torch.ones(1, 4)).square().sum().backward()
            optimizer.step()
    answer = ask(client(tmp_path), "findings", run="run", optimizer="Adam")
    wanted = lrprobe.diagnose(lrprobe.read(places[1]))
    assert answer["left_out"] == []
    assert [group["code"] for group in answer["groups"]] == [
        same[0].code for same in wanted.grouped()
    ]
    missing = next(each for each in answer["groups"] if each["code"] == "not-in-optimizer")
    assert [item["parameter"] for item in missing["items"]] == ["1.weight", "1.bias"]


DEEP = '{"optimizers": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "null", '{"optimizers": [1]}', '{"optimizers": {"AdamW": 3}}', DEEP),
        *('{"optimizers": {"AdamW": {"groups": {"0": 1}}}}', '{"not_in_optimizer": [[]]}'),
        *('{"optimizers": {"AdamW": {"groups": [{"betas": "<b>", "eps": {}}, {}]}}}',),
        *('{"optimizers": {"AdamW": {"step_count": "no"}}}', '{"in_two_optimizers": {"a": 7}}'),
    ],
)
def test_a_hostile_description_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Where it cannot be used, the tab and ``read`` do without it."""
    monkeypatch.setattr("lrprobe.sinks.tab.to_json", lambda run: text)
    write(tmp_path / "run", *(make_record(step) for step in range(20)))
    answer = ask(client(tmp_path), "findings", run="run", optimizer="AdamW")
    assert answer["summary"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lrprobe: a description of the run at step 0")
        assert len(lrprobe.read(tmp_path / "run")) == 20 * len(NAMES)


def test_findings_compare_the_optimizers_of_a_run(tmp_path: Path) -> None:
    """Each is with its own table, and one about an optimizer without a table with the first."""
    run = {"optimizers": {"G": {}, "D": {}, "idle": {}}}
    records = [make_record(at // 2, optimizer="GD"[at % 2], run=run) for at in range(40)]
    write(tmp_path / "run", *records)
    browser = client(tmp_path)
    codes = {}
    for name in "DG":
        answer = ask(browser, "findings", run="run", optimizer=name)
        codes[name] = {group["code"] for group in answer["groups"]}
        assert {group["optimizer"] for group in answer["groups"]} <= {name, "idle"}
    assert ("no-steps" in codes["D"]) != ("no-steps" in codes["G"])


def test_optimizers_by_parameter_and_by_module_are_diagnosed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only one of them has too many parameters: no row is without a name."""
    monkeypatch.setattr("lrprobe.sinks.tab.MAX_ROWS", 2)
    run = {"optimizers": {"G": {}, "D": {}}}
    names = {"G": NAMES, "D": ("a", "b")}
    write(
        tmp_path / "run",
        *(
            make_record(step, optimizer=name, names=names[name], run=run)
            for step in range(20)
            for name in "GD"
        ),
    )
    store = Store(provider(tmp_path))
    runs = store.runs(RequestContext(), "")
    entries = [store.entry(RequestContext(), "", *key, each) for key, each in runs.items()]
    blocks = [block for found in entries for block in found.blocks]
    frame = frame_of("run", blocks, 10_000)
    assert set(frame["parameter"].astype(str)) == {"0", "2", "a", "b"}
    found = lrprobe.diagnose(frame)
    assert {each.optimizer for each in found} == {"G", "D"}


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("heatmap", {"run": "run", "optimizer": "AdamW"}),
        ("heatmap", {"run": "run", "optimizer": "AdamW", "figure": "<b>"}),
        ("heatmap", {"run": "no", "optimizer": "AdamW", "figure": "grad_norm"}),
        ("heatmap", {"run": "run", "optimizer": "AdamW", "figure": "grad_norm", "low": "x"}),
        ("detail", {"run": "run", "optimizer": "AdamW", "name": "no"}),
    ],
)
def test_a_wrong_question_is_refused(tmp_path: Path, path: str, query: dict[str, str]) -> None:
    """With TensorBoard's own errors, which it answers with 400 and 404."""
    write(tmp_path / "run", make_record(1))
    with pytest.raises(errors.PublicError):
        client(tmp_path).get(f"/data/plugin/lrprobe/{path}", query_string=query)


def test_without_plotly_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, in the tab."""
    write(tmp_path / "run", make_record(1))
    monkeypatch.setattr("lrprobe.tab.plugin.find_spec", lambda name: None)
    browser = client(tmp_path)
    assert "pip install 'lrprobe[plot]'" in ask(browser, "overview")["notes"][0]
    with pytest.raises(errors.NotFoundError, match="Plotly"):
        browser.get("/data/plugin/lrprobe/plotly.min.js")


def test_it_is_there_where_it_has_something_to_say(tmp_path: Path) -> None:
    """With data, in an empty logdir, beside a file of ours without a record; not elsewhere."""

    def active(logdir: Path) -> bool:
        context = TBContext(data_provider=provider(logdir), logdir=str(logdir))
        return Loader().load(context).is_active()

    assert active(tmp_path)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "other") as writer:
        writer.add_scalar("loss", 1.0)
    assert not active(tmp_path)
    TensorBoard(tmp_path / "none").close()
    assert active(tmp_path)


def test_tensorboard_keeps_enough_records() -> None:
    """Unless the user says how many."""
    for given, kept in (({}, SAMPLES), ({PLUGIN: 7}, 7)):
        flags = Namespace(samples_per_plugin=dict(given))
        Loader().fix_flags(flags)
        assert flags.samples_per_plugin[PLUGIN] == kept


def test_a_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    """Wherever it is cut; not while it may still be written."""
    write(tmp_path / "run", make_record(1), make_record(2))
    (path,) = (tmp_path / "run").iterdir()
    size = path.stat().st_size
    assert whole(path, size)
    assert list(torn(tmp_path)) == []
    for cut in (1, 5, 200):
        os.truncate(path, size - cut)
        assert not whole(path, size - cut)
        assert list(torn(tmp_path)) == []
        os.utime(path, (time.time() - 60,) * 2)
        (note,) = torn(tmp_path)
        assert "Run run" in note
        assert "truncated" in note
