"""What a newcomer meets first: a missing extra, the versions, the files of the project."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lrprobe

ROOT = Path(__file__).resolve().parent.parent

NEEDS = {
    "lrprobe.sinks.WandB()": ("wandb", "wandb"),
    "lrprobe.sinks.MLflow()": ("mlflow", "mlflow"),
    "lrprobe.sinks.Trackio()": ("trackio", "trackio"),
    "lrprobe.sinks.Comet()": ("comet_ml", "comet"),
    "lrprobe.sinks.ClearML()": ("clearml", "clearml"),
    "import lrprobe.integrations.lightning": ("pytorch_lightning", "lightning"),
    "import lrprobe.integrations.transformers": ("transformers", "transformers"),
    "import lrprobe.integrations.keras": ("keras", "keras"),
    "import lrprobe.integrations.ignite": ("ignite", "ignite"),
}
"""Code to the package that it needs, and the extra that brings it."""


HIDDEN = ["lightning", *(package for package, _ in NEEDS.values())]
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))
import lrprobe
for code in {list(NEEDS)!r}:
    try:
        exec(code)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.fixture(scope="module")
def said():
    """Code to what it raises where no package that it may need is installed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    return dict(zip(NEEDS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("code", NEEDS)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(code, said):
    """In one line, whatever is installed here."""
    package, extra = NEEDS[code]
    wanted = f"{package} is not installed: pip install 'lrprobe[{extra}]'"
    assert said[code] == f"ModuleNotFoundError: {wanted}"


def test_every_extra_that_is_named_exists():
    """The extras of messages, docstrings and pages are those of pyproject.toml."""
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for folder in ("lrprobe", "docs", "examples"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            for named in re.findall(r"lrprobe\[([\w,]+)\]", path.read_text()):
                assert set(named.split(",")) <= declared, f"{path}: {named}"


def test_show_versions_has_what_an_issue_needs(capsys, monkeypatch):
    """One line each, torch with its build."""
    import torch

    monkeypatch.setenv("LRPROBE_ENGINE", "eager")
    lrprobe.show_versions()
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(shown) == {
        "lrprobe", "python", "platform", "torch", "numpy", "pandas", "pyarrow", "tensorboard",
        "numba", "triton", "cuda", "LRPROBE_ENGINE",
    }  # fmt: skip
    assert shown["torch"] == torch.__version__
    assert shown["LRPROBE_ENGINE"] == "eager"


def test_the_files_of_the_project_are_sound():
    """The YAML of GitHub and pre-commit parses; the issue form asks for the versions."""
    if not (ROOT / ".github").exists():
        pytest.skip("an sdist does not have them")
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text()), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]] == [
        "ruff-check", "ruff-format", "mypy",
    ]  # fmt: skip
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "lrprobe.show_versions()" in form


def test_no_module_is_longer_than_a_newcomer_reads() -> None:
    """At most 500 lines each."""
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "lrprobe").rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > 500} == {}
