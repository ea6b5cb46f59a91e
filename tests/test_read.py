"""What was recorded comes back from disk as it was."""

import itertools
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import versions
from test_sinks import NAMES, make_record, parts
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import lrprobe
from lrprobe.read import read
from lrprobe.record import LEVELS
from lrprobe.sinks import parquet, tensorboard
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.parquet import Parquet
from lrprobe.sinks.tensorboard import TensorBoard


def write(sink, steps, **options):
    """Write records of these steps, and close."""
    options = {"attempt": getattr(sink, "attempt", 0), **options}
    for step in steps:
        sink.write(make_record(step, **options))
    sink.close()


@pytest.fixture
def path(tmp_path):
    """Where a dataset may be."""
    return tmp_path / "a.parquet"


@pytest.fixture
def many_parts(monkeypatch):
    """Make datasets begin the next part after a few records."""
    monkeypatch.setattr(parquet, "PART_BYTES", 30_000)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("records", [0, 1, 40])
def test_a_dataset_is_what_memory_has(path, records):
    """Every table, at every level, equals Memory's to the last bit, type and index."""
    memory, dataset = Memory(), Parquet(path)
    for step in range(records):
        record = make_record(step, stepped=step % 4 > 0, track=step % 2)
        memory.write(record)
        dataset.write(record)
        dataset.flush()
    dataset.close()
    assert len(parts(path)) > 1 or records < 40
    for by in LEVELS:
        frame = read(path, by=by)
        pd.testing.assert_frame_equal(frame, memory.frame(by), check_exact=True)
        assert type(frame.index) is pd.RangeIndex
    for table in ("elements", "histograms"):
        expected = getattr(memory, table)()
        pd.testing.assert_frame_equal(read(path, table=table), expected, check_exact=True)
    pd.testing.assert_frame_equal(read(str(path), attempts="all"), memory.frame())


@pytest.mark.usefixtures("many_parts")
def test_a_dataset_is_read_while_it_grows(path):
    """Read in mid-run, every table has whole records from the first on, and no row twice."""
    dataset = Parquet(path)
    done = threading.Event()

    def work():
        for step in range(40):
            dataset.write(make_record(step))
            dataset.flush()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        for options in ({}, {"by": "module"}, {"table": "elements"}, {"table": "histograms"}):
            frame = read(path, **options)
            steps = frame["step"].unique()
            assert list(steps) == list(range(len(steps)))
            assert set(frame.groupby("step").size()) <= {len(steps) and len(frame) // len(steps)}
    thread.join()
    dataset.close()
    assert len(read(path)) == 40 * len(NAMES)


def test_a_record_is_there_only_as_a_whole(path, monkeypatch):
    """Where a process died between the tables of a flush, no table shows what the frame lacks."""
    dataset = Parquet(path)
    dataset.write(make_record(1))
    dataset.flush()
    dataset.write(make_record(2))
    replace = Path.replace

    def die_before_the_frame(self, target):
        if Path(target).parent == path:
            raise OSError("killed")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die_before_the_frame)
    with pytest.raises(OSError, match="killed"):
        dataset.flush()
    assert len(pq.read_table(next((path / "_module").iterdir()))["step"].unique()) == 2
    for options in ({}, {"by": "module"}, {"table": "elements"}, {"table": "histograms"}):
        assert list(read(path, **options)["step"].unique()) == [1]


def test_an_attempt_supersedes_earlier_ones(path):
    """By default each step is there once, from the last attempt; "all" gives every row."""
    write(Parquet(path), range(10, 60, 10))
    write(Parquet(path), range(30, 50, 10))
    write(Parquet(path), range(40, 80, 10))
    for options in ({}, {"by": "model"}, {"table": "elements"}, {"table": "histograms"}):
        frame = read(path, **options).drop_duplicates(["step", "attempt"])
        assert list(zip(frame["step"], frame["attempt"], strict=True)) == [
            (10, 0), (20, 0), (30, 1), (40, 2), (50, 2), (60, 2), (70, 2),
        ]  # fmt: skip
        every = read(path, attempts="all", **options).drop_duplicates(["step", "attempt"])
        assert len(every) == 5 + 2 + 4
    assert type(read(path).index) is pd.RangeIndex


def test_attempts_are_told_per_optimizer(path):
    """A new attempt of one optimizer leaves the other's records alone."""
    first = Parquet(path)
    for step in (10, 20, 30):
        first.write(make_record(step, optimizer="G"))
        first.write(make_record(step, optimizer="D"))
    first.close()
    write(Parquet(path), [20], optimizer="D")
    frame = read(path).drop_duplicates(["step", "optimizer"])
    found = {name: list(rows["step"]) for name, rows in frame.groupby("optimizer")}
    assert found == {"G": [10, 20, 30], "D": [10, 20]}


def test_an_attempt_without_elements_supersedes_all_the_same(path):
    """What an attempt replaces is told by its frame, in tables where it has no rows, too."""
    write(Parquet(path), [10, 20, 30])
    write(Parquet(path), [20], track=0)
    assert list(read(path, table="elements")["step"].unique()) == [10]


def test_several_paths_have_a_column_run(tmp_path):
    """Several paths come with a first column of their names, made longer where they are equal."""
    places = ["x/a.parquet", "y/a.parquet", "b.parquet", "b.parquet"]
    for place in set(places):
        write(Parquet(tmp_path / place), [1, 2])
    frame = read(*[tmp_path / place for place in places])
    assert frame.columns[0] == "run"
    assert str(frame["run"].dtype) == versions.TEXT
    assert list(frame["run"].unique())[:2] == ["x/a", "y/a"]
    assert frame["run"].nunique() == 4
    assert type(frame.index) is pd.RangeIndex
    rows = frame[frame["run"] == "y/a"].drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, read(tmp_path / "y/a.parquet"))
    assert list(read(tmp_path / "b.parquet", tmp_path / "x/a.parquet")["run"].unique()) == [
        "b",
        "a",
    ]


def truncate(part):
    """Cut off the end."""
    part.write_bytes(part.read_bytes()[:-20])


def empty(part):
    """Leave nothing."""
    part.write_bytes(b"")


def garbage(part):
    """Put in a pickle."""
    part.write_bytes(pickle.dumps(print))


def foreign(part):
    """Put in somebody else's Parquet file."""
    pd.DataFrame({"a": [1]}).to_parquet(part)


def newer(part):
    """Claim a schema version of the future."""
    table = pq.read_table(part)
    keys = {**table.schema.metadata, b"lrprobe.schema_version": b"999"}
    pq.write_table(table.replace_schema_metadata(keys), part)


def lacking(part):
    """Take a column away."""
    pq.write_table(pq.read_table(part).drop_columns(["lr"]), part)


def vandalised(part):
    """Break the metadata."""
    table = pq.read_table(part)
    keys = {**table.schema.metadata, b"lrprobe.rows": b"{"}
    pq.write_table(table.replace_schema_metadata(keys), part)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("spoil", [truncate, empty, garbage, foreign, newer, lacking, vandalised])
def test_a_broken_part_is_named(path, spoil):
    """A broken or foreign file is named, with what was expected; the good ones are read."""
    write(Parquet(path), range(60))
    files = parts(path)
    assert len(files) > 2
    lost = set(pd.read_parquet(files[1])["step"])
    spoil(files[1])
    with pytest.warns(UserWarning, match=rf"{files[1].name}: expected a Parquet file .*others are"):
        frame = read(path)
    assert set(frame["step"]) == set(range(60)) - lost
    for file in {*files} - {files[1]}:
        spoil(file)
    with pytest.raises(ValueError, match=rf"{files[0].name}: expected a Parquet file .*lrprobe"):
        read(path)


@pytest.mark.usefixtures("many_parts")
def test_a_broken_part_of_another_table_is_named(path):
    """The same holds for modules, elements, histograms, each by its own file."""
    write(Parquet(path), range(60))
    name = parts(path)[0].name
    lost = set(pd.read_parquet(path / name)["step"])
    truncate(path / "_module" / name)
    (path / "_elements" / name).unlink()
    for options, folder in (({"by": "module"}, "_module"), ({"table": "elements"}, "_elements")):
        with pytest.warns(UserWarning, match=f"{folder}.{name}: expected"):
            frame = read(path, **options)
        assert set(frame["step"]) == set(range(60)) - lost
    truncate(path / name)
    with pytest.warns(UserWarning, match=name):
        assert set(read(path, table="histograms")["step"]) == set(range(60))


def test_reading_a_dataset_executes_nothing(path, monkeypatch):
    """No pickle is loaded for any file, whatever it holds."""
    write(Parquet(path), [1])
    (path / "evil.parquet").write_bytes(pickle.dumps(print))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    with pytest.warns(UserWarning, match="evil"):
        assert len(read(path)) == len(NAMES)


def test_bad_arguments_are_refused(tmp_path, path):
    """Every bad argument is an error that says what came and what is allowed."""
    Parquet(path).close()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for error, options, message in (
        (ValueError, {"table": "rows"}, "table='rows'; allowed are 'frame', 'elements'"),
        (ValueError, {"by": "layer"}, "by='layer'; allowed are 'parameter', 'module', 'group'"),
        (ValueError, {"attempts": 1}, "attempts=1; allowed are 'last', 'all'"),
        (ValueError, {"table": "elements", "by": "model"}, "by='model' goes with table=\"frame\""),
    ):
        with pytest.raises(error, match=message):
            read(path, **options)
    for error, paths, message in (
        (TypeError, [], "no path was given; allowed"),
        (TypeError, [[path]], "a path is a list; allowed are str"),
        (FileNotFoundError, [path, tmp_path / "b.parquet"], r"b\.parquet' does not exist; allowed"),
        (ValueError, [tmp_path / "file"], "file' is a file; allowed"),
        (ValueError, [tmp_path / "folder"], "folder' holds 'sub'; allowed"),
        (ValueError, [tmp_path / "folder" / "sub"], "sub' holds nothing; allowed"),
    ):
        with pytest.raises(error, match=message):
            read(*paths)


# --- TensorBoard --------------------------------------------------------------------------------

SCALARS = (
    *("lr", "effective_lr_p05", "effective_lr_p50", "effective_lr_p95"),
    *("update_norm", "update_ratio", "grad_norm"),
)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("prefix", ["", "probe/"])
def test_a_logdir_gives_its_scalars(tmp_path, own, prefix):
    """The scalars come back as rows, under the real names, in float32 precision."""
    names = ("a b", "a_b", "🦆/..")
    memory, writer = Memory(), SummaryWriter(tmp_path) if not own else None
    sink = TensorBoard(writer or tmp_path, prefix)
    for step in (1, 2, 3):
        record = make_record(step, names=names, stepped=step != 2)
        sink.write(record)
        if step != 2:
            memory.write(record)
    if writer:
        writer.add_scalar("loss", 1.0, 1)
    sink.flush()
    frame = read(tmp_path)
    keys = ["step", "time", "attempt", "optimizer", "group", "group_name", "parameter"]
    expected = memory.frame()[keys + list(SCALARS)]
    expected[list(SCALARS)] = expected[list(SCALARS)].astype("float32").astype("float64")
    pd.testing.assert_frame_equal(frame, expected, check_exact=True)
    groups = read(tmp_path, by="group")
    assert list(groups.columns) == [*keys[:5], "lr"]
    assert list(groups["group"]) == [0, 1] * 3
    model = read(tmp_path, by="model")
    assert list(model.columns) == [*keys[:4], "reconstruction_error"]
    assert list(model["step"]) == [1, 3]
    for options in ({"by": "module"}, {"table": "elements"}):
        with pytest.raises(ValueError, match="logdir"):
            read(tmp_path, **options)
    sink.close()
    if writer:
        writer.close()


def test_a_large_network_comes_back_per_module(tmp_path):
    """A logdir whose tags are per module gives module rows, and says so for parameters."""
    names = tuple(f"m{i // 4}.w{i % 4}" for i in range(240))
    write(TensorBoard(tmp_path), [1], names=names)
    frame = read(tmp_path, by="module")
    assert list(frame["module"]) == [f"m{i}" for i in range(60)]
    assert frame["update_norm"].notna().all()
    with pytest.raises(
        ValueError, match=r"by='parameter', but the tags .* are by 'module', 'group'"
    ):
        read(tmp_path)


def test_attempts_of_a_logdir(tmp_path, monkeypatch):
    """A run that writes to a logdir again supersedes its earlier steps there, too."""
    monkeypatch.setattr(tensorboard, "_uid", itertools.count(9))  # its files within a second
    write(TensorBoard(tmp_path), [10, 20, 30])
    write(TensorBoard(tmp_path), [20, 40])
    frame = read(tmp_path).drop_duplicates("step")
    assert list(zip(frame["step"], frame["attempt"], strict=True)) == [(10, 0), (20, 1), (40, 1)]
    assert len(read(tmp_path, attempts="all")) == 5 * len(NAMES)
    frame = read(tmp_path, tmp_path)
    assert list(frame["run"].unique()) == [tmp_path.name, f"{tmp_path.name}#1"]


def test_several_optimizers_in_a_logdir(tmp_path):
    """Rows of several optimizers are told apart, each with the lr of its own group."""
    run = {"optimizers": {"G": {}, "D": {}}}
    sink = TensorBoard(tmp_path)
    for optimizer, step in (("G", 1), ("D", 5)):
        sink.write(make_record(step, optimizer=optimizer, run=run))
    sink.close()
    frame = read(tmp_path)
    assert list(frame["optimizer"]) == ["G"] * 3 + ["D"] * 3
    assert list(frame["parameter"]) == [*NAMES, *NAMES]
    lr = make_record(5).tables["group"]["lr"]
    np.testing.assert_array_equal(frame["lr"][3:], np.float32(lr[[0, 1, 0]]))


def test_a_half_written_event_is_passed_over(tmp_path):
    """The event at the end that is still being written, or was cut off, is not there yet."""
    write(TensorBoard(tmp_path), [1, 2])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for cut in (1, 5, 200):
        file.write_bytes(whole[:-cut])
        assert list(read(tmp_path)["step"].unique()) == [1]


def test_a_broken_event_file_is_named(tmp_path):
    """A damaged or foreign event file is named in a warning, and the others are read."""
    write(TensorBoard(tmp_path), [1, 2])
    (file,) = tmp_path.iterdir()
    shutil.copy(file, tmp_path / "z.tfevents.copy")
    content = bytearray(file.read_bytes())
    content[-500] ^= 255
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{file.name}: expected a TensorBoard event file"):
        assert list(read(tmp_path)["step"].unique()) == [1, 2]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / "z.tfevents.x").write_bytes(pickle.dumps(print))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=r"has no events of lrprobe's"):
            read(tmp_path)


def test_a_logdir_of_others_is_refused(tmp_path):
    """A logdir that no probe wrote to is an error that says so."""
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("effective_lr/x", 1.0, 1)
    writer.close()
    with pytest.raises(ValueError, match=r"has no events of lrprobe's; allowed is"):
        read(tmp_path)


@pytest.mark.parametrize("by", ["parameter", "group", "model"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_logdir_beside_a_dataset(tmp_path, by, first):
    """Columns keep their kinds, whichever comes first; what the logdir does not have is NaN."""
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    paths = [tmp_path / "a.parquet", tmp_path / "log"]
    with lrprobe.attach(adam, model, to=paths, every=1):
        for factor in (1.0, float("inf"), 1.0):
            adam.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            scaler.step(adam)
            scaler.update()
    frame = read(*(paths if first else reversed(paths)), by=by)
    assert {str(kind) for kind in frame.dtypes} <= {"int64", "float64", "bool", versions.TEXT}
    assert frame["stepped"].dtype == bool
    assert set(frame["run"]) == {"a", "log"}
    if by == "parameter":
        right = [(step, step != 2) for step in (1, 2, 3) for _ in range(2)]
        for _, rows in frame.groupby("run"):
            assert list(zip(rows["step"], rows["stepped"], strict=True)) == right
        assert frame.loc[frame["run"] == "log", "rule"].isna().all()
