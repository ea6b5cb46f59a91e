"""The plugin that runs other projects' suites with a probe on every optimizer: it finds things."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = """
import torch

def train(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape)
    optimizer.step()

def params():
    return [torch.nn.Parameter(torch.randn(3))]

def test_same():
    train(torch.optim.Adam(params()))

def test_other_draws():
    optimizer = torch.optim.SGD(params())
    if optimizer._optimizer_step_post_hooks:
        torch.rand(1)
    train(optimizer)

def test_other_outcome():
    optimizer = torch.optim.SGD(params())
    train(optimizer)
    assert not optimizer._optimizer_step_post_hooks

def test_unstable():
    optimizer = torch.optim.SGD(params())
    torch.seed()
    train(optimizer)

class Halved(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=0.5 * self.param_groups[0]["lr"])

def test_measured():
    optimizer = Halved(params(), lr=0.1)
    for _ in range(5):
        train(optimizer)
"""


@pytest.mark.slow
def test_what_a_probe_changes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other draws, another outcome, a rule that is given up; not what differs from run to run."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "peers")
    import peers_run

    (tmp_path / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(peers_run, "BUILD", tmp_path)
    monkeypatch.setattr(peers_run, "unpacked", lambda suite: tmp_path)
    monkeypatch.setattr(peers_run, "version", lambda package: "1.0")
    found = peers_run.compared(peers_run.Suite("them", ("test_suite.py",)))
    assert found["tests"] == found["optimizers"] == 5
    assert found["steps"] == 9
    tests = [f"test_suite.py::test_other_{what}" for what in ("draws", "outcome")]
    assert found["differing"] == tests
    assert found["unstable"] == ["test_suite.py::test_unstable"]
    assert found["measured"] == {"Halved": 3}
    assert len(found["warnings"]) == 1
    assert found["errors"] == found["leftovers"] == []
    assert "| them 1.0 | 5 | 4 | 5 | 9 | 2 | 1 | 0 | 0 | 1 | Halved 3 | 0 |" in peers_run.table(
        [found]
    )
