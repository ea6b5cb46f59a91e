"""The frame as JSON Lines, for everything that is not Python."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lrprobe.record import LEVELS, Level, Record, frame_columns


class JSONL:
    """Appends a line of JSON for each row of the frame.

    ``pandas.read_json(path, lines=True, precise_float=True)`` reads it. JSON has no NaN and no
    infinity: both are ``null``, and ``nonfinite`` shows where elements were not finite.

    Args:
        path: the file, which is created if missing, and otherwise continued. A partial line that a
            killed process left at its end is removed.
        by: which rows: ``"parameter"``, or ``"module"``, ``"group"``, ``"model"`` for merged ones.

    Raises:
        OSError: the file cannot be written.
        ValueError: for another ``by``; or the file has other contents, which are not touched.
    """

    def __init__(self, path: str | os.PathLike[str], *, by: Level = "parameter") -> None:
        if by not in LEVELS:
            raise ValueError(f"by={by!r}; allowed are {', '.join(map(repr, LEVELS))}")
        self._columns = frame_columns(by)
        self._by = by
        self._path = os.fspath(path)
        self._where = Path(path).absolute()  # wherever the process goes
        self.attempt = 0
        self._where.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._where.open("a+b", buffering=0)
        try:
            self._size = self._continue()
        except BaseException:
            self._file.close()
            raise

    def __repr__(self) -> str:
        return f"JSONL({self._path!r})"

    @property
    def destination(self) -> str:
        """The file's real, absolute path."""
        return os.path.realpath(self._where)

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            OSError: it could not be written; then nothing of it is in the file. Where the file was
                removed it is told so once, and goes on in a new one.
        """
        self._look_for_file()
        table = record.tables[self._by]
        columns = [
            [f"{json.dumps(name)}: {_JSON[kind](value)}" for value in table[name].tolist()]
            for name, kind in self._columns.items()
        ]
        lines = [f"{{{', '.join(row)}}}\n" for row in zip(*columns, strict=True)]
        rest = memoryview("".join(lines).encode())
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += size

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _look_for_file(self) -> None:
        try:
            if os.path.samestat(self._where.stat(), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            self._where.parent.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._file = self._where.open("a+b", buffering=0)
        attempt, self._size = self.attempt, self._continue()
        self.attempt = attempt
        raise FileNotFoundError(f"the file {self._path!r} was removed; it is created again")

    def _continue(self) -> int:
        """Go on where another run of this file ended; the file's size in bytes."""
        self._file.seek(0)
        size, last = 0, -1
        for line in self._file:
            torn = not line.endswith(b"\n")
            row = None if torn else self._row(line)
            if not (_BEGIN.startswith(line[: len(_BEGIN)]) if torn else row):
                raise ValueError(
                    f"{self._path!r} exists and was not written by lrprobe with by={self._by!r}: "
                    f"{line[:60]!r}"
                )
            if row is None:
                self._file.truncate(size)
                break
            size += len(line)
            last = max(last, row["attempt"])
        self.attempt = last + 1
        return size

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """A line that this sink has written; None for another one."""
        try:
            row = json.loads(line)
        except ValueError:
            return None
        return row if isinstance(row, dict) and list(row) == list(self._columns) else None


_BEGIN = b'{"step": '
"""Of each line."""


def _float(value: float) -> str:
    return repr(value) if math.isfinite(value) else "null"


_JSON: dict[str, Any] = {"float64": _float, "int64": str, "bool": json.dumps, "str": json.dumps}
"""Type of a column to what writes its values."""
