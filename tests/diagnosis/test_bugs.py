"""Each bug of the table is named, with its code, by what the frame says."""

from pathlib import Path

import pytest
from bugs import BUGS, MAKERS, Bug

import lrprobe

CASES = [
    pytest.param(bug, optimizer, every, id=f"{bug.code}: {bug.name}, {optimizer}, every={every}")
    for bug in BUGS
    for optimizer in bug.optimizers
    for every in bug.every
]


@pytest.mark.sampled
@pytest.mark.parametrize(("bug", "optimizer", "every"), CASES)
def test_the_bug_is_named(bug: Bug, optimizer: str, every: int, tmp_path: Path) -> None:
    """Its code is among those found, with evidence, meaning and advice."""
    result = lrprobe.diagnose(bug.run(MAKERS[optimizer], every, tmp_path))
    named = [each for each in result if each.code == bug.code]
    assert named, f"missed ({bug.reported}): got {sorted({each.code for each in result})}"
    for each in named:
        assert each.evidence
        assert each.meaning
        assert each.advice


def test_the_table_is_large_enough() -> None:
    """At least 40 bugs, each of which names where it was reported."""
    assert len(BUGS) >= 40
    assert all(bug.reported for bug in BUGS)
