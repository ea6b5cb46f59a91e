"""The examples run as a user runs them, and leave what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import versions

import lrprobe

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["hidden1", "hidden2", "output"]
STEPS = [1, *range(10, 281, 10)]
"""Of the demo: 14 an epoch."""


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script of the repository with warnings as errors; what it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder where 20 epochs of the demo ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("examples/demo.py", "--epochs", "20", "--out", "out", cwd=folder)


def test_demo_leaves_a_dataset_of_each_run(demo: tuple[Path, str]) -> None:
    """pandas opens them, and they hold every layer at every tenth step."""
    folder, _ = demo
    for name in ("adadelta", "adam", "sgd"):
        frame = pd.read_parquet(folder / "out" / f"{name}.parquet")
        assert frame["step"].unique().tolist() == STEPS
        assert set(frame["rule"]) == {name}
        assert set(frame["parameter"]) == {f"{x}.{y}" for x in LAYERS for y in ("weight", "bias")}
        assert frame["reconstruction_error"].max() < 1e-4


def test_demo_shows_the_rate_of_the_schedule(demo: tuple[Path, str]) -> None:
    """Under one cycle, SGD's lr differs from step to step, and is its effective rate."""
    folder, _ = demo
    frame = lrprobe.read(folder / "out" / "sgd.parquet", by="model")
    assert frame["lr"].is_unique
    assert frame["effective_lr_p50"].tolist() == pytest.approx(frame["lr"].tolist())


def test_demo_leaves_a_logdir_that_reads_back(demo: tuple[Path, str]) -> None:
    """TensorBoard's scalars are there for each run."""
    folder, _ = demo
    for name in ("adadelta", "adam", "sgd"):
        frame = lrprobe.read(folder / "out" / "tensorboard" / name)
        assert frame["step"].unique().tolist() == STEPS
        assert frame["effective_lr_p50"].notna().all()


def test_demo_leaves_a_picture_and_says_where_everything_is(demo: tuple[Path, str]) -> None:
    """Every path it prints exists."""
    folder, printed = demo
    paths = re.findall(r"out\S*", printed.partition("TensorBoard logdir")[2])
    assert len(paths) == 6
    assert all((folder / path).exists() for path in paths)
    assert (folder / "out" / "effective_lr.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_is_healthy(demo: tuple[Path, str]) -> None:
    """Its three runs, alone, together, and from TensorBoard; and it leaves a report."""
    out = demo[0] / "out"
    assert "adadelta, adam, sgd" in (out / "report.html").read_text(encoding="utf-8")
    paths = [out / f"{name}.parquet" for name in ("adadelta", "adam", "sgd")]
    for path in paths:
        assert lrprobe.diagnose(lrprobe.read(path)).findings == ()
        assert lrprobe.diagnose(lrprobe.read(path, by="module")).findings == ()
    together = lrprobe.diagnose(lrprobe.read(*paths))
    assert together.findings == ()
    assert {each.run for each in together.notes} == {"adadelta"}
    for name in ("adadelta", "adam", "sgd"):
        assert lrprobe.diagnose(lrprobe.read(out / "tensorboard" / name)).findings == ()


@pytest.mark.slow
@pytest.mark.skipif(not versions.FSDP2_ON_CPU, reason="FSDP2 does not run on the CPU")
def test_a_sharded_training_has_one_record(tmp_path: Path) -> None:
    """Two ranks hold half of the elements each; the dataset has whole parameters."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "examples" / "fsdp2.py"), "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "out" / "fsdp2.parquet")
    assert frame["step"].unique().tolist() == [1, *range(10, 80, 10)]
    assert frame.groupby("step")["numel"].sum().unique().tolist() == [185_810]
    assert set(frame["samples"]) == {40.0}
    assert frame["reconstruction_error"].max() < 1e-4
    assert re.search(r"rank [01] of 2 held 92,905 of 185,810", done.stdout)


@pytest.mark.slow
def test_lost_updates_are_seen_in_bfloat16_only(tmp_path: Path) -> None:
    """And more of them at the lower rate."""
    rows = [line.split() for line in run("examples/lost_updates.py", cwd=tmp_path).splitlines()]
    lost = {(dtype, lr): float(share.rstrip("%")) for dtype, lr, share, _ in rows[1:]}
    assert lost["float32", "0.001"] < 1 < lost["bfloat16", "0.001"] < lost["bfloat16", "0.0001"]
    assert lost["float32", "0.0001"] < 1


@pytest.mark.slow
def test_documented_answers_are_what_is_measured(tmp_path: Path) -> None:
    """docs/answers_table.md is what docs/measure_answers.py prints, to the rounding of machines."""
    number = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
    documented = (ROOT / "docs" / "answers_table.md").read_text()
    measured = run("docs/measure_answers.py", cwd=tmp_path)
    assert number.sub("#", measured) == number.sub("#", documented)
    pairs = zip(number.findall(measured), number.findall(documented), strict=True)
    for now, then in pairs:
        assert float(now) == pytest.approx(float(then), rel=0.05, abs=1e-12)


def test_demo_is_short() -> None:
    """An example is a model of how to use lrprobe only while it fits on a page or two."""
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text().splitlines()) <= 100, script.name


def test_the_tutorial_quotes_its_run(tmp_path: Path) -> None:
    """docs/tutorial.md quotes what its script prints, to the rounding of machines."""
    number = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
    printed = run("examples/tutorial.py", "--out", "out", cwd=tmp_path)
    page = (ROOT / "docs" / "tutorial.md").read_text()
    said = {" ".join(number.sub("#", line).split()) for line in printed.splitlines()}
    for block in re.findall(
        r"^```[^\n]*text\n(?::class: wrap\n)?(.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        for line in filter(None, block.splitlines()):
            quoted = " ".join(number.sub("#", line).split())
            assert any(quoted in each for each in said), line
    last = [float(each) for each in re.findall(r"([\d.]+) % *$", printed, re.MULTILINE)]
    broken, higher, fixed = last
    assert fixed <= higher < broken
    for picture in ("tutorial_error.png", "tutorial_rates.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
