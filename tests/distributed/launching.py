"""Starts ranks, and compares their frame with that of one process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rank_net
import versions

EXACT = 1e-12
KEYS = ["step", "optimizer", "group", "parameter", "module", "element"]
ROUNDING = {"reconstruction_error", "state_error"}
"""Rounding errors, of other elements."""
SAMPLED = {"lost_fraction": 0.05, "grad_persistence": 0.08}
"""Read from the check sample: largest difference where a shard's is another than the whole's."""
RAISING = {"differing", "elsewhere", "killed"}
"""Cases that return the text of an error."""


def launch(
    count: int, folder: Path, *cases: str, survives: bool = True, engine: str = "eager"
) -> dict[str, list[Any]]:
    """Run cases on that many processes; case to what each rank returned."""
    if not versions.FSDP2_ON_CPU:
        pytest.skip("FSDP2, which most cases use, does not run on the CPU with this torch")
    done = subprocess.run(
        [
            sys.executable, str(Path(__file__).with_name("ranks.py")),
            str(count), str(folder), *cases,
        ],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LRPROBE_ENGINE": engine},
    )  # fmt: skip
    assert (done.returncode == 0) is survives, done.stderr[-4000:]
    result = {}
    for case in cases:
        files = [folder / f"{case}.{rank}.pkl" for rank in range(count)]
        result[case] = [pickle.loads(f.read_bytes()) for f in files if f.exists()]  # noqa: S301
        failed = [told for told in result[case] if isinstance(told, str) and "Error:" in told]
        assert not failed or case in RAISING, f"{case}: {failed[0]}"
    return result


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by their keys."""
    keys = [key for key in KEYS if key in frame]
    return frame.sort_values(keys, ignore_index=True).drop(columns="time")


def differences(want: dict[str, Any], got: dict[str, Any], limit: float = EXACT) -> list[str]:
    """Where tables are not the same: columns to a relative limit, all else to the bit.

    Figures of the check sample may differ where that is not of all elements.
    """
    found = []
    for table, expected in want.items():
        a, b = in_order(expected), in_order(got[table])
        if len(a) != len(b):
            found.append(f"{table} has {len(b)} rows, not {len(a)}")
            continue
        for name in a.columns:
            x, y = a[name], b[name]
            if name in {"edges", "counts"}:
                same = all(map(np.array_equal, x, y))
                found += [] if same else [f"{table}.{name}: {y.tolist()} instead of {x.tolist()}"]
            elif x.dtype == float:
                least = np.full(len(x), 1e-10 if name in ROUNDING else 0.0)
                if name in SAMPLED:
                    least = np.where(a["numel"] > 4096, SAMPLED[name], 0.0)
                close = np.isclose(y, x, rtol=limit, atol=least, equal_nan=True)
                found += [
                    f"{table}.{name}: {y[i]!r} instead of {x[i]!r}" for i in np.flatnonzero(~close)
                ][:3]
            elif not (x == y).all():
                found.append(f"{table}.{name}: {y.tolist()} instead of {x.tolist()}")
    return found


def check(case: str, told: list[Any]) -> None:
    """Rank 0 told what one process tells; the others have no frame."""
    kind = case.partition("-")[2] or "adamw"
    wrong = differences(rank_net.alone(kind), told[0])
    assert not wrong, f"{case} over {len(told)} ranks: " + "; ".join(wrong[:6])
    assert told[1:] == [None] * (len(told) - 1)
