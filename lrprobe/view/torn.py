"""Finds truncated event files, which a full disk or a killed process leaves."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_SETTLED = 5.0
"""A file unchanged for this many seconds is no longer being written."""


def torn(folder: Path) -> Iterator[str]:
    """Yield a sentence on each truncated event file of a logdir and its subfolders."""
    for path in sorted(folder.rglob("*tfevents*")):
        try:
            about = path.stat()
            if not path.is_file() or time.time() - about.st_mtime < _SETTLED:
                continue
            if not whole(path, about.st_size):
                run = path.parent.relative_to(folder).as_posix()
                yield (
                    f"Run {run}: the event file {path.name} is truncated: it ends in the middle of "
                    "a record. The complete records are shown"
                )
        except OSError:  # removed, or not ours to read
            continue


@lru_cache(maxsize=4096)
def whole(path: Path, size: int) -> bool:
    """Whether an event file ends with a complete record; reads only the lengths of records."""
    with path.open("rb", buffering=0) as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(8)
            if len(head) < 8:
                return False
            at += 16 + struct.unpack("<Q", head)[0]
    return at == size
