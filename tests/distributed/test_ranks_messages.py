"""A recorded step is few messages, of the documented size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch

from lrprobe.distributed.exchange import counted_rows
from lrprobe.engine.buffers import blank
from lrprobe.engine.columns import Row, slots_of

TENSORS = 7
"""Tensors of the net, all of whose rates differ by element under Adam, and none under SGD."""


def documented(tensors: int, tracked: int, differing: int) -> list[int]:
    """Bytes of the messages of a recorded step: docs/distributed.md."""
    sizes = [48 * (tensors + 1), 8 * (34 * tensors + 4 * tracked)]
    return [*sizes, 36_864 * differing] if differing else sizes


def check_messages(told: list[Any], sizes: list[int], before: int = 0) -> None:
    """Messages of recorded steps (1, 2 and 4), and none in step 3 nor at the end.

    Args:
        told: by each rank.
        sizes: of the messages.
        before: partial gradients that are added up before them.
    """
    for rank in told:
        calls = [[size for _, size in step] for step in rank["steps"]]
        assert calls[2] == rank["close"] == []
        for step in (0, 1, 3):
            assert calls[step][before:] == sizes, rank["steps"]
            assert len(calls[step]) == before + len(sizes)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Calls of torch.distributed on two ranks."""
    cases = ("ddp-sgd", "fsdp2-sgd", "fsdp2-adamw", "sequence-sgd", "sequence-adamw")
    folder = tmp_path_factory.mktemp("told")
    return launch(2, folder, *(f"counted-{case}" for case in cases))


def test_plain_tensors_of_all_ranks_are_no_message(told: dict[str, list[Any]]) -> None:
    """Rank 0 has all of them."""
    check_messages(told["counted-ddp-sgd"], [])


def test_a_recorded_step_is_two_messages(told: dict[str, list[Any]]) -> None:
    """Of the documented size; three where rates differ by element."""
    tracked = 3 * TENSORS
    check_messages(told["counted-fsdp2-sgd"], documented(TENSORS, tracked, 0))
    check_messages(told["counted-fsdp2-adamw"], documented(TENSORS, tracked, TENSORS))


def test_partial_gradients_are_one_message_more(told: dict[str, list[Any]]) -> None:
    """Under sequence parallelism."""
    tracked = 3 * TENSORS
    for kind, differing in (("sgd", 0), ("adamw", TENSORS)):
        sizes = documented(TENSORS, tracked, differing)
        check_messages(told[f"counted-sequence-{kind}"], sizes, before=1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_messages_do_not_grow_with_ranks(count: int, tmp_path: Path) -> None:
    """As many, and as long, on 4 and 8 ranks as on 2."""
    for told in launch(count, tmp_path, "counted-fsdp2-sgd", "counted-hsdp-sgd").values():
        check_messages(told, documented(TENSORS, 3 * TENSORS, 0))


def test_message_sizes_are_the_documented_formulas() -> None:
    """docs/distributed.md works them out; a tensor's size does not matter."""
    for size in (100, 4000):
        rows = [
            Row(f"w{i}", 0, "group0", (size, 100), "adam", 1e-3, torch.arange(2), shared_rate=i < 3)
            for i in range(10)
        ]
        buffers = blank(len(rows), slots_of(rows)[1], torch.device("cpu"))
        folded = buffers.fold_rows(counted_rows(rows))
        sizes = [buffers.maxima.nbytes, buffers.added.nbytes, folded.nbytes]
        assert sizes == documented(10, 20, 7)
