"""Loads the runs at the paths given on the command line into one frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrprobe.about import KEY, Description, description, merged, of_rows, of_several
from lrprobe.read import _run_names, read
from lrprobe.record import Level
from lrprobe.series import latest
from lrprobe.text import listed, warn

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

COLUMNS = (
    "step",
    "time",
    "attempt",
    "optimizer",
    "group",
    "parameter",
    "numel",
    "rule",
    "stepped",
    "lr",
    "initial_lr",
    "decay",
    "effective_lr_min",
    "effective_lr_p05",
    "effective_lr_p50",
    "effective_lr_p95",
    "effective_lr_applied",
    "update_norm",
    "update_ratio",
    "param_norm",
    "grad_norm",
    "zero_grad_fraction",
    "rms_update_mean",
    "eps_fraction",
    "nonfinite",
    "lost_fraction",
    "reconstruction_error",
)
"""Columns that findings and reports need."""

NEWER_COLUMNS = ("idle_fraction", "grad_persistence", "state_error")
"""Further columns that they need, which older datasets lack."""

_LAST_PARTS = 4
"""Number of last parts of a dataset to search for the newest step of an optimizer."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs that were read.

    Attributes:
        frame: rows of every attempt; with a column ``run`` if there are several runs.
        names: names of the runs, in order.
        level: what a row describes: ``"parameter"``, or ``"module"`` if a logdir has only that.
    """

    frame: pd.DataFrame
    names: tuple[str, ...]
    level: Level


def load(*paths: str | os.PathLike[str], also: Sequence[str] = ()) -> Runs:
    """Read the runs at some paths; for a folder of runs, all runs in it.

    Args:
        paths: the paths of the runs.
        also: columns to read in addition to ``COLUMNS``, if they exist.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path holds no run, or nothing in it can be read.
    """
    import pandas as pd

    found = [run for path in paths for run in find(Path(path))]
    names = run_names(found)
    level: Level = "parameter"
    frames = []
    for path in found:
        frame = _columns_of(path, also)
        if frame is None:
            try:
                frame = read(path, by=level, attempts="all")
            except ValueError as error:
                if "by='parameter'" not in str(error):
                    raise
                level = "module"
                break
        frames.append(frame)
    if level == "module":
        frames = [read(path, by=level, attempts="all") for path in found]
    if len(found) == 1:
        return Runs(frames[0], tuple(names), level)
    about = of_several({name: description(each) for name, each in zip(names, frames, strict=True)})
    for frame, name in zip(frames, names, strict=True):
        frame.insert(0, "run", pd.Series(name, index=frame.index, dtype="str"))
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs[KEY] = about
    return Runs(whole, tuple(names), level)


def _columns_of(path: Path, also: Sequence[str]) -> pd.DataFrame | None:
    """The columns that findings and reports need, of every attempt, with names as categories.

    It fills each column part by part, so it is four times as fast as ``read`` and takes a third of
    the memory, which matters for five million rows. None if the path is not a dataset, or if
    something in it is broken; ``read`` then raises the error.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrprobe.sinks.memory import SCHEMAS
    from lrprobe.sinks.parquet import inspect_part, part_files

    if not path.is_dir() or not is_dataset(path):
        return None
    schema = SCHEMAS["parameter"]
    try:
        parts = part_files(path)
        if not parts:
            return None
        runs = [inspect_part(part).run for part in parts]
        available = set.intersection(*(set(pq.read_schema(part).names) for part in parts))
        more = [name for name in (*NEWER_COLUMNS, *also) if name in available]
        wanted = list(dict.fromkeys((*COLUMNS, *more)))
        text_columns = [
            name
            for name in wanted
            if name in schema.names and schema.field(name).type == pa.string()
        ]
        codes: dict[str, dict[str, int]] = {name: {} for name in text_columns}
        ends = np.cumsum([pq.read_metadata(part).num_rows for part in parts]).tolist()
        columns: dict[str, Any] = {
            name: np.empty(ends[-1], np.int32 if name in codes else _dtype(schema, name))
            for name in wanted
        }
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            # A part is too small for Arrow's threads, which would each read some of its columns.
            with pq.ParquetFile(part, read_dictionary=text_columns) as file:
                table = file.read(columns=wanted, use_threads=False)
            for name, column in columns.items():
                # The last part of a live run may have grown since `ends` was computed.
                values: Any = table.column(name).combine_chunks()[: end - start]
                if name in codes:
                    known = codes[name]
                    text = values.dictionary.to_pylist()
                    code = np.array([known.setdefault(each, len(known)) for each in text], int)
                    column[start:end] = code[values.indices.to_numpy()]
                else:
                    column[start:end] = values.to_numpy(zero_copy_only=False)
    except (pa.ArrowException, ValueError, KeyError, OSError):
        return None
    descriptions = [Description(0, 0, "", run) for run in runs[:1]]
    optimizers = list(codes["optimizer"])
    for run, start, end in zip(runs, [0, *ends], ends, strict=False):
        code, at = np.unique(columns["optimizer"][start:end], return_index=True)
        attempts, steps = (columns[name][start:end][at] for name in ("attempt", "step"))
        descriptions += of_rows(run, [optimizers[each] for each in code], attempts, steps)
    for name, known in codes.items():
        columns[name] = pd.Categorical.from_codes(columns[name], categories=pd.Index(list(known)))
    frame = pd.DataFrame(columns, copy=False)
    frame.attrs[KEY] = merged(descriptions)
    return frame


def _dtype(schema: pa.Schema, name: str) -> Any:
    return schema.field(name).type.to_pandas_dtype() if name in schema.names else "float64"


def before_attempt(path: Path, attempt: int) -> pd.DataFrame | None:
    """The rows of all attempts before this one in a dataset; None if there are none.

    Raises:
        ValueError: it cannot be read.
        OSError: the same.
    """
    if not path.is_dir() or not is_dataset(path):
        return None
    frame = _columns_of(path, ())
    if frame is None:
        frame = read(path, attempts="all")
    earlier = frame[frame["attempt"] < attempt].reset_index(drop=True)
    return earlier if len(earlier) else None


def run_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its shortest suffix that is unique."""
    return _run_names(list(paths))


def find(path: Path) -> list[Path]:
    """The runs at a path: the path itself, or all runs in the folder.

    Parquet datasets are preferred, because they have more than TensorBoard's scalars.
    """
    if not path.is_dir() or is_dataset(path) or is_logdir(path):
        return [path]  # if it is not a run, reading it raises the error
    inside = sorted(each for each in path.iterdir() if each.is_dir())
    datasets = [each for each in inside if is_dataset(each)]
    logdirs = [each for each in inside if is_logdir(each)]
    dataset_names = {each.name.removesuffix(".parquet") for each in datasets}
    alone = [each.name for each in logdirs if each.name not in dataset_names]
    if datasets and alone:
        warn(
            f"{str(path)!r} has datasets, which are read, and logdirs of other runs, which "
            f"are not: {listed(alone)}. Pass their paths to read them"
        )
    return datasets or logdirs or [path]


def is_dataset(path: Path) -> bool:
    """Whether a folder is a Parquet dataset."""
    return any(each.suffix == ".parquet" and each.is_file() for each in path.iterdir())


def is_logdir(path: Path) -> bool:
    """Whether a folder is a TensorBoard logdir."""
    return any("tfevents" in each.name for each in path.iterdir())


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of a run's files, which change when it has recorded more."""
    if not path.is_dir():
        return []
    found = []
    for each in sorted(path.iterdir()):
        try:
            about = each.stat()
        except FileNotFoundError:  # replaced at this moment
            continue
        found.append((each.name, about.st_mtime_ns, about.st_size))
    return found


def newest(path: Path, by: Level) -> pd.DataFrame:
    """Rows that include the newest step of each optimizer; fast even for a long dataset.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it holds no run, or has no rows ``by`` this.
    """
    if path.is_dir() and is_dataset(path):
        frame = _last_parts(path, by)
        if frame is not None:
            return frame
    levels: tuple[Level, ...] = (by, "module", "parameter")
    for level in levels:
        try:
            return read(path, by=level)
        except ValueError as error:
            if "by=" not in str(error) or level == levels[-1]:
                raise
    return read(path)


def _last_parts(path: Path, by: Level) -> pd.DataFrame | None:
    """The rows in the last parts of a dataset; None if the whole dataset has to be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lrprobe.sinks.memory import to_pandas
    from lrprobe.sinks.parquet import FOLDERS, inspect_part, part_files

    tables: list[pa.Table] = []
    missing: set[str] = set()
    for part in reversed(part_files(path)):
        try:
            with pq.ParquetFile(path / FOLDERS[by] / part.name) as file:
                table = file.read()
            if not len(table):
                continue
            if not tables:
                missing = set(inspect_part(part).run.get("optimizers", ()))
        except FileNotFoundError:
            continue
        except (pa.ArrowException, ValueError, OSError):
            return None
        tables.insert(0, table.replace_schema_metadata())
        missing -= set(table.column("optimizer").to_pylist())
        if not missing or len(tables) == _LAST_PARTS:
            break
    return latest(to_pandas(pa.concat_tables(tables))) if tables else None
