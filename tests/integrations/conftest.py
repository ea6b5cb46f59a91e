"""Tests with the real packages: what lrprobe says is an error, what they say is theirs."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Programs that a test runs in processes of their own, and what only these import: looked through
# for doctests, they would begin a run here, and bring TensorFlow along.
collect_ignore_glob = ["clearml_run.py", "keras_*.py", "two_processes.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of the packages pass, from their import on; lrprobe's do not."""
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:lrprobe")
    # Trackio reads it once, when it is imported; without it runs gather in the home folder.
    folder = tempfile.TemporaryDirectory(prefix="trackio-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["TRACKIO_DIR"] = folder.name


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is uploaded or asked for, and what a package writes lands where nothing is."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "COMET_LOGGING_CONSOLE": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def _empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MLflow makes of a new SQLite file, for which it takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(_empty_database: Path, tmp_path: Path) -> str:
    """The address of an empty database of MLflow's, where its environment variable says too."""
    path = tmp_path / "mlflow.db"
    shutil.copy(_empty_database, path)
    return f"sqlite:///{path}"
