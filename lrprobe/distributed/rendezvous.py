"""Determines which ranks attach together, without waiting forever for a rank that does not.

Under DDP, people write ``if rank == 0: attach(...)``. So the ranks of a process group first meet
in the store that it was initialised with, and start collectives only if all have arrived.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch

WAIT = 30.0
"""Seconds that a rank waits for the others, at most."""

_TOGETHER, _APART = "together", "apart"


def missing_from(ranks: Sequence[int]) -> list[int]:
    """The global ranks that do not attach in time; empty if all record together.

    A round ends with one decision for all ranks that have arrived. A rank that arrives later waits
    in the next round.
    """
    store = _store()
    if store is None:
        return []
    key = "lrprobe/" + hashlib.sha256(repr(list(ranks)).encode()).hexdigest()[:16]
    me = torch.distributed.get_rank()
    until = time.monotonic() + patience()
    while True:
        meeting = f"{key}/{store.add(f'{key}/round', 0)}"
        store.set(f"{meeting}/{me}", "here")
        missing = _missing(store, meeting, ranks, until)
        wish = _APART if missing else _TOGETHER
        decided = store.compare_set(f"{meeting}/decision", "", wish).decode()
        if decided == wish and _is_first(store, meeting):
            store.add(f"{key}/round", 1)
        if decided == _TOGETHER:
            return []
        if missing:
            return missing


def patience() -> float:
    """Seconds to wait: a third of the process group's timeout, if that is less than ``WAIT``.

    A rank that does not attach may already wait for this one in its next collective.
    """
    try:
        group = torch.distributed.distributed_c10d._get_default_group()  # noqa: SLF001 - torch tells it nowhere else
        backend = group._get_backend(group._device_types[0])  # noqa: SLF001 - the same
        limit: float = backend.options._timeout.total_seconds()  # noqa: SLF001 - the same
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return WAIT
    return min(WAIT, limit / 3)


def _missing(store: Any, meeting: str, ranks: Sequence[int], until: float) -> list[int]:
    """Ranks that have not arrived by the deadline, or by the time of another rank's decision."""
    missing, pause = list(ranks), 1e-3
    while True:
        missing = [rank for rank in missing if not store.check([f"{meeting}/{rank}"])]
        if not missing or time.monotonic() > until or store.check([f"{meeting}/decision"]):
            return missing
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _is_first(store: Any, meeting: str) -> bool:
    return int(store.add(f"{meeting}/closed", 1)) == 1


def _store() -> Any:
    """The store of the default process group; None if it is not available."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name for it
        store.check(["lrprobe"])
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None
    return store
