"""From the device to a record: the only place where device values reach the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.names import module_of
from lrprobe.record import ELEMENT_COLUMNS, FIGURES, LEVELS, Columns, Level, Record, frame_columns
from lrprobe.summary import finish
from lrprobe.summary.distribution import Rates, histograms
from lrprobe.summary.figures import CHECKS, PARTS
from lrprobe.summary.snapshot import Raw, Watched

Floats = NDArray[np.float64]


@dataclass(slots=True)
class StepInfo:
    """What the hooks know of a step without asking the device.

    Attributes:
        step: its number; one less where an earlier step turns out to have been none.
        time, optimizer, samples, run: as in the record.
        recorded: whether it is to be recorded.
        attempt: known when the figures are passed on.
    """

    step: int
    time: float
    optimizer: str
    samples: float
    run: Mapping[str, Any]
    recorded: bool = True
    attempt: int = 0


@dataclass(slots=True)
class Arrived:
    """The figures of one step on the host, one row per parameter.

    Attributes:
        names, groups, rules: of the parameters, in order.
        summary: their figures.
        unused: whether it had a gradient that a fused optimizer did not use: (parameters,).
        grad_scale: factor still in the gradients that were not used.
        lr, initial_lr: as in the frame: (parameters,).
        tracked: row to the positions of its tracked elements, and their rate, update, gradient
            and parameter: (4, positions).
    """

    names: Sequence[str]
    groups: Sequence[int]
    rules: Sequence[str]
    summary: finish.Summary
    unused: NDArray[np.bool_]
    grad_scale: float
    lr: Floats
    initial_lr: Floats
    tracked: Mapping[int, tuple[NDArray[np.int64], Floats]]

    def record(self, info: StepInfo) -> Record:
        """Merge and finish the figures of every level."""
        summary = self.summary
        tables = {level: self._columns(info, level) for level in LEVELS}
        edges, counts = histograms(summary.binned().merged(self._in_histograms()), len(self.names))
        return Record(
            step=info.step,
            time=info.time,
            attempt=info.attempt,
            optimizer=info.optimizer,
            tables=tables,
            edges=edges,
            counts=counts,
            elements=self._elements(info),
            run=info.run,
        )

    def _in_histograms(self) -> NDArray[np.int64]:
        """Each parameter's own number; −1 where it took no step."""
        return np.where(self.summary.stepped, np.arange(len(self.names)), -1)

    def _columns(self, info: StepInfo, level: Level) -> Columns:
        summary = self.summary
        keys: Sequence[str | int]
        if level == "parameter":
            keys = range(len(self.names))
        elif level == "module":
            keys = [module_of(name) for name in self.names]
        elif level == "group":
            keys = self.groups
        else:
            keys = [0] * len(self.names)
        label, order = finish.labels(keys)
        rows = len(order)
        values: dict[str, NDArray[Any]] = dict(finish.columns(summary, label, rows))
        stepped = np.zeros(rows, np.bool_)
        np.logical_or.at(stepped, label, summary.stepped)
        values["lr"] = finish.merged_numbers(self.lr, label, rows)
        values["initial_lr"] = finish.merged_numbers(self.initial_lr, label, rows)
        values["decay"] = finish.merged_numbers(
            np.where(summary.stepped, summary.part("decay"), np.nan), label, rows
        )
        values["samples"] = np.full(rows, info.samples)
        values["lr_per_sample"] = values["lr"] / info.samples
        for name in FIGURES:
            if name not in ("lr", "param_norm"):
                values[name] = np.where(stepped, values[name], np.nan)
        self._unused_gradients(values, label, stepped)
        values["stepped"] = stepped
        values["numel"] = np.zeros(rows, np.int64)
        np.add.at(values["numel"], label, summary.numel)
        values["rule"] = _merged_names(self.rules, label, rows)
        values["group"] = np.array(self.groups if level == "parameter" else order)
        values["parameter"] = _strings(self.names)
        values["module"] = _strings([str(key) for key in order])
        values["step"] = np.full(rows, info.step, np.int64)
        values["time"] = np.full(rows, info.time)
        values["attempt"] = np.full(rows, info.attempt, np.int64)
        values["optimizer"] = _strings([info.optimizer] * rows)
        return {
            name: values[name] if kind == "str" else values[name].astype(kind)
            for name, kind in frame_columns(level).items()
        }

    def _unused_gradients(
        self, values: dict[str, NDArray[Any]], label: NDArray[np.int64], stepped: NDArray[np.bool_]
    ) -> None:
        """Norm and nonfinite count of gradients that were not used, in rows without a step."""
        if not self.unused.any():
            return
        squares, bad = np.zeros(len(stepped)), np.zeros(len(stepped))
        np.add.at(squares, label[self.unused], self.summary.part("gg")[self.unused])
        np.add.at(bad, label[self.unused], self.summary.part("nonfinite")[self.unused])
        some = np.zeros(len(stepped), np.bool_)
        some[label[self.unused]] = True
        some &= ~stepped
        values["grad_norm"] = np.where(
            some, np.sqrt(squares) / self.grad_scale, values["grad_norm"]
        )
        values["nonfinite"] = np.where(some, bad, values["nonfinite"])

    def _elements(self, info: StepInfo) -> Columns:
        pieces: dict[str, list[Any]] = {name: [] for name in ELEMENT_COLUMNS}
        for i in sorted(self.tracked):
            where, (rate, update, grad, param) = self.tracked[i]
            n = len(where)
            if not self.summary.stepped[i]:
                rate = update = np.full(n, np.nan)
            constants = (info.step, info.time, info.attempt, info.optimizer)
            keys = (*constants, self.groups[i], self.names[i])
            for name, key in zip(ELEMENT_COLUMNS, keys, strict=False):
                pieces[name] += [key] * n
            pieces["element"] += where.tolist()
            for name, column in (
                ("effective_lr", rate), ("update", update), ("grad", grad), ("param", param)
            ):  # fmt: skip
                pieces[name] += column.tolist()
        return {
            name: _strings(pieces[name]) if kind == "str" else np.array(pieces[name], dtype=kind)
            for name, kind in ELEMENT_COLUMNS.items()
        }


class Pending:
    """The figures of one step on their way to the host: one buffer crosses, nobody waits."""

    def __init__(self, raw: Raw, watched: Sequence[Watched], info: StepInfo) -> None:
        self._raw = raw
        self.info = info
        self.watched = list(watched)
        self._names = [w.name for w in watched]
        self._groups = [w.group for w in watched]
        self._rules = [w.rule for w in watched]
        self._tensors = [t for rows in raw.rows for _, t in rows.tensors()]
        self._initial = [w.initial_lr for w in watched]
        numbers = [*raw.lr.values(), *self._initial]
        numbers += [raw.found_inf, raw.grad_scale, *(raw.resting or ())]
        self._tensors += [t for t in numbers if isinstance(t, Tensor)]
        self._crossing = Crossing(self._tensors)
        self._host: dict[int, NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that wait until the record is made."""
        return sum(t.numel() * t.element_size() for t in self._tensors)

    def ready(self) -> bool:
        """Whether the buffer has arrived."""
        return self._crossing.ready()

    def wait(self) -> bool:
        """True: what waits for a device waits where it is read."""
        return True

    def _value(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if self._host is None:
            arrays = self._crossing.arrays()
            self._host = {id(t): a for t, a in zip(self._tensors, arrays, strict=True)}
        return self._host[id(tensor)]

    def _number(self, value: Any) -> float:
        return float(np.asarray(self._value(value)).reshape(()))

    @property
    def skipped(self) -> bool:
        """Whether a fused optimizer skipped the step for the gradient scaler."""
        return self._raw.found_inf is not None and self._number(self._raw.found_inf) != 0

    @property
    def none_taken(self) -> bool:
        """Whether every rate and every gradient was 0: a checkpoint library's, to make state."""
        rest = self._raw.resting
        if rest is None or any(self._number(lr) != 0 for lr in self._raw.lr.values()):
            return False
        squares = self._table("parts", len(PARTS))[self._raw.stepped, PARTS.index("gg")]
        if not len(squares) + len(rest):
            return False
        return not (squares != 0).any() and not any(self._number(found) for found in rest)

    @property
    def errors(self) -> Mapping[int, str]:
        """What rules raised, by position of the parameter."""
        return self._raw.errors

    def reconstruction_errors(self) -> Floats:
        """Error of each parameter whose step a rule explained; NaN elsewhere: (parameters,)."""
        checks = self._table("checks", len(CHECKS))
        named = dict(zip(CHECKS, checks.T, strict=True))
        with np.errstate(all="ignore"):
            moved = np.sqrt(np.maximum(named["intended"], named["observed"]))
            error = np.sqrt(named["residual"]) / moved
        # A rule that says NaN of a step that was taken does not explain it.
        failed = np.isnan(error) & (named["observed"] > 0) & ~np.isnan(named["checked"])
        ruled = np.array([rule is not None for rule in self._rules], dtype=np.bool_)
        result: Floats = np.where(failed & ruled, np.inf, error)
        return result

    def _table(self, name: str, width: int) -> Floats:
        table = np.full((len(self._names), width), np.nan)
        for rows in self._raw.rows:
            tensor = getattr(rows, name)
            if tensor is not None:
                table[rows.at] = self._value(tensor)
        return table

    def record(self) -> Record:
        """Merge and finish the figures of every level."""
        raw = self._raw
        count = len(self._names)
        with_grad = np.zeros(count, np.bool_)
        with_grad[raw.stepped] = True
        rule_names = [
            "measured" if rule is None or i in raw.errors else rule.name
            for i, rule in enumerate(self._rules)
        ]
        return Arrived(
            names=self._names,
            groups=self._groups,
            rules=rule_names,
            summary=finish.Summary(
                numel=np.array([w.numel for w in self.watched], dtype=np.int64),
                stepped=with_grad & (not self.skipped),
                measured=np.array([name == "measured" for name in rule_names]),
                parts=self._table("parts", len(PARTS)),
                checks=self._table("checks", len(CHECKS)),
                rates=self._rates(count),
            ),
            unused=with_grad & self.skipped,
            grad_scale=1.0 if raw.grad_scale is None else self._number(raw.grad_scale),
            lr=np.array([self._number(raw.lr[group]) for group in self._groups]),
            initial_lr=np.array([self._number(value) for value in self._initial]),
            tracked=self._tracked(),
        ).record(self.info)

    def _rates(self, count: int) -> list[Rates | None]:
        result: list[Rates | None] = [None] * count
        for rows in self._raw.rows:
            if rows.rates is not None:
                values = self._value(rows.rates)
                for at, row in zip(rows.at, values, strict=True):
                    result[at] = Rates(values=row)
            elif rows.bins is not None:
                for at, row in zip(rows.at, self._value(rows.bins), strict=True):
                    bins = np.flatnonzero(row)
                    if len(bins):
                        counts = row[bins].astype(np.float64)
                        result[at] = Rates(bins=bins + rows.first_bin, counts=counts)
        return result

    def _tracked(self) -> dict[int, tuple[NDArray[np.int64], Floats]]:
        found: dict[int, tuple[NDArray[np.int64], Floats]] = {}
        for rows in self._raw.rows:
            if rows.tracked is not None:
                values = self._value(rows.tracked)
                for row, at in enumerate(rows.at):
                    where = self.watched[at].tracked
                    if where is not None:
                        found[at] = where.numpy(), values[:, row]
        return found


class Crossing:
    """Tensors on their way to the host, those of one device in one buffer."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._buffers: dict[torch.device, Tensor] = {}
        self._events: list[Any] = []
        devices = {t.device for t in tensors if t.device.type != "cpu"}
        for device in devices:
            flat = [
                t.contiguous().reshape(-1).view(torch.uint8) for t in tensors if t.device == device
            ]
            buffer = torch.cat(flat)
            host = torch.empty_like(buffer, device="cpu", pin_memory=True)
            host.copy_(buffer, non_blocking=True)
            event = torch.get_device_module(device).Event()
            event.record(torch.get_device_module(device).current_stream(device))
            self._buffers[device] = host
            self._events.append(event)

    def ready(self) -> bool:
        """Whether all have arrived."""
        return all(event.query() for event in self._events)

    def arrays(self) -> list[NDArray[Any]]:
        """The values of the tensors, in order; waits for what is still on its way."""
        for event in self._events:
            event.synchronize()
        start = dict.fromkeys(self._buffers, 0)
        result = []
        for tensor in self._tensors:
            host = tensor
            if tensor.device in self._buffers:
                end = start[tensor.device] + tensor.numel() * tensor.element_size()
                piece = self._buffers[tensor.device][start[tensor.device] : end]
                host = piece.clone().view(tensor.dtype).reshape(tensor.shape)
                start[tensor.device] = end
            result.append(host.double().numpy() if host.dtype == torch.bfloat16 else host.numpy())
        return result


def _strings(values: Sequence[str]) -> NDArray[Any]:
    result = np.empty(len(values), dtype=object)
    result[:] = list(values)
    return result


def _merged_names(names: Sequence[str], label: NDArray[np.int64], rows: int) -> NDArray[Any]:
    """The name that all parameters of a row share, else ``mixed``."""
    result = np.empty(rows, dtype=object)
    for name, at in zip(names, label, strict=True):
        result[at] = name if result[at] in (None, name) else "mixed"
    return result
