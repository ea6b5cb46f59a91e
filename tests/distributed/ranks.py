"""What the ranks of these tests do: python tests/distributed/ranks.py COUNT FOLDER CASE...

They are forks of one process: importing torch once is enough, which is a third of what such a test
takes under torchrun. An example and the tests with other packages do run under it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - which the first step would do, in each rank
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


def run(names: list[str], folder: Path) -> None:
    """The cases, on this rank."""
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


def main(count: int, folder: Path, names: list[str]) -> int:
    """Fork the ranks; the first that fails ends all. Returns the status of the process."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4 * count)
    port = listener.getsockname()[1]
    running = set()
    for rank in range(count):
        child = os.fork()
        if child == 0:
            listener.close()
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
            run(names, folder)
            return 0
        running.add(child)
    # This process serves it, so that it is there until the last rank has ended.
    served = listener.detach()
    _store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=served,
    )
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
