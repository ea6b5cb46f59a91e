"""What the ranks of these tests do, run by torchrun.

torchrun --nproc-per-node 2 tests/distributed/ranks.py FOLDER CASE...
"""

from __future__ import annotations

import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_cases import (
    added,
    counted,
    differing,
    elsewhere,
    flat,
    killed,
    lagging,
    mixed_precision,
    no_gradient,
    resumed,
    samples,
    skipped,
    stages,
    strangers,
    unexplained,
    untouched,
    warming,
    zero,
)  # fmt: skip
from rank_meetings import MEETINGS, dying
from rank_net import OPTIMIZERS
from rank_wrappers import WRAPPERS, wrapped

CASES: dict[str, Callable[[], Any]] = {
    f"{wrap.__name__}-{kind}": lambda wrap=wrap, kind=kind: wrapped(wrap, kind)
    for wrap in WRAPPERS
    for kind in OPTIMIZERS
}
CASES |= {
    f"counted-{wrap.__name__}-{kind}": lambda wrap=wrap, kind=kind: counted(wrap, kind)
    for wrap in WRAPPERS
    for kind in ("sgd", "adamw")
}
for case in (
    zero, stages, lagging, no_gradient, added, differing, elsewhere, untouched, skipped,
    unexplained, mixed_precision, samples, flat, warming, strangers,
):  # fmt: skip
    CASES[case.__name__] = case
CASES |= {case.__name__: case for case in MEETINGS}


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    CASES["resumed"] = lambda: resumed(folder)
    CASES["dying"] = lambda: dying(folder)
    CASES["killed"] = lambda: killed(folder)
    for name in names:
        try:
            result: Any = CASES[name]()
        except Exception:  # noqa: BLE001 - the test tells
            result = traceback.format_exc(limit=-3)
        (folder / f"{name}.{dist.get_rank()}.pkl").write_bytes(pickle.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
