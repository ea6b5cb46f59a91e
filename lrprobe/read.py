"""Reads recorded runs from disk into a DataFrame."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lrprobe.about import (
    KEY,
    Description,
    description,
    from_json,
    merged,
    of_rows,
    of_several,
)
from lrprobe.record import KEYS, LEVELS, Level
from lrprobe.text import warn

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from lrprobe.sinks.memory import TableName

TABLES = ("frame", "elements", "histograms")
ATTEMPTS = ("last", "all")

_SHOWN = (  # per parameter, in the order of the frame
    "lr",
    "effective_lr_p05",
    "effective_lr_p50",
    "effective_lr_p95",
    "update_norm",
    "update_ratio",
    "grad_norm",
)
_KEYS = ["optimizer", "attempt", "step"]
_ALLOWED = "a Parquet dataset (a folder that lrprobe wrote) or a TensorBoard logdir"


def read(
    *paths: str | os.PathLike[str],
    table: Literal["frame", "elements", "histograms"] = "frame",
    by: Level = "parameter",
    attempts: Literal["last", "all"] = "last",
) -> pd.DataFrame:
    """Read recorded runs, also while they are in progress.

    A Parquet dataset gives the tables that ``Probe.frame()``, ``.elements()`` and ``.histograms()``
    gave, types included. A TensorBoard logdir gives its scalars, in float32 precision: ``step``,
    ``time``, ``attempt`` (0, then one more for each probe attached to the same logdir),
    ``optimizer``, the key column, and the figures ``lr``, the quantiles p05, p50 and p95 of the
    effective rate, ``update_norm``, ``update_ratio`` and ``grad_norm``; for ``by="group"`` the
    ``lr``, for ``by="model"`` the largest ``reconstruction_error``. If its tags are per module, so
    are its rows. Parameters that did not step have no rows.

    Args:
        paths: one or several. With several, a first column ``run`` names the folder (without
            ``.parquet``, and with enough of its path to be unique). If logdirs and datasets are
            read together, columns that a logdir lacks are NaN there, and ``numel`` and
            ``nonfinite`` are float64.
        table: ``"frame"``, ``"elements"`` or ``"histograms"``; a logdir has only the first.
        by: ``"parameter"``, ``"module"``, ``"group"`` or ``"model"``, for ``"frame"``.
        attempts: ``"last"`` gives each step once: per optimizer, an attempt to continue a run
            replaces the earlier attempts from its own first step on. ``"all"`` gives every row.

    Returns:
        The rows in the order of recording, with a plain ``RangeIndex``. The description of the run
        is in ``attrs["lrprobe"]``, as in ``Probe.frame()``; for several paths, in
        ``attrs["lrprobe"]["runs"]`` by run name.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: an argument has none of the values above; a path is neither a dataset nor a
            logdir, or nothing in it can be read.
        TypeError: no path is given, or an argument that is not a path.

    Warns:
        UserWarning: a file of a dataset, or a description of the run, is broken or foreign; the
            others are read.
    """
    if not paths:
        raise TypeError(f"no path was given; allowed are one or several, each {_ALLOWED}")
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"a path is a {type(path).__name__}; allowed are str and os.PathLike, several as "
                "read(a, b, ...)"
            )
    for name, value, allowed in (
        ("table", table, TABLES),
        ("by", by, LEVELS),
        ("attempts", attempts, ATTEMPTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; allowed are {', '.join(map(repr, allowed))}")
    if table != "frame" and by != "parameter":
        raise ValueError(f'by={by!r} goes with table="frame" only, not with table={table!r}')

    import pandas as pd

    frames = [_read_one(Path(path), table, by, attempts == "last") for path in paths]
    if len(paths) == 1:
        return frames[0]
    names = _run_names([Path(path) for path in paths])
    for frame, run in zip(frames, names, strict=True):
        frame.insert(0, "run", pd.Series(run, index=frame.index, dtype="str"))
    about = of_several({run: description(each) for run, each in zip(names, frames, strict=True)})
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs[KEY] = about
    if "stepped" in frame and frame["stepped"].dtype != bool:  # logdirs and datasets together
        # For a parameter that did not step, a logdir has the gradient at most.
        moved = frame["update_norm"].notna() if by in {"parameter", "module"} else True
        told = frame["stepped"].notna()
        frame["stepped"] = frame["stepped"].where(told, moved).astype(bool)
    return frame


def _run_names(paths: list[Path]) -> list[str]:
    """Name each path by its shortest unique suffix; repeated paths are numbered."""
    whole = [path.resolve() for path in paths]
    whole = [path.parent / path.name.removesuffix(".parquet") for path in whole]
    names = dict.fromkeys(whole, "")
    for path in names:
        for depth in range(1, len(path.parts) + 1):
            names[path] = Path(*path.parts[-depth:]).as_posix()
            if not any(
                other.parts[-depth:] == path.parts[-depth:] for other in names if other != path
            ):
                break
    again = [whole[:at].count(path) for at, path in enumerate(whole)]
    return [names[path] + (f"#{n}" if n else "") for path, n in zip(whole, again, strict=True)]


def _read_one(path: Path, table: str, by: Level, last: bool) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist; allowed is {_ALLOWED}")
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; allowed is {_ALLOWED}")
    entries = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".parquet") and (path / name).is_file() for name in entries):
        name: TableName = (
            by if table == "frame" else "elements" if table == "elements" else "histograms"
        )
        return _read_dataset(path, name, last)
    if any("tfevents" in name for name in entries):
        if table != "frame":
            raise ValueError(
                f'{str(path)!r} is a TensorBoard logdir, which has table="frame" only, not '
                f"{table!r}"
            )
        return _read_logdir(path, by, last)
    found = ", ".join(map(repr, entries[:3])) + (", ..." if len(entries) > 3 else "")
    raise ValueError(f"{str(path)!r} holds {found or 'nothing'}; allowed is {_ALLOWED}")


def _without_superseded(frame: pd.DataFrame, first: Mapping[tuple[str, int], int]) -> pd.DataFrame:
    """Drop the rows that a later attempt of the same optimizer replaces.

    ``first`` is the first step of each attempt, by optimizer and attempt.
    """
    if len({attempt for _, attempt in first}) < 2:
        return frame
    optimizer, attempt, step = (frame[key].to_numpy() for key in ("optimizer", "attempt", "step"))
    drop = np.zeros(len(frame), dtype=bool)
    for (name, later), start in first.items():
        drop |= (optimizer == name) & (attempt < later) & (step >= start)
    return frame[~drop].reset_index(drop=True)


# --- Parquet ----------------------------------------------------------------------------------


def _read_dataset(folder: Path, name: TableName, last: bool) -> pd.DataFrame:
    import pyarrow as pa

    from lrprobe.sinks.memory import SCHEMAS, to_pandas
    from lrprobe.sinks.parquet import part_files

    tables = []
    keys = [SCHEMAS["parameter"].empty_table().select(_KEYS)]
    broken: list[str] = []
    told: list[Description] = []
    for path in part_files(folder):
        table, its_keys, its_run = _read_parts(path, name, broken)
        tables += table
        keys += its_keys
        for rows in its_keys:
            columns: list[Any] = [rows.column(key).to_pylist() for key in _KEYS]
            told += of_rows(its_run, *columns)
        if not told:
            told.append(Description(0, 0, "", its_run))
    if broken:
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        message = f"{len(broken)} of the files in {str(folder)!r} cannot be read: " + (
            "; ".join(broken[:3]) + more
        )
        if not tables:
            raise ValueError(message)
        warn(f"{message}. The others are read")
    frame = to_pandas(pa.concat_tables([SCHEMAS[name].empty_table(), *tables]))
    frame.attrs[KEY] = merged(told)
    if not last:
        return frame
    every = pa.concat_tables(keys).group_by(["optimizer", "attempt"]).aggregate([("step", "min")])
    first = {(row["optimizer"], row["attempt"]): row["step_min"] for row in every.to_pylist()}
    return _without_superseded(frame, first)


def _read_parts(
    path: Path, name: TableName, broken: list[str]
) -> tuple[list[pa.Table], list[pa.Table], Mapping[str, Any]]:
    """Read one part file of the frame, or the same part of another table.

    Returns:
        A list with the table, and a list with the key columns of the frame. Each list is empty if
        its file cannot be read; ``broken`` then receives the reason. Last, the description of the
        run.
    """
    from lrprobe.sinks.memory import SCHEMAS
    from lrprobe.sinks.parquet import FOLDERS, inspect_part

    rows: int | None = None
    keys = []
    run: Mapping[str, Any] = {}
    try:
        part = inspect_part(path)
        run = part.run
        frame = _read_part(path, "parameter", None, keys_only=name != "parameter")
        keys = [frame.select(_KEYS)]
        if name == "parameter":
            return [frame], keys, run
        rows = part.rows[name]
        if not rows:
            return [SCHEMAS[name].empty_table()], keys, run
    except FileNotFoundError:  # an attempt without a record has just removed its part
        return [], [], run
    except ValueError as error:
        broken.append(str(error))
        if name == "parameter":
            return [], [], run
    other = path.parent / FOLDERS[name] / path.name
    try:
        # If the frame's part is broken, the number of rows that belong to it is unknown: take all.
        if rows or other.exists():
            return [_read_part(other, name, rows)], keys, run
    except (ValueError, FileNotFoundError) as error:
        broken.append(str(error))
    return [], keys, run


def _read_part(path: Path, name: TableName, rows: int | None, keys_only: bool = False) -> pa.Table:
    """Read the table of one part file, cast to its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrprobe.sinks.memory import SCHEMAS

    schema = SCHEMAS[name]
    if keys_only:
        schema = pa.schema([schema.field(key) for key in _KEYS])
    expected = f"expected a Parquet file with the columns of lrprobe's table {name!r}"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=schema.names).select(schema.names).cast(schema)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {expected}, found no file") from error
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path}: {expected}, found a broken or foreign file ({error})") from error
    if rows is not None and len(table) < rows:
        raise ValueError(f"{path}: {expected}, {rows} rows, found {len(table)}")
    table = table.replace_schema_metadata()
    return table if rows is None else table.slice(0, rows)


# --- TensorBoard ------------------------------------------------------------------------------


def _read_logdir(folder: Path, by: Level, last: bool) -> pd.DataFrame:
    scalars = _Scalars()
    for file in sorted(path for path in folder.iterdir() if "tfevents" in path.name):
        for event in _events(file):
            scalars.take(event)
    levels = [level for level in LEVELS if level in scalars.levels]
    if not levels:
        raise ValueError(
            f"{str(folder)!r} has no events of lrprobe's; allowed is {_ALLOWED} that a probe wrote"
        )
    if by not in levels:
        raise ValueError(
            f"by={by!r}, but the tags in the logdir {str(folder)!r} are by "
            + ", ".join(map(repr, levels))
        )
    frame = scalars.frame(by)
    frame.attrs[KEY] = merged(scalars.descriptions)
    return _without_superseded(frame, scalars.first_steps()) if last else frame


class _Event(NamedTuple):
    """The values that the scalars of one record share."""

    optimizer: str
    attempt: int
    step: int
    time: float


class _Scalars:
    """Assembles the scalars of a logdir into rows."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str, Any, str]] = {}  # optimizer, level, key, column
        self._groups: dict[tuple[str, str, Any], int | None] = {}
        self._group_names: dict[tuple[str, int], str] = {}
        # Each sink id is one attempt. By optimizer: all ids in order, and the current one.
        self._sinks: dict[str, list[str]] = {}
        self._sink: dict[str, str] = {}
        self._found: dict[_Event, dict[tuple[str, Any], dict[str, float]]] = {}
        self.descriptions: list[Description] = []

    @property
    def levels(self) -> set[str]:
        return {level for _, level, _, _ in self._known.values()}

    def first_steps(self) -> dict[tuple[str, int], int]:
        first: dict[tuple[str, int], int] = {}
        for event in self._found:
            key = event.optimizer, event.attempt
            first[key] = min(event.step, first.get(key, event.step))
        return first

    def take(self, event: Any) -> None:
        from lrprobe.sinks.tab import RUN_PLUGIN
        from lrprobe.sinks.tensorboard import MAP_PLUGIN

        for value in event.summary.value:
            plugin = value.metadata.plugin_data
            if plugin.plugin_name == MAP_PLUGIN:
                self._learn(json.loads(value.tensor.string_val[0]))
            elif plugin.plugin_name == RUN_PLUGIN:
                self._describe(event.step, plugin.content, value.tensor.string_val[0])
            elif value.tag in self._known and value.HasField("simple_value"):
                optimizer, level, key, column = self._known[value.tag]
                attempt = self._sinks[optimizer].index(self._sink[optimizer])
                at = _Event(optimizer, attempt, event.step, event.wall_time)
                row = self._found.setdefault(at, {}).setdefault((level, key), {})
                row[column] = value.simple_value

    def frame(self, by: Level) -> pd.DataFrame:
        import pandas as pd

        figures = {"group": ("lr",), "model": ("reconstruction_error",)}.get(by, _SHOWN)
        kinds = {"step": "int64", "time": "float64", "attempt": "int64", "optimizer": "str"}
        kinds |= {**KEYS[by], **dict.fromkeys(figures, "float64")}
        rows = []
        for event, found in self._found.items():
            for (level, key), values in found.items():
                if level == by:
                    group = self._groups.get((event.optimizer, level, key))
                    lr = found.get(("group", group), {}).get("lr", float("nan"))
                    row = {**event._asdict(), "group": group, level: key, "lr": lr, **values}
                    if group is not None:
                        row["group_name"] = self._group_names[event.optimizer, group]
                    rows.append(row)
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)

    def _describe(self, step: int, content: bytes, text: bytes) -> None:
        """Take a description of the run; skip a broken one with a warning."""
        try:
            optimizer = _text(json.loads(content)["optimizer"])
            attempt = self._sinks[optimizer].index(self._sink[optimizer])
            run = from_json(text)
        except (ValueError, KeyError, TypeError) as error:
            warn(f"a description of the run at step {step:,} cannot be read: {error}")
            return
        self.descriptions.append(Description(attempt, step, optimizer, run))

    def _learn(self, content: Mapping[str, Any]) -> None:
        """Take the map from tags to parameters and columns, which precedes the first scalars."""
        for tag, name in content["reconstruction_error"].items():
            optimizer = _text(name)
            self._sink[optimizer] = content["sink"]
            if content["sink"] not in self._sinks.setdefault(optimizer, []):
                self._sinks[optimizer].append(content["sink"])
            self._known[tag] = (optimizer, "model", None, "reconstruction_error")
        for tag, (name, group, group_name) in content["lr"].items():
            self._known[tag] = (_text(name), "group", group, "lr")
            self._group_names[_text(name), group] = _text(group_name)
        for name, about in content["names"].items():
            where = (_text(about["optimizer"]), about["level"], _text(about["key"]))
            self._groups[where] = about["group"]
            for tag, column in content["scalars"].items():
                self._known[content["prefix"] + tag.format(name=name)] = (*where, column)


def _text(name: str) -> str:
    """Escape lone surrogates, as in a dataset: Python allows them, UTF-8 does not."""
    return name.encode("utf-8", "backslashreplace").decode()


def _events(path: Path) -> Iterator[Any]:
    """Yield the events of a file, up to one that is still being written.

    TensorBoard's EventAccumulator computes checksums in Python, which takes a second per 10 MB.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    from lrprobe.sinks.tensorboard import masked_crc

    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, check = struct.unpack("<QI", head)
            sound = masked_crc(head[:8]) == check
            if sound:
                content = file.read(length + 4)
                if len(content) < length + 4:
                    return
                data = content[:length]
                sound = masked_crc(data) == struct.unpack("<I", content[length:])[0]
            if not sound:
                warn(
                    f"{path}: expected a TensorBoard event file, found a broken or foreign one; "
                    "the events before that are read"
                )
                return
            yield Event.FromString(data)
