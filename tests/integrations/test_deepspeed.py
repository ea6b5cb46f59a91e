"""DeepSpeed: one frame of whole parameters, with the figures of one process."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed_net
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

ROUNDING = ("reconstruction_error", "state_error")
ESTIMATES = re.compile(r"gmean|p\d\d$")
CANCELLING = {"update_grad_cosine", "update", "grad"}
"""Sums and elements that may be nearly 0, to 1e-6 of what they are made of."""


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for the comparison."""
    monkeypatch.setenv("LRPROBE_ENGINE", "eager")


def launch(count: int, script: str, *arguments: str, cwd: Path | None = None) -> None:
    """Run a script of this folder, or another one, on that many processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [sys.executable, *command, str(Path(__file__).parent / script), *arguments],
        capture_output=True, text=True, timeout=240, check=False, cwd=cwd,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LRPROBE_ENGINE": "eager"
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def told(count: int, folder: Path, *cases: str) -> dict[str, list[Any]]:
    """Case to what each rank returned."""
    if not (folder / "done").exists():
        launch(count, "deepspeed_ranks.py", str(folder), *cases)
        (folder / "done").touch()
    result = {}
    for case in cases:
        files = [folder / f"{case}.{rank}.pkl" for rank in range(count)]
        result[case] = [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 - our own
    return result


def of(found: dict[str, list[Any]], *cases: str) -> Iterator[tuple[str, list[Any]]]:
    """Those cases, all of which have to have come to their end."""
    for case in cases:
        failed = [each for each in found[case] if isinstance(each, str)]
        assert not failed, f"{case}: {failed[0]}"
        yield case, found[case]


def wrong(want: pd.DataFrame, got: pd.DataFrame, limit: float) -> list[str]:
    """Where a table differs, with both numbers: norms and means to that limit, estimates to 1 %."""
    if len(want) != len(got):
        return [f"{len(got)} rows, not {len(want)}"]
    keys = [key for key in ("step", "parameter", "module", "group", "element") if key in want]
    a, b = (each.sort_values(keys, ignore_index=True) for each in (want, got))
    found = []
    for name in a.columns.drop("time"):
        x, y = a[name], b[name]
        if name in ROUNDING:
            found += [f"{name}: {value}" for value in y if value > 1e-6]
        elif x.dtype == float:
            relative = 0.01 if ESTIMATES.search(name) else limit
            least = 1e-6 if name in CANCELLING else 0.0
            same = np.isclose(y, x, rtol=relative, atol=least, equal_nan=True)
            found += [f"{name}: {y[i]!r} instead of {x[i]!r}" for i in np.flatnonzero(~same)[:3]]
        elif not (x == y).all():
            found.append(f"{name}: {y.tolist()} instead of {x.tolist()}")
    return found


def check(case: str, want: dict[str, Any], got: dict[str, Any], limit: float = 1e-5) -> None:
    """Every table and level is that of the training in one process."""
    for table in ("parameter", "module", "group", "model", "elements"):
        differs = wrong(want[table], got[table], limit)
        assert not differs, f"{case}, {table}: " + "; ".join(differs[:6])
    order = [list(each["parameter"]["parameter"]) for each in (want, got)]
    assert order[0] == order[1], case


SINGLE = (
    "0-adamw-groups-clip", "1-adamw-engine", "1-sgd-groups-clip", "1-adadelta-robin-groups",
    "2-adamw-offload-accumulate-groups", "2-sgd-accumulate", "2-adadelta-clip-inner",
    "3-adamw-small-groups", "3-sgd-accumulate-clip", "3-adadelta-offload-small-clip-inner",
)  # fmt: skip
"""Stage, optimizer and options, in fp32."""

HALF = (
    "0-adamw-bf16", "1-adamw-bf16-accumulate", "2-sgd-bf16-groups-clip", "3-adadelta-bf16-small",
    "0-adamw-fp16", "1-adamw-fp16", "2-sgd-fp16-groups-clip", "3-adadelta-fp16-small",
    "3-adamw-fp16-offload-clip",
)  # fmt: skip

SENT = {
    "counted:0-adamw": [],
    "counted:2-adamw-groups": [384, 2576, 258_048],
    "counted:3-sgd-small": [384, 2576],
}
"""Bytes of the messages of a recorded step, by the formulas in docs/distributed.md."""

SAME = (
    "untouched:1-sgd-groups", "untouched:2-adamw-groups", "untouched:3-adadelta-small",
    "untouched:3-adamw-fp16-small",
)  # fmt: skip

UNKNOWN = {
    "unknown:2-adamw-subclass-groups": "does not know where this class keeps its master weights",
    "unknown:3-sgd-nvme-small": "its master weights are on NVMe",
    "unknown:1-adamw-groups-shuffled": "its parameters are not views of its flattened groups",
}
"""What ``attach`` says."""

ELSE = ("3-adamw-small-groups-generated", "3-adamw-fp16-overflow")


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, list[Any]]:
    """What two processes tell: started once, by whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "two"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        return told(2, folder, *SINGLE, *HALF, *SENT, *SAME, *UNKNOWN, *ELSE)


def test_two_processes_have_the_frame_of_one(two: dict[str, list[Any]]) -> None:
    """Stages 0 to 3 in fp32: accumulation, clipping, groups, sub-groups, and CPU offload."""
    for case, (first, second) in of(two, *SINGLE):
        check(case, deepspeed_net.alone(case), first)
        assert second is None


def test_generated_code_has_the_frame_of_one(two: dict[str, list[Any]]) -> None:
    """Where the loops over ranges of flat tensors are compiled, too."""
    for case, (first, _) in of(two, ELSE[0]):
        check(case, deepspeed_net.alone(case), first)


def test_sixteen_bits_have_the_figures_of_the_master_weights(two: dict[str, list[Any]]) -> None:
    """Against a twin in fp32 that gets the gradients DeepSpeed tells of; skipped steps too."""
    for case, (first, _) in of(two, *HALF):
        got, want, norms = first
        frame = got["parameter"]
        skipped = frame[~frame["stepped"]]
        assert list(skipped["step"].unique()) == list(norms), case
        assert bool(norms) is ("fp16" in case and not case.startswith("0")), case
        for row in skipped.itertuples():
            assert row.param_norm == pytest.approx(norms[row.step][row.parameter], rel=1e-5), case
            assert row.lr > 0
            assert np.isnan(row.update_norm), case
        assert set(frame.loc[frame["stepped"], "samples"]) == {deepspeed_net.BATCH}, case
        samples = ["samples", "lr_per_sample"]
        taken = {
            name: table[table["stepped"]].drop(columns=samples) if "stepped" in table else table
            for name, table in got.items()
        }
        want = {name: t.drop(columns=samples, errors="ignore") for name, t in want.items()}
        check(case, want, taken)


def test_steps_skipped_at_the_end_have_rows(two: dict[str, list[Any]]) -> None:
    """Though no later step tells of them: ``close`` does."""
    for _, (first, _) in of(two, ELSE[1]):
        frame = first[0]["parameter"]
        assert frame["step"].unique().tolist() == list(range(1, 2 * deepspeed_net.STEPS + 1))
        assert not frame["stepped"].any()
        assert set(frame["lr"]) == {0.01}


def test_messages_are_those_of_the_formulas(two: dict[str, list[Any]]) -> None:
    """Two or three in a recorded step, as with FSDP; none in step 3, nor at the end."""
    for case, ranks in of(two, *SENT):
        for rank in ranks:
            assert rank["steps"] == [SENT[case], SENT[case], [], SENT[case]], case
            assert rank["close"] == []


def test_training_is_the_same_bits(two: dict[str, list[Any]]) -> None:
    """With and without a probe, on both ranks."""
    for case, ranks in of(two, *SAME):
        assert ranks == [True, True], case


def test_what_cannot_be_named_is_not_merged(two: dict[str, list[Any]]) -> None:
    """Each rank's tensors have rows of their own, named by group and rank, with their own norms."""
    for case, ((frame, said, own), (_, quiet, theirs)) in of(two, *UNKNOWN):
        assert [UNKNOWN[case] in each for each in said] == [True], said
        assert quiet == []
        last = frame[frame["step"] == frame["step"].max()]
        names = last["parameter"].str.extract(r"^rank([01])\.group\d+\.param\d+$")[0]
        assert names.notna().all(), case
        assert last["stepped"].all()
        assert last["reconstruction_error"].max() < 1e-6
        assert last["param_norm"].tolist() == pytest.approx([*own, *theirs], rel=1e-5), case


def test_four_processes_have_the_frame_of_one(tmp_path: Path) -> None:
    """Parameters that are cut over three ranks, and ranks that have nothing of most."""
    cases = ("1-adamw-groups", "3-adadelta-small-groups")
    for case, (first, *others) in of(told(4, tmp_path, *cases), *cases):
        check(case, deepspeed_net.alone(case), first)
        assert others == [None] * 3


@pytest.mark.parametrize("host", ["accelerate", "lightning", "transformers"])
def test_a_host_has_the_frame_of_one_process(tmp_path: Path, host: str) -> None:
    """Two processes of each host with DeepSpeed record what one process by hand does."""
    launch(2, "deepspeed_hosts.py", host, str(tmp_path))
    frame, hand = pd.read_pickle(tmp_path / f"{host}.pkl")  # noqa: S301 - our own
    if host == "transformers":
        from test_transformers import by_hand

        hand = by_hand(tmp_path, adam_epsilon=1e-2, optim="adamw_torch")
        assert set(frame["samples"]) == {8.0}
        frame, hand = (each.drop(columns=["samples", "lr_per_sample"]) for each in (frame, hand))
    assert not (differs := wrong(hand, frame, 1e-4)), "; ".join(differs[:6])


def test_the_example_leaves_whole_parameters(tmp_path: Path) -> None:
    """Under torchrun on a CPU, as its first line says."""
    example = Path(__file__).resolve().parents[2] / "examples" / "with_deepspeed.py"
    launch(2, str(example), cwd=tmp_path)
    frame = pd.read_parquet(tmp_path / "runs" / "deepspeed.parquet")
    assert frame["step"].unique().tolist() == [1, *range(10, 80, 10)]
    assert set(frame["samples"]) == {40.0}
    assert frame["reconstruction_error"].max() < 1e-6
