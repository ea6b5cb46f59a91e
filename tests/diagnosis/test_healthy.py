"""No healthy run of the table is accused."""

from pathlib import Path

import pytest
from healthy import HEALTHY, Healthy

import lrprobe

CASES = [
    pytest.param(row, every, id=f"{row.name}, every={every}")
    for row in HEALTHY
    for every in row.every
]


@pytest.mark.sampled(17)
@pytest.mark.parametrize(("row", "every"), CASES)
def test_a_healthy_run_is_not_accused(row: Healthy, every: int, tmp_path: Path) -> None:
    """It has no finding; notes are allowed."""
    accused = [str(each) for each in lrprobe.diagnose(row.run(every, tmp_path)).findings]
    assert not accused, "accused: " + "; ".join(accused)


def test_the_table_is_large_enough() -> None:
    """At least 60 runs."""
    assert len(HEALTHY) >= 60
