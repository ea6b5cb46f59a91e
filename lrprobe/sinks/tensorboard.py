"""Scalars, histograms and bands for TensorBoard."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import socket
import struct
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    HistogramProto,
    Summary,
)
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, text

from lrprobe.names import kind
from lrprobe.record import SCHEMA_VERSION, Record
from lrprobe.sinks.merge import MergedRows
from lrprobe.sinks.tab import TabTensors, add_text
from lrprobe.sinks.tags import Plan, Tags, TagStyle

MAP_PLUGIN = "lrprobe"
"""Plugin name of the tensor, a JSON text, that says which tags belong to what."""

_HISTOGRAM = "effective_lr_log10_hist"
_BUCKETS = 32  # TensorBoard draws 30

_OVERVIEW = {
    "update ratio of all parameters (usual: about 0.001)": "update_ratio",
    "log10 of the effective lr of all parameters (median)": "effective_lr_p50",
    "lr of the groups": "lr",
}
"""Title of a chart with many lines to the column that they show."""

_MEANINGS = {
    "effective_lr_p50": "median of the effective rate over the elements",
    "effective_lr_p05": "5 % of the elements are below",
    "effective_lr_p95": "5 % of the elements are above",
    "update_norm": "norm of the intended step, weight decay included",
    "update_ratio": "that norm over the norm of the parameter",
    "update_grad_cosine": "cosine of the step and the gradient: 1 follows the gradient",
    "grad_norm": "norm of the gradient as the optimizer used it",
    "param_norm": "norm of the parameter after the step",
    "lr": "the group's `lr` during the step",
}

_CARD = """\
### lrprobe: the effective learning rate

The *effective learning rate* is the factor by which an optimizer multiplies the direction of its
step, for each element of a parameter: `lr / (sqrt(v) + eps)` in Adam. The tags below are per
{level}; its name follows the first `/`.

| tag | meaning |
|---|---|
{rows}| `{prefix}effective_lr_log10_p50/...` (`p05`, `p95`) | its logarithm: -3 means 0.001 |
| `{prefix}effective_lr_log10_hist/...` | the histogram of that logarithm |
| `{prefix}reconstruction_error/..._max` | how far the reconstruction is from the actual step |

**Which layer is too fast, which too slow?** The LRPROBE tab shows all of them in one picture, with
what is wrong. The Custom Scalars tab has the update ratios of all in one chart: an update of about
0.001 of the parameter is usual, far more is fast, far less is slow. It also has the logarithm of
each median rate, with the band from the 5th to the 95th percentile. `probe.frame()` and Parquet
datasets have all columns, for each parameter.
"""


class TensorBoard:
    """Writes each record as one TensorBoard event.

    Besides scalars and histograms, each event has a tensor with all columns of every parameter, for
    the tab LRPROBE. The description of the run is another tensor, written again if it has changed.
    Above ``MAX_NAMES`` parameters, the tags of scalars are per module, at the greatest depth with
    at most that many modules; their quantiles are merged from the parameters' histograms. The wall
    time and the step of an event are those of the record.

    Args:
        writer_or_dir: a logdir, which is created if missing, or a
            ``torch.utils.tensorboard.SummaryWriter``, which is flushed but not closed.
        prefix: prepended to each tag; may contain ``A-Za-z0-9_./-``.
        tag_style: the naming of the tags: ``"lrprobe"``, or ``"composer"`` or ``"olmo"`` for the
            columns that have a name there.

    Raises:
        OSError: the logdir cannot be created or written.
        TypeError: ``writer_or_dir`` is neither a path nor a writer.
        ValueError: ``prefix`` has other characters, or the style does not exist.
    """

    def __init__(
        self,
        writer_or_dir: str | os.PathLike[str] | SummaryWriter,
        prefix: str = "",
        tag_style: TagStyle = "lrprobe",
    ) -> None:
        """Make the logdir and prove that it can be written."""
        self.prefix = prefix
        self._tags = Tags(prefix, tag_style)
        self._tab = TabTensors(prefix)
        self._target: _EventFile | _Writer
        if isinstance(writer_or_dir, SummaryWriter):
            self._target = _Writer(writer_or_dir)
        elif isinstance(writer_or_dir, (str, os.PathLike)):
            self._target = _EventFile(os.fspath(writer_or_dir))
        else:
            raise TypeError(
                f"writer_or_dir is a {kind(writer_or_dir)}; allowed are a path and a "
                "torch.utils.tensorboard.SummaryWriter"
            )
        self._needs_metadata = True  # the present file has none yet
        self._attempt = 0
        self._attempt_id = secrets.token_hex(8)

    def __repr__(self) -> str:
        """Name the logdir."""
        return f"TensorBoard({self._target.folder!r})"

    @property
    def destination(self) -> str:
        """The logdir's real, absolute path, and the prefix if there is one."""
        folder = os.path.realpath(self._target.folder)
        return f"{folder}:{self.prefix}" if self.prefix else folder

    def write(self, record: Record) -> None:
        """Write one record.

        Raises:
            OSError: it could not be written.
        """
        if record.attempt > self._attempt:  # the run goes back to an earlier step
            self._attempt = record.attempt
            self._attempt_id = secrets.token_hex(8)
            self._needs_metadata = True
        self._needs_metadata |= self._target.begin()
        again, self._needs_metadata = self._needs_metadata, True  # until the event is written
        if again:
            self._tab.forget()
        known = self._tags.plans.get(record.optimizer)
        plan = self._tags.plan(record)
        summary = Summary()
        if again or plan is not known:
            summary.MergeFrom(_describe(self._tags.plans.values(), self._tags, self._attempt_id))
        merged = plan.merged(record)
        _add_scalars(summary, plan, record, merged)
        self._tab.add(summary, record, plan, merged, attempt_id=self._attempt_id)
        self._target.add(Event(summary=summary, step=record.step, wall_time=record.time))
        self._needs_metadata = False

    def flush(self) -> None:
        """Make sure that everything written so far is in the file.

        Raises:
            OSError: it could not be written.
        """
        self._target.flush()

    def close(self) -> None:
        """Flush, and close the file if it is not the user's; idempotent."""
        self._target.close()


# --- Figures --------------------------------------------------------------------------------


def _describe(plans: Collection[Plan], tags: Tags, sink: str) -> Any:
    """The Custom Scalars layout, the card that explains the tags, and the map for ``read``."""
    bands = {
        name: ["Margin", [plan.log10(at, name) for at in ("p50", "p05", "p95")]]
        for plan in plans
        for name in plan.names
    }
    summary = Summary()
    prefix, style = tags.prefix, tags.style
    patterns = {
        column: _pattern(prefix, style.figures.get(column, style.lr))
        for column in _OVERVIEW.values()
    }
    patterns["effective_lr_p50"] = f"^{re.escape(prefix)}effective_lr_log10_p50/"
    # All layers in one chart each, for the eye to find the odd one.
    overview = {title: ["Multiline", [patterns[column]]] for title, column in _OVERVIEW.items()}
    # TensorBoard shows bands below all other charts, and the last of them first.
    layout = {f"{prefix}effective_lr": {**overview, **dict(reversed(bands.items()))}}
    summary.MergeFrom(custom_scalars(layout))  # type: ignore[no-untyped-call]
    level = " or ".join(sorted({plan.level for plan in plans}))
    rows = "".join(
        f"| `{prefix}{_ELLIPSIS.sub('...', tag)}` | {_MEANINGS[column]} |\n"
        for column, tag in {**style.figures, "lr": style.lr}.items()
    )
    card = _CARD.format(prefix=prefix, level=level, rows=rows)
    summary.MergeFrom(text(f"{prefix}lrprobe", card))  # type: ignore[no-untyped-call]
    content = {
        "schema_version": SCHEMA_VERSION,
        "sink": sink,
        "prefix": prefix,
        "scalars": {tag: column for column, tag in style.figures.items()},
        "names": {
            name: {
                "optimizer": optimizer,
                "level": level,
                "key": key,
                "group": tags.group_of.get(name),
            }
            for (optimizer, level, key), name in tags.names.items()
        },
        "lr": tags.groups,
        "reconstruction_error": {plan.error: plan.optimizer for plan in plans},
    }
    add_text(summary, f"{prefix}lrprobe/map", json.dumps(content), MAP_PLUGIN)
    return summary


_ELLIPSIS = re.compile(r"\{.*\}")


def _pattern(prefix: str, tag: str) -> str:
    """A regular expression for all tags of a kind."""
    return "^" + re.escape(prefix) + ".*".join(map(re.escape, re.split(r"\{.*?\}", tag)))


def _add_scalars(
    summary: Any, plan: Plan, record: Record, merged: Sequence[MergedRows] | None
) -> None:
    pairs = [*plan.scalars(record, merged), *plan.logarithms(record, merged)]
    with np.errstate(over="ignore"):  # what is above float32's range is inf in TensorBoard
        values = np.array([value for _, value in pairs]).astype(np.float32).tolist()
    add = summary.value.add
    for (tag, _), value in zip(pairs, values, strict=True):
        add(tag=tag, simple_value=value)
    histograms: Iterable[tuple[NDArray[np.float64], NDArray[Any]]]
    if merged is None:
        histograms = [(record.edges[row], record.counts[row]) for (row, *_) in plan.rows]
    else:
        histograms = [(m.edges, m.counts) for m in merged]
    for name, (edges, counts) in zip(plan.names, histograms, strict=True):
        histogram = log10_histogram(edges, counts)
        if histogram is not None:
            add(tag=f"{plan.prefix}{_HISTOGRAM}/{name}", histo=histogram)


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


# --- Files ----------------------------------------------------------------------------------

_uid = itertools.count()


class _EventFile:
    """An event file that lrprobe writes itself.

    torch's ``FileWriter`` writes in a thread of its own. That thread dies at the first error, with
    everything it still holds, and may leave half an event, which hides all later ones. It also
    takes 10 ms per event to compute the checksum in Python.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._gone = False
        self._open()

    def begin(self) -> bool:
        """Prepare for an event; True if it goes to another file than the last one."""
        if self._file.closed:
            raise ValueError(f"the event file in {self.folder!r} is closed")
        if os.fstat(self._file.fileno()).st_nlink:
            return False
        if not self._gone:  # say so once, then begin another one
            self._gone = True
            raise FileNotFoundError(
                f"the event file {self._file.name!r} was removed, with its contents; a new one "
                "will be created"
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
            # Half an event would hide all later ones.
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
            name += f".{os.getpid()}.{next(_uid):06d}.lrprobe"  # read in the order of names
            self._file = Path(self.folder, name).open("xb", buffering=0)  # noqa: SIM115 - close() closes it
            self._size = 0
            self.add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        except OSError as error:
            what = f"cannot write a TensorBoard logdir to {self.folder!r}"
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{what}: {reason}") from error


class _Writer:
    """The user's ``SummaryWriter``."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.folder = str(writer.log_dir)
        self._writer = writer
        self._told = self._reopened = False

    def begin(self) -> bool:
        """Prepare for an event; True if it goes to another file than the last one."""
        if self._writer.all_writers is not None:
            return False
        if not self._told:  # say so once; then it opens another file, as for add_scalar
            self._told = True
            raise OSError(
                f"the SummaryWriter of {self.folder!r} was closed before the probe; later "
                "records go to another file in its logdir"
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


# --- Checksums: CRC-32C, as the format requires; TensorBoard's own takes 90 ns per byte --------


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
