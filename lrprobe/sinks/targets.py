"""What ``to=`` means."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
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
        ".hdf",
        ".tfrecord",
        ".zarr",
        ".hdf5",
        ".html",
        ".ipc",
        ".json",
        ".log",
        ".mat",
        ".md",
        ".msgpack",
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


@dataclass(frozen=True, slots=True)
class Target:
    """One destination, checked but not opened yet.

    Attributes:
        place: where a path or writer leads, comparable; None for a sink, which may be shared.
        open: gives the sink.
        owned: whether lrprobe opens it, and so closes it.
    """

    place: str | None
    open: Callable[[], Sink]
    owned: bool


def targets(to: Any) -> list[Target]:
    """Everything that ``to`` stands for.

    Raises:
        TypeError: for something that is not a destination.
        ValueError: for a path that no sink writes, or one that is there twice.
    """
    if to is None:
        return []
    many = isinstance(to, Sequence) and not isinstance(to, str | bytes)
    found = [_target(one) for one in (to if many else [to])]
    places = [target.place for target in found if target.place is not None]
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise ValueError(f"to= has the same destination twice: {', '.join(sorted(twice))}")
    return found


def open_sinks(
    found: Sequence[Target], taken: Collection[str], release: Callable[[], None]
) -> tuple[list[Sink], list[Sink]]:
    """The sinks, and those among them that were opened here.

    Args:
        found: where they lead.
        taken: places that another probe writes to.
        release: makes it close; called once, when all other places are open, so that it goes on
            where one of them cannot be.

    Raises:
        OSError: if a destination cannot be written.
        ValueError: if a folder holds something else.
    """
    sinks: dict[int, Sink] = {}
    owned: list[Sink] = []

    def open_those(*, last: bool) -> None:
        for at, target in enumerate(found):
            if (target.place in taken) == last:
                sinks[at] = target.open()
                if target.owned:
                    owned.append(sinks[at])

    try:
        open_those(last=False)
        release()
        open_those(last=True)
    except BaseException:
        for sink in owned:
            sink.close()
        raise
    return [sinks[at] for at in range(len(found))], owned


def _target(to: Any) -> Target:
    if isinstance(to, str | os.PathLike):
        path = os.fspath(to)
        return Target(os.path.realpath(path), _from_path(path), owned=True)
    if _is_summary_writer(to):
        folder = getattr(to, "log_dir", None)
        place = os.path.realpath(folder) if isinstance(folder, str | os.PathLike) else None
        return Target(place, partial(_tensorboard, to), owned=True)
    if (
        callable(getattr(to, "write", None))
        and callable(getattr(to, "close", None))
        and not isinstance(to, io.IOBase | type)
    ):
        return Target(None, lambda: to, owned=False)
    raise TypeError(f"to= takes {_ALLOWED}; got {type(to).__name__}: {to!r}")


def _from_path(path: Any) -> Callable[[], Sink]:
    if not isinstance(path, str) or not path:
        raise ValueError(f"to= takes {_ALLOWED}; got the path {path!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise ValueError(f"to={path!r}: no sink writes to a URL; to= takes {_ALLOWED}")
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        return partial(_parquet, path)
    if ending in (".jsonl", ".ndjson"):
        raise ValueError(f"to={path!r}: for JSON Lines pass lrprobe.sinks.JSONL({path!r})")
    if ending in _FILE_ENDINGS:
        raise ValueError(f"to={path!r}: no sink writes {ending} files; to= takes {_ALLOWED}")
    return partial(_tensorboard, path)


def _parquet(path: str) -> Sink:
    from lrprobe.sinks.parquet import Parquet

    return Parquet(path)


def _tensorboard(where: Any) -> Sink:
    from lrprobe.sinks.tensorboard import TensorBoard

    return TensorBoard(where)


def _is_summary_writer(thing: Any) -> bool:
    return all(
        callable(getattr(thing, name, None)) for name in ("add_scalar", "add_histogram", "flush")
    )
