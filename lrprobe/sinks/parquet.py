"""A dataset folder that ``pandas.read_parquet`` opens, readable while it is written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrprobe.about import to_json
from lrprobe.optional import version_of
from lrprobe.record import SCHEMA_VERSION, Record
from lrprobe.sinks.memory import SCHEMAS, TABLES, TableName, arrow_tables, encode

PART_BYTES = 16 * 2**20
"""The last part grows by rewriting until its tables are as large as this in memory; also the bound
of what waits to be written."""

FOLDERS: Mapping[TableName, str] = {
    # pandas and pyarrow pass over names that begin with "_" in a dataset folder.
    **{name: f"_{name}" for name in TABLES},
    "parameter": "",
}
"""Table to its folder below the dataset."""

_SIDE: tuple[TableName, ...] = tuple(name for name in TABLES if name != "parameter")
_PART = re.compile(r"part-\d{5,}-[0-9a-f]{8}-\d{5,}\.parquet")
_TEMPORARY = ".lrprobe-"
_KEY = "lrprobe."


class Parquet:
    """Writes a Parquet dataset: a folder of part files that grow, each with its metadata.

    The folder itself holds the parameter-level frame, so ``pandas.read_parquet(path)`` reads it
    directly. The other tables are in ``_module``, ``_group``, ``_model``, ``_elements`` and
    ``_histograms`` below it. A part is written under a temporary name and then renamed, the frame's
    last, so a reader never sees a partial file, a row twice, or a record without its other tables.
    Every part's schema metadata has ``lrprobe.schema_version``, ``lrprobe.versions`` (of lrprobe,
    torch, Python), ``lrprobe.run`` (hyperparameters), ``lrprobe.attempt``, all JSON.

    An existing dataset is continued: nothing in it is rewritten, and ``attempt`` is one more than
    the highest in it.

    Args:
        path: the folder, which is created if missing.
        flush_secs: a record becomes readable after at most this many seconds, provided that
            something calls ``write`` or ``flush`` then (``Probe`` does).

    Attributes:
        attempt: how often the dataset had been continued: 0 for a fresh one.
        flush_secs: as given.

    Raises:
        OSError: the folder cannot be created or written (``PermissionError``, ``FileExistsError``,
            ``NotADirectoryError``, ...).
        ValueError: the folder contains something other than an lrprobe dataset, or ``flush_secs``
            is not a positive number.
    """

    def __init__(self, path: str | os.PathLike[str], *, flush_secs: float = 5.0) -> None:
        """Make the folder, or find what it holds, and prove that it can be written."""
        if not (math.isfinite(flush_secs) and flush_secs > 0):
            raise ValueError(f"flush_secs={flush_secs!r}; allowed is a positive number of seconds")
        self.flush_secs = flush_secs
        self._path = os.fspath(path)
        self._folder = Path(os.path.realpath(path))
        if self._folder.is_file():
            raise FileExistsError(
                f"{self._path!r} is a file; a Parquet sink writes a folder of files: allowed is a "
                "new or empty folder, or a dataset that lrprobe wrote"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.attempt = _next_attempt(self._folder)
            # Written by nobody else, even where two processes continue the dataset at once.
            self._token = secrets.token_hex(4)
            self._number, self._name, self._highest = -1, "", 0
            self._tables: dict[TableName, pa.Table] = {}
            self._begin()
            self._runs: dict[str, Mapping[str, Any]] = {}  # the latest of each optimizer
            self._pending: list[Record] = []
            self._pending_bytes = 0
            self._pending_since = 0.0
            self._gone = self._closed = False
            self._about: Mapping[str, Any] | None = None
            # An empty part proves that it can be written, and makes the folder a dataset at once.
            self._write_part(self._tables, self._highest)
        except OSError as error:
            raise _explained(error, f"cannot write a Parquet dataset to {self._path!r}") from error

    def __repr__(self) -> str:
        """Name the folder."""
        return f"Parquet({self._path!r})"

    @property
    def destination(self) -> str:
        """The folder's real, absolute path."""
        return str(self._folder)

    def write(self, record: Record) -> None:
        """Accept one record; it becomes readable after the next ``flush``.

        Raises:
            OSError: waiting records could not be written and are kept; this one is not accepted.
            ValueError: the sink is closed.
        """
        if self._closed:
            raise ValueError(f"{self!r} is closed")
        changed = self._run_changed(record)
        due = self._pending and time.monotonic() - self._pending_since >= self.flush_secs
        if changed or due or self._pending_bytes >= PART_BYTES:
            self.flush()  # before the record is taken: one that raises takes nothing
        if changed and self._tables["parameter"].num_rows:
            self._begin()
        self._runs[record.optimizer] = record.run
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(record)
        self._pending_bytes += record.nbytes

    def describe(self, run: Mapping[str, Any]) -> None:
        """Set the run's description, for the time before the first record; only once."""
        if self._about is None and not self._runs:
            self._about = run
            with contextlib.suppress(OSError):  # the next write says so
                self._write_part(self._tables, self._highest)

    def flush(self) -> None:
        """Make everything written so far durable and visible to readers.

        Raises:
            OSError: the write failed; the records are kept, and the next ``flush`` tries again.
        """
        if not self._pending:
            return
        if not self._folder.is_dir():
            if not self._gone:  # say so once, then make it anew: nothing is lost without a word
                self._gone = True
                raise FileNotFoundError(
                    f"the dataset folder {self._path!r} was removed; it will be created again, "
                    "with what is still in memory"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
        latest = arrow_tables(self._pending)
        tables = {name: pa.concat_tables([self._tables[name], latest[name]]) for name in TABLES}
        highest = max(self._highest, *(record.attempt for record in self._pending))
        try:
            self._write_part(tables, highest)
        except OSError as error:
            raise _explained(error, f"cannot write to the dataset {self._path!r}") from error
        self._tables, self._highest = tables, highest
        self._pending, self._pending_bytes, self._gone = [], 0, False
        if sum(table.nbytes for table in tables.values()) >= PART_BYTES:
            self._begin()

    def close(self) -> None:
        """Flush and finish; idempotent.

        Raises:
            OSError: the write failed; the records are kept, and ``close`` may be called again.
        """
        if self._closed:
            return
        self.flush()
        self._closed = True
        unused = self._number == 0 and not self._tables["parameter"].num_rows
        if unused and self.attempt:  # an attempt that recorded nothing leaves nothing
            with contextlib.suppress(OSError):
                (self._folder / self._name).unlink()

    def _begin(self) -> None:
        """Begin the next part, empty."""
        self._number += 1
        self._name = f"part-{self.attempt:05d}-{self._token}-{self._number:05d}.parquet"
        self._tables = {name: SCHEMAS[name].empty_table() for name in TABLES}
        self._highest = self.attempt

    def _run_changed(self, record: Record) -> bool:
        known = self._runs.get(record.optimizer)
        if known is None or known is record.run:
            return False
        return to_json(known) != to_json(record.run)

    def _write_part(self, tables: Mapping[TableName, pa.Table], attempt: int) -> None:
        run: dict[str, Any] = {}
        # Several where probes share the sink.
        for one in self._runs.values() or ([] if self._about is None else [self._about]):
            for key, value in one.items():
                both = isinstance(value, Mapping) and isinstance(run.get(key), Mapping)
                run[key] = {**run[key], **value} if both else value
        # What another optimizer's description says of this one may be older.
        own = {
            name: one["optimizers"][name]
            for name, one in self._runs.items()
            if name in one.get("optimizers", {})
        }
        if own:
            run["optimizers"] = {**run["optimizers"], **own}
        values = {
            "schema_version": SCHEMA_VERSION,
            "versions": _versions(),
            "attempt": attempt,
            "run": run,
        }
        keys = {_KEY + key: to_json(value) for key, value in values.items()}
        for name in _SIDE:
            if tables[name].num_rows:
                self._replace(self._folder / FOLDERS[name], tables[name], keys)
        # How far the other tables belong to this state of the part: they may already be longer
        # when a reader comes, or when the process is killed here.
        keys[_KEY + "rows"] = to_json({name: tables[name].num_rows for name in TABLES})
        self._replace(self._folder, tables["parameter"], keys)

    def _replace(self, folder: Path, table: pa.Table, keys: Mapping[str, str]) -> None:
        content = encode(table.replace_schema_metadata(dict(keys)))
        temporary = folder / f"{_TEMPORARY}{self._name}"
        folder.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / self._name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


class OtherVersionError(ValueError):
    """A part that another version of lrprobe wrote."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a part file says of itself.

    Attributes:
        path: the file.
        attempt: the highest attempt of its rows.
        rows: table to the number of rows that belong to this part.
        run: hyperparameters and versions, as in ``Record.run``.
    """

    path: Path
    attempt: int
    rows: Mapping[str, int]
    run: Mapping[str, Any]


def part_files(folder: Path) -> list[Path]:
    """The files in a dataset folder that are not to be passed over, in order of writing."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))


def inspect_part(path: Path) -> Part:
    """Read what a part file of the frame says of itself.

    Raises:
        ValueError: it is no whole Parquet file, or lrprobe did not write it.
        OSError: it cannot be read.
    """
    expected = f"expected a Parquet file written by lrprobe (schema version {SCHEMA_VERSION})"
    if not path.is_file():
        raise ValueError(f"{path}: {expected}, found no file")
    try:
        keys = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: {expected}, found a broken or foreign file ({error})") from error
    found = {key.decode(errors="replace"): value for key, value in keys.items()}
    try:
        version = json.loads(found[_KEY + "schema_version"])
        if version != SCHEMA_VERSION:
            raise OtherVersionError(f"{path}: {expected}, found schema version {version}")
        attempt, rows, run = (json.loads(found[_KEY + key]) for key in ("attempt", "rows", "run"))
    except KeyError as error:
        raise ValueError(f"{path}: {expected}, found one without its metadata") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {expected}, found one with broken metadata") from error
    return Part(path, attempt, rows, run)


def _next_attempt(folder: Path) -> int:
    """One more than the highest attempt in a dataset; 0 in an empty folder."""
    attempts = []
    foreign = []
    for path in part_files(folder):
        ours = _PART.fullmatch(path.name)
        try:
            attempts.append(inspect_part(path).attempt)
        except ValueError as error:
            if ours and not isinstance(error, OtherVersionError):
                # Broken by whatever broke it: leave it, and go on after it.
                attempts.append(int(path.name.split("-")[1]))
            else:
                foreign.append(path.name)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{str(folder)!r} holds {foreign[0]!r}{more}, not written by this version of lrprobe; "
            "allowed is a new or empty folder, or a dataset that lrprobe wrote"
        )
    for name in TABLES:  # what a killed process left; readers pass over it
        for leftover in (folder / FOLDERS[name]).glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
    return 1 + max(attempts, default=-1)


def _explained(error: OSError, what: str) -> OSError:
    """An error of the same kind that says what it kept from being done."""
    reason = error.strerror or str(error)
    return (
        OSError(error.errno, f"{what}: {reason}") if error.errno else OSError(f"{what}: {reason}")
    )


def _versions() -> dict[str, str]:
    packages = {package: version_of(package) for package in ("lrprobe", "torch")}
    return {"python": platform.python_version(), **packages}
