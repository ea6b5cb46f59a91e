"""Which ranks attach together: nobody waits without end for one that never does."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from rank_meetings import WAIT

from lrprobe.distributed import rendezvous

pytestmark = pytest.mark.slow  # ranks that wait for others, with time-outs of their own


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks tell."""
    told = launch(2, tmp_path_factory.mktemp("told"), "first_only", "late", "sharded", "unsharded")
    for case in ("twice", "early"):  # what is left over holds up the end of a process group
        told |= launch(2, tmp_path_factory.mktemp(case), case)
    return told


def test_attach_on_the_first_rank_only(told: dict[str, list[Any]]) -> None:
    """It waits a while, warns once, records alone; and later attaches find each other."""
    first, other = told["first_only"]
    for (took, messages, steps), (_, quiet, nothing) in zip(first[::2], other[::2], strict=True):
        assert WAIT <= took < WAIT + 5
        (message,) = messages
        assert f"rank 1 did not attach within {WAIT:g} s: this rank records alone" in message
        assert len(steps) == 3
        assert (quiet, nothing) == ([], None)
    took, messages, steps = first[1]
    assert took < WAIT + 5
    assert messages == []
    assert len(steps) == 3
    assert other[1][1:] == ([], None)


def test_the_wait_is_within_the_process_groups_own_limit(tmp_path: Path) -> None:
    """A rank that does not attach waits in its next collective meanwhile, and must not time out."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=3),
    )
    try:
        start = time.monotonic()
        assert rendezvous.missing_from([0, 1]) == [1]
        assert 1 <= time.monotonic() - start < 3
    finally:
        torch.distributed.destroy_process_group()


def test_a_rank_that_comes_late(told: dict[str, list[Any]]) -> None:
    """Each records alone; once both come, they record together."""
    for rank, (took, messages, steps, again, together) in enumerate(told["late"]):
        assert took < WAIT + 5
        assert len(messages) == 1
        assert f"rank {1 - rank} did not attach" in messages[0]
        assert len(steps) == 3
        assert again == []
        assert (together is None) == bool(rank)


def test_a_rank_that_attaches_twice(told: dict[str, list[Any]]) -> None:
    """To shards: the second time is an error, and the training goes on."""
    (_, messages, _), (quiet, nothing, steps) = told["twice"]
    assert any("sharded over ranks 0-1, of which rank 1 did not attach" in m for m in messages)
    assert (quiet, nothing, steps) == ([], None, None)


def test_a_rank_that_closes_early(told: dict[str, list[Any]]) -> None:
    """The others are told what is missing, within the time that they wait."""
    took, messages, steps = told["early"][0]
    assert took < 20
    assert steps[:2] == [1, 2]
    assert any("could not be recorded" in message for message in messages)


@pytest.mark.parametrize("wrap", ["fsdp2", "fsdp1", "tp"])
def test_a_part_alone_is_an_error(told: dict[str, list[Any]], wrap: str) -> None:
    """On the only rank that attaches, and in a process group with less than all parts."""
    for rank, result in enumerate(told["sharded"]):
        alone, few = result[wrap]
        for (message,) in filter(None, (alone, few)):
            assert "is sharded over ranks 0-1, of which rank" in message
            assert f"rank {1 - rank} did not attach" in message
            assert "Call attach on all ranks that hold a shard" in message


def test_a_mesh_of_one_rank_is_not_sharded(told: dict[str, list[Any]]) -> None:
    """Each rank records what it has, without a warning."""
    assert told["unsharded"] == [["1", "2", "3"]] * 2


def test_a_rank_that_dies_in_attach(tmp_path: Path) -> None:
    """The other records alone."""
    launch(2, tmp_path, "dying")
    assert (tmp_path / "survivor.txt").read_text() == "True 1 [1, 2]"
