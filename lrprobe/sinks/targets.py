"""What ``to=`` means."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrprobe.sinks.base import Sink

_FILE_ENDINGS = frozenset(
    {
        ".arrow",
        ".avro",
        ".bin",
        ".bz2",
        ".ckpt",
        ".csv",
        ".db",
        ".duckdb",
        ".feather",
        ".gz",
        ".h5",
        ".hdf5",
        ".html",
        ".ipc",
        ".json",
        ".jsonl",
        ".log",
        ".mat",
        ".md",
        ".msgpack",
        ".ndjson",
        ".npy",
        ".npz",
        ".orc",
        ".pb",
        ".pdf",
        ".pickle",
        ".pkl",
        ".png",
        ".pq",
        ".pt",
        ".pth",
        ".py",
        ".safetensors",
        ".sqlite",
        ".sqlite3",
        ".svg",
        ".tar",
        ".tfevents",
        ".toml",
        ".tsv",
        ".txt",
        ".xls",
        ".xlsx",
        ".xml",
        ".xz",
        ".yaml",
        ".yml",
        ".zip",
        ".zst",
    }
)
_ALLOWED = (
    "a path ending in .parquet (a dataset), another path without a file ending (a TensorBoard "
    "logdir), a SummaryWriter, a sink with write() and close(), or a list of these"
)


def open_sinks(to: Any) -> tuple[list[Sink], list[Sink]]:
    """All sinks that ``to`` stands for, and those among them that were opened here.

    Raises:
        TypeError: for something that is not a destination.
        ValueError: for a path that no sink writes.
        OSError: if a destination cannot be written.
    """
    if to is None:
        return [], []
    many = isinstance(to, Sequence) and not isinstance(to, str | bytes)
    sinks: list[Sink] = []
    owned: list[Sink] = []
    try:
        for one in to if many else [to]:
            sink, ours = _open(one)
            sinks.append(sink)
            if ours:
                owned.append(sink)
    except BaseException:
        for sink in owned:
            sink.close()
        raise
    return sinks, owned


def destinations(to: Any) -> list[str]:
    """Where paths and writers in ``to`` lead, comparable; a sink may be shared and is left out."""
    many = isinstance(to, Sequence) and not isinstance(to, str | bytes)
    found = []
    for one in to if many else [to]:
        path = getattr(one, "log_dir", None) if _is_summary_writer(one) else one
        if isinstance(path, str | os.PathLike):
            found.append(os.path.realpath(os.fspath(path)))
    return found


def _open(to: Any) -> tuple[Sink, bool]:
    if isinstance(to, str | os.PathLike):
        return _from_path(os.fspath(to)), True
    if _is_summary_writer(to):
        from lrprobe.sinks.tensorboard import TensorBoard

        return TensorBoard(to), True
    if (
        callable(getattr(to, "write", None))
        and callable(getattr(to, "close", None))
        and not isinstance(to, io.IOBase | type)
    ):
        return to, False
    raise TypeError(f"to= takes {_ALLOWED}; got {type(to).__name__}: {to!r}")


def _from_path(path: Any) -> Sink:
    if not isinstance(path, str) or not path:
        raise ValueError(f"to= takes {_ALLOWED}; got the path {path!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise ValueError(f"to={path!r}: no sink writes to a URL; to= takes {_ALLOWED}")
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        from lrprobe.sinks.parquet import Parquet

        return Parquet(path)
    if ending in _FILE_ENDINGS:
        raise ValueError(f"to={path!r}: no sink writes {ending} files; to= takes {_ALLOWED}")
    from lrprobe.sinks.tensorboard import TensorBoard

    return TensorBoard(path)


def _is_summary_writer(thing: Any) -> bool:
    return all(
        callable(getattr(thing, name, None)) for name in ("add_scalar", "add_histogram", "flush")
    )
