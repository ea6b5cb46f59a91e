"""What the tests of all hosts share: a small network, its data, and how frames are compared."""

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import lrprobe

BATCHES = 12


def loader() -> DataLoader:
    """12 batches of 8, the same every time, in the same order."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8 * BATCHES, 10, generator=generator)
    labels = torch.randint(0, 4, (8 * BATCHES,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def net() -> nn.Module:
    """Two layers, the same every time."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))


def by_hand(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    accumulate: int = 1,
    epochs: int = 1,
    after: Callable[[], object] = lambda: None,
    **options: object,
) -> pd.DataFrame:
    """The frame of the loop that anyone would write, every step recorded."""
    loss = loss or (lambda x, y: nn.functional.cross_entropy(model(x), y))
    with lrprobe.attach(optimizer, model, **{"every": 1, **options}) as probe:
        done = 0
        for _ in range(epochs):
            for x, y in loader():
                (loss(x, y) / accumulate).backward()
                done += 1
                if done % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    after()
    return probe.frame()


def assert_same(host: pd.DataFrame, hand: pd.DataFrame) -> None:
    """Row for row and bit for bit, all but the time of day."""
    assert len(hand) > 0
    host, hand = host.drop(columns="time"), hand.drop(columns="time")
    pd.testing.assert_frame_equal(host, hand, check_exact=True)


def assert_resumed(resumed: pd.DataFrame, whole: pd.DataFrame, *, first: int) -> None:
    """The same as a run that was never cut, but for what a new process cannot know.

    At ``first``, its first step, a resumed run has no gradient of a step before to compare with:
    ``grad_persistence`` is NaN there, and there alone. It is a new attempt, and its groups have
    the ``initial_lr`` that it saw first.
    """
    assert len(whole) > 0
    begins = resumed["step"] == first
    assert begins.any()
    assert resumed.loc[begins, "grad_persistence"].isna().all()
    whole = whole.assign(grad_persistence=whole["grad_persistence"].mask(whole["step"] == first))
    columns = ["attempt", "initial_lr"]
    assert_same(resumed.drop(columns=columns), whole.drop(columns=columns))


def trackio_history(run: Any) -> dict[int, dict[str, float]]:
    """What a finished local run of Trackio has logged, by step."""
    from trackio.sqlite_storage import SQLiteStorage

    found: dict[int, dict[str, float]] = {}
    for row in SQLiteStorage.get_logs(run.project, run.name):
        row.pop("timestamp")
        found.setdefault(row.pop("step"), {}).update(row)
    return found


def wandb_history(folder: Path) -> list[dict[str, str]]:
    """The rows that offline runs of Weights & Biases in a folder have logged, values as JSON."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(100):  # finish() may return a moment before all is in the file
        records = [
            wandb_internal_pb2.Record.FromString(data)
            for path in folder.rglob("*.wandb")
            for data in _logged(path.read_bytes())
        ]
        if "exit" in [record.WhichOneof("record_type") for record in records]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"no run in {folder} came to its end")
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def _logged(data: bytes) -> Iterator[bytes]:
    """The records in LevelDB's log format, after a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a record does not begin at the very end of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""
