"""The background thread never harms the training, and never loses a record in silence."""

import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_sinks import make_record

import lrprobe
from lrprobe import delivery, worker
from lrprobe.delivery import Delivery


class Kept:
    """A sink that keeps the steps it got, and fails or waits where a test says so."""

    def __init__(self):
        self.steps, self.threads, self.flushes, self.closed = [], set(), 0, 0
        self.error = None
        self.gate = threading.Event()
        self.gate.set()

    def write(self, record):
        """Keep its step."""
        self.gate.wait(10)
        if self.error:
            raise self.error
        self.threads.add(threading.current_thread().name)
        self.steps.append(record.step)

    def flush(self):
        """Count it."""
        if self.error:
            raise self.error
        self.flushes += 1

    def close(self):
        """Count it."""
        self.closed += 1

    def __repr__(self):
        return "Kept()"


class Plain:
    """The least that a sink has."""

    def __init__(self):
        self.steps = []

    def write(self, record):
        """Keep its step."""
        self.steps.append(record.step)

    def close(self):
        """Do nothing."""


@pytest.fixture
def sink():
    """One that does what the test says, and holds up no other test."""
    kept = Kept()
    yield kept
    kept.gate.set()


@pytest.fixture(autouse=True)
def no_thread_left():
    """Whatever a test did, the thread ends with the last delivery."""
    yield
    until(lambda: not running())


def running():
    """The background thread, if there is one."""
    return [t for t in threading.enumerate() if t.name == "lrprobe-delivery"]


def until(condition, seconds=5):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def put(to, *steps):
    """Put records of these steps."""
    for step in steps:
        to.put(lambda step=step: make_record(step))


def test_records_come_in_order_in_the_background(sink):
    """Every sink gets every record, in order, in one background thread; None is no record."""
    other = Plain()
    sender = Delivery([sink, other])
    put(sender, 1, 2)
    assert sender.put(lambda: None)
    put(sender, 3)
    assert sender.drain()
    assert sink.steps == other.steps == [1, 2, 3]
    assert sink.threads == {"lrprobe-delivery"}
    assert sender.problems() == []
    assert sender.lost == 0
    sender.close()


def test_put_costs_microseconds(sink):
    """The training thread does not wait for a sink, nor for a record to be made."""
    sink.gate.clear()
    sender = Delivery([sink])
    record = make_record(1)
    taken = []
    for _ in range(900):
        start = time.perf_counter()
        sender.put(lambda: record)
        taken.append(time.perf_counter() - start)
    # The machine may stall: the median tells of `put`, and the sum that none of them waited.
    assert statistics.median(taken) < 200e-6
    assert sum(taken) < 5
    assert not sender.drain(timeout=0.01)
    sink.gate.set()
    assert sender.drain()
    assert len(sink.steps) == 900
    sender.close()


def test_a_failing_sink_stops_nothing(sink, monkeypatch):
    """Others go on; its records wait, are written when it recovers; it is told twice in all."""
    monkeypatch.setattr(worker, "_PAUSES", (0.02, 0.1))
    other = Plain()
    sender = Delivery([sink, other])
    put(sender, 1)
    sender.drain()
    sink.error = OSError("disk full")
    put(sender, 2, 3, 4)
    sender.drain()
    time.sleep(0.1)
    put(sender, 5)
    sender.drain()
    assert other.steps == [1, 2, 3, 4, 5]
    assert sink.steps == [1]
    (message,) = sender.problems()
    assert message.startswith("Kept() failed: OSError: disk full; its records wait in memory")
    sink.error = None
    until(lambda: sink.steps == [1, 2, 3, 4, 5])
    put(sender, 6)
    sender.drain()
    sender.flush()
    (message,) = sender.problems()
    assert message == "Kept() works again; the waiting records have been written"
    sender.close()
    assert sink.steps == [1, 2, 3, 4, 5, 6]
    assert sender.problems() == []
    assert sender.lost == 0


def test_retries_are_spaced(sink, monkeypatch):
    """A sink that stays broken is tried again after growing pauses, not without end."""
    monkeypatch.setattr(worker, "_PAUSES", (0.05, 10.0))
    tries = []
    sink.write = lambda _: tries.append(time.monotonic()) or 1 / 0
    sender = Delivery([sink])
    put(sender, 1)
    until(lambda: len(tries) == 4)
    gaps = [b - a for a, b in pairwise(tries)]
    assert gaps[0] >= 0.05
    assert gaps[1] >= 0.1
    assert gaps[2] >= 0.2
    del sink.write
    sender.close()
    assert sink.steps == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), ValueError()])
def test_any_exception_of_a_sink_is_survived(sink, error):
    """Not even what ends programs ends the thread."""
    sender = Delivery([sink])
    sink.error = error
    put(sender, 1)
    sender.drain()
    sink.error = None
    sender.close()
    assert sink.steps == [1]


def test_what_is_lost_is_counted(sink, monkeypatch):
    """Past the bound of a failing sink the oldest are lost; close says how many, and why."""
    monkeypatch.setattr(worker, "WAITING_RECORDS", 5)
    sender = Delivery([sink, Plain()], owned=[sink])
    sink.error = OSError("disk full")
    for step in range(12):
        put(sender, step)
        sender.drain()
    assert sender.lost == 7
    sink.error = None
    sender.flush()
    assert sink.steps == [7, 8, 9, 10, 11]
    assert sender.problems()[-1].endswith("the waiting records have been written, 7 were lost")
    sink.error = OSError("disk gone")
    put(sender, 12, 13)
    sender.close()
    assert sink.closed == 1
    assert sender.lost == 9
    assert sender.problems()[-1] == "9 records were not written to Kept(): OSError: disk gone"


def test_the_bound_counts_bytes_too(sink, monkeypatch):
    """Large records reach the bound of a failing sink by their bytes."""
    monkeypatch.setattr(worker, "WAITING_BYTES", 3 * make_record(1).nbytes)
    sender = Delivery([sink])
    sink.error = OSError("disk full")
    put(sender, *range(10))
    sender.drain()
    sink.error = None
    sender.close()
    assert sink.steps == [7, 8, 9]


@pytest.mark.parametrize(("bound", "nbytes"), [(5, 0), (1000, worker.WAITING_BYTES // 5)])
def test_a_hanging_disk_fills_no_memory(sink, monkeypatch, bound, nbytes):
    """While a sink hangs a bounded number waits; the rest is refused, told once and counted."""
    monkeypatch.setattr(delivery, "_is_near", lambda sink: True)
    monkeypatch.setattr(worker, "WAITING_RECORDS", bound)
    sender = Delivery([sink])
    sink.gate.clear()
    taken = [sender.put(lambda: make_record(1), nbytes) for _ in range(12)]
    assert taken == [True] * 5 + [False] * 7
    sink.gate.set()
    sender.drain()
    assert len(sink.steps) == 5
    assert sender.put(lambda: make_record(2))
    sender.close()
    first, last = sender.problems()
    assert "records are lost until the sinks catch up" in first
    assert last == "7 records were lost while too many waited for the sinks"
    assert sender.lost == 7


@pytest.mark.parametrize("bound", ["WAITING_RECORDS", "WAITING_BYTES"])
def test_a_hanging_sink_holds_up_no_other(sink, monkeypatch, bound, tmp_path):
    """A disk has every record, at once; what is too much for the one that hangs is counted."""
    most = 5 * make_record(1).nbytes - 1 if bound == "WAITING_BYTES" else 5
    monkeypatch.setattr(worker, bound, most)
    disk = lrprobe.sinks.Parquet(tmp_path / "run.parquet")
    sender = Delivery([sink, disk], owned=[disk])
    sink.gate.clear()
    for step in range(12):
        assert sender.put(lambda step=step: make_record(step))
        assert sender.drain(near=True)
    assert sender.flush(timeout=0.5) is False
    assert lrprobe.read(tmp_path / "run.parquet", by="model")["step"].tolist() == [*range(12)]
    monkeypatch.setattr(delivery, "_EXIT_SECS", 0.1)
    assert sender.close() is False
    assert "Kept() did not finish within 0.1 seconds" in sender.problems()
    assert sender.lost == 7
    sink.gate.set()
    assert sender.close()
    assert sink.steps == [0, 1, 2, 3, 4]


def test_a_slow_sink_holds_up_no_other(sink, monkeypatch):
    """What it has not caught up with waits for it alone; memory has it at once, also a subclass."""
    monkeypatch.setattr(worker, "WAITING_RECORDS", 8)

    class Mine(lrprobe.sinks.Memory):
        pass

    memory = Mine()
    sender = Delivery([memory, sink])
    sink.gate.clear()
    put(sender, *range(8))
    assert sender.drain(near=True)
    assert memory.frame(by="model")["step"].tolist() == [*range(8)]
    assert not sink.steps
    sink.gate.set()
    sender.close()
    assert sink.steps == [*range(8)]
    assert sender.lost == 0


def test_a_record_that_cannot_be_made_is_told(sink):
    """An error in making a record loses that one only, and is told once for a row of them."""
    sender = Delivery([sink])
    for _ in range(3):
        sender.put(lambda: 1 / 0)
    put(sender, 1)
    sender.drain()
    assert sink.steps == [1]
    (message,) = sender.problems()
    assert (
        message == "a record could not be created, and is lost: ZeroDivisionError: division by zero"
    )
    sender.close()
    assert sender.problems() == ["3 records were lost because they could not be created"]
    assert sender.lost == 3


def test_sinks_are_flushed_where_nothing_new_comes(sink):
    """A sink is flushed within its flush_secs after a write, and not again without another."""
    sink.flush_secs = 0.05
    sender = Delivery([sink])
    put(sender, 1)
    until(lambda: sink.flushes == 1, seconds=1)
    time.sleep(0.1)
    assert sink.flushes == 1
    put(sender, 2)
    until(lambda: sink.flushes == 2, seconds=1)
    sender.close()


def test_flush_reaches_the_sinks(sink):
    """After flush() everything put so far is written and flushed."""
    sender = Delivery([sink, Plain()])
    put(sender, 1)
    assert sender.flush()
    assert (sink.steps, sink.flushes) == ([1], 1)
    sender.close()


def test_a_failing_flush_is_an_episode_too(sink):
    """A flush that raises is told and tried again; meanwhile records wait, none comes twice."""
    sender = Delivery([sink])
    put(sender, 1)
    sender.drain()
    sink.error = OSError("disk full")
    sender.flush()
    put(sender, 2)
    sender.drain()
    (message,) = sender.problems()
    assert "disk full" in message
    sink.error = None
    sender.close()
    assert sink.steps == [1, 2]


def test_close_gives_a_sink_a_second_chance(sink):
    """A sink that fails once when it is closed, and then helps itself, loses nothing."""
    flush, errors = sink.flush, [OSError("folder removed")]

    def fail_once():
        if errors:
            raise errors.pop()
        flush()

    sender = Delivery([sink], owned=[sink])
    put(sender, 1)
    sender.drain()
    sink.flush = fail_once
    sender.close()
    assert sink.flushes == 1
    failed, recovered = sender.problems()
    assert "folder removed" in failed
    assert "works again" in recovered
    assert sender.lost == 0


def test_unflushed_records_are_not_passed_over(sink):
    """What a sink took but could not flush before it failed to close is counted as lost."""
    sender = Delivery([sink], owned=[sink])
    put(sender, 1, 2)
    sender.drain()
    sink.error = OSError("disk full")
    sink.close = lambda: 1 / 0
    sender.close()
    messages = sender.problems()
    assert "Kept() could not be closed: ZeroDivisionError: division by zero" in messages
    assert messages[-1].startswith("2 records were not written to Kept()")


def test_only_what_is_owned_is_closed(sink):
    """close() closes the owned sinks, once, and flushes the others."""
    other = Kept()
    sender = Delivery([sink, other], owned=[sink])
    put(sender, 1)
    assert sender.close()
    assert sender.close()
    assert (sink.closed, other.closed) == (1, 0)
    assert other.flushes >= 1
    assert not sender.put(lambda: make_record(2))
    assert sender.drain()
    assert sender.flush()
    assert other.steps == [1]


def test_a_shared_sink_is_called_by_one_thread(sink):
    """Two deliveries fed from two threads write every record to a shared sink, one at a time."""
    senders = [Delivery([sink], owned=[sink]), Delivery([sink])]
    inside, together = [], []
    write = sink.write

    def watched(record):
        inside.append(1)
        together.append(len(inside))
        write(record)
        inside.pop()

    sink.write = watched
    feeders = [
        threading.Thread(target=put, args=(sender, *range(at * 100, at * 100 + 100)))
        for at, sender in enumerate(senders)
    ]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    senders[0].close()
    assert sink.closed == 0
    put(senders[1], 200)
    senders[1].close()
    assert sink.closed == 1
    assert set(together) == {1}
    for steps in (range(100), range(100, 201)):
        assert [step for step in sink.steps if step in steps] == list(steps)


def test_a_failure_of_a_shared_sink_is_told_once(sink):
    """One of the deliveries that share a failing sink has the message, not each."""
    senders = [Delivery([sink]), Delivery([sink])]
    sink.error = OSError("disk full")
    for sender in senders:
        put(sender, 1)
        sender.drain()
    assert len([m for sender in senders for m in sender.problems()]) == 1
    sink.error = None
    for sender in senders:
        sender.close()
    assert sink.steps == [1, 1]


def test_problems_of_a_sink_are_passed_on(sink):
    """What a sink has to say itself comes out of problems(), for the training thread to warn of."""
    sink.problems = lambda: ["half is dropped"] if sink.steps == [1] else []
    sender = Delivery([sink])
    put(sender, 1)
    sender.drain()
    put(sender, 2)
    sender.drain()
    assert sender.problems() == ["half is dropped"]
    sender.close()


def test_the_thread_ends_and_comes_back(sink):
    """No thread is left when the last delivery is closed, and a later one has it again."""
    for step in range(3):
        senders = [Delivery([sink]), Delivery([sink])]
        assert len(running()) == 2  # one of the sink's own, which is not ours
        put(senders[0], step)
        senders[0].close()
        put(senders[1], step)
        senders[1].close()
        until(lambda: not running())
    assert sink.steps == [0, 0, 1, 1, 2, 2]


def test_a_forgotten_delivery_is_finished(sink):
    """Garbage collection writes what is left, closes what is owned, and keeps nothing alive."""
    sender = Delivery([sink], owned=[sink])
    put(sender, 1, 2)
    gone = weakref.ref(sender)
    del sender
    gc.collect()
    assert gone() is None
    until(lambda: sink.closed == 1)
    assert sink.steps == [1, 2]
    last = weakref.ref(sink)
    assert last() is sink


def test_records_are_not_kept(sink):
    """A record that all sinks have written is freed."""
    sender = Delivery([sink])
    record = make_record(1)
    array = weakref.ref(record.tables["model"]["lr"])
    sender.put(lambda record=record: record)
    del record
    until(lambda: array() is None)  # with nothing coming after it
    sender.close()


def test_a_sink_may_ask_for_its_own_end(sink):
    """Waiting from within a sink returns at once instead of waiting forever."""
    sender = Delivery([sink])
    sink.write = lambda _: sink.steps.append((sender.drain(), sender.close()))
    put(sender, 1)
    until(lambda: sink.steps == [(False, False)])


# --- Processes ----------------------------------------------------------------------------------


def in_child(work):
    """Run in a forked child; its exit status is 0 where ``work`` returned true in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: that is the test
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have():
    """Another thread was taking a record when the process was forked."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        held, release = threading.Event(), threading.Event()

        def hold():
            with probe._recorder._lock:
                held.set()
                release.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def work():
            optimizer.step()
            return probe.step == 1

        assert in_child(work) == 0
        release.set()
        thread.join()


def test_a_forked_child_writes_nothing(sink, tmp_path):
    """In the child every method returns at once, and no sink is touched; the parent goes on."""
    trace = tmp_path / "trace"
    sink.close = lambda: trace.write_text(str(os.getpid()))
    sink.gate.clear()  # the thread is in the middle of something
    sender = Delivery([sink], owned=[sink])
    put(sender, 1, 2)

    def work():
        sink.gate.set()
        start = time.monotonic()
        taken = sender.put(lambda: make_record(3))
        answers = (sender.drain(), sender.flush(), sender.close())
        waited = time.monotonic() - start  # a minute where a thread is waited for
        gc.collect()
        return not taken and all(answers) and not sink.steps and waited < 5

    status, touched = in_child(work), trace.exists()
    sink.gate.set()
    sender.close()
    assert (status, touched) == (0, False)
    assert sink.steps == [1, 2]
    assert trace.read_text() == str(os.getpid())


def test_a_child_may_have_deliveries_of_its_own(sink):
    """A forked process that trains itself records like any other."""
    sender = Delivery([sink])

    def work():
        own = Kept()
        mine = Delivery([own])
        put(mine, 5)
        mine.close()
        return own.steps == [5]

    assert in_child(work) == 0
    put(sender, 1)
    sender.close()
    assert sink.steps == [1]


class Samples(torch.utils.data.Dataset):
    """A dataset whose worker holds a copy of the delivery, and uses it."""

    def __init__(self, sender, folder):
        self.sender, self.folder = sender, folder

    def __len__(self):
        return 4

    def __getitem__(self, at):
        taken = self.sender.put(lambda: make_record(99))
        self.sender.close()
        return int(taken)


def test_dataloader_workers_write_nothing(tmp_path):
    """Forked workers of a DataLoader neither write nor hang, and the parent's records are whole."""

    class File(Plain):
        def write(self, record):
            with (tmp_path / "steps").open("a") as file:
                file.write(f"{record.step}\n")

    sender = Delivery([File()])
    put(sender, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader = torch.utils.data.DataLoader(
            Samples(sender, tmp_path), num_workers=2, multiprocessing_context="fork"
        )
        assert sum(int(batch) for batch in loader) == 0
    put(sender, 2)
    sender.close()
    assert (tmp_path / "steps").read_text() == "1\n2\n"


SCRIPT = """
import os, signal, sys, threading, time, types
package = sys.modules["lrprobe"] = types.ModuleType("lrprobe")  # or it would import torch: slow
package.__path__ = [{package!r}]
from lrprobe.delivery import Delivery
def make_record(step): return types.SimpleNamespace(step=step, nbytes=0)
class Slow:
    flush_secs = 100
    def __init__(self): self.held = []
    def write(self, record): time.sleep(0.01); self.held.append(record.step)
    def flush(self): print(*self.held, flush=True); self.held = []
    def close(self): print("closed", flush=True)
slow = Slow()
sender = Delivery([slow], owned=[slow])
for step in range(5): sender.put(lambda step=step: make_record(step))
{end}
"""
PACKAGE = str(Path(delivery.__file__).parent)
ENDS = {
    "the script's end": "",
    "an exception": "raise RuntimeError('training failed')",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "sys.exit": "sys.exit(3)",
    "a training thread": """
def train():
    time.sleep(0.2)
    sender.put(lambda: make_record(5))
threading.Thread(target=train).start()""",
    "a forked process": """
import multiprocessing
def train():
    global sender
    sender = Delivery([Slow()])
    sender.put(lambda: make_record(7))
multiprocessing.get_context("fork").Process(target=train).start()""",
}


def test_nothing_is_lost_at_the_end():
    """However the interpreter ends, what was put is written and flushed, without close()."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(package=PACKAGE, end=end)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, end in ENDS.items()
    }
    for name, process in running.items():
        out, err = process.communicate(timeout=60)
        written = re.findall(r"\d+", out)
        expected = ["0", "1", "2", "3", "4"]
        expected += {"a training thread": ["5"], "a forked process": ["7"]}.get(name, [])
        assert sorted(written) == expected, (name, out, err)
        assert out.count("closed") == 1, (name, out, err)
        assert "lrprobe:" not in err, (name, err)


def test_problems_nobody_asked_for_are_told_at_the_end():
    """Losses that no training thread was told of are warned of when the interpreter ends."""
    end = "slow.write = None"
    code = SCRIPT.format(package=PACKAGE, end=end)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"UserWarning: lrprobe: [1-5] records were not written to Slow", ran.stderr)
