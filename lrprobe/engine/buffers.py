"""The figures of one step as buffers that merge by ``+`` and ``max``, wherever their pieces are.

Rows are those of the frame. What one process has is added up here; ranks add their buffers up with
an all-reduce; and the host reads them all in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.distribution import FOLDED, Bins, folded
from lrprobe.engine.figures import CHECKS, FIGURES
from lrprobe.rules.base import Scalar, brought, there

_COUNTS = ("pieces", "elements", "with_grad")
"""Pieces that took the step, and their elements; pieces with a gradient."""
_ADDED = tuple(f.name for f in (*FIGURES, *CHECKS) if f.merge == "sum")
SUMS = (*_COUNTS, *_ADDED)
"""Merged by ``+``: (rows, SUMS)."""

_GREATEST = tuple(f.name for f in FIGURES if f.merge != "sum")
MAXIMA = (*_GREATEST, "lr", "initial_lr", "skipped", "scale", "failed")
"""Merged by ``max``, what merges by ``min`` negated: (rows, MAXIMA); −∞ where there is nothing.

``skipped`` is 1 where a fused optimizer skipped the step for the gradient scaler, ``scale`` what
is then still in the gradients, ``failed`` 1 where a rule raised.
"""

_NAMES = tuple(f.name for f in (*FIGURES, *CHECKS))
WIDTH = len(_NAMES)
"""Columns of a ``Vectors`` table: ``FIGURES``, then ``CHECKS``."""


def column(name: str) -> int:
    """Where a figure is in a ``Vectors`` table."""
    return _NAMES.index(name)


@dataclass(slots=True)
class Vectors:
    """Figures of some pieces, where these are.

    Attributes:
        at: numbers of their parameters.
        table: (pieces, WIDTH), float64.
        numel: elements of each piece.
        bins: how their rates are distributed, if the host knows: owners are places in ``at``.
        folded: the same on a device: (pieces, FOLDED).
    """

    at: list[int]
    table: Tensor
    numel: list[int]
    bins: Bins | None = None
    folded: Tensor | None = None


@dataclass(slots=True)
class StepFigures:
    """All that is known of one recorded step, before anything crosses to the host.

    Attributes:
        vectors: of the parameters that had a gradient.
        resting: number of a parameter without one to Σθ².
        lr, initial_lr: number of a parameter to its group's rates.
        failed: number of a parameter to what its rule raised.
        tracked: number of a parameter to the rate, update, gradient and value of its tracked
            elements: (4, elements).
        skipped: nonzero where a fused optimizer skipped the step; None where none can.
        scale: what is then still in the gradients.
    """

    vectors: list[Vectors] = field(default_factory=list)
    resting: dict[int, Tensor] = field(default_factory=dict)
    lr: dict[int, Scalar] = field(default_factory=dict)
    initial_lr: dict[int, Scalar] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    tracked: dict[int, Tensor] = field(default_factory=dict)
    skipped: Tensor | None = None
    scale: Tensor | None = None


@dataclass(slots=True)
class Buffers:
    """What one process adds to the figures of a step.

    Attributes:
        sums: (rows, SUMS), float64.
        maxima: (rows + 1, MAXIMA), float64; the last row is the caller's.
        tracked: values of tracked elements, row by row: (values,), float64.
        added: ``sums`` and ``tracked``, which are views of it: flat, one message.
        folded: distributions on a device or on their way between ranks: (rows, FOLDED); or None.
        folded_rows: which rows those are; None for all.
        bins: distributions on the host; owners are rows.
    """

    sums: Tensor
    maxima: Tensor
    tracked: Tensor
    added: Tensor
    folded: Tensor | None = None
    folded_rows: list[int] | None = None
    bins: Bins | None = None

    def note(self, column: int, value: float | Tensor) -> None:
        """Put a number of the caller's into the last row."""
        target = self.maxima[-1, column]
        target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)

    def fold_rows(self, rows: list[int]) -> Tensor:
        """Keep the distributions of some rows only, as a message between ranks."""
        if self.folded is None:
            shape = len(rows), FOLDED
            self.folded = torch.zeros(shape, dtype=torch.float64, device=self.sums.device)
        elif len(rows) < len(self.folded):
            self.folded = self.folded[there(torch.tensor(rows), self.folded.device)]
        self.folded_rows = rows
        return self.folded


def blank(rows: int, tracked: int, device: torch.device) -> Buffers:
    """Buffers to which nothing was added."""
    dtype = torch.float64
    added = torch.zeros(rows * len(SUMS) + tracked, dtype=dtype, device=device)
    sums, values = torch.split(added, [rows * len(SUMS), tracked])
    maxima = torch.full((rows + 1, len(MAXIMA)), -torch.inf, dtype=dtype, device=device)
    return Buffers(sums.view(rows, len(SUMS)), maxima, values, added)


def fill(
    buffers: Buffers,
    figures: StepFigures,
    row_of: Sequence[int],
    slots: Mapping[int, Tensor],
    *,
    folds: bool,
) -> None:
    """Add the figures of a step.

    Args:
        buffers: where to.
        figures: the step's.
        row_of: number of a parameter to its row; −1 where it is not for this process to add.
        slots: number of a parameter to where its tracked elements go: (4, elements).
        folds: whether distributions are to be folded, since other ranks add to them.
    """
    device = buffers.sums.device
    known = buffers if device.type == "cpu" else blank(len(buffers.sums), 0, torch.device("cpu"))
    for vectors in figures.vectors:
        _add_known(known, vectors, row_of, figures.failed)
        _add_vectors(buffers, vectors, row_of, folds=folds)
    resting = [i for i in figures.resting if row_of[i] >= 0]
    if resting:
        at = there(torch.tensor([row_of[i] for i in resting]), device)
        squares = [figures.resting[i].to(device, torch.float64, non_blocking=True) for i in resting]
        param = SUMS.index("param_square")
        buffers.sums[:, param] = buffers.sums[:, param].index_add(0, at, torch.stack(squares))
    _fill_known(buffers, known, figures, row_of)
    if known is not buffers:  # what the host knows crosses at once
        sent = there(torch.cat([known.added, known.maxima.reshape(-1)]), device)
        buffers.sums += sent[: len(known.added)].view_as(buffers.sums)
        most = sent[len(known.added) :].view_as(buffers.maxima)
        torch.maximum(buffers.maxima, most, out=buffers.maxima)
    for i, where in slots.items():
        if i in figures.tracked and row_of[i] >= 0:
            values = figures.tracked[i].to(device, torch.float64, non_blocking=True)
            buffers.tracked.index_put_((where.reshape(-1),), values.reshape(-1))


def _add_known(
    known: Buffers, vectors: Vectors, row_of: Sequence[int], failed: Mapping[int, str]
) -> None:
    """What the host knows of pieces: how many there are, their elements, whether a rule raised."""
    sums, raised = known.sums.numpy(), known.maxima.numpy()[:, MAXIMA.index("failed")]
    for i, numel in zip(vectors.at, vectors.numel, strict=True):
        row = row_of[i]
        if row >= 0:
            sums[row, : len(_COUNTS)] += 1.0, numel, 1.0
            raised[row] = max(raised[row], float(i in failed))


def _add_vectors(buffers: Buffers, vectors: Vectors, row_of: Sequence[int], *, folds: bool) -> None:
    device = buffers.sums.device
    rows = [row_of[i] for i in vectors.at]
    mine = [place for place, row in enumerate(rows) if row >= 0]
    if not mine:
        return
    table = vectors.table.to(device, non_blocking=True)
    if len(mine) < len(rows):
        table = table[there(torch.tensor(mine), device)]
    at = there(torch.tensor([rows[place] for place in mine]), device)
    columns, signs = _merging(device)
    table = table.index_select(1, columns)
    buffers.sums[:, len(_COUNTS) :].index_add_(0, at, table[:, : len(_ADDED)])
    values = (table[:, len(_ADDED) :] * signs).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    index = at.unsqueeze(1).expand(-1, len(_GREATEST))
    buffers.maxima[:, : len(_GREATEST)].scatter_reduce_(0, index, values, "amax")
    _add_rates(buffers, vectors, rows, folds=folds)


@cache
def _merging(device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of what merges by ``+``, then by ``max``; signs of the latter."""
    figures = (*FIGURES, *CHECKS)
    added = [i for i, f in enumerate(figures) if f.merge == "sum"]
    greatest = [i for i, f in enumerate(figures) if f.merge != "sum"]
    signs = [-1.0 if figures[i].merge == "min" else 1.0 for i in greatest]
    return (
        there(torch.tensor([*added, *greatest]), device),
        there(torch.tensor(signs, dtype=torch.float64), device),
    )


def _add_rates(buffers: Buffers, vectors: Vectors, rows: Sequence[int], *, folds: bool) -> None:
    count, device = len(buffers.sums), buffers.sums.device
    if vectors.bins is not None and len(vectors.bins.owner):
        mine = vectors.bins.merged(np.array(rows, np.int64))
        if folds or device.type != "cpu":
            sent = there(torch.from_numpy(folded(mine, count)), device)
            buffers.folded = sent if buffers.folded is None else buffers.folded + sent
        else:
            before = [] if buffers.bins is None else [buffers.bins]
            buffers.bins = Bins.joined([*before, mine])
    if vectors.folded is not None:
        if buffers.folded is None and rows == list(range(count)):
            buffers.folded = vectors.folded.to(device, torch.float64, non_blocking=True)
            return
        if buffers.folded is None:
            buffers.folded = torch.zeros((count, FOLDED), dtype=torch.float64, device=device)
        mine_at = [place for place, row in enumerate(rows) if row >= 0]
        at = there(torch.tensor([rows[place] for place in mine_at]), device)
        table = vectors.folded
        if len(mine_at) < len(rows):
            table = table[there(torch.tensor(mine_at), table.device)]
        buffers.folded.index_add_(0, at, table.to(device, torch.float64, non_blocking=True))


def _fill_known(
    buffers: Buffers, known: Buffers, figures: StepFigures, row_of: Sequence[int]
) -> None:
    """Rates of the groups, and what a fused optimizer tells of a skipped step."""
    device = buffers.sums.device
    for name in ("lr", "initial_lr"):
        given: Mapping[int, Scalar] = getattr(figures, name)
        target = known.maxima.numpy()[:, MAXIMA.index(name)]
        for i, value in given.items():
            if row_of[i] >= 0 and not isinstance(value, Tensor) and not math.isnan(value):
                target[row_of[i]] = value
        _put(buffers.maxima, name, [(row_of[i], value) for i, value in given.items()])
    for name, told in (("skipped", figures.skipped), ("scale", figures.scale)):
        if told is not None:
            number = torch.as_tensor(told).detach().reshape(())
            number = number.to(device, torch.float64, non_blocking=True)
            number = (number != 0).double() if name == "skipped" else number
            rows = sorted({row_of[i] for v in figures.vectors for i in v.at if row_of[i] >= 0})
            if rows:
                at = there(torch.tensor(rows), device)
                buffers.maxima[at, MAXIMA.index(name)] = number


def _put(maxima: Tensor, name: str, given: Sequence[tuple[int, Any]]) -> None:
    target = maxima[:, MAXIMA.index(name)]
    tensors = [(row, x) for row, x in given if row >= 0 and isinstance(x, Tensor)]
    if tensors:
        rows, values = zip(*tensors, strict=True)
        alike = len({(x.device, x.dtype) for x in values}) == 1  # so that few launches do
        if not alike:
            values = tuple(brought(x.detach(), maxima.device) for x in values)
        stacked = torch.stack([x.detach().reshape(()) for x in values])
        found = brought(stacked, maxima.device)
        found = torch.where(found.isnan(), -torch.inf, found)
        target.index_copy_(0, there(torch.tensor(rows), maxima.device), found)


@dataclass(slots=True)
class Arrived:
    """The merged buffers on the host."""

    sums: NDArray[np.float64]
    maxima: NDArray[np.float64]
    tracked: NDArray[np.float64]
    bins: Bins

    def sum(self, name: str) -> NDArray[np.float64]:
        """One of ``SUMS``: (rows,)."""
        return self.sums[:, SUMS.index(name)]

    def most(self, name: str) -> NDArray[np.float64]:
        """One of ``MAXIMA``, NaN where there is nothing: (rows,)."""
        values = self.maxima[: len(self.sums), MAXIMA.index(name)]
        return np.where(values == -np.inf, np.nan, values)
