"""Fixtures of several files."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    """What is drawn is the same every time."""
    torch.manual_seed(0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are taken without compiling anything, which takes a second for each program."""
    monkeypatch.setenv("LRPROBE_ENGINE", "eager")
