"""What the tab LRPROBE of TensorBoard reads: the figures of each record, and the run's description.

TensorBoard takes minutes to read thousands of scalar tags, so the scalars are few. The tab needs
every parameter. One float32 matrix of columns × rows per record holds them all, in a thirtieth of
the space that scalars would take. The metadata of its tag names the rows and columns. If these
change (a group is added, a rule turns ``measured``, a run is continued), another tag begins.

The description of the run (hyperparameters, versions, names) is a JSON text in a tensor. It is
written again whenever it has changed. Both tensors have plugin names of their own, so that no
other tab of TensorBoard shows them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    DATA_CLASS_TENSOR,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_shape_pb2 import (  # type: ignore[import-untyped]
    TensorShapeProto,
)

from lrprobe.about import to_json
from lrprobe.record import Level, Record
from lrprobe.sinks.merge import MergedRows
from lrprobe.sinks.tags import Plan, clean, group_names
from lrprobe.text import shorter

PLUGIN = "lrprobe_table"
"""Plugin name of the tensors of figures."""

RUN_PLUGIN = "lrprobe_run"
"""Plugin name of the tensors that describe the run."""

MAX_ROWS = 2048
"""Above so many parameters the rows are modules, so that a record stays below 300 kB."""

_VERSION = 1
# Neither the tab nor any check uses these.
_LEFT_OUT = (
    *("effective_lr_mean", "effective_lr_gmean", "effective_lr_std"),
    *("samples", "lr_per_sample"),
)


class TabTensors:
    """Makes the tensors of one sink.

    Args:
        prefix: prepended to each tag.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._tables: dict[str, tuple[Any, str]] = {}
        self._runs: dict[str, tuple[Mapping[str, Any], str]] = {}

    def forget(self) -> None:
        """Write metadata and descriptions again with the next records, as for a new file."""
        self._tables.clear()
        self._runs.clear()

    def add(
        self,
        summary: Any,
        record: Record,
        plan: Plan,
        merged: list[MergedRows] | None,
        *,
        attempt_id: str,
    ) -> None:
        """Add the tensors of a record to a summary.

        Args:
            summary: receives the tensors.
            record: the record.
            plan: its tags.
            merged: its rows merged to what the tags stand for; used if there are too many modules.
            attempt_id: distinguishes the attempts to record the run.
        """
        self._add_run(summary, record, attempt_id)
        level, table = _rows(record, plan, merged)
        columns = [
            name
            for name, values in table.items()
            if name not in _LEFT_OUT and values.dtype == np.float64 and name != "time"
        ]
        what = (
            attempt_id,
            level,
            tuple(columns),
            *(_key(table, k) for k in (level, "rule", "group")),
        )
        known, tag = self._tables.get(record.optimizer, (None, ""))
        metadata = None
        if known != what:
            about = _metadata(record, level, table, columns, attempt_id)
            content = json.dumps(about, ensure_ascii=True).encode()
            digest = hashlib.sha256(content).hexdigest()[:12]
            tag = f"{self._prefix}lrprobe/table/{clean(record.optimizer)}/{digest}"
            self._tables[record.optimizer] = (what, tag)
            plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
            metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
        with np.errstate(over="ignore"):  # a value above float32's range becomes inf
            matrix = np.array([table[name] for name in columns]).astype("<f4")
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in matrix.shape])
        value = summary.value.add(tag=tag)
        if metadata is not None:
            value.metadata.CopyFrom(metadata)
        value.tensor.CopyFrom(
            TensorProto(dtype="DT_FLOAT", tensor_shape=shape, tensor_content=matrix.tobytes())
        )

    def _add_run(self, summary: Any, record: Record, attempt_id: str) -> None:
        """Add the description of the run if it differs from the last one."""
        known, text = self._runs.get(record.optimizer, ({}, ""))
        if known is record.run:
            return
        latest = to_json(record.run)
        self._runs[record.optimizer] = record.run, latest
        if latest == text:
            return
        about = {"version": _VERSION, "sink": attempt_id, "optimizer": record.optimizer}
        tag = f"{self._prefix}lrprobe/run/{clean(record.optimizer)}/{attempt_id}"
        add_text(summary, tag, latest, RUN_PLUGIN, json.dumps(about).encode())


def add_text(summary: Any, tag: str, text: str, plugin: str, content: bytes = b"") -> None:
    """Add a text as a scalar tensor that only this plugin shows."""
    value = summary.value.add(tag=tag)
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    value.metadata.CopyFrom(SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR))
    value.tensor.CopyFrom(
        TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=TensorShapeProto())
    )


def _rows(
    record: Record, plan: Plan, merged: list[MergedRows] | None
) -> tuple[str, Mapping[str, NDArray[Any]]]:
    """The level and columns of the finest table that is small enough."""
    levels: tuple[Level, ...] = ("parameter", "module")
    for level in levels:
        table = record.tables[level]
        if len(table["step"]) <= MAX_ROWS:
            return level, table
    rows = merged or []
    names = np.array(plan.names, dtype=object)
    figures = {
        name: np.array([row.figures[name] for row in rows], dtype=np.float64)
        for name in (rows[0].figures if rows else ())
    }
    return "module", {"module": names, **figures}


def _key(table: Mapping[str, NDArray[Any]], name: str) -> tuple[Any, ...]:
    return tuple(table[name].tolist()) if name in table else ()


def _metadata(
    record: Record,
    level: str,
    table: Mapping[str, NDArray[Any]],
    columns: list[str],
    attempt_id: str,
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "sink": attempt_id,
        "optimizer": shorter(record.optimizer),
        "level": level,
        "columns": columns,
        "names": [shorter(name) for name in table[level].tolist()],
        "groups": list(_key(table, "group")),
        "group_names": {str(k): shorter(v) for k, v in group_names(record).items()},
        "numel": list(_key(table, "numel")),
        "rules": list(_key(table, "rule")),
    }
