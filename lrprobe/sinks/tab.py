"""All figures of a record as one tensor, for the tab LRPROBE of TensorBoard.

TensorBoard takes minutes with thousands of scalar tags, so these are few; the tab needs every
parameter. One float32 matrix of columns × rows a record has them all: 30 times less than scalars
would take. What its rows and columns are is told once, in the metadata of its tag; where that
changes (a group is added, a rule turns ``measured``, a run is continued) there is another tag.
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

from lrprobe.record import Level, Record
from lrprobe.sinks.merge import MergedRows
from lrprobe.sinks.tags import Plan, clean, group_names
from lrprobe.text import shorter

PLUGIN = "lrprobe_table"
"""Plugin name of the tensors."""

MAX_ROWS = 2048
"""Above so many parameters the rows are modules, so that a record stays below 300 kB."""

_VERSION = 1
# What neither the tab nor a finding asks for.
_LEFT_OUT = (
    *("effective_lr_mean", "effective_lr_gmean", "effective_lr_std"),
    *("samples", "lr_per_sample"),
)


class TabTable:
    """Makes the tensors of one sink.

    Args:
        prefix: put before each tag.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._told: dict[str, tuple[Any, str]] = {}

    def add(
        self,
        summary: Any,
        record: Record,
        plan: Plan,
        merged: list[MergedRows] | None,
        *,
        life: str,
        news: bool,
    ) -> None:
        """Add a record's tensor to a summary.

        Args:
            summary: where to.
            record: the record.
            plan: its tags, and
            merged: the parameters as they stand for; used where there are too many modules, too.
            life: tells one attempt to record the run from the next.
            news: whether the summary goes to a file that has none of these tensors.
        """
        level, table = _rows(record, plan, merged)
        columns = [
            name
            for name, values in table.items()
            if name not in _LEFT_OUT and values.dtype == np.float64 and name != "time"
        ]
        what = (life, level, tuple(columns), *(_key(table, k) for k in (level, "rule", "group")))
        known, tag = self._told.get(record.optimizer, (None, ""))
        metadata = None
        if news or known != what:
            about = _description(record, level, table, columns, life)
            content = json.dumps(about, ensure_ascii=True).encode()
            digest = hashlib.sha256(content).hexdigest()[:12]
            tag = f"{self._prefix}lrprobe/table/{clean(record.optimizer)}/{digest}"
            self._told[record.optimizer] = (what, tag)
            plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
            metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
        with np.errstate(over="ignore"):  # what is above float32's range is inf here
            matrix = np.array([table[name] for name in columns]).astype("<f4")
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in matrix.shape])
        value = summary.value.add(tag=tag)
        if metadata is not None:
            value.metadata.CopyFrom(metadata)
        value.tensor.CopyFrom(
            TensorProto(dtype="DT_FLOAT", tensor_shape=shape, tensor_content=matrix.tobytes())
        )


def _rows(
    record: Record, plan: Plan, merged: list[MergedRows] | None
) -> tuple[str, Mapping[str, NDArray[Any]]]:
    """What rows are, and the columns of the finest table that is small enough."""
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


def _description(
    record: Record,
    level: str,
    table: Mapping[str, NDArray[Any]],
    columns: list[str],
    life: str,
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "sink": life,
        "optimizer": shorter(record.optimizer),
        "level": level,
        "columns": columns,
        "names": [shorter(name) for name in table[level].tolist()],
        "groups": list(_key(table, "group")),
        "group_names": {str(k): shorter(v) for k, v in group_names(record).items()},
        "numel": list(_key(table, "numel")),
        "rules": list(_key(table, "rule")),
    }
