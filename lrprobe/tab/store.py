"""Reads the tensors of ``sinks.TensorBoard`` through TensorBoard's data provider."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.data.provider import RunTagFilter  # type: ignore[import-untyped]

from lrprobe.about import Description, from_json
from lrprobe.sinks.tab import PLUGIN, RUN_PLUGIN
from lrprobe.tab import SAMPLES
from lrprobe.text import shorter
from lrprobe.view.table import COLUMNS, Table, unique

_ANSWER_BYTES = 200 * 2**20
"""Size of one answer of the data provider; its own limit is 256 MB."""

_CACHE_BYTES = 600 * 2**20
"""Size of the cache of runs, which drops the least recently used one first."""


@dataclass(frozen=True, slots=True)
class Series:
    """One tag: records with the same rows.

    Attributes:
        tag: the tag.
        about: the metadata that ``sinks.tab`` writes.
        version: changes with each new record.
    """

    tag: str
    about: Mapping[str, Any]
    version: tuple[Any, ...]


@dataclass(slots=True)
class Block:
    """The records of one tag: (records, columns, rows)."""

    about: Mapping[str, Any]
    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    cells: NDArray[np.float32]


@dataclass(slots=True)
class Entry:
    """The records of one optimizer of one run."""

    version: tuple[Any, ...]
    blocks: list[Block]
    table: Table

    @property
    def nbytes(self) -> int:
        """Size of the figures."""
        return sum(block.cells.nbytes for block in self.blocks)


class Store:
    """Reads runs on demand, and caches them until they have new records.

    Args:
        provider: TensorBoard's data provider.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._entries: OrderedDict[tuple[str, str, str], Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[tuple[str, str, str], threading.Lock] = {}
        self._parsed: dict[bytes, Any] = {}

    def runs(self, ctx: Any, experiment: str) -> dict[tuple[str, str], list[Series]]:
        """Map run and optimizer to their tags."""
        listing = self._provider.list_tensors(ctx, experiment_id=experiment, plugin_name=PLUGIN)
        found: dict[tuple[str, str], list[Series]] = {}
        for run in sorted(listing or {}):
            for tag, series in listing[run].items():
                about = self._metadata(series.plugin_content)
                if about is not None:
                    version = tag, series.max_step, series.max_wall_time
                    key = run, str(about["optimizer"])
                    found.setdefault(key, []).append(Series(tag, about, version))
        return found

    def entry(
        self, ctx: Any, experiment: str, run: str, optimizer: str, series: Sequence[Series]
    ) -> Entry:
        """Return the records of an optimizer of a run, as far as TensorBoard has loaded them."""
        key = experiment, run, optimizer
        version = tuple(sorted(each.version for each in series))
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # simultaneous requests read it once
            known = self._entries.get(key)
            if known is None or known.version != version:
                blocks = self._read(ctx, experiment, run, series)
                table = merged(run, optimizer, blocks)
                known = Entry(version, blocks, table)
            with self._lock:
                self._entries[key] = known
                self._entries.move_to_end(key)
                while len(self._entries) > 1 and self._size() > _CACHE_BYTES:
                    self._entries.popitem(last=False)
        return known

    def descriptions(
        self, ctx: Any, experiment: str, run: str, blocks: Sequence[Block]
    ) -> list[Description]:
        """Read the descriptions of a run, in the order of recording.

        A broken description is skipped, and so is one of an attempt without a record.

        Args:
            ctx: TensorBoard's request context.
            experiment: TensorBoard's experiment id.
            run: name of the run.
            blocks: the records of its optimizers, which determine the attempts.
        """
        where = {
            "experiment_id": experiment,
            "plugin_name": RUN_PLUGIN,
            "run_tag_filter": RunTagFilter(runs=[run]),
        }
        listing = self._provider.list_tensors(ctx, **where) or {}
        texts = self._provider.read_tensors(ctx, downsample=SAMPLES, **where) or {}
        attempt_of = {
            (block.about["optimizer"], block.about["sink"]): attempt
            for block, attempt in zip(blocks, attempts(blocks), strict=True)
        }
        found: list[tuple[float, Description]] = []
        for tag, series in listing.get(run, {}).items():
            writer = _writer(series.plugin_content)
            if writer not in attempt_of:
                continue
            for datum in texts.get(run, {}).get(tag, ()):
                with contextlib.suppress(ValueError, TypeError):  # it is broken
                    about = _shortened(from_json(datum.numpy.item()))
                    described = Description(attempt_of[writer], datum.step, writer[0], about)
                    found.append((datum.wall_time, described))
        return [described for _, described in sorted(found, key=lambda pair: pair[0])]

    def _size(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _metadata(self, content: bytes) -> Any:
        """Parse the metadata of a tag; None if broken, or written by a later version."""
        if content not in self._parsed:
            try:
                about = json.loads(content)
                sound = _is_metadata(about)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                sound = False
            self._parsed[content] = {**about, "names": unique(about["names"])} if sound else None
        return self._parsed[content]

    def _read(self, ctx: Any, experiment: str, run: str, series: Sequence[Series]) -> list[Block]:
        about = {each.tag: each.about for each in series}
        size = max(4 * len(one["columns"]) * len(one["names"]) for one in about.values())
        answer = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=max(min(SAMPLES, _ANSWER_BYTES // max(size, 1) // len(about)), 1),
            run_tag_filter=RunTagFilter(runs=[run], tags=list(about)),
        )
        blocks = [
            block
            for tag, data in answer.get(run, {}).items()
            if (block := _block(about[tag], data)) is not None
        ]
        return sorted(blocks, key=lambda block: float(block.times.min()))


def _is_metadata(about: Any) -> bool:
    """Whether this is what ``sinks.tab`` writes; a log may contain anything.

    Raises:
        KeyError: an entry is missing.
        TypeError, AttributeError: an entry has another type.
    """

    def are(kind: type, name: str, *lengths: int) -> bool:
        values = about[name]
        fits = not lengths or len(values) in lengths
        return isinstance(values, list) and fits and all(isinstance(v, kind) for v in values)

    size = len(about["names"])
    return (
        about["version"] == 1
        and about["level"] in ("parameter", "module")
        and all(isinstance(about[name], str) for name in ("optimizer", "sink"))
        and all(isinstance(name, str) for name in about["group_names"].values())
        and len(about["columns"]) > 0
        and are(str, "columns")
        and are(str, "names")
        and are(str, "rules", 0, size)
        and all(are(int, name, 0, size) for name in ("groups", "numel"))
    )


def _block(about: Mapping[str, Any], data: Sequence[Any]) -> Block | None:
    """Stack the records of a tag that have the shape in its metadata; None if there are none."""
    shape = len(about["columns"]), len(about["names"])
    data = [datum for datum in data if datum.numpy.shape == shape and datum.numpy.dtype.kind == "f"]
    if not data:
        return None
    return Block(
        about,
        np.array([datum.step for datum in data], dtype=np.int64),
        np.array([datum.wall_time for datum in data], dtype=np.float64),
        np.stack([datum.numpy for datum in data]).astype(np.float32, copy=False),
    )


def _writer(content: bytes) -> tuple[str, str]:
    """Parse the metadata of a description: optimizer and sink, empty if broken."""
    try:
        about = json.loads(content)
        return shorter(about["optimizer"]), str(about["sink"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""


def _shortened(run: dict[str, Any]) -> dict[str, Any]:
    """Shorten the names of optimizers in a description, as the tables do."""
    optimizers = run.get("optimizers", {})
    return {**run, "optimizers": {shorter(name): each for name, each in optimizers.items()}}


def attempts(blocks: Sequence[Block]) -> list[int]:
    """Number the attempt that each block belongs to, per optimizer."""
    sinks: dict[str, list[str]] = {}
    result = []
    for block in blocks:
        known = sinks.setdefault(block.about["optimizer"], [])
        if block.about["sink"] not in known:
            known.append(block.about["sink"])
        result.append(known.index(block.about["sink"]))
    return result


def merged(run: str, optimizer: str, blocks: Sequence[Block]) -> Table:
    """Merge blocks into one table; a later attempt replaces the steps of an earlier one."""
    kept = list(zip(blocks, _kept(blocks), strict=True))
    names: dict[str, int] = {}
    groups: dict[str, str] = {}
    numel: dict[str, float] = {}
    for about in (block.about for block in blocks):
        for at, name in enumerate(about["names"]):
            names.setdefault(name, len(names))
            group = str(about["groups"][at]) if about.get("groups") else ""
            groups[name] = str(about["group_names"].get(group, group))
            numel[name] = float(about["numel"][at]) if about.get("numel") else np.nan
    every = [block.steps[rows] for block, rows in kept]
    steps = np.unique(np.concatenate(every)) if every else np.empty(0, dtype=np.int64)
    figures = {}
    for column in COLUMNS:
        having = [(b, rows) for b, rows in kept if column in b.about["columns"]]
        if not having:
            continue
        first = having[0][0]
        if len(blocks) == 1 and np.array_equal(steps, first.steps):  # usual: no copy
            figures[column] = first.cells[:, first.about["columns"].index(column), :]
            continue
        matrix = np.full((len(steps), len(names)), np.nan, dtype=np.float32)
        for block, rows in having:
            at_steps = np.searchsorted(steps, block.steps[rows])
            at_names = np.array([names[name] for name in block.about["names"]])
            matrix[np.ix_(at_steps, at_names)] = block.cells[
                rows, block.about["columns"].index(column), :
            ]
        figures[column] = matrix
    return Table(
        run=run,
        optimizer=optimizer,
        level=str(blocks[-1].about["level"]) if blocks else "parameter",
        names=list(names),
        groups=[groups[name] for name in names],
        numel=[numel[name] for name in names],
        steps=steps,
        figures=figures,
    )


def _kept(blocks: Sequence[Block]) -> list[NDArray[np.int64]]:
    """For each block, the indices of the records before any later attempt."""
    number = attempts(blocks)
    result = []
    for block, attempt in zip(blocks, number, strict=True):
        later = [
            int(other.steps.min())
            for other, its in zip(blocks, number, strict=True)
            if its > attempt
        ]
        keep = block.steps < min(later) if later else np.ones(len(block.steps), dtype=bool)
        result.append(np.flatnonzero(keep))
    return result
