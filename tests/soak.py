"""What takes long: `make soak`. Each test prints what it measured, for docs/reliability.md."""

from __future__ import annotations

import gc
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings
from test_reliability_faults import assert_whole_after, end_trainings, evidence, whole
from test_reliability_machine import Training
from test_reliability_training import attach_and_close
from torch import nn

import lrprobe

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "10000"))


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_kills(tmp_path: Path) -> None:
    """After SIGKILL at random instants, both datasets are whole with all that was flushed."""
    assert len(end_trainings(tmp_path, [{"end": "SIGKILL", "most": 1.0}] * KILLS)) == KILLS
    lost = []
    for at in range(KILLS):
        assert_whole_after(tmp_path, at)
        steps, _ = evidence(tmp_path, at)
        table, _ = whole(tmp_path, at)
        last = max(steps.values())
        lost.append(
            max((last - when for step, when in steps.items() if step not in table), default=0)
        )
    print(f"{KILLS} kills, flush_secs=0.05: the oldest record lost was {max(lost):.3f} s old")


def test_kills_at_the_default_interval(tmp_path: Path) -> None:
    """At the default of 5 seconds, no record that is older is lost."""
    jobs = [
        {"end": "SIGKILL", "flush_secs": 5.0, "most": 8.0, "pause": 0.002, "part_bytes": 2**24}
    ] * max(KILLS // 10, 2)
    killed = end_trainings(tmp_path, jobs)
    lost = []
    for at in range(len(jobs)):
        steps, _ = evidence(tmp_path, at)
        table, board = whole(tmp_path, at)
        end = killed[str(tmp_path / str(at))]
        for there in (table, board):
            ages = [end - when for step, when in steps.items() if step not in there]
            lost.append(max(ages, default=0.0))
    print(f"{len(jobs)} kills, flush_secs=5: the oldest record lost was {max(lost):.3f} s old")
    assert max(lost) < 5.5  # half a second for the machine


@pytest.mark.filterwarnings("ignore:lrprobe. the records in memory have reached their limit")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Over 20,000 recorded steps, to all sinks, memory, objects, threads and handles stay flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    memory = lrprobe.sinks.Memory(max_bytes=8 * 2**20)
    to = [memory, tmp_path / "run.parquet", tmp_path / "logdir"]
    held = []
    with lrprobe.attach(optimizer, model, to=to, every=1, track=3, batch_size=16) as probe:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
            if (step + 1) % (STEPS // 20) == 0:
                probe.flush()
                gc.collect()
                handles = len(list(Path("/proc/self/fd").iterdir()))
                held.append((resident(), len(gc.get_objects()), threading.active_count(), handles))
    table = pd.DataFrame(held, columns=["resident", "objects", "threads", "handles"])
    print(table.assign(resident=table["resident"] / 2**20).round(1).to_string())
    frame = lrprobe.read(tmp_path / "run.parquet")
    assert frame["step"].nunique() == STEPS
    assert not frame.duplicated(["step", "parameter"]).any()
    late = table[len(table) // 2 :]  # the bounded memory and the growing part are full by then
    assert np.ptp(late["resident"]) < 64 * 2**20
    for what in ("objects", "threads", "handles"):
        assert late[what].max() <= late[what].min() + (2000 if what == "objects" else 1)


def test_attaching_ten_thousand_times(tmp_path: Path) -> None:
    """attach → step → close, ten thousand times, leaves no memory, object, thread or handle."""
    held = attach_and_close(ROUNDS, tmp_path)
    for what, values in held.items():
        print(f"{what} at each tenth of {ROUNDS:,}: {values}")
    for what, allowed in (("bytes", 20_000), ("objects", 60), ("threads", 1), ("handles", 2)):
        assert held[what][-1] - held[what][4] <= allowed, (what, held[what])


LongTraining = type("LongTraining", (Training,), {})
TestLongTraining = LongTraining.TestCase
TestLongTraining.__doc__ = (
    "The state machine of the tests, eight times as long, and new every time."
)
TestLongTraining.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
