"""The examples of the hosts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hosts import wandb_history

import lrprobe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name, folder):
    """Run one with lrprobe's warnings as errors; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error:lrprobe", str(EXAMPLES / f"with_{name}.py")],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=os.environ.copy(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "logdir", "last"),
    [
        ("accelerate", "runs/accelerate", 70),
        ("ignite", "runs/ignite", 216),
        ("lightning", "runs/lightning/version_0", 210),
        ("transformers", "runs/transformers/runs/lrprobe", 120),
    ],
)
def test_an_example_leaves_its_rates_where_the_host_has_its_figures(name, logdir, last, tmp_path):
    """The logdir that it names has them, up to the last step."""
    printed = example(name, tmp_path)
    assert "TensorBoard: runs/" in printed
    frame = lrprobe.read(tmp_path / logdir)
    assert frame["step"].max() == last
    assert frame["effective_lr_p50"].notna().all()


def test_the_trackers_example_leaves_the_same_steps_in_each(tmp_path):
    """Weights & Biases, MLflow, JSON Lines and the function."""
    assert "recorded steps: [1, 20, 40, 60]" in example("trackers", tmp_path)
    assert sorted(set(pd.read_json(tmp_path / "run.jsonl", lines=True)["step"])) == [1, 20, 40, 60]
    rows = wandb_history(tmp_path)
    tag = "l2_norm/update/hidden1.weight"
    assert [row["lrprobe/step"] for row in rows if tag in row] == ["1", "20", "40", "60"]
    assert sum("loss" in row for row in rows) == 72
