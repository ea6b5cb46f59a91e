"""Sinks that fail, processes that die, forks, threads, hostile names and numbers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_unchanged import assert_same, clone
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import lrprobe
from lrprobe import delivery, sinks, worker
from lrprobe.engine.flight import Crossing
from lrprobe.recorder import open_recorders

SEED = 0


def training(steps: int, **options: Any) -> tuple[list[torch.Tensor], lrprobe.Probe | None]:
    """Train a small net; what it ends with, and the probe where ``to`` was given."""
    torch.manual_seed(SEED)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    between = options.pop("between", None)
    probe = lrprobe.attach(optimizer, model, every=1, **options) if options else None
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        if between is not None:
            between(step, probe)
    return [clone(param) for param in model.parameters()], probe


# --- Faults of sinks ----------------------------------------------------------------------------


class Faulty:
    """A sink that fails while it is told to."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def write(self, record: Any) -> None:
        self.gate.wait(10)
        if self.broken:
            raise OSError(28, "No space left on device")
        self.steps.append(record.step)

    def close(self) -> None:
        """Do nothing."""


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    """What was warned of."""
    return [str(warning.message) for warning in caught]


def test_a_sink_that_fails_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on with the same bits; one warning names sink and cause; nothing is lost."""
    monkeypatch.setattr(worker, "_PAUSES", (0.01, 0.01))
    sink = Faulty()

    def between(step: int, probe: lrprobe.Probe) -> None:
        probe.frame()
        sink.broken = step in range(2, 7)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended, probe = training(10, to=sink, between=between)
        probe.close()
    assert_same(ended, training(10)[0], "failing sink")
    failed, works = messages(caught)
    assert "Faulty failed: OSError: [Errno 28] No space left on device" in failed
    assert "wait in memory (up to 1,000)" in failed
    assert "works again" in works
    assert sink.steps == list(range(1, 11))
    assert probe.frame()["step"].unique().tolist() == list(range(1, 11))


def test_a_sink_that_hangs_holds_up_nothing() -> None:
    """While a sink hangs, the training takes its steps; when it comes back it has all of them."""
    sink = Faulty()
    sink.gate.clear()
    ended, probe = training(20, to=sink)  # returns although the gate is shut
    assert sink.steps == []
    sink.gate.set()
    probe.close()
    assert sink.steps == list(range(1, 21))
    assert_same(ended, training(20)[0], "hanging sink")


@pytest.mark.parametrize("where", ["ready", "arrays"])
def test_figures_that_fail_on_their_way_are_given_up(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that never reach the host cost their own row and one warning; training goes on."""
    calls = iter(range(100))
    original = getattr(Crossing, where)

    def failing(self: Crossing) -> Any:
        if next(calls) in (1, 2):
            raise RuntimeError("the device is gone")
        return original(self)

    monkeypatch.setattr(Crossing, where, failing)
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with lrprobe.attach(optimizer, every=1) as probe:
            for _ in range(5):
                param.grad = torch.ones(3)
                optimizer.step()
        frame = probe.frame()
    messages = [str(warning.message) for warning in said]
    assert len(frame) == 3, f"{messages}\n{frame['step'].tolist()}"
    assert float(param.detach()[0]) == pytest.approx(0.5)
    assert sum("the device is gone" in message for message in messages) == 1, messages
    assert "lrprobe: 2 steps of SGD could not be recorded" in messages, messages


def test_what_is_lost_is_said_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that never recovers: the bound holds, and close() counts what is lost."""
    monkeypatch.setattr(worker, "WAITING_RECORDS", 4)
    sink = Faulty()
    sink.broken = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, probe = training(10, to=sink)
        probe._recorder.collect(wait=True)
        probe._recorder._delivery.drain()
        (buffered,) = delivery._worker_of(sink)._buffered.values()
        assert len(buffered.backlog) == 4
        probe.close()
    first, last = messages(caught)
    assert "Faulty failed: OSError" in first
    assert "10 records were not written to Faulty: OSError: [Errno 28]" in last
    assert probe.frame()["step"].nunique() == 10


def removed(path: Path, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(path)


def replaced(path: Path, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(path)
    path.write_text("somebody else's")


def read_only(_: Path, patch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, as whom the tests may run; this stops everybody."""

    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    patch.setattr(Path, "open", refuse)


def limited(_: Path, __: pytest.MonkeyPatch) -> None:
    """A file may have one byte: like a full disk, for all that is not there yet."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


@pytest.mark.parametrize("fault", [removed, replaced, read_only, limited])
@pytest.mark.parametrize("kind", ["run.parquet", "logdir"])
def test_a_disk_that_fails(
    fault: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder removed, replaced or read-only, a file-size limit: told once, then gone on with."""
    if kind == "logdir" and fault in (read_only, replaced):
        pytest.skip("its one file stays open: there is nothing to be refused")
    monkeypatch.setattr(worker, "_PAUSES", (60.0, 60.0))  # until a flush asks
    path, patch = tmp_path / kind, pytest.MonkeyPatch()

    def heal() -> None:
        patch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if path.is_file():
            path.unlink()

    def between(step: int, probe: lrprobe.Probe) -> None:
        if step in (1, 3):
            probe.flush()
        if step == 1:
            fault(path, patch)
        elif step == 5:
            heal()
            probe.flush()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ended, probe = training(8, to=path, between=between)
        finally:
            heal()
        probe.close()
    assert_same(ended, training(8)[0], fault.__name__)
    said = messages(caught)
    assert len(said) == 2, said
    assert kind in said[0]
    assert "failed: " in said[0]
    assert "works again" in said[1]
    steps = lrprobe.read(path)["step"].unique().tolist()
    gone = 2 if fault is removed and kind == "logdir" else 0  # what was on the disk, and only there
    assert steps == list(range(1 + gone, 9))


def test_a_summary_writer_that_was_closed(tmp_path: Path) -> None:
    """A SummaryWriter closed before the probe is told of once; training and records go on."""
    writer = SummaryWriter(tmp_path / "logdir")

    def between(step: int, probe: lrprobe.Probe) -> None:
        if step == 2:
            probe.flush()
            writer.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, probe = training(6, to=writer, between=between)
        probe.close()
    assert len([m for m in messages(caught) if "was closed before the probe" in m]) == 1
    assert lrprobe.read(tmp_path / "logdir")["step"].unique().tolist() == [1, 2, 3, 4, 5, 6]


# --- Sudden death -------------------------------------------------------------------------------

NURSERY = '''
"""Forks trainings, and ends each as it was told to: importing torch once is enough."""
import json, os, random, signal, struct, sys, time
import torch
import torch._dynamo  # which the first step would do, in each child
torch.set_num_threads(1)
import lrprobe
from lrprobe.sinks import Parquet, TensorBoard, parquet
from lrprobe.engine import flight

def train(folder, plan):
    parquet.PART_BYTES = plan["part_bytes"]
    if plan["late"]:  # figures that are still on their way from a device, as far as one can see
        flight.Crossing.ready = lambda self: False
    log = os.open(folder + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def note(kind, step):
        os.write(log, struct.pack("<cqd", kind, step, time.monotonic()))
    class Noted(Parquet):
        done = 0
        def write(self, record):
            super().write(record)
            self.done = record.step
        def flush(self):
            done = self.done
            super().flush()
            note(b"f", done)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    owned = plan["end"] not in ("SIGKILL", "os._exit")
    to = [folder + ".parquet", folder + ".tb"]
    if not owned:
        to = [Noted(to[0], flush_secs=plan["flush_secs"]), TensorBoard(to[1])]
    probe = lrprobe.attach(optimizer, model, to=to, every=1, track=2)
    step = 0
    while step < plan["steps"]:
        step += 1
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        note(b"s", step)
        if plan["pause"]:
            time.sleep(plan["pause"])
    end = plan["end"]
    if end == "os._exit":
        os._exit(0)
    elif end == "exception":
        raise RuntimeError("training failed")
    elif end == "Ctrl-C":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    elif end == "sys.exit":
        sys.exit(3)

def noted(folder):
    try:
        data = open(folder + ".log", "rb").read()
    except FileNotFoundError:
        return []
    return [struct.unpack_from("<cqd", data, at) for at in range(0, len(data) - 16, 17)]

def main():
    root, jobs = sys.argv[1], json.loads(sys.argv[2])
    chance, running, killed = random.Random(len(jobs)), {}, {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < 2:
            at, plan = waiting.pop(0)
            folder = os.path.join(root, str(at))
            child = os.fork()
            if child == 0:
                train(folder, plan)
                return  # and the interpreter shuts down, as any does
            running[child] = [folder, plan, None]
        time.sleep(0.01)
        for child, about in list(running.items()):
            folder, plan, when = about
            if os.waitpid(child, os.WNOHANG)[0]:
                del running[child]
            elif plan["end"] == "SIGKILL":
                if when is None and any(kind == b"f" and step for kind, step, _ in noted(folder)):
                    about[2] = time.monotonic() + chance.uniform(0, plan["most"])
                elif when is not None and time.monotonic() > when:
                    killed[folder] = time.monotonic()
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    del running[child]
    print(json.dumps(killed))

main()
'''


def end_trainings(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, float]:
    """Run trainings and end them; when each was killed."""
    defaults = {"steps": 10**9, "pause": 0, "flush_secs": 0.05, "part_bytes": 10**5}
    defaults |= {"most": 0.4, "late": False}
    plans = json.dumps([{**defaults, **job} for job in jobs])
    code = folder / "nursery.py"
    code.write_text(NURSERY)
    ran = subprocess.run(
        [sys.executable, str(code), str(folder), plans],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "lrprobe" not in ran.stderr.replace("Traceback", ""), ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert lines, ran.stderr
    return json.loads(lines[-1])


def evidence(folder: Path, at: int) -> tuple[dict[int, float], int]:
    """When each step was taken, and the last step of a flush that had returned."""
    data = (folder / f"{at}.log").read_bytes()
    notes = [struct.unpack_from("<cqd", data, here) for here in range(0, len(data) - 16, 17)]
    steps = {step: when for kind, step, when in notes if kind == b"s"}
    return steps, max((step for kind, step, _ in notes if kind == b"f"), default=0)


def whole(folder: Path, at: int) -> tuple[set[int], set[int]]:
    """The steps in both datasets, which must be whole; every warning is an error."""
    path = folder / f"{at}.parquet"
    frame = lrprobe.read(path)
    assert len(frame), "nothing at all"
    assert (frame.groupby("step").size() == 4).all(), "half a record"
    assert not frame.duplicated(["step", "parameter"]).any(), "a record twice"
    steps = frame["step"].unique().tolist()
    assert steps == list(range(1, len(steps) + 1)), "a gap"
    assert len(pd.read_parquet(path)) == len(frame)
    elements = lrprobe.read(path, table="elements")
    assert elements.groupby("step").size().reindex(steps).eq(8).all()
    assert lrprobe.read(path, by="model")["step"].tolist() == steps
    board = lrprobe.read(folder / f"{at}.tb")
    assert (board.groupby("step").size() == 4).all()
    assert not board.duplicated(["step", "parameter"]).any()
    drawn = board["step"].unique().tolist()
    assert drawn == list(range(1, len(drawn) + 1))
    return set(steps), set(drawn)


def assert_whole_after(folder: Path, at: int) -> None:
    """What was flushed is there, in both datasets, and they are whole."""
    steps, flushed = evidence(folder, at)
    table, board = whole(folder, at)
    assert flushed > 0
    assert len(table) >= flushed, f"{flushed} steps were flushed, {len(table)} are there"
    assert len(board) >= flushed
    assert len(steps) >= len(table) - 1  # the last may be on its way to our notes


@pytest.mark.slow
def test_sudden_death(tmp_path: Path) -> None:
    """Killed 20 times while it writes, or ended by os._exit: whole, with all that was flushed."""
    jobs = [{"end": "SIGKILL"}] * 20
    jobs += [{"end": "os._exit", "steps": n, "pause": 0.002} for n in (150, 301)]
    assert len(end_trainings(tmp_path, jobs)) == 20
    for at in range(len(jobs)):
        assert_whole_after(tmp_path, at)


@pytest.mark.slow
def test_no_other_end_loses_anything(tmp_path: Path) -> None:
    """An exception, Ctrl-C, sys.exit, the script's end, without close(), lose nothing at all."""
    ends = ["exception", "Ctrl-C", "sys.exit", "the script's end"]
    jobs = [{"end": end, "steps": 37, "late": late} for end in ends for late in (False, True)]
    end_trainings(tmp_path, jobs)
    for at, job in enumerate(jobs):
        table, board = whole(tmp_path, at)
        assert (len(table), len(board)) == (37, 37), job


# --- Processes and threads ----------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A dataset whose workers hold the probe, and ask it to write."""

    def __init__(self, probe: lrprobe.Probe, optimizer: torch.optim.Optimizer) -> None:
        self.probe = probe
        self.optimizer = optimizer

    def __len__(self) -> int:
        return 24

    def __getitem__(self, at: int) -> torch.Tensor:
        if torch.utils.data.get_worker_info() is not None:
            self.optimizer.step()  # nobody does; but nothing of it may be written
            self.probe.flush()
            self.probe.close()
        return torch.full((4,), float(at))


def test_forked_workers_write_nothing(tmp_path: Path) -> None:
    """DataLoader workers, forked with an open probe, leave its datasets as the parent has them."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    to = [tmp_path / "run.parquet", tmp_path / "logdir"]
    with lrprobe.attach(optimizer, model, to=to, every=1) as probe:
        data = Numbers(probe, optimizer)
        steps = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python, for any fork
            for _ in range(2):
                loader = torch.utils.data.DataLoader(
                    data, batch_size=4, num_workers=2, multiprocessing_context="fork"
                )
                for batch in loader:
                    optimizer.zero_grad()
                    model(batch).square().mean().backward()
                    optimizer.step()
                    steps += 1
    assert probe.frame()["step"].unique().tolist() == list(range(1, steps + 1))
    for path in to:
        frame = lrprobe.read(path)
        assert frame["step"].unique().tolist() == list(range(1, steps + 1))
        assert not frame.duplicated(["step", "parameter"]).any()
    assert len(list((tmp_path / "logdir").iterdir())) == 1


def test_two_threads_two_probes_one_sink(tmp_path: Path) -> None:
    """Two optimizers stepped from two threads into one sink: all whole, in order, none mixed."""
    shared = [sinks.Parquet(tmp_path / "run.parquet"), sinks.TensorBoard(tmp_path / "logdir")]
    memory = sinks.Memory()
    errors: list[BaseException] = []
    frames: dict[str, pd.DataFrame] = {}

    def train(name: str, lr: float) -> None:
        try:
            model = nn.Linear(4, 3)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            to = [*shared, memory]
            with lrprobe.attach({name: optimizer}, model, to=to, every=1) as probe:
                for _ in range(150):
                    optimizer.zero_grad()
                    model(torch.randn(5, 4)).square().mean().backward()
                    optimizer.step()
            frames[name] = probe.frame()
        except BaseException as error:  # noqa: BLE001 - to be seen in the test
            errors.append(error)

    threads = [threading.Thread(target=train, args=each) for each in (("a", 0.1), ("b", 0.2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sink in shared:
        sink.close()
    assert errors == []
    frames = {"memory": memory.frame(), "disk": lrprobe.read(tmp_path / "run.parquet")}
    frames["logdir"] = lrprobe.read(tmp_path / "logdir")
    for where, frame in frames.items():
        for name, lr in (("a", 0.1), ("b", 0.2)):
            rows = frame[frame["optimizer"] == name]
            expected = [step for step in range(1, 151) for _ in range(2)]
            assert rows["step"].tolist() == expected, (where, name)
            np.testing.assert_allclose(rows["lr"], lr, rtol=1e-6)


def test_optimizers_of_one_name_in_one_sink_are_told_apart(tmp_path: Path) -> None:
    """The second has `#1` added, also when it is attached anew; elsewhere it has its own name."""
    memory, disk = sinks.Memory(), sinks.Parquet(tmp_path / "run.parquet")
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    one, two = (torch.optim.SGD([p], lr=0.1 * (i + 1)) for i, p in enumerate(params))
    for param in params:
        param.grad = torch.ones(2)
    with lrprobe.attach(one, to=[memory, disk], every=1):
        lrprobe.attach(two, to=[memory, disk], every=1)
        with pytest.warns(UserWarning, match="replaces it"):
            again = lrprobe.attach(two, to=[memory, disk], every=1)
        one.step()
        two.step()
        again.close()
    disk.close()
    for frame in (memory.frame(), lrprobe.read(tmp_path / "run.parquet")):
        assert frame[["optimizer", "step"]].to_numpy().tolist() == [["SGD", 1], ["SGD#1", 1]]
        assert frame["lr"].tolist() == [0.1, 0.2]
    with lrprobe.attach(two, to=memory, every=1) as again:
        assert [hooks.name for hooks in again._recorder.hooks] == ["SGD#1"]
    with lrprobe.attach(two, every=1) as alone:
        assert [hooks.name for hooks in alone._recorder.hooks] == ["SGD"]


def test_a_probe_is_asked_from_another_thread() -> None:
    """`frame()` beside the training, figures arriving late, gives whole steps, each once."""
    done = threading.Event()
    seen: list[int] = []
    errors: list[BaseException] = []

    def between(step: int, probe: lrprobe.Probe) -> None:
        if step == 0:
            thread.start()

    def look() -> None:
        try:
            while not done.is_set():
                for recorder in list(open_recorders):
                    frame = lrprobe.Probe(recorder).frame()
                    assert (frame.groupby("step").size() == 2).all()
                    seen.append(int(frame["step"].max()))
        except BaseException as error:  # noqa: BLE001 - to be seen in the test
            errors.append(error)

    thread = threading.Thread(target=look)
    _, probe = training(150, batch_size=5, between=between)
    done.set()
    thread.join()
    probe.close()
    assert errors == []
    assert seen == sorted(seen)
    assert probe.frame()["step"].unique().tolist() == list(range(1, 151))


# --- Hostile names ------------------------------------------------------------------------------

HOSTILE = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a b",
    "🦆.weight",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "C:\\con",
    "\x00\n\r\t",
    "%2e%2e%2f",
    "\ud800",
    "same",
    "same",
    "x" * 2**20,
]


def test_hostile_names_stay_in_their_folder(tmp_path: Path) -> None:
    """No parameter's or optimizer's name makes a path outside, a tag that breaks, or a mix-up."""
    params = [(name, nn.Parameter(torch.ones(2))) for name in HOSTILE]
    optimizer = torch.optim.SGD([{"params": [p for _, p in params]}], lr=0.1)
    optimizer.param_groups[0]["param_names"] = [name for name, _ in params]
    inside = tmp_path / "a" / "b"
    to = [inside / "run.parquet", inside / "logdir"]
    with lrprobe.attach({"../<b>x</b>": optimizer}, to=to, every=1, track=1) as probe:
        for at, (_, param) in enumerate(params):
            param.grad = torch.full((2,), float(at + 1))
        optimizer.step()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in inside.iterdir()) == ["logdir", "run.parquet"]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert all(p.name.startswith(("part-", "events.out.tfevents.")) for p in files)
    assert sum(p.stat().st_size for p in files) < 50 * 2**20
    norms = [(at + 1) * 2**0.5 for at in range(len(params))]
    for frame in (probe.frame(), lrprobe.read(to[0]), lrprobe.read(to[1])):
        assert len(frame) == len(params)
        assert len(set(frame["parameter"])) == len(params)  # pandas 2 counts up to a NUL only
        np.testing.assert_allclose(frame["grad_norm"], norms, rtol=1e-6)
    assert frame["optimizer"].unique().tolist() == ["../<b>x</b>"]
    tags = board_tags(to[1])
    assert tags
    assert all(set(tag) <= ALLOWED and len(tag) < 300 for tag in tags)


ALLOWED = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-")


def board_tags(folder: Path) -> list[str]:
    """The tags of all scalars, as tensorboard itself finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload().Tags()["scalars"]


@pytest.mark.parametrize("where", ["run.parquet", "logdir"])
def test_foreign_files_execute_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a folder with pickles in place of its files loads none, and names each."""
    _, probe = training(3, to=tmp_path / where)
    probe.close()
    trap = tmp_path / "executed"
    evil = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    kind = "parquet" if where.endswith("parquet") else "tfevents"
    for name in ("part-00001-00000000-00000", "zzz"):
        (tmp_path / where / f"{name}.{kind}").write_bytes(evil)
    with pytest.warns(UserWarning, match=f"{kind}.*expected a .*found a broken or foreign"):
        frame = lrprobe.read(tmp_path / where)
    assert frame["step"].unique().tolist() == [1, 2, 3]
    assert not trap.exists()
