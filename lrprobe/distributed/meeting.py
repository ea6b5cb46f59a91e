"""Which ranks attach together: nobody waits without end for a rank that never does.

``if rank == 0: attach(...)`` is what people write under DDP. So the ranks of a process group first
meet, in the store that it was initialised with, and begin collectives only where all have come.
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
    """Which of these global ranks do not attach in time; none where all record together.

    A round of the meeting ends with one decision that holds for all who came. Who comes later
    waits in the next round.
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
    """Seconds to wait: well within the time after which a rank's collectives fail.

    One that does not attach may wait there already for what this one does next.
    """
    try:
        group = torch.distributed.distributed_c10d._get_default_group()  # noqa: SLF001 - torch tells it nowhere else
        backend = group._get_backend(group._device_types[0])  # noqa: SLF001 - the same
        limit: float = backend.options._timeout.total_seconds()  # noqa: SLF001 - the same
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return WAIT
    return min(WAIT, limit / 3)


def _missing(store: Any, meeting: str, ranks: Sequence[int], until: float) -> list[int]:
    """Ranks that have not come when the time is over, or when it was decided without them."""
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
    """The store of the default process group; None where it cannot be asked."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no other way to it
        store.check(["lrprobe"])
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None
    return store
