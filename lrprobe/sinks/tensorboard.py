"""Scalars, histograms and bands for TensorBoard."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    HistogramProto,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_shape_pb2 import (  # type: ignore[import-untyped]
    TensorShapeProto,
)
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, text

from lrprobe.record import QUANTILES, SCHEMA_VERSION, Record

MAX_NAMES = 200
"""Above so many parameters the tags are per module: TensorBoard takes minutes with more."""

SCALARS: Mapping[str, str] = {
    "effective_lr": "effective_lr_p50",
    "effective_lr_p05": "effective_lr_p05",
    "effective_lr_p95": "effective_lr_p95",
    "update_ratio": "update_ratio",
    "update_norm": "update_norm",
    "grad_norm": "grad_norm",
}
"""First part of a tag, before the parameter's or module's name, to the column it shows."""

MAP_PLUGIN = "lrprobe"
"""Plugin name of the tensor, a JSON text, that says which tags belong to what."""

_HISTOGRAM = "effective_lr_log10_hist"
_BUCKETS = 32  # TensorBoard draws 30
_MAX_NAME = 200  # characters of a name in a tag

_OVERVIEW = {
    "update ratio of all (usual: about 0.001)": "update_ratio",
    "effective lr of all (median)": "effective_lr",
    "lr of the groups": "lr",
}
"""Title of a chart with many lines to the first part of their tags."""

_CARD = """\
### lrprobe: the effective learning rate

The *effective learning rate* is the factor that an optimizer multiplies the direction of its step
with, for each element of a parameter: `lr / (sqrt(v) + eps)` in Adam. The tags below are per
{level}; what stands after the first `/` is its name.

| tag | meaning |
|---|---|
| `{prefix}effective_lr/...` | median of the effective rate over the elements |
| `{prefix}effective_lr_p05/...` | 5 % of the elements are below |
| `{prefix}effective_lr_p95/...` | 5 % of the elements are above |
| `{prefix}effective_lr_log10_hist/...` | its histogram: -3 stands for a rate of 0.001 |
| `{prefix}update_norm/...` | norm of the intended step, weight decay included |
| `{prefix}update_ratio/...` | that norm over the norm of the parameter |
| `{prefix}grad_norm/...` | norm of the gradient as the optimizer used it |
| `{prefix}lr/...` | the group's `lr` as it stood during the step |
| `{prefix}reconstruction_error/..._max` | how far the reconstruction is from the real step |

**Which layer is too fast, which too slow?** The Custom Scalars tab begins with the update ratios of
all in one chart: an update of about 0.001 of the parameter is usual, far more is fast, far less is
slow. Its other charts have the median rate with its band from the 5th to the 95th percentile. All
figures, for each parameter: `probe.frame()`, or a Parquet dataset.
"""


class TensorBoard:
    """Writes each record as one event of TensorBoard's.

    Above ``MAX_NAMES`` parameters the tags are per module, at the greatest depth that has at most
    as many modules; their quantiles are merged from the parameters' histograms. The wall time and
    the step of an event are the record's.

    Args:
        writer_or_dir: a logdir, made where it is missing, or a
            ``torch.utils.tensorboard.SummaryWriter``, which stays its owner's: it is flushed and
            not closed.
        prefix: put before each tag, as it is; of ``A-Za-z0-9_./-``.

    Raises:
        OSError: the logdir cannot be made or written.
        TypeError: ``writer_or_dir`` is neither a path nor such a writer.
        ValueError: ``prefix`` has other characters.
    """

    def __init__(
        self, writer_or_dir: str | os.PathLike[str] | SummaryWriter, prefix: str = ""
    ) -> None:
        """Make the logdir and prove that it can be written."""
        if _clean(prefix, "") != prefix:
            raise ValueError(f"prefix={prefix!r}; allowed are the characters A-Za-z0-9_./-")
        self.prefix = prefix
        self._target: _EventFile | _Writer
        if isinstance(writer_or_dir, SummaryWriter):
            self._target = _Writer(writer_or_dir)
        elif isinstance(writer_or_dir, (str, os.PathLike)):
            self._target = _EventFile(os.fspath(writer_or_dir))
        else:
            raise TypeError(
                f"writer_or_dir is a {type(writer_or_dir).__name__}; allowed are a path and a "
                "torch.utils.tensorboard.SummaryWriter"
            )
        self._tags = _Tags(prefix)

    def __repr__(self) -> str:
        """Name the logdir."""
        return f"TensorBoard({self._target.folder!r})"

    @property
    def destination(self) -> str:
        """The logdir's real, absolute path, and the prefix where there is one."""
        folder = os.path.realpath(self._target.folder)
        return f"{folder}:{self.prefix}" if self.prefix else folder

    def write(self, record: Record) -> None:
        """Write one record.

        Raises:
            OSError: it could not be written.
        """
        self._tags.begin_attempt(record.attempt)
        self._tags.news |= self._target.begin()
        plan = self._tags.plan(record)
        summary = Summary()
        if self._tags.news:
            summary.MergeFrom(self._tags.describe())
        _add_scalars(summary, plan, record)
        self._target.add(Event(summary=summary, step=record.step, wall_time=record.time))
        self._tags.news = False

    def flush(self) -> None:
        """Make sure that everything written so far is in the file.

        Raises:
            OSError: it could not be written.
        """
        self._target.flush()

    def close(self) -> None:
        """Flush, and close the file if it is not the user's; idempotent."""
        self._target.close()


# --- Which tag belongs to what ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """The tags of one optimizer's records."""

    optimizer: str
    parameters: tuple[str, ...]
    level: str
    names: tuple[str, ...]  # what the tags end in
    rows: tuple[list[int], ...]  # of the parameter table, per name
    prefix: str
    owner: str  # "" or "<optimizer>."

    def tag(self, metric: str, name: str) -> str:
        return f"{self.prefix}{metric}/{name}"


class _Tags:
    """Names for everything, unique in the run."""

    def __init__(self, prefix: str) -> None:
        self.news = True  # something is to be described to TensorBoard
        self._prefix = prefix
        self._sink = secrets.token_hex(8)  # tells readers one attempt from the next
        self._attempt = 0
        self._plans: dict[str, _Plan] = {}
        self._names: dict[tuple[str, str, str], str] = {}  # (optimizer, level, key) to name
        self._owners: dict[str, str] = {}
        self._groups: dict[str, tuple[str, int]] = {}  # tag to (optimizer, group)
        self._group_of: dict[str, int] = {}  # name to group

    def begin_attempt(self, attempt: int) -> None:
        """Tell readers where a run goes back to an earlier step."""
        if attempt > self._attempt:
            self._attempt = attempt
            self._sink = secrets.token_hex(8)
            self.news = True

    def plan(self, record: Record) -> _Plan:
        """The tags for a record; the same plan as long as the parameters are the same."""
        parameters = tuple(record.tables["parameter"]["parameter"].tolist())
        plan = self._plans.get(record.optimizer)
        if plan is not None and plan.parameters == parameters:
            return plan
        several = max(len(record.run.get("optimizers", ())), len({*self._plans, record.optimizer}))
        owner = self._owner(record.optimizer) if several > 1 else ""
        others = sum(len(p.names) for name, p in self._plans.items() if name != record.optimizer)
        level, keys = roll_up(parameters, max(MAX_NAMES // several, MAX_NAMES - others))
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        if level == "parameter":  # two of one name are two parameters all the same
            pairs = [
                (f"{key}#{i}" if i else key, row) for key in rows for i, row in enumerate(rows[key])
            ]
            rows = {key: [row] for key, row in pairs}
        names = tuple(self._name(record.optimizer, level, key, several > 1) for key in rows)
        plan = _Plan(
            record.optimizer, parameters, level, names, tuple(rows.values()), self._prefix, owner
        )
        groups = record.tables["parameter"]["group"].tolist()
        for name, members in zip(names, plan.rows, strict=True):
            if len({groups[row] for row in members}) == 1:
                self._group_of[name] = groups[members[0]]
        for group in record.tables["group"]["group"].tolist():
            self._groups[plan.tag("lr", f"{owner}group{group}")] = (record.optimizer, group)
        self._plans[record.optimizer] = plan
        self.news = True
        return plan

    def describe(self) -> Any:
        """The Custom Scalars layout, the card that explains the tags, and the map for ``read``."""
        plans = self._plans.values()
        bands = {
            name: [
                "Margin",
                [
                    plan.tag(metric, name)
                    for metric in ("effective_lr", "effective_lr_p05", "effective_lr_p95")
                ],
            ]
            for plan in plans
            for name in plan.names
        }
        summary = Summary()
        start = re.escape(self._prefix)
        overview = {  # all layers in one chart each, for the eye to find the odd one
            title: ["Multiline", [f"^{start}{metric}/"]] for title, metric in _OVERVIEW.items()
        }
        layout = {f"{self._prefix}effective_lr": {**overview, **bands}}
        summary.MergeFrom(custom_scalars(layout))  # type: ignore[no-untyped-call]
        level = " or ".join(sorted({plan.level for plan in plans}))
        card = _CARD.format(prefix=self._prefix, level=level)
        summary.MergeFrom(text(f"{self._prefix}lrprobe", card))  # type: ignore[no-untyped-call]
        content = {
            "schema_version": SCHEMA_VERSION,
            "sink": self._sink,
            "prefix": self._prefix,
            "scalars": dict(SCALARS),
            "names": {
                name: {
                    "optimizer": optimizer,
                    "level": level,
                    "key": key,
                    "group": self._group_of.get(name),
                }
                for (optimizer, level, key), name in self._names.items()
            },
            "lr": self._groups,
            "reconstruction_error": {
                plan.tag("reconstruction_error", f"{plan.owner}_max"): plan.optimizer
                for plan in plans
            },
        }
        value = summary.value.add(tag=f"{self._prefix}lrprobe/map")
        plugin = SummaryMetadata.PluginData(plugin_name=MAP_PLUGIN)
        value.metadata.CopyFrom(SummaryMetadata(plugin_data=plugin))
        value.tensor.CopyFrom(
            TensorProto(
                dtype="DT_STRING",
                string_val=[json.dumps(content).encode()],
                tensor_shape=TensorShapeProto(),
            )
        )
        return summary

    def _owner(self, optimizer: str) -> str:
        if optimizer not in self._owners:
            self._owners[optimizer] = _unique(f"{_clean(optimizer)}.", set(self._owners.values()))
        return self._owners[optimizer]

    def _name(self, optimizer: str, level: str, key: str, several: bool) -> str:
        entry = (optimizer, level, key)
        if entry not in self._names:
            taken = set(self._names.values())
            name = _clean(key)
            if several and name in taken:
                name = f"{_clean(optimizer)}.{name}"
            self._names[entry] = _unique(name, taken)
        return self._names[entry]


def roll_up(parameters: Sequence[str], limit: int) -> tuple[str, list[str]]:
    """What the tags are per, and for each parameter the key of its tag.

    Args:
        parameters: dotted names.
        limit: how many tags there may be.

    Returns:
        ``"parameter"`` and the names themselves where they fit; else ``"module"`` and the names of
        the modules at the greatest depth that fits (``""``, the whole network, fits always).
    """
    if len(parameters) <= limit:
        return "parameter", list(parameters)
    modules = [name.split(".")[:-1] for name in parameters]
    for depth in range(max(map(len, modules)), 0, -1):
        keys = [".".join(module[:depth]) for module in modules]
        if len(set(keys)) <= limit:
            return "module", keys
    return "module", [""] * len(parameters)


def _clean(name: str, empty: str = "_") -> str:
    """The name in the characters that tags may have, not too long."""
    clean = re.sub(r"[^A-Za-z0-9_./-]", "_", name) or empty
    if len(clean) > _MAX_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        clean = f"{clean[: _MAX_NAME - 60]}-{digest}-{clean[-50:]}"
    return clean


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    stem, dot = (name[:-1], ".") if name.endswith(".") else (name, "")
    candidates = (f"{stem}_{number}{dot}" for number in itertools.count(2))
    return next(candidate for candidate in candidates if candidate not in taken)


# --- Figures --------------------------------------------------------------------------------


def _add_scalars(summary: Any, plan: _Plan, record: Record) -> None:
    table = record.tables["parameter"]
    histograms: list[tuple[NDArray[np.float64], NDArray[Any]]]
    if plan.level == "parameter":
        order = [rows[0] for rows in plan.rows]
        figures = {column: table[column][order] for column in SCALARS.values()}
        figures["stepped"] = table["stepped"][order]
        histograms = [(record.edges[row], record.counts[row]) for row in order]
    else:
        merged = [merge_rows(record, rows) for rows in plan.rows]
        figures = {
            column: np.array([m.figures[column] for m in merged]) for column in SCALARS.values()
        }
        figures["stepped"] = np.array([m.stepped for m in merged])
        histograms = [(m.edges, m.counts) for m in merged]
    add = summary.value.add
    with np.errstate(over="ignore"):  # what is above float32's range is inf in TensorBoard
        for metric, column in SCALARS.items():
            shown = figures["stepped"] | ~np.isnan(figures[column])
            values = figures[column].astype(np.float32).tolist()
            for name, value, show in zip(plan.names, values, shown.tolist(), strict=True):
                if show:
                    add(tag=plan.tag(metric, name), simple_value=value)
        groups = record.tables["group"]
        for group, lr in zip(groups["group"].tolist(), groups["lr"].tolist(), strict=True):
            if not math.isnan(lr):  # which stands for a mixed one
                tag = plan.tag("lr", f"{plan.owner}group{group}")
                add(tag=tag, simple_value=float(np.float32(lr)))
        errors = table["reconstruction_error"]
        errors = errors[~np.isnan(errors)]
        if len(errors):
            tag = plan.tag("reconstruction_error", f"{plan.owner}_max")
            add(tag=tag, simple_value=float(np.float32(errors.max())))
    for name, (edges, counts) in zip(plan.names, histograms, strict=True):
        histogram = log10_histogram(edges, counts)
        if histogram is not None:
            add(tag=plan.tag(_HISTOGRAM, name), histo=histogram)


def log10_histogram(edges: NDArray[np.float64], counts: NDArray[Any]) -> Any:
    """A histogram of rates as TensorBoard's ``HistogramProto`` of their log10.

    An edge that has no finite logarithm (0, inf) is put one decade outside the others.

    Args:
        edges: n + 1, ascending, not negative.
        counts: n.

    Returns:
        None where there is nothing to draw: no counts, or an edge that is NaN or negative.
    """
    total = float(counts.sum()) if len(counts) else 0.0
    if total <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        limits = np.log10(edges)
    if np.isnan(limits).any():
        return None
    finite = limits[np.isfinite(limits)]
    if len(finite) < len(limits):
        low, high = (finite[0], finite[-1]) if len(finite) else (0.0, 0.0)
        limits = np.clip(limits, low - 1, high + 1)
    if len(counts) > _BUCKETS:
        picks = np.unique(np.linspace(0, len(counts), _BUCKETS + 1).round().astype(int))
        counts, limits = np.add.reduceat(counts, picks[:-1]), limits[picks]
    middles = (limits[1:] + limits[:-1]) / 2
    weighted = middles * counts
    return HistogramProto(
        min=limits[0],
        max=limits[-1],
        num=total,
        sum=weighted.sum(),
        sum_squares=(weighted * middles).sum(),
        # TensorBoard's buckets have right edges only: an empty one in front tells the left edge.
        bucket_limit=limits.tolist(),
        bucket=[0.0, *counts.tolist()],
    )


@dataclass(frozen=True, slots=True)
class MergedRows:
    """Several parameters of a record as one.

    Attributes:
        stepped: whether any of them did.
        figures: the columns that have a tag.
        edges: of a histogram of the effective rate, as in ``Record``.
        counts: that belong to them, in elements; not whole numbers.
    """

    stepped: bool
    figures: Mapping[str, float]
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]


def merge_rows(record: Record, rows: Sequence[int]) -> MergedRows:
    """Merge parameters: rates weighted by ``numel``, norms by the sum of their squares.

    Args:
        record: the record.
        rows: of its parameter table. Those that did not step count for the norm of the parameters
            only.
    """
    table = record.tables["parameter"]
    stepped = [row for row in rows if table["stepped"][row]]
    figures = dict.fromkeys(SCALARS.values(), float("nan"))

    def norm(column: str, of: Sequence[int]) -> float:
        # hypot would cost a call per row; scaling keeps the squares in range all the same.
        values = table[column][of]
        top = float(np.max(values, initial=0.0))
        if not 0 < top < np.inf:
            return top
        return top * float(np.sqrt(np.sum(np.square(values / top))))

    with_grad = [row for row in rows if not np.isnan(table["grad_norm"][row])]
    if stepped or with_grad:
        figures["grad_norm"] = norm("grad_norm", stepped or with_grad)
    if stepped:
        figures["update_norm"] = norm("update_norm", stepped)
        size = norm("param_norm", list(rows))
        figures["update_ratio"] = figures["update_norm"] / size if size else float("nan")
    known = [piece for row in stepped if (piece := _distribution(record, row)) is not None]
    if not known:
        return MergedRows(bool(stepped), figures, np.empty(0), np.empty(0))
    grid, share = _mixture(known)
    for suffix in ("p05", "p50", "p95"):
        value = np.interp(QUANTILES[suffix], share, grid)
        figures[f"effective_lr_{suffix}"] = float(value)
    picks = np.unique(np.linspace(0, len(grid) - 1, 65).round().astype(int))
    numel = sum(weight for _, _, weight in known)
    edges, at = grid[picks], share[picks]
    if len(edges) == 1:  # all elements have one rate
        edges, at = np.repeat(edges, 2), np.array([0.0, 1.0])
    counts = np.diff(at) * numel
    counts[0] += at[0] * numel
    return MergedRows(True, figures, edges, counts)


_Distribution = tuple[NDArray[np.float64], NDArray[np.float64], float]


def _distribution(record: Record, row: int) -> _Distribution | None:
    """Edges, the share of the elements up to each, and their number; None where it is unknown."""
    table = record.tables["parameter"]
    weight = float(table["numel"][row])
    edges, counts = np.asarray(record.edges[row]), np.asarray(record.counts[row])
    if len(counts) and counts.sum() > 0:
        share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    else:  # no histogram: the quantiles are one, if a coarse one
        columns = [f"effective_lr_{suffix}" for suffix in ("min", *QUANTILES, "max")]
        edges = np.array([table[column][row] for column in columns])
        share = np.array([0.0, *QUANTILES.values(), 1.0])
        share, edges = share[~np.isnan(edges)], edges[~np.isnan(edges)]
        if not len(edges):
            return None
        share[0], share[-1] = 0.0, 1.0
    if not np.isfinite(edges).all() or weight <= 0:
        return None
    return edges, share, weight


def _mixture(pieces: Sequence[_Distribution]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the distribution of all elements together has its knots, and the share up to each."""
    grid = np.unique(np.concatenate([edges for edges, _, _ in pieces]))
    if len(grid) > 1024:
        grid = grid[np.linspace(0, len(grid) - 1, 1024).round().astype(int)]
    # Where many elements have one and the same rate the share jumps: a knot just below keeps it
    # from being smeared down to the next one.
    jumps = [edges[1:][edges[1:] == edges[:-1]] for edges, _, _ in pieces]
    grid = np.union1d(grid, np.nextafter(np.concatenate(jumps), -np.inf))
    total = sum(weight for _, _, weight in pieces)
    share = np.zeros(len(grid))
    for edges, up_to, weight in pieces:
        share += weight / total * np.interp(grid, edges, up_to, left=0.0, right=1.0)
    return grid, share


# --- Files ----------------------------------------------------------------------------------

_uid = itertools.count()


class _EventFile:
    """A file of events of our own.

    It is not torch's ``FileWriter``, since that writes in one more thread, which dies of the first
    error with what it still held, and may leave half an event that hides all after it. And it
    takes 10 ms of pure Python to sum up an event.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._gone = False
        self._open()

    def begin(self) -> bool:
        """Be ready for an event; True where it goes to another file than the last."""
        if self._file.closed:
            raise ValueError(f"the event file in {self.folder!r} is closed")
        if os.fstat(self._file.fileno()).st_nlink:
            return False
        if not self._gone:  # say so once, then begin another one
            self._gone = True
            raise FileNotFoundError(
                f"the event file {self._file.name!r} was removed, with what it held; another one "
                "will be begun"
            )
        self._file.close()
        self._open()
        self._gone = False
        return True

    def add(self, event: Any) -> None:
        data = event.SerializeToString()
        head = struct.pack("<Q", len(data))
        rest = memoryview(
            head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))
        )
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            # Half an event would hide those that come after it.
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += size

    def flush(self) -> None:
        pass  # the file is not buffered

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
            name += f".{os.getpid()}.{next(_uid)}.lrprobe"
            self._file = Path(self.folder, name).open("xb", buffering=0)  # noqa: SIM115 - close() closes it
            self._size = 0
            self.add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        except OSError as error:
            what = f"cannot write a TensorBoard logdir to {self.folder!r}"
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{what}: {reason}") from error


class _Writer:
    """A ``SummaryWriter`` of the user's."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.folder = str(writer.log_dir)
        self._writer = writer
        self._told = self._reopened = False

    def begin(self) -> bool:
        """Be ready for an event; True where it goes to another file than the last."""
        if self._writer.all_writers is not None:
            return False
        if not self._told:  # say so once; then it opens another file, as for add_scalar
            self._told = True
            raise OSError(
                f"the SummaryWriter of {self.folder!r} was closed before the probe; what comes "
                "after goes to another file in its logdir"
            )
        self._reopened = True
        return True

    def add(self, event: Any) -> None:
        # Not public, but what all its methods use: the file, opened again where it was closed.
        file_writer = self._writer._get_file_writer()  # type: ignore[no-untyped-call] # noqa: SLF001
        file_writer.add_event(event, event.step, event.wall_time)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()
        if self._reopened:  # as its owner left it
            self._writer.close()


# --- Checksums: CRC-32C, as the format wants it; tensorboard's own takes 90 ns a byte ----------


def _byte_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0x82F63B78) ^ (table >> 1), table >> 1)
    return table


_BYTE = _byte_table()
_CHUNK = 512


def _chunk_table() -> NDArray[np.uint32]:
    """For each place in a chunk and each byte: what it adds to the sum at the end of the chunk."""
    table = np.empty((_CHUNK, 256), dtype=np.uint32)
    table[-1] = _BYTE
    for place in range(_CHUNK - 2, -1, -1):
        later = table[place + 1]
        table[place] = _BYTE[later & 0xFF] ^ (later >> 8)
    return table


_PLACES = _chunk_table()
_INDEX = np.arange(_CHUNK)


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of some bytes."""
    crc = 0xFFFFFFFF
    whole = len(data) // _CHUNK * _CHUNK
    if whole:
        # The sum is linear: each byte's part comes from a table, and the sum so far counts as
        # four more bytes, xored onto the first four of the chunk.
        chunks = np.frombuffer(data, dtype=np.uint8, count=whole).reshape(-1, _CHUNK)
        parts = np.bitwise_xor.reduce(_PLACES[_INDEX, chunks], axis=1).tolist()
        first = _PLACES[:4].tolist()
        for part in parts:
            crc = (
                part
                ^ first[0][crc & 0xFF]
                ^ first[1][crc >> 8 & 0xFF]
                ^ first[2][crc >> 16 & 0xFF]
                ^ first[3][crc >> 24]
            )
    table = _BYTE.tolist()
    for byte in data[whole:]:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """``crc32c`` as event files have it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
