"""Records kept in memory, compressed; and how records become Arrow tables, for every sink."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lrprobe.about import KEY, Description, merged
from lrprobe.record import (
    ELEMENT_COLUMNS,
    HISTOGRAM_COLUMNS,
    LEVELS,
    Columns,
    Level,
    Record,
    frame_columns,
)
from lrprobe.text import warn

if TYPE_CHECKING:
    import pandas as pd

TableName: TypeAlias = Literal["parameter", "module", "group", "model", "elements", "histograms"]
"""Every table of a record: one per level, the tracked elements, the histograms."""

TABLES: tuple[TableName, ...] = get_args(TableName)

_TYPES: Mapping[str, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    # Parquet calls the items "element"; the same name here spares a cast when reading.
    "list<float64>": pa.list_(pa.field("element", pa.float64())),
    "list<int64>": pa.list_(pa.field("element", pa.int64())),
}


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    return pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])


SCHEMAS: Mapping[TableName, pa.Schema] = {
    **{level: _schema(frame_columns(level)) for level in LEVELS},
    "elements": _schema(ELEMENT_COLUMNS),
    "histograms": _schema(HISTOGRAM_COLUMNS),
}
"""Table to its Arrow schema: the columns of ``lrprobe.record``, in order."""


def check_level(by: str) -> Level:
    """``by`` itself; ``ValueError`` where it is no level."""
    for level in LEVELS:
        if by == level:
            return level
    raise ValueError(f"by={by!r}; allowed are {', '.join(map(repr, LEVELS))}")


def arrow_tables(records: Sequence[Record]) -> dict[TableName, pa.Table]:
    """All tables of some records as Arrow, by ``SCHEMAS``, in the order of the records."""
    columns: dict[TableName, list[Columns]] = {
        **{level: [record.tables[level] for record in records] for level in LEVELS},
        "elements": [record.elements for record in records],
        "histograms": [record.histograms() for record in records],
    }
    return {name: _arrow_table(name, columns[name]) for name in TABLES}


def arrow_table(name: TableName, records: Sequence[Record]) -> pa.Table:
    """One of the tables of ``arrow_tables``."""
    if name == "histograms":
        return _arrow_table(name, [record.histograms() for record in records])
    if name == "elements":
        return _arrow_table(name, [record.elements for record in records])
    return _arrow_table(name, [record.tables[name] for record in records])


def _arrow_table(name: TableName, pieces: Sequence[Columns]) -> pa.Table:
    schema = SCHEMAS[name]
    if not pieces:
        return schema.empty_table()
    arrays = []
    for column in schema:
        values = np.concatenate([piece[column.name] for piece in pieces])
        arrays.append(_arrow_array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _arrow_array(values: NDArray[Any], kind: pa.DataType) -> Any:
    if isinstance(kind, pa.ListType):
        offsets = np.zeros(len(values) + 1, dtype=np.int32)
        np.cumsum([len(items) for items in values], out=offsets[1:])
        flat = np.concatenate(values) if len(values) else np.empty(0)
        ends: Any = pa.array(offsets)
        items: Any = pa.array(flat, type=kind.value_type)
        return pa.ListArray.from_arrays(ends, items, type=kind)
    try:
        return pa.array(values, type=kind)
    except UnicodeEncodeError:  # half a surrogate pair: a legal name in Python, no legal text
        text = [value.encode("utf-8", "backslashreplace").decode() for value in values]
        return pa.array(text, type=kind)


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A DataFrame with a plain ``RangeIndex`` and the types that section 3 of the design names.

    A column of text has pandas's own type for it: ``str``, before pandas 3 ``object``.
    """
    import pandas as pd

    frame: pd.DataFrame = table.to_pandas()
    text = pd.Series(dtype="str").dtype
    for column in table.schema:  # which pyarrow before 19 leaves as objects also with pandas 3
        if pa.types.is_string(column.type) and frame[column.name].dtype != text:
            frame[column.name] = frame[column.name].astype(text)
    return frame


def encode(table: pa.Table) -> bytes:
    """The table as the bytes of a Parquet file, its metadata included."""
    text: Any = []
    figures: Any = []  # the stubs have these two parameters as bool only
    for column in table.schema:
        if isinstance(column.type, pa.ListType):
            figures.append(f"{column.name}.list.element")
        elif pa.types.is_floating(column.type):
            figures.append(column.name)
        else:
            text.append(column.name)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=text,
        # Splitting doubles into byte streams brings their slowly varying exponents together:
        # smaller and faster than a dictionary of figures that are never twice the same.
        use_byte_stream_split=figures,
        write_statistics=False,
    )
    return sink.getvalue().to_pybytes()  # whose size is what it takes, unlike the buffer's


def footprint(record: Record, names: set[int] | None = None) -> int:
    """Bytes that keeping a record takes: figures, array objects and the names not yet in ``names``.

    Args:
        record: what would be kept.
        names: the ``id`` of each string that other kept records share; those of this record are
            added.
    """
    seen = set() if names is None else names
    tables: list[tuple[TableName, Columns]] = [
        *record.tables.items(),
        ("elements", record.elements),
    ]
    arrays = len(record.edges) + len(record.counts)
    total = record.nbytes
    for name, columns in tables:
        arrays += len(columns)
        for of in _TEXTS[name]:
            array = columns[of]
            total += array.nbytes
            for text in array.tolist():
                if id(text) not in seen:
                    seen.add(id(text))
                    total += sys.getsizeof(text)
    return total + _ARRAY * arrays


_ARRAY = sys.getsizeof(np.empty(0)) + 16  # the object around an array, and a place in a container
_TEXTS = {
    name: [column.name for column in schema if pa.types.is_string(column.type)]
    for name, schema in SCHEMAS.items()
}


@dataclass(frozen=True, slots=True)
class _NumberedRecord:
    """A record with its position in the order of arrival."""

    arrival: int
    record: Record


@dataclass(frozen=True, slots=True)
class _CompressedRecords:
    """Some records, compressed."""

    arrivals: NDArray[np.int64]
    rows: Mapping[TableName, NDArray[np.int64]]
    files: Mapping[TableName, bytes]
    nbytes: int

    @classmethod
    def of(cls, kept: Sequence[_NumberedRecord]) -> _CompressedRecords:
        records = [one.record for one in kept]
        arrivals = np.array([one.arrival for one in kept])
        rows = {name: np.array([_rows(record, name) for record in records]) for name in TABLES}
        tables = arrow_tables(records)
        files = {name: encode(table) for name, table in tables.items() if table.num_rows}
        arrays = [arrivals, *rows.values()]
        nbytes = sum(map(sys.getsizeof, files.values()))
        nbytes += sum(array.nbytes + _ARRAY for array in arrays)
        return cls(arrivals, rows, files, nbytes)

    def table(self, name: TableName) -> pa.Table:
        if name not in self.files:
            return SCHEMAS[name].empty_table()
        return pq.ParquetFile(pa.BufferReader(self.files[name])).read()


def _rows(record: Record, name: TableName) -> int:
    if name == "histograms":
        return sum(1 for counts in record.counts if len(counts))
    columns = record.elements if name == "elements" else record.tables[name]
    return len(columns["step"])


@dataclass(slots=True)
class _ResolutionTier:
    """Records that are dropped together: compressed blocks, and the newest, not yet compressed."""

    blocks: list[_CompressedRecords] = field(default_factory=list)
    block_bytes: int = 0
    open: list[_NumberedRecord] = field(default_factory=list)
    open_bytes: int = 0
    names: set[int] = field(default_factory=set)


_TOP = 63  # the tier of each optimizer's first record; it is never dropped


class Memory:
    """Keeps records in memory, for ``Probe.frame()``.

    Older records are compressed (zstd). When ``max_bytes`` is reached, every second kept record is
    dropped, and from then on only every second one is kept, then every fourth, and so on: the
    resolution in time halves over the whole run. Each optimizer is counted separately, and its
    first and its newest record are always kept, even if they alone exceed the limit.

    Any thread may request a frame while another one writes.

    Args:
        max_bytes: limit in bytes; 0 keeps nothing.

    Raises:
        ValueError: ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        """Create an empty memory."""
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(
                f"max_bytes={max_bytes!r}; allowed is a whole number of bytes, 0 or more"
            )
        self.max_bytes = max_bytes
        # A record's tier is the number of times its index (per optimizer) can be halved. The
        # lowest tier that is left is therefore every second kept record, and halving the
        # resolution is dropping one tier: no block needs to be opened for that.
        self._tiers: dict[int, _ResolutionTier] = {}
        self._lowest = 0
        self._written: dict[str, int] = {}
        self._newest: dict[str, tuple[int, _NumberedRecord]] = {}
        self._spare: dict[str, int] = {}  # bytes of the newest records that are in no tier
        self._arrivals = 0
        self._problems: list[str] = []
        self._told: list[Description] = []
        self._runs: dict[str, Mapping[str, Any]] = {}  # the latest of each optimizer
        self._about: Mapping[str, Any] = {}  # before there is a record
        # Held for swapping references only, never while compressing: the writer is one thread.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Say what is kept."""
        return f"Memory(max_bytes={self.max_bytes}): {self.nbytes} bytes kept"

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        tiers = list(self._tiers.values())
        return sum(t.block_bytes + t.open_bytes for t in tiers) + sum(self._spare.copy().values())

    def write(self, record: Record) -> None:
        """Take one record."""
        if self.max_bytes == 0:
            return
        name = record.optimizer
        index = self._written.get(name, 0)
        tier = (index & -index).bit_length() - 1 if index else _TOP
        kept = _NumberedRecord(self._arrivals, record)
        with self._lock:
            self._arrivals += 1
            if self._runs.get(name) is not record.run:
                self._runs[name] = record.run
                self._told.append(Description(record.attempt, record.step, name, record.run))
            self._written[name] = index + 1
            self._newest[name] = (tier, kept)
            if tier < self._lowest:
                self._spare[name] = footprint(record)
            else:
                self._spare.pop(name, None)
                target = self._tiers.setdefault(tier, _ResolutionTier())
                target.open_bytes += footprint(record, target.names)
                target.open.append(kept)
        if tier in self._tiers and self._tiers[tier].open_bytes > self.max_bytes // 48:
            self._compress(self._tiers[tier])
        while self.nbytes > self.max_bytes and self._thin():
            pass

    def describe(self, run: Mapping[str, Any]) -> None:
        """Set the run's description, for the time before the first record."""
        self._about = run

    def close(self) -> None:
        """Do nothing: the records remain available."""

    def problems(self) -> list[str]:
        """Messages since the last call, for warnings."""
        with self._lock:
            problems, self._problems = self._problems, []
        return problems

    def frame(self, by: str = "parameter") -> pd.DataFrame:
        """One row per kept record and parameter (or module, group, model), in order of arrival.

        Args:
            by: ``"parameter"``, ``"module"``, ``"group"`` or ``"model"``.

        Raises:
            ValueError: ``by`` is none of these.
            RuntimeError: nothing is kept, because ``max_bytes`` is 0.
        """
        return self._frame(check_level(by))

    def elements(self) -> pd.DataFrame:
        """One row per kept record and tracked element, in order of arrival.

        Raises:
            RuntimeError: nothing is kept, because ``max_bytes`` is 0.
        """
        return self._frame("elements")

    def histograms(self) -> pd.DataFrame:
        """One row per kept record and parameter that has a rate: n + 1 edges and n counts.

        Raises:
            RuntimeError: nothing is kept, because ``max_bytes`` is 0.
        """
        return self._frame("histograms")

    def _compress(self, tier: _ResolutionTier) -> None:
        block = _CompressedRecords.of(tier.open)
        with self._lock:
            tier.blocks.append(block)
            tier.block_bytes += block.nbytes
            tier.open, tier.open_bytes, tier.names = [], 0, set()

    def _thin(self) -> bool:
        """Drop every second kept record; False where only first and newest ones are left."""
        with self._lock:
            droppable = [tier for tier in self._tiers if tier != _TOP]
            if not droppable:
                return False
            lowest = min(droppable)
            del self._tiers[lowest]
            if self._lowest == 0:
                self._problems.append(
                    f"the records in memory have reached their limit of "
                    f"{self.max_bytes:,} bytes (sinks.Memory(max_bytes={self.max_bytes})). To stay "
                    "within it, every second record is dropped now, and again each time it is "
                    "reached; the first and the newest are kept. To keep all records, use "
                    'attach(..., to="some/path.parquet"), or give sinks.Memory a larger limit.'
                )
            self._lowest = lowest + 1
            for name, (tier, kept) in self._newest.items():
                if tier < self._lowest and name not in self._spare:
                    self._spare[name] = footprint(kept.record)
            return True

    def _frame(self, name: TableName) -> pd.DataFrame:
        if self.max_bytes == 0:
            raise RuntimeError(
                "max_bytes=0 turns memory off, so it keeps no record; use "
                "sinks.Memory(max_bytes=...) above 0, or record to a Parquet dataset and "
                "lrprobe.read() it"
            )
        for problem in self.problems():  # where no delivery has passed it on
            warn(problem)
        with self._lock:
            blocks = [block for tier in self._tiers.values() for block in tier.blocks]
            loose = [kept for tier in self._tiers.values() for kept in tier.open]
            loose += [self._newest[optimizer][1] for optimizer in self._spare]
            told = list(self._told)
        tables = [block.table(name) for block in blocks]
        tables.append(arrow_table(name, [kept.record for kept in loose]))
        table = pa.concat_tables([t.replace_schema_metadata() for t in tables])
        arrivals = np.concatenate(
            [np.repeat(block.arrivals, block.rows[name]) for block in blocks]
            + [np.full(_rows(kept.record, name), kept.arrival) for kept in loose]
            + [np.empty(0, dtype=np.int64)]
        )
        if np.any(arrivals[1:] < arrivals[:-1]):
            order: Any = pa.array(np.argsort(arrivals, kind="stable"))
            table = table.take(order)
        frame = to_pandas(table)
        frame.attrs[KEY] = merged([Description(0, 0, "", self._about), *told])
        return frame
