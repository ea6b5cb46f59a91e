"""Fixtures for steps that wait."""

from __future__ import annotations

import pytest

from lrprobe import gathering
from lrprobe.engine import deferred


@pytest.fixture
def from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is computed at once."""
    monkeypatch.setattr(gathering, "AT_ONCE", 0)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were computed together, each time."""
    counts: list[int] = []
    original = deferred.Deferred._compute

    def compute(self: deferred.Deferred, steps: list[deferred.CopiedStep]) -> None:
        counts.append(len(steps))
        original(self, steps)

    monkeypatch.setattr(deferred.Deferred, "_compute", compute)
    return counts
