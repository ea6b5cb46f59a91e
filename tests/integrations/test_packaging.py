"""The wheel and the sdist install, and work, with the declared dependencies alone."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # it installs torch

SMOKE = """
import torch, lrprobe
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
optimizer = torch.optim.AdamW(model.parameters())
lines = lrprobe.sinks.JSONL("run.jsonl")
with lrprobe.attach(optimizer, model, to=["run", "run.parquet", lines], every=1) as probe:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        with lrprobe.inspect_step(optimizer, model) as step:
            optimizer.step()
lines.close()
assert probe.frame().equals(lrprobe.read("run.parquet")), probe.frame()
assert lrprobe.read("run")["step"].tolist() == lrprobe.read("run.parquet")["step"].tolist()
assert step["0.weight"].effective_lr.shape == (3, 4)
assert not lrprobe.diagnose(probe.frame()).findings
lrprobe.show_versions()
assert lrprobe.__file__.startswith({prefix!r}), lrprobe.__file__
for code, package, extra in {hosts!r}:
    try:
        exec(code)
    except ModuleNotFoundError as error:
        wanted = f"{{package}} is not installed: pip install 'lrprobe[{{extra}}]'"
        assert str(error) == wanted, error
    else:
        raise AssertionError(f"{{code}} needs {{package}}, which nobody has declared")
"""
HOSTS = [
    ("import lrprobe.integrations.lightning", "pytorch_lightning", "lightning"),
    ("import lrprobe.integrations.transformers", "transformers", "transformers"),
    ("import lrprobe.integrations.keras", "keras", "keras"),
    ("import lrprobe.integrations.ignite", "ignite", "ignite"),
    ("lrprobe.sinks.WandB()", "wandb", "wandb"),
    ("lrprobe.sinks.MLflow()", "mlflow", "mlflow"),
    ("lrprobe.sinks.Trackio()", "trackio", "trackio"),
    ("lrprobe.sinks.Comet()", "comet_ml", "comet"),
    ("lrprobe.sinks.ClearML()", "clearml", "clearml"),
]


def run(*command, code=0, **options):
    """Run a command away from this environment and checkout; its output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
        **options,
    )
    said = f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == code, said
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was built from it; `make release-check` keeps them."""
    kept = os.environ.get("LRPROBE_DIST")
    folder = Path(kept).resolve() if kept else tmp_path_factory.mktemp("dist")
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def environment(folder, archive):
    """A new environment with the archive, what it declares, and nothing else."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pins = str(ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", pins, archive, cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    return python


def smoke(python, folder):
    """What a user does first."""
    code = SMOKE.format(prefix=str(python.parents[1]), hosts=HOSTS)
    run(python, "-W", "error", "-c", code, cwd=folder)
    command = python.parent / "lrprobe"
    assert "step 3" in run(command, "show", "run.parquet", cwd=folder)
    assert "No findings" in run(command, "diagnose", "run.parquet", cwd=folder)
    # What needs an extra says so, in a line.
    for name, extra in {"report": "plot", "demo": "demo"}.items():
        said = run(command, name, *["run.parquet"] * (name == "report"), code=2, cwd=folder)
        assert said.splitlines()[-1].endswith(f"pip install 'lrprobe[{extra}]'"), said
        assert len(said.splitlines()) == 1, said


def test_the_archives_have_what_belongs_in_them(built):
    """The wheel the package alone, with its types; the sdist tests, examples and docs too."""
    sdist, wheel = built
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"lrprobe"}
    assert {"lrprobe/py.typed", "lrprobe/integrations/lightning.py"} <= set(names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/test_read.py"}
    wanted |= {"examples/with_lightning.py", "docs/policy.md", "conftest.py"}
    assert wanted <= inside
    assert not [name for name in inside if "__pycache__" in name or ".venv" in name]


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_works_in_an_empty_environment(built, tmp_path, kind):
    """With warnings as errors; an extra that is missing is named with what installs it."""
    python = environment(
        tmp_path / "empty", dict(zip(("sdist", "wheel"), built, strict=True))[kind]
    )
    smoke(python, tmp_path)


def test_every_host_and_tracker_has_an_extra(built):
    """The metadata names them, so that pip can install what an integration needs."""
    metadata = zipfile.ZipFile(built[1])
    (name,) = [name for name in metadata.namelist() if name.endswith("METADATA")]
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata.read(name).decode(), re.MULTILINE))
    named = {"accelerate", "ignite", "keras", "lightning", "mlflow", "tensorflow", "transformers"}
    assert {*named, "clearml", "comet", "trackio", "wandb"} <= extras


def test_import_touches_no_optional_package():
    """All of them are installed here, and none is imported."""
    optional = [
        "accelerate",
        "clearml",
        "comet_ml",
        "ignite",
        "keras",
        "lightning",
        "mlflow",
        "tensorflow",
        "trackio",
        "transformers",
        "wandb",
        "matplotlib",
    ]
    code = f"import sys, lrprobe, lrprobe.sinks; print(set({optional}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
