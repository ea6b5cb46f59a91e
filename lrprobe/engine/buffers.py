"""The figures of one step as buffers that merge by ``+`` and ``max``, wherever their pieces are.

Rows are those of the frame. What one process has is added up here; ranks add their buffers up with
an all-reduce; and the host reads them all in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

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
MAXIMA = (*_GREATEST, "lr", "initial_lr", "failed")
"""Merged by ``max``, what merges by ``min`` negated: (rows, MAXIMA); −∞ where there is nothing.

``failed`` is 1 where a rule raised.
"""

_STAYS = ("with_grad", "param_square", "grad_square", "nonfinite")
"""Sums that are known of a step that a fused optimizer skipped for the gradient scaler."""

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
    skip = None
    if figures.skipped is not None:
        skip = figures.skipped.detach().reshape(()).to(device, non_blocking=True) != 0
    for vectors in figures.vectors:
        _add_vectors(buffers, vectors, row_of, figures, skip, folds=folds)
    resting = [i for i in figures.resting if row_of[i] >= 0]
    if resting:
        at = there(torch.tensor([row_of[i] for i in resting]), device)
        squares = [brought(figures.resting[i], device) for i in resting]
        param = SUMS.index("param_square")
        buffers.sums[:, param] = buffers.sums[:, param].index_add(0, at, torch.stack(squares))
    _fill_known(buffers, figures, row_of)
    for i, where in slots.items():
        if i in figures.tracked and row_of[i] >= 0:
            values = brought(figures.tracked[i], device)
            if skip is not None:
                rate, update, *others = values
                moved = torch.where(skip, torch.nan, torch.stack([rate, update]))
                values = torch.cat([moved, torch.stack(others)])
            buffers.tracked.index_put_((where.reshape(-1),), values.reshape(-1))


def _add_vectors(
    buffers: Buffers,
    vectors: Vectors,
    row_of: Sequence[int],
    figures: StepFigures,
    skip: Tensor | None,
    *,
    folds: bool,
) -> None:
    """Add figures of some pieces; of those of a skipped step only what is known all the same."""
    device = buffers.sums.device
    rows = np.array([row_of[i] for i in vectors.at], np.int64)
    mine = np.flatnonzero(rows >= 0)
    if not len(mine):
        return
    table = brought(vectors.table, device)
    if len(mine) < len(rows):
        table = table[there(torch.from_numpy(mine), device)]
    at = there(torch.from_numpy(rows[mine]), device)
    order, signs, stays = _merging(device)
    table = table.index_select(1, order)
    sums, most = table[:, : len(_ADDED)], table[:, len(_ADDED) :] * signs
    counts = np.ones((len(mine), len(_COUNTS)))
    counts[:, _COUNTS.index("elements")] = np.array(vectors.numel)[mine]
    counted = there(torch.from_numpy(counts), device)
    sums = torch.cat([counted, sums], 1)
    most = most.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    if skip is not None:
        if figures.scale is not None:  # which is then still in the gradients
            grad = SUMS.index("grad_square")
            scale = brought(figures.scale.detach().reshape(()), device)
            sums[:, grad] = torch.where(skip, sums[:, grad] / scale**2, sums[:, grad])
        sums = torch.where(skip & ~stays, 0.0, sums)
        most = torch.where(skip, -torch.inf, most)
    buffers.sums.index_add_(0, at, sums)
    index = at.unsqueeze(1).expand(-1, len(_GREATEST))
    buffers.maxima[:, : len(_GREATEST)].scatter_reduce_(0, index, most, "amax")
    failed = np.isin(vectors.at, list(figures.failed)) & (rows >= 0)
    if failed.any():
        buffers.maxima[there(torch.from_numpy(rows[failed]), device), MAXIMA.index("failed")] = 1.0
    _add_rates(buffers, vectors, rows, skip, folds=folds)


@cache
def _merging(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of what merges by ``+``, then by ``max``; signs of the latter; sums that stay."""
    figures = (*FIGURES, *CHECKS)
    added = [i for i, f in enumerate(figures) if f.merge == "sum"]
    greatest = [i for i, f in enumerate(figures) if f.merge != "sum"]
    signs = [-1.0 if figures[i].merge == "min" else 1.0 for i in greatest]
    return (
        there(torch.tensor([*added, *greatest]), device),
        there(torch.tensor(signs, dtype=torch.float64), device),
        there(torch.tensor([name in _STAYS for name in SUMS]), device),
    )


def _add_rates(
    buffers: Buffers,
    vectors: Vectors,
    rows: NDArray[np.int64],
    skip: Tensor | None,
    *,
    folds: bool,
) -> None:
    count, device = len(buffers.sums), buffers.sums.device
    if vectors.bins is not None and len(vectors.bins.owner):
        mine = vectors.bins.merged(rows)
        if folds or device.type != "cpu":
            sent = there(torch.from_numpy(folded(mine, count)), device)
            sent = sent if skip is None else torch.where(skip, 0.0, sent)
            buffers.folded = sent if buffers.folded is None else buffers.folded + sent
        else:
            before = [] if buffers.bins is None else [buffers.bins]
            buffers.bins = Bins.joined([*before, mine])
    if vectors.folded is not None:
        if buffers.folded is None:
            buffers.folded = torch.zeros((count, FOLDED), dtype=torch.float64, device=device)
        mine_at = np.flatnonzero(rows >= 0)
        at = there(torch.from_numpy(rows[mine_at]), device)
        table = vectors.folded if skip is None else torch.where(skip, 0, vectors.folded)
        if len(mine_at) < len(rows):
            table = table[there(torch.from_numpy(mine_at), table.device)]
        buffers.folded.index_add_(0, at, brought(table, device))


def _fill_known(buffers: Buffers, figures: StepFigures, row_of: Sequence[int]) -> None:
    """Rates of the groups: numbers cross to the device together."""
    names = ("lr", "initial_lr")
    numbers = np.full((len(buffers.sums), len(names)), -np.inf)
    tensors: list[tuple[int, int, Tensor]] = []
    for at, name in enumerate(names):
        given: Mapping[int, Scalar] = getattr(figures, name)
        for i, value in given.items():
            if row_of[i] >= 0 and isinstance(value, Tensor):
                tensors.append((row_of[i], MAXIMA.index(name), value))
            elif row_of[i] >= 0:
                numbers[row_of[i], at] = value
    device, first = buffers.sums.device, MAXIMA.index(names[0])
    target = buffers.maxima[: len(buffers.sums), first : first + len(names)]
    told = there(_or_nothing(torch.from_numpy(numbers)), device)
    torch.maximum(target, told, out=target)  # other calls of the same step may have told of others
    if tensors:
        unique = {id(value): value for _, _, value in tensors}
        read = {key: brought(x.detach().reshape(()), device) for key, x in unique.items()}
        values = _or_nothing(torch.stack([read[id(value)] for _, _, value in tensors]))
        places = torch.tensor([[row, column] for row, column, _ in tensors])
        buffers.maxima[there(places[:, 0], device), there(places[:, 1], device)] = values


def _or_nothing(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), -torch.inf, values)


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
