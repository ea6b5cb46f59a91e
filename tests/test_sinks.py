"""What is written can be read, whatever happens meanwhile."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import versions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import lrprobe
from lrprobe import sinks
from lrprobe.record import (
    ELEMENT_COLUMNS,
    FIGURES,
    HISTOGRAM_COLUMNS,
    LEVELS,
    QUANTILES,
    RATE,
    Record,
    frame_columns,
)
from lrprobe.sinks import merge, parquet, tags, tensorboard
from lrprobe.sinks.memory import Memory
from lrprobe.sinks.parquet import Parquet
from lrprobe.sinks.tensorboard import TensorBoard

NAMES = ("0.weight", "0.bias", "2.weight")


def column(kind, values):
    """A column of a record, of one of the types of the contract."""
    if kind != "str":
        return np.array(values, dtype=kind)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def make_record(
    step, *, optimizer="AdamW", attempt=0, names=NAMES, stepped=True, run=None, bins=4, track=1
):
    """A record whose every figure tells its step, level, row and column."""
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
    sizes = {"parameter": len(names), "module": len(modules), "group": 2, "model": 1}
    head = {"step": step, "time": 1e9 + step, "attempt": attempt, "optimizer": optimizer}
    tables = {}
    for place, level in enumerate(LEVELS):
        size = sizes[level]
        values = {name: [value] * size for name, value in head.items()}
        values |= {"parameter": names, "module": modules, "numel": [10] * size}
        values |= {"rule": ["adamw"] * size, "stepped": [stepped] * size}
        values["group"] = [row % 2 for row in range(size)]
        values["group_name"] = [f"group{row % 2}" for row in range(size)]
        for at, name in enumerate(FIGURES):
            gone = not stepped and name not in ("lr", "param_norm")
            values[name] = [
                np.nan if gone else (step + 1) * 1e-3 + place + row / 7 + at / 1000
                for row in range(size)
            ]
        values["lr"] = [(step + 1) * 1e-3 + row % 2 / 7 for row in range(size)]  # of the group
        tables[level] = {n: column(kind, values[n]) for n, kind in frame_columns(level).items()}
    rows = [row for row in range(len(names)) for _ in range(track)]
    values = {name: [value] * len(rows) for name, value in head.items()}
    values |= {"group": [row % 2 for row in rows], "parameter": [names[row] for row in rows]}
    values["group_name"] = [f"group{row % 2}" for row in rows]
    for name in ("element", "effective_lr", "update", "grad", "param"):
        values[name] = [step + row for row in rows]
    return Record(
        step=step,
        time=head["time"],
        attempt=attempt,
        optimizer=optimizer,
        tables=tables,
        edges=[10.0 ** np.arange(-bins, 1) if stepped else np.empty(0) for _ in names],
        counts=[np.arange(bins) + row if stepped else np.arange(0) for row in range(len(names))],
        elements={name: column(kind, values[name]) for name, kind in ELEMENT_COLUMNS.items()},
        run={"optimizers": {optimizer: {}}} if run is None else run,
    )


def expected_frame(records, by="parameter"):
    """The frame that pandas itself makes of the columns of some records."""
    pieces = [pd.DataFrame(dict(record.tables[by])) for record in records]
    return pd.concat(pieces, ignore_index=True).astype(frame_columns(by))


def all_tables(memory):
    """Every frame that a memory gives."""
    return [*(memory.frame(level) for level in LEVELS), memory.elements(), memory.histograms()]


def kinds(frame):
    """Column name to type, as the contract spells it."""
    return {name: str(dtype) for name, dtype in frame.dtypes.items()}


# --- The package --------------------------------------------------------------------------------


def test_a_backend_is_imported_when_it_is_used():
    """Importing lrprobe does not import tensorboard."""
    code = "import sys, lrprobe.sinks; print('tensorboard' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_the_package_names_its_sinks():
    """All sinks are reachable by name, keep to the protocol, and another name is an error."""
    assert sinks.Memory is Memory
    assert sinks.Parquet is Parquet
    assert sinks.TensorBoard is TensorBoard
    assert isinstance(Memory(), sinks.Sink)
    assert sinks.JSONL.__module__ == "lrprobe.sinks.jsonl"
    assert set(dir(sinks)) == set(sinks.__all__)
    with pytest.raises(AttributeError, match="CSV"):
        _ = sinks.CSV


# --- Memory -------------------------------------------------------------------------------------


def spelled(columns):
    """The contract's types as the installed pandas spells them."""
    return {name: versions.TEXT if kind == "str" else kind for name, kind in columns.items()}


@pytest.mark.parametrize("records", [0, 1])
def test_memory_has_the_types_of_the_contract(records):
    """Every frame, empty or not, has the columns and types of the contract and a RangeIndex."""
    memory = Memory()
    for step in range(records):
        memory.write(make_record(step))
    for level in LEVELS:
        frame = memory.frame(level)
        assert kinds(frame) == spelled(frame_columns(level))
        assert frame.index.equals(pd.RangeIndex(len(frame)))
        assert type(frame.index) is pd.RangeIndex
    assert kinds(memory.elements()) == spelled(ELEMENT_COLUMNS)
    histograms = memory.histograms()
    lists = dict.fromkeys(("edges", "counts"), "object")
    assert kinds(histograms) == {**spelled(HISTOGRAM_COLUMNS), **lists}
    if records:
        assert histograms["edges"][0].dtype == np.float64
        assert histograms["counts"][0].dtype == np.int64


@pytest.mark.parametrize("max_bytes", [2**30, 3 * 2**20])
def test_memory_gives_back_what_was_written(max_bytes):
    """Figures, NaN and all, come back bit by bit and in order of arrival, compressed or not."""
    memory = Memory(max_bytes)
    records = [make_record(step, stepped=step % 5 != 0) for step in range(60)]
    records[7] = make_record(7, optimizer="SGD", names=("a", "b.c"), track=0)
    for record in records:
        memory.write(record)
    compressed = any(tier.blocks for tier in memory._tiers.values())
    assert compressed == (max_bytes < 2**30)
    assert not memory.problems()
    for level in LEVELS:
        pd.testing.assert_frame_equal(
            memory.frame(level), expected_frame(records, level), check_exact=True
        )
    elements = pd.concat([pd.DataFrame(dict(r.elements)) for r in records], ignore_index=True)
    pd.testing.assert_frame_equal(memory.elements(), elements.astype(dict(ELEMENT_COLUMNS)))
    histograms = memory.histograms()
    rows = [(r, row) for r in records for row in range(len(r.counts)) if len(r.counts[row])]
    assert len(histograms) == len(rows)
    for found, (record, row) in zip(histograms.itertuples(), rows, strict=True):
        assert found.step == record.step
        assert found.parameter == record.tables["parameter"]["parameter"][row]
        np.testing.assert_array_equal(found.edges, record.edges[row])
        np.testing.assert_array_equal(found.counts, record.counts[row])


def test_a_full_memory_halves_its_resolution():
    """Full, it keeps evenly spaced records, the first and the newest, and says so once."""
    memory = Memory(2**20)
    said = []
    for step in range(1200):
        memory.write(make_record(step))
        said += memory.problems()
        assert memory.nbytes <= 2**20
        if step % 97 == 0:
            frame = memory.frame()
            assert frame["step"].iloc[0] == 0
            assert frame["step"].iloc[-1] == step
    assert len(said) == 1
    assert "1,048,576 bytes" in said[0]
    steps = memory.frame()["step"].unique()
    gaps = set(np.diff(steps)[:-1])
    assert len(gaps) == 1
    assert gaps < {2, 4, 8, 16, 32, 64}
    assert steps[-1] == 1199
    for frame in all_tables(memory)[1:]:
        assert list(frame["step"].unique()) == list(steps)


def test_optimizers_in_turn_are_thinned_alike():
    """Thinning counts each optimizer for itself: none vanishes, whatever the order of writing."""
    memory = Memory(2**20)
    last = {}
    for step in range(1000):
        for optimizer in ("G", "D") if step % 5 == 0 else ("D",):
            memory.write(make_record(step, optimizer=optimizer))
            last[optimizer] = step
    assert memory.problems()
    frame = memory.frame()
    assert frame["time"].is_monotonic_increasing
    for optimizer, share in (("G", 1 / 6), ("D", 5 / 6)):
        steps = frame.loc[frame["optimizer"] == optimizer, "step"].unique()
        assert steps[0] == 0
        assert steps[-1] == last[optimizer]
        assert len(set(np.diff(steps)[:-1])) == 1
        assert len(steps) == pytest.approx(
            share * frame.groupby("optimizer")["step"].nunique().sum(), abs=2
        )


def test_the_bound_of_memory_is_real():
    """What the process allocates for the records stays within the bound, all tables included."""
    bound = 4 * 2**20
    memory = Memory(bound)
    memory.write(make_record(0))
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for step in range(1, 201):
            memory.write(make_record(step, names=tuple(f"layer.{i}" for i in range(20)), bins=20))
            if step % 50 == 0:
                kept = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
                assert kept < 1.05 * bound
                assert memory.nbytes > 0.3 * kept
    finally:
        tracemalloc.stop()


def test_memory_warns_where_nobody_asks_for_problems():
    """Without a delivery that passes it on, the first frame() warns that records were dropped."""
    memory = Memory(100_000)
    for step in range(50):
        memory.write(make_record(step))
    with pytest.warns(UserWarning, match="every second record is dropped"):
        memory.frame()
    memory.frame()


def test_first_and_newest_stay_above_any_bound():
    """A bound below one record still leaves the first and the newest."""
    memory = Memory(1)
    for step in range(9):
        memory.write(make_record(step))
    assert memory.problems()
    assert list(memory.frame()["step"].unique()) == [0, 8]


def test_memory_turned_off_says_so():
    """max_bytes=0 keeps nothing, and asking for a frame is an error that says what to do."""
    memory = Memory(0)
    memory.write(make_record(0))
    assert memory.nbytes == 0
    for ask in (memory.frame, memory.elements, memory.histograms):
        with pytest.raises(RuntimeError, match=r"max_bytes=0 .*sinks\.Memory\(max_bytes=\.\.\.\)"):
            ask()


@pytest.mark.parametrize("bad", [-1, 1.5, "1", True, None])
def test_a_bad_bound_is_refused(bad):
    """max_bytes that is not a whole number from 0 is an error that says what came."""
    with pytest.raises(ValueError, match=f"max_bytes={bad!r}; allowed is"):
        Memory(bad)


def test_a_bad_level_is_refused():
    """An unknown level is an error that lists the levels."""
    with pytest.raises(ValueError, match="by='layer'; allowed are 'parameter', 'module'"):
        Memory().frame("layer")


def test_memory_is_read_while_it_is_written():
    """A frame from another thread is at any time whole records, in order, none twice."""
    memory = Memory(2**20)
    done = threading.Event()

    def write():
        for step in range(600):
            memory.write(make_record(step))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    looks = 0
    while not done.is_set() or looks == 0:
        memory.problems()
        frame = memory.frame()
        assert frame["step"].is_monotonic_increasing
        assert (frame.groupby("step").size() == len(NAMES)).all()
        looks += 1
    thread.join()
    assert memory.frame()["step"].iloc[-1] == 599


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "🦆/..", "", "x" * 10**6, "<b>&"])
def test_any_name_is_kept(name, tmp_path):
    """No parameter name is too odd for memory and Parquet."""
    record = make_record(1, names=(name, "other"))
    memory, dataset = Memory(), Parquet(tmp_path / "a.parquet")
    memory.write(record)
    dataset.write(record)
    dataset.close()
    frame = memory.frame()
    assert frame["parameter"][0] == ("\\ud800" if name == "\ud800" else name)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), frame)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet"]


# --- Parquet ------------------------------------------------------------------------------------


def parts(folder):
    """The part files of the frame."""
    return sorted(Path(folder).glob("part-*.parquet"))


@pytest.mark.parametrize("where", ["a.parquet", "lr=0.1/_x/.y/a.parquet"])
def test_pandas_opens_a_dataset(tmp_path, where, monkeypatch):
    """pandas.read_parquet gives exactly Memory's frame, of many parts, wherever the folder is."""
    monkeypatch.setattr(parquet, "PART_BYTES", 50_000)
    memory, dataset = Memory(), Parquet(tmp_path / where)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / where), memory.frame())
    for step in range(130):
        record = make_record(step, stepped=step % 3 > 0)
        memory.write(record)
        dataset.write(record)
        if step % 10 == 0:
            dataset.flush()
            frame = pd.read_parquet(tmp_path / where)
            pd.testing.assert_frame_equal(frame, memory.frame(), check_exact=True)
    dataset.close()
    frame = pd.read_parquet(tmp_path / where)
    pd.testing.assert_frame_equal(frame, memory.frame(), check_exact=True)
    assert type(frame.index) is pd.RangeIndex
    assert len(parts(tmp_path / where)) > 2


def test_a_part_grows_in_place(tmp_path):
    """However often it is flushed, a short run is one part file, the same in each folder."""
    dataset = Parquet(tmp_path / "a.parquet")
    for step in range(30):
        dataset.write(make_record(step))
        dataset.flush()
    dataset.close()
    (part,) = parts(tmp_path / "a.parquet")
    files = {p.relative_to(tmp_path / "a.parquet") for p in tmp_path.rglob("*") if p.is_file()}
    folders = ("", "_module", "_group", "_model", "_elements", "_histograms")
    assert files == {Path(folder, part.name) for folder in folders}


def test_every_part_knows_its_run(tmp_path):
    """Versions, schema and hyperparameters are in each part; a new run object begins a part."""
    dataset = Parquet(tmp_path / "a.parquet")
    first = {"optimizers": {"AdamW": {"betas": [0.9, 0.99]}}, "seed": 1}
    second = {"optimizers": {"AdamW": {"betas": [0.8, 0.99]}}, "seed": 1}
    for step, run in enumerate([first, first, dict(first), second, second]):
        dataset.write(make_record(step, run=run))
    dataset.close()
    found = []
    for part in parts(tmp_path / "a.parquet"):
        for path in (part, part.parent / "_histograms" / part.name):
            keys = {k.decode(): v for k, v in pq.read_schema(path).metadata.items()}
            assert json.loads(keys["lrprobe.schema_version"]) == 1
            assert set(json.loads(keys["lrprobe.versions"])) == {"lrprobe", "torch", "python"}
            assert json.loads(keys["lrprobe.attempt"]) == 0
        found.append(
            (json.loads(keys["lrprobe.run"]), list(pd.read_parquet(part)["step"].unique()))
        )
    assert found == [(first, [0, 1, 2]), (second, [3, 4])]


def test_two_runs_in_one_dataset_share_parts(tmp_path):
    """Two probes that write to one sink in turn do not begin a part at each record."""
    dataset = Parquet(tmp_path / "a.parquet")
    for step in range(10):
        dataset.write(make_record(step, optimizer="G", run={"optimizers": {"G": {"lr": 1}}}))
        dataset.write(make_record(step, optimizer="D", run={"optimizers": {"D": {"lr": 2}}}))
    dataset.close()
    (part,) = parts(tmp_path / "a.parquet")
    run = json.loads(pq.read_schema(part).metadata[b"lrprobe.run"])
    assert run == {"optimizers": {"G": {"lr": 1}, "D": {"lr": 2}}}


def test_a_dataset_is_continued(tmp_path):
    """The attempt is one more than the highest there, and no existing file is touched."""
    path = tmp_path / "a.parquet"
    for attempt in range(3):
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*.parquet")}
        dataset = Parquet(path)
        assert dataset.attempt == attempt
        dataset.write(make_record(1, attempt=dataset.attempt))
        dataset.close()
        dataset.close()
        for p, (content, when) in before.items():
            assert (p.read_bytes(), p.stat().st_mtime_ns) == (content, when)
    unused = Parquet(path)
    assert unused.attempt == 3
    unused.close()
    assert Parquet(path).attempt == 3


def test_an_attempt_counts_as_its_records_say(tmp_path):
    """Records of a higher attempt (of another destination's) raise the next one here, too."""
    dataset = Parquet(tmp_path / "a.parquet")
    dataset.write(make_record(1, attempt=4))
    dataset.close()
    assert Parquet(tmp_path / "a.parquet").attempt == 5


def foreign_text(folder):
    """Put a text file there."""
    (folder / "notes.csv").write_text("a,b")


def foreign_parquet(folder):
    """Put somebody else's Parquet file there."""
    pd.DataFrame({"a": [1]}).to_parquet(folder / "part-0.parquet")


def newer_version(folder):
    """Put a dataset of a schema version of the future there."""
    Parquet(folder).close()
    (part,) = parts(folder)
    table = pq.read_table(part)
    keys = {**table.schema.metadata, b"lrprobe.schema_version": b"999"}
    pq.write_table(table.replace_schema_metadata(keys), part)


@pytest.mark.parametrize("spoil", [foreign_text, foreign_parquet, newer_version])
def test_a_foreign_folder_is_refused(tmp_path, spoil):
    """A folder of something else is an error that names folder and file, and stays as it was."""
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    spoil(folder)
    (name,) = (entry.name for entry in folder.iterdir())
    with pytest.raises(ValueError, match=rf"a\.parquet' holds '{name}'.*allowed is a new or empty"):
        Parquet(folder)
    assert [entry.name for entry in folder.iterdir()] == [name]


def test_a_destination_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """A file, a path through a file and a read-only folder are OSErrors that name the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file' is a file"):
        Parquet(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"cannot write .*file/a\.parquet"):
        Parquet(tmp_path / "file" / "a.parquet")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)  # a read-only folder does not stop root
    with pytest.raises(PermissionError, match=r"cannot write .*b\.parquet': Permission denied"):
        Parquet(tmp_path / "b.parquet")


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_a_bad_interval_is_refused(tmp_path, bad):
    """flush_secs that is not a positive number is an error that says what came."""
    with pytest.raises(ValueError, match=f"flush_secs={bad!r}; allowed is"):
        Parquet(tmp_path / "a.parquet", flush_secs=bad)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_process_do_no_harm(tmp_path):
    """Temporary files are passed over by readers, and removed when the dataset is opened again."""
    path = tmp_path / "a.parquet"
    dataset = Parquet(path)
    dataset.write(make_record(1))
    dataset.close()
    leftovers = [path / ".lrprobe-part-x.parquet", path / "_module" / ".lrprobe-part-x.parquet"]
    for leftover in leftovers:
        leftover.write_bytes(b"PAR1 half")
    assert len(pd.read_parquet(path)) == len(NAMES)
    Parquet(path).close()
    assert not any(leftover.exists() for leftover in leftovers)


def test_nothing_is_lost_on_a_full_disk(tmp_path, monkeypatch):
    """After errors of write and flush, each record is there once, and no half file is left."""
    path = tmp_path / "a.parquet"
    dataset, memory = Parquet(path), Memory()
    full = set()
    refused = 0

    def fsync(_):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(parquet, "PART_BYTES", 10 * make_record(0).nbytes)
    for step in range(60):
        full.clear()
        if 10 <= step % 30 < 25:
            full.add(1)
        record = make_record(step)
        if full and dataset._pending_bytes >= parquet.PART_BYTES:
            with pytest.raises(OSError, match=r"a\.parquet': No space left"):
                dataset.write(record)
            refused += 1
            full.clear()
        dataset.write(record)  # one that was refused was not taken
        memory.write(record)
        if step % 30 == 24:
            full.add(1)
            with pytest.raises(OSError, match="No space left"):
                dataset.flush()
            assert not list(path.rglob(".*"))
            with pytest.raises(OSError, match="No space left"):
                dataset.close()
    full.clear()
    dataset.close()
    assert refused
    pd.testing.assert_frame_equal(pd.read_parquet(path), memory.frame())


def test_a_removed_folder_is_made_again(tmp_path):
    """When its folder is removed the sink says so once, then goes on in a new one."""
    path = tmp_path / "runs" / "a.parquet"
    dataset = Parquet(path)
    dataset.write(make_record(1))
    dataset.flush()
    shutil.rmtree(tmp_path / "runs")
    dataset.write(make_record(2))
    with pytest.raises(FileNotFoundError, match=r"a\.parquet' was removed"):
        dataset.flush()
    dataset.flush()
    assert list(pd.read_parquet(path)["step"].unique()) == [1, 2]


def test_records_become_visible_in_time(tmp_path):
    """Records that are older than flush_secs are written when the next comes."""
    dataset = Parquet(tmp_path / "a.parquet", flush_secs=0.05)
    dataset.write(make_record(1))
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == 0
    threading.Event().wait(0.06)
    dataset.write(make_record(2))
    assert list(pd.read_parquet(tmp_path / "a.parquet")["step"].unique()) == [1]


def test_a_closed_dataset_takes_no_record(tmp_path):
    """Writing after close is an error, not a record that nobody will find."""
    dataset = Parquet(tmp_path / "a.parquet")
    dataset.close()
    with pytest.raises(ValueError, match=r"Parquet\('.*a\.parquet'\) is closed"):
        dataset.write(make_record(1))


def test_the_destination_is_the_real_path(tmp_path, monkeypatch):
    """Two spellings of a folder are one destination, and changing the directory changes nothing."""
    monkeypatch.chdir(tmp_path)
    dataset = Parquet("x/../a.parquet")
    monkeypatch.chdir("/")
    dataset.write(make_record(1))
    dataset.close()
    assert dataset.destination == os.path.realpath(tmp_path / "a.parquet")
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == len(NAMES)


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from test_sinks import make_record
from lrprobe.sinks.parquet import Parquet
from lrprobe.sinks.tensorboard import TensorBoard
from lrprobe.sinks import parquet
parquet.PART_BYTES = 100_000
table, board = Parquet(sys.argv[1] + ".parquet"), TensorBoard(sys.argv[1])
for step in range(10**6):
    record = make_record(step)
    table.write(record); table.flush(); board.write(record)
    print(step, flush=True)
"""


def test_a_killed_process_leaves_whole_records(tmp_path):
    """After SIGKILL both kinds of file open, with every record that was flushed, each once."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    where = [str(tmp_path / "a"), str(tmp_path / "b")]
    running = [
        subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True)
        for place in where
    ]
    for kill, (place, process) in enumerate(zip(where, running, strict=True)):
        with process:
            for _ in range(20 + 17 * kill):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            last = max([last, *map(int, process.stdout.read().split("\n")[:-1])])
        frame = pd.read_parquet(place + ".parquet")
        steps = frame["step"].unique()
        assert list(steps) in (list(range(last + 1)), list(range(last + 2)))
        assert len(frame) == len(NAMES) * len(steps)
        steps = [event.step for event in load(place).Scalars("effective_lr/0.weight")]
        assert steps in (list(range(last + 1)), list(range(last + 2)))


# --- TensorBoard --------------------------------------------------------------------------------


def load(folder):
    """All that tensorboard itself finds in a logdir."""
    every = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=every).Reload()


def scalar_tags(folder):
    """The tags of all scalars."""
    return set(load(folder).Tags()["scalars"])


def layout(loaded, at=-1):
    """The charts of the Custom Scalars layout: title to (value, lower, upper)."""
    (content,) = loaded.Tensors("custom_scalars__config__")[at].tensor_proto.string_val
    (category,) = layout_pb2.Layout.FromString(content).category
    return {
        chart.title: (series.value, series.lower, series.upper)
        for chart in category.chart
        for series in chart.margin.series
    }


def test_the_layout_begins_with_all_parameters_in_one_chart(tmp_path):
    """First the update ratios, then rates and the groups' lr: each its own tags and no others."""
    sink = TensorBoard(tmp_path, prefix="a.b/")
    sink.write(make_record(1))
    sink.close()
    loaded = load(tmp_path)
    (content,) = loaded.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    (category,) = layout_pb2.Layout.FromString(content).category
    scalars = loaded.Tags()["scalars"]
    # TensorBoard shows the last band first.
    assert [chart.title for chart in category.chart[3:]] == list(NAMES)[::-1]
    metrics = ("update_ratio", "effective_lr_log10_p50", "lr")
    for chart, metric in zip(category.chart, metrics, strict=False):
        (pattern,) = chart.multiline.tag
        shown = [tag for tag in scalars if re.search(pattern, tag)]
        assert shown == [tag for tag in scalars if tag.startswith(f"a.b/{metric}/")] != []


@pytest.mark.parametrize("own", [True, False])
def test_the_tags_are_those_of_the_contract(tmp_path, own):
    """Each record is one event with the tags of section 5, its figures, its step and its time."""
    record = make_record(30)
    target = tmp_path if own else SummaryWriter(tmp_path)
    sink = TensorBoard(target)
    sink.write(record)
    sink.write(make_record(40))
    sink.close()
    loaded = load(tmp_path)
    metrics = {
        "effective_lr": "effective_lr_p50",
        "effective_lr_p05": "effective_lr_p05",
        "effective_lr_p95": "effective_lr_p95",
        "update_ratio": "update_ratio",
        "update_norm": "update_norm",
        "grad_norm": "grad_norm",
    }
    tags = {f"{metric}/{name}" for metric in metrics for name in NAMES}
    logs = {f"effective_lr_log10_{at}/{n}" for at in ("p05", "p50", "p95") for n in NAMES}
    tags |= {"lr/group0", "lr/group1", "reconstruction_error/_max"} | logs
    assert set(loaded.Tags()["scalars"]) == tags
    table = record.tables["parameter"]
    for metric, figure in metrics.items():
        for row, name in enumerate(NAMES):
            first, second = loaded.Scalars(f"{metric}/{name}")
            assert first.value == np.float32(table[figure][row])
            assert (first.step, first.wall_time, second.step) == (30, record.time, 40)
    for tag in logs:
        rate = loaded.Scalars(tag.replace("_log10", "").replace("_p50", ""))[0].value
        assert loaded.Scalars(tag)[0].value == pytest.approx(np.log10(rate), rel=1e-5)
    assert loaded.Scalars("lr/group1")[0].value == np.float32(record.tables["group"]["lr"][1])
    worst = loaded.Scalars("reconstruction_error/_max")[0].value
    assert worst == np.float32(table["reconstruction_error"].max())
    assert set(loaded.Tags()["histograms"]) == {f"effective_lr_log10_hist/{n}" for n in NAMES}
    assert layout(loaded) == {
        name: tuple(f"effective_lr_log10_{q}/{name}" for q in ("p50", "p05", "p95"))
        for name in NAMES
    }
    assert len(loaded.Tensors("custom_scalars__config__")) == 1
    card = loaded.Tensors("lrprobe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "`update_ratio/...`" in card


def test_a_record_is_one_event(tmp_path):
    """All values of a record are in one event, so that its cost does not grow by the call."""
    writer = SummaryWriter(tmp_path)
    events = []
    writer._get_file_writer().event_writer.add_event = events.append
    sink = TensorBoard(writer)
    for step in range(3):
        sink.write(make_record(step))
    assert [event.step for event in events] == [0, 1, 2]
    assert len(events[1].summary.value) == 10 * len(NAMES) + 4


def test_a_prefix_is_put_before_all_tags(tmp_path):
    """With a prefix, every tag but the layout's own begins with it, the charts' included."""
    sink = TensorBoard(tmp_path, prefix="probe/")
    sink.write(make_record(1))
    sink.close()
    loaded = load(tmp_path)
    tags = loaded.Tags()
    every = {*tags["scalars"], *tags["histograms"], *tags["tensors"]}
    assert all(tag.startswith("probe/") for tag in every - {"custom_scalars__config__"})
    assert layout(loaded)["0.bias"][0] == "probe/effective_lr_log10_p50/0.bias"


def test_groups_have_the_names_that_the_user_gave_them(tmp_path):
    """In the characters of tags, each once, whatever style of names the figures have."""
    record = make_record(1)
    table = record.tables["parameter"]
    table["group_name"] = np.array(["head & tail", "head ? tail"], dtype=object)[table["group"]]
    sink = TensorBoard(tmp_path)
    sink.write(record)
    sink.close()
    tags = {tag for tag in scalar_tags(tmp_path) if tag.startswith("lr/")}
    assert tags == {"lr/head___tail", "lr/head___tail_2"}


def test_hostile_names_have_tags_of_their_own(tmp_path):
    """Names outside the characters of tags, doubles and huge ones, all get different clean tags."""
    names = ("a b", "a_b", "a&b", "a_b_2", "x", "x", "../../x", "🦆", "", "<script>", "y" * 10**6)
    names = (*names, "y" * 10**6 + "z")
    sink = TensorBoard(tmp_path / "log")
    sink.write(make_record(1, names=names))
    sink.close()
    tags = {tag for tag in scalar_tags(tmp_path / "log") if tag.startswith("effective_lr/")}
    assert len(tags) == len(names)
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-")
    assert all(set(tag) <= allowed for tag in tags)
    assert max(map(len, tags)) < 300
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_optimizers_do_not_share_tags(tmp_path):
    """With several optimizers, lr, errors and parameters of one name have tags of their own."""
    run = {"optimizers": {"G": {}, "D": {}}}
    sink = TensorBoard(tmp_path)
    for optimizer in ("G", "D", "G"):
        sink.write(make_record(1, optimizer=optimizer, names=("w", f"{optimizer}.b"), run=run))
    sink.close()
    tags = scalar_tags(tmp_path)
    assert {tag for tag in tags if tag.startswith("lr/")} == {
        f"lr/{optimizer}.group{group}" for optimizer in "GD" for group in (0, 1)
    }
    assert {"reconstruction_error/G._max", "reconstruction_error/D._max"} <= tags
    names = {tag.removeprefix("effective_lr/") for tag in tags if tag.startswith("effective_lr/")}
    assert names == {"w", "G.b", "D.w", "D.b"}
    assert set(layout(load(tmp_path))) == names


def test_the_layout_follows_the_parameters(tmp_path):
    """A parameter that comes later gets its band, the tags of the others stay as they were."""
    sink = TensorBoard(tmp_path)
    for step in range(4):
        sink.write(make_record(step, names=("a", "b") if step < 2 else ("a", "b", "c")))
    sink.close()
    loaded = load(tmp_path)
    assert len(loaded.Tensors("custom_scalars__config__")) == 2
    assert set(layout(loaded, 0)) == {"a", "b"}
    assert set(layout(loaded, 1)) == {"a", "b", "c"}
    assert len(loaded.Scalars("effective_lr/a")) == 4


def test_what_did_not_step_has_no_scalars(tmp_path):
    """A parameter that did not step leaves a gap; one that did and is NaN shows it."""
    still, broken = make_record(1, stepped=False), make_record(2)
    broken.tables["parameter"]["grad_norm"][0] = np.nan
    broken.tables["group"]["lr"][1] = np.nan
    sink = TensorBoard(tmp_path)
    sink.write(still)
    sink.write(broken)
    sink.close()
    loaded = load(tmp_path)
    assert [event.step for event in loaded.Scalars("effective_lr/0.weight")] == [2]
    assert [event.step for event in loaded.Scalars("lr/group0")] == [1, 2]
    assert [event.step for event in loaded.Scalars("lr/group1")] == [1]
    assert [event.step for event in loaded.Scalars("reconstruction_error/_max")] == [2]
    (norm,) = loaded.Scalars("grad_norm/0.weight")
    assert np.isnan(norm.value)


def test_numbers_beyond_float32_break_nothing(tmp_path):
    """Infinities and figures above float32's range are written as inf."""
    record = make_record(1)
    record.tables["parameter"]["update_norm"][:] = (1e300, -np.inf, 5e-324)
    sink = TensorBoard(tmp_path)
    sink.write(record)
    sink.close()
    loaded = load(tmp_path)
    values = [loaded.Scalars(f"update_norm/{name}")[0].value for name in NAMES]
    assert values == [np.inf, -np.inf, 0]


@pytest.mark.parametrize(
    ("edges", "limits"),
    [
        ([1e-3, 1e-2, 1], [-3, -2, 0]),
        ([0, 1e-2, 1], [-3, -2, 0]),
        ([0, 0, 0], [-1, -1, -1]),
        ([1e-3, 1, np.inf], [-3, 0, 1]),
        ([0, 1, np.inf], [-1, 0, 1]),
        ([1e-3, 1e-3, 1e-3], [-3, -3, -3]),
        ([5e-324, 1, 10], [np.log10(5e-324), 0, 1]),
        ([np.nan, 1, 2], None),
        ([-1, 1, 2], None),
    ],
)
def test_histograms_are_of_the_logarithm(edges, limits):
    """Edges become log10; zero and inf stand a decade outside; NaN or nothing is not drawn."""
    found = tensorboard.log10_histogram(np.array(edges), np.array([3, 5]))
    assert tensorboard.log10_histogram(np.array(edges), np.array([0, 0])) is None
    if limits is None:
        assert found is None
        return
    np.testing.assert_allclose(found.bucket_limit, limits)
    assert list(found.bucket) == [0, 3, 5]
    assert (found.min, found.max, found.num) == (found.bucket_limit[0], found.bucket_limit[-1], 8)
    middles = np.array([limits[0] + limits[1], limits[1] + limits[2]]) / 2
    np.testing.assert_allclose(found.sum, (middles * [3, 5]).sum())
    np.testing.assert_allclose(found.sum_squares, (middles**2 * [3, 5]).sum())


def test_fine_histograms_are_drawn_coarser():
    """TensorBoard gets at most 32 buckets, with the same elements in the same range."""
    counts = np.arange(1000)
    found = tensorboard.log10_histogram(np.geomspace(1e-9, 1, 1001), counts)
    assert len(found.bucket) == 33
    assert sum(found.bucket) == counts.sum()
    assert (found.min, found.max) == (-9, 0)


def test_a_large_network_has_tags_per_module(tmp_path):
    """Above 200 parameters tags are per module, at the depth that fits, with merged figures."""
    names = tuple(f"block{i % 60}.layer{i // 60}.weight" for i in range(240))
    record = make_record(1, names=names)
    sink = TensorBoard(tmp_path)
    sink.write(record)
    sink.close()
    tags = {tag for tag in scalar_tags(tmp_path) if tag.startswith("grad_norm/")}
    assert tags == {f"grad_norm/block{i}" for i in range(60)}
    rows = [7, 67, 127, 187]
    norms = record.tables["parameter"]["grad_norm"][rows]
    (event,) = load(tmp_path).Scalars("grad_norm/block7")
    assert event.value == pytest.approx(np.sqrt((norms**2).sum()))


def test_two_large_optimizers_share_the_limit(tmp_path):
    """The limit on tags is for the run, not for each of its optimizers."""
    run = {"optimizers": {"G": {}, "D": {}}}
    sink = TensorBoard(tmp_path)
    for optimizer in ("G", "D"):
        names = tuple(f"{optimizer}{i // 2}.{i % 2}" for i in range(180))
        sink.write(make_record(1, optimizer=optimizer, names=names, run=run))
    sink.close()
    tags = {tag for tag in scalar_tags(tmp_path) if tag.startswith("grad_norm/")}
    assert len(tags) == 180 + 90


@pytest.mark.parametrize(
    ("names", "limit", "expected"),
    [
        (["a.b.w", "a.c.w"], 2, ("parameter", ["a.b.w", "a.c.w"])),
        (["a.b.w", "a.b.v", "a.c.w"], 2, ("module", ["a.b", "a.b", "a.c"])),
        (["a.b.w", "a.c.w", "d.w"], 2, ("module", ["a", "a", "d"])),
        (["a.w", "b.w", "c.w"], 2, ("module", ["", "", ""])),
        (["u", "v", "w"], 2, ("module", ["", "", ""])),
        (["a/b/w", "a/b/v", "a/c.0/w"], 2, ("module", ["a/b", "a/b", "a/c.0"])),
    ],
)
def test_tags_are_rolled_up_to_the_depth_that_fits(names, limit, expected):
    """The greatest depth with at most as many modules as the limit is chosen."""
    assert tags.roll_up(names, limit) == expected


def merged_record(samples, known=True):
    """A record of one parameter per sample of rates, with a fine histogram or only quantiles."""
    record = make_record(1, names=tuple(f"m.{i}" for i in range(len(samples))))
    table = record.tables["parameter"]
    for row, rates in enumerate(samples):
        table["numel"][row] = len(rates)
        table["effective_lr_min"][row], table["effective_lr_max"][row] = rates.min(), rates.max()
        for suffix, q in QUANTILES.items():
            table[f"effective_lr_{suffix}"][row] = np.quantile(rates, q)
        counts, edges = np.histogram(rates, 200) if known else (np.empty(0), np.empty(0))
        if rates.min() == rates.max():
            counts, edges = np.array([len(rates)]), np.array([rates[0], rates[0]])
        record.counts[row], record.edges[row] = counts, edges
    return record


def test_rates_are_merged_by_number_of_elements():
    """Merged quantiles and histogram are those of all elements together."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(5, 1, 9000), rng.normal(20, 2, 1000), rng.uniform(0, 1, 30)]
    merged = merge.merge_rows(merged_record(samples), [0, 1, 2])
    every = np.concatenate(samples)
    for suffix in ("p05", "p50", "p95"):
        value = merged.figures[f"effective_lr_{suffix}"]
        assert np.mean(every < value) == pytest.approx(QUANTILES[suffix], abs=0.005)
    assert merged.counts.sum() == pytest.approx(len(every))
    assert merged.edges[0] == pytest.approx(every.min())
    assert merged.edges[-1] == pytest.approx(every.max())
    below = merged.counts[merged.edges[1:] <= 12].sum()
    assert below == pytest.approx((every < 12).sum(), rel=0.02)


def test_rates_are_merged_without_histograms():
    """Where a parameter has quantiles only (a measured one), these stand in for its histogram."""
    rng = np.random.default_rng(0)
    samples = [rng.uniform(1, 2, 1000), rng.uniform(3, 4, 1000)]
    record = merged_record(samples, known=False)
    for name in ("min", "max"):
        record.tables["parameter"][f"effective_lr_{name}"][:] = np.nan
    merged = merge.merge_rows(record, [0, 1])
    assert merged.figures["effective_lr_p05"] == pytest.approx(1.1, abs=0.02)
    assert 1.9 < merged.figures["effective_lr_p50"] < 3.1
    assert merged.figures["effective_lr_p95"] == pytest.approx(3.9, abs=0.02)


def test_rates_that_are_all_the_same_stay_so():
    """Scalar rates are merged without smearing: a quantile is one of them, never in between."""
    samples = [np.full(60, 1e-3), np.full(30, 1e-1), np.full(10, 1e-1)]
    merged = merge.merge_rows(merged_record(samples), [0, 1, 2])
    assert merged.figures["effective_lr_p05"] == pytest.approx(1e-3)
    assert merged.figures["effective_lr_p50"] == pytest.approx(1e-3)
    assert merged.figures["effective_lr_p95"] == pytest.approx(1e-1)
    alone = merge.merge_rows(merged_record(samples), [1])
    assert alone.figures["effective_lr_p50"] == pytest.approx(1e-1)
    assert alone.counts.sum() == pytest.approx(30)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adadelta])
@pytest.mark.parametrize("blocks", [60, 120], ids=["modules", "blocks"])
def test_merged_rates_are_those_of_the_frame(make, blocks, tmp_path):
    """Tags of modules have the frame's quantiles; those of more, within 1 % of one of rank ±3 %."""
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(blocks)]
    model = nn.Sequential(*block)
    optimizer = make(model.parameters(), lr=0.01)
    with lrprobe.attach(optimizer, model, to=tmp_path, every=3) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(64, 16)).square().mean().backward()
            optimizer.step()
        rates = lrprobe.effective_lr(optimizer, model)
    shown = lrprobe.read(tmp_path, by="module")
    shown = shown[shown["step"] == 3].set_index("module")
    assert len(shown) == 120
    if blocks == 60:
        frame = probe.frame(by="module")
        frame = frame[frame["step"] == 3].set_index("module")
    idle = probe.frame().set_index(["step", "parameter"]).loc[3, "idle_fraction"]
    assert (idle < 1).any()  # the first layers of such a deep net may have no gradient at all
    rates = {n: rate for n, rate in rates.items() if idle[n] < 1}
    for name, row in shown.iterrows():
        inside = [r.flatten() for n, r in rates.items() if n.startswith(f"{name}.")]
        if not inside:
            assert np.isnan(row["effective_lr_p50"])
            continue
        every = torch.cat(inside)
        for suffix in ("p05", "p50", "p95"):
            column = f"effective_lr_{suffix}"
            if blocks == 60:
                assert row[column] == pytest.approx(frame.loc[name, column], rel=1e-6)
            low, high = (
                np.quantile(every, np.clip(QUANTILES[suffix] + by, 0, 1)) for by in (-0.03, 0.03)
            )
            where = f"{name} {suffix}: {row[column]}, allowed are {low} to {high}"
            assert low * 0.99 <= row[column] <= high * 1.01, where


def test_norms_are_merged_in_squares():
    """Norms add in squares; what did not step counts for the norm of the parameters only."""
    record = make_record(1, names=("m.a", "m.b", "m.c"))
    table = record.tables["parameter"]
    table["stepped"][2] = False
    for name in (*RATE, "update_norm", "grad_norm", "update_ratio"):
        table[name][2] = np.nan
    table["update_norm"][:2] = (3e200, 4e200)
    table["grad_norm"][:2] = (0, 0)
    table["param_norm"][:] = (1e200, 2e200, 2e200)
    merged = merge.merge_rows(record, [0, 1, 2])
    assert merged.stepped
    assert merged.figures["update_norm"] == pytest.approx(5e200)
    assert merged.figures["grad_norm"] == 0
    assert merged.figures["update_ratio"] == pytest.approx(5 / 3)
    still = merge.merge_rows(record, [2])
    assert not still.stepped
    assert still.figures.pop("param_norm") == record.tables["parameter"]["param_norm"][2]
    assert all(np.isnan(value) for value in still.figures.values())
    table["update_norm"][0] = np.nan
    assert np.isnan(merge.merge_rows(record, [0, 1]).figures["update_norm"])


def test_the_users_writer_stays_the_users(tmp_path):
    """A SummaryWriter is flushed and left open, and what its owner adds is beside ours."""
    writer = SummaryWriter(tmp_path)
    sink = TensorBoard(writer)
    sink.write(make_record(1))
    sink.flush()
    assert "effective_lr/0.weight" in scalar_tags(tmp_path)
    sink.close()
    writer.add_scalar("loss", 1.0, 2)
    writer.close()
    assert {"loss", "effective_lr/0.weight"} <= scalar_tags(tmp_path)


def test_a_closed_writer_is_opened_again(tmp_path):
    """A writer closed before the probe is told once; nothing is lost, and it is closed after."""
    writer = SummaryWriter(tmp_path)
    sink = TensorBoard(writer)
    sink.write(make_record(1))
    writer.close()
    with pytest.raises(OSError, match="was closed before the probe"):
        sink.write(make_record(2))
    sink.write(make_record(2))
    sink.write(make_record(3))
    sink.close()
    assert writer.all_writers is None
    assert [e.step for e in load(tmp_path).Scalars("effective_lr/0.weight")] == [1, 2, 3]


def test_a_bad_target_is_refused(tmp_path):
    """A logdir that cannot be made, something that is none, and a bad prefix are clear errors."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"cannot write a TensorBoard logdir to '.*file'"):
        TensorBoard(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file/log"):
        TensorBoard(tmp_path / "file" / "log")
    with pytest.raises(TypeError, match="is a int; allowed are a path and a torch"):
        TensorBoard(3)
    with pytest.raises(ValueError, match="prefix='a b'; allowed are"):
        TensorBoard(tmp_path / "log", prefix="a b")
    assert not (tmp_path / "log").exists()


def test_a_full_disk_leaves_no_half_event(tmp_path):
    """An event that does not fit is taken back, and written when there is room again."""
    sink = TensorBoard(tmp_path)
    sink.write(make_record(1))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            sink.write(make_record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == whole
    sink.write(make_record(2))
    sink.close()
    assert [e.step for e in load(tmp_path).Scalars("effective_lr/0.weight")] == [1, 2]


def test_a_removed_logdir_is_made_again(tmp_path):
    """When its file is removed the sink says so once, then goes on, layout and all, in another."""
    sink = TensorBoard(tmp_path / "log")
    sink.write(make_record(1))
    shutil.rmtree(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="was removed"):
        sink.write(make_record(2))
    sink.write(make_record(2))
    sink.close()
    loaded = load(tmp_path / "log")
    assert [e.step for e in loaded.Scalars("effective_lr/0.weight")] == [2]
    assert set(layout(loaded)) == set(NAMES)
    with pytest.raises(ValueError, match="is closed"):
        sink.write(make_record(3))


def test_destinations_tell_sinks_apart(tmp_path):
    """Sinks of one logdir and prefix have the same destination, others have not."""
    writer = SummaryWriter(tmp_path / "log")
    here, there = TensorBoard(writer), TensorBoard(tmp_path / "x" / ".." / "log")
    other = TensorBoard(writer, prefix="b/")
    assert here.destination == there.destination == os.path.realpath(tmp_path / "log")
    assert other.destination != here.destination
    there.close()
    writer.close()


@pytest.mark.parametrize("size", [0, 1, 3, 511, 512, 513, 1024, 5000])
def test_checksums_are_those_of_tensorboard(size):
    """Our checksum of any bytes is tensorboard's own."""
    data = np.random.default_rng(size).bytes(size)
    assert tensorboard.masked_crc(data) == masked_crc32c(data)


def test_sinks_leave_no_open_files(tmp_path):
    """What was opened and closed thirty times leaves neither threads nor file handles behind."""
    warnings.simplefilter("error", ResourceWarning)
    listing = Path("/proc/self/fd")
    handles = len(list(listing.iterdir())) if listing.exists() else 0
    threads = threading.active_count()
    for i in range(30):
        board = TensorBoard(tmp_path / str(i))
        for sink in (Parquet(tmp_path / f"{i}.parquet"), board, Memory()):
            sink.write(make_record(1))
            sink.close()
    assert threading.active_count() == threads
    if handles:
        assert len(list(listing.iterdir())) == handles
