"""Two processes, each a host's: the frame is that of the same loop by hand, in one place."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("host", ["lightning", "transformers", "accelerate", "ignite"])
def test_two_processes_have_the_frame_of_the_loop(tmp_path, host, monkeypatch):
    """Row for row and bit for bit under DDP, written by the first process, in each host."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("PYTHONWARNINGS", "error:lrprobe")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [sys.executable, *launch, str(script), host, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert {f"rank {rank} is done" for rank in (0, 1)} <= set(done.stdout.splitlines())
