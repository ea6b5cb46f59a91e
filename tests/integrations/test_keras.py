"""Keras 3, each backend in processes of its own: which one is chosen when Keras is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lrprobe

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "with_keras.py"


def python(backend, *arguments, cwd, timeout):
    """Run Python with this backend; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        check=False, env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("what", ["keras_optimizers.py", "keras_training.py"])
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_keras(backend, what):
    """All the tests in that file pass on that backend."""
    arguments = ("-m", "pytest", str(HERE / what), "-q", "-p", "no:cacheprovider")
    printed = python(backend, *arguments, cwd=HERE.parents[1], timeout=990)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 25


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_the_example(backend, tmp_path):
    """Leaves its rates in the logdir that it names, up to the last step, on either backend."""
    arguments = ("-W", "error:lrprobe", str(EXAMPLE))
    printed = python(backend, *arguments, cwd=tmp_path, timeout=290)
    assert f"Adam on {backend}, step 216" in printed
    frame = lrprobe.read(tmp_path / "runs" / "keras")
    assert frame["step"].max() == 216
    assert frame["effective_lr_p50"].notna().all()
