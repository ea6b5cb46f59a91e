"""Block programs without a GPU: interpreted, compiled, and on a device that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import versions

from lrprobe.engine import cuda

TESTS = Path(__file__).parent.parent
PARTS = 4


def run(script: str, *arguments: str, interpreted: bool = False) -> str:
    """What a program prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_programs_agree_with_eager_code(part: int) -> None:
    """Each generated program, in the interpreter, has the figures of eager code in float64."""
    pytest.importorskip("triton")
    printed = run("tests/block_programs.py", "interpret", str(part), str(PARTS), interpreted=True)
    assert int(printed.split()[0]) > 10, printed


@pytest.mark.slow
def test_several_chunks() -> None:
    """Full chunks, their rest, and what is not aligned add up; few that move are all counted."""
    pytest.importorskip("triton")
    assert "4 programs" in run("tests/block_programs.py", "large", "0", "1", interpreted=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", range(PARTS))
def test_programs_compile(part: int) -> None:
    """Each generated program compiles for sm_80 and sm_90, and spills no more than a register."""
    pytest.importorskip("triton", "3.4", reason="Triton compiles without a device from 3.4 on")
    printed = run("tests/block_programs.py", "compile", str(part), str(PARTS))
    assert int(printed.split()[0]) > 10, printed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not versions.FAR_DEVICE, reason="torch cannot have a device that is not there")
def test_launches_do_not_grow() -> None:
    """A recorded step launches at most 60 times, however large the model is."""
    pytest.importorskip("triton")
    counts = [int(count) for count in run("benchmarks/launches.py").split("launches:")[-1].split()]
    assert len(counts) == 4
    assert max(counts) <= 60
    assert counts[:2] == counts[2:]


def test_addresses_are_checked() -> None:
    """What cannot be read by address is not: by device, dtype, layout, sign bit, storage."""
    far = torch.zeros(4, device="meta")
    assert not cuda.is_addressable(far)
    if cuda.interpreted():
        return
    cuda.DEVICES.add("cpu")
    try:
        assert cuda.is_addressable(torch.zeros(4))
        assert not cuda.is_addressable(torch.zeros(4, dtype=torch.int32))
        assert not cuda.is_addressable(torch.zeros(4).to_sparse())
        assert not cuda.is_addressable(torch._neg_view(torch.zeros(4)))
        shrunk = torch.zeros(4)
        shrunk.untyped_storage().resize_(8)
        assert not cuda.is_addressable(shrunk)
    finally:
        cuda.DEVICES.discard("cpu")
