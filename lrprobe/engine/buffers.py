"""The figures of one step as buffers that merge by ``+`` and ``max``.

A row is a row of the frame. Each process merges its pieces here, ranks merge their buffers with an
all-reduce, and the host reads the result the same way in both cases.
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
from lrprobe.rules.base import Scalar, to_device, to_device_float64

_COUNTS = ("pieces", "elements", "with_grad")
"""Pieces that took the step, their elements, and pieces with a gradient."""
_SUM_FIGURES = tuple(f.name for f in (*FIGURES, *CHECKS) if f.merge == "sum")
SUMS = (*_COUNTS, *_SUM_FIGURES)
"""Columns merged by ``+``: (rows, SUMS)."""

_MAX_FIGURES = tuple(f.name for f in FIGURES if f.merge != "sum")
MAXIMA = (*_MAX_FIGURES, "lr", "initial_lr", "failed")
"""Columns merged by ``max``: (rows, MAXIMA); −∞ where there is no value.

Figures that merge by ``min`` are negated. ``failed`` is 1 where a rule raised an error.
"""

_STAYS = ("with_grad", "param_square", "grad_square", "nonfinite")
"""Sums that stay valid if a fused optimizer skipped the step for the gradient scaler."""

_NAMES = tuple(f.name for f in (*FIGURES, *CHECKS))
WIDTH = len(_NAMES)
"""Columns of a ``Vectors`` table: ``FIGURES``, then ``CHECKS``."""


def column(name: str) -> int:
    """Index of a figure's column in a ``Vectors`` table."""
    return _NAMES.index(name)


@dataclass(slots=True)
class Vectors:
    """Figures of some pieces, on the device of the pieces.

    Attributes:
        at: indices of their parameters.
        table: (pieces, WIDTH), float64.
        numel: elements of each piece.
        bins: distribution of their rates, if computed on the host; owners are indices into ``at``.
        folded: distribution of their rates, if computed on a device: (pieces, FOLDED).
    """

    at: list[int]
    table: Tensor
    numel: list[int]
    bins: Bins | None = None
    folded: Tensor | None = None


@dataclass(slots=True)
class StepFigures:
    """Everything computed for one recorded step, before it is copied to the host.

    Keys are indices of watched parameters.

    Attributes:
        vectors: figures of the parameters that had a gradient.
        resting: Σθ² of the parameters without a gradient.
        lr, initial_lr: the rates of the parameter's group.
        failed: the error that the parameter's rule raised.
        tracked: rate, update, gradient and value of the tracked elements: (4, elements).
        skipped: nonzero if a fused optimizer skipped the step; None if it cannot skip.
        scale: the loss scale, by which the gradients of a skipped step are still multiplied.
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
    """The contribution of one process to the figures of a step.

    Attributes:
        sums: (rows, SUMS), float64.
        maxima: (rows + 1, MAXIMA), float64; the last row holds flags of the caller.
        tracked: values of tracked elements, row by row: (values,), float64.
        added: one flat buffer for the all-reduce; ``sums`` and ``tracked`` are views of it.
        folded: distributions on a device, or for the all-reduce: (rows, FOLDED); or None.
        folded_rows: the rows in ``folded``; None for all.
        bins: distributions on the host; owners are rows.
    """

    sums: Tensor
    maxima: Tensor
    tracked: Tensor
    added: Tensor
    folded: Tensor | None = None
    folded_rows: list[int] | None = None
    bins: Bins | None = None

    def set_flag(self, column: int, value: float | Tensor) -> None:
        """Set a flag in the last row."""
        target = self.maxima[-1, column]
        target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)

    def fold_rows(self, rows: list[int]) -> Tensor:
        """Reduce ``folded`` to the given rows, for the all-reduce, and return it."""
        if self.folded is None:
            shape = len(rows), FOLDED
            self.folded = torch.zeros(shape, dtype=torch.float64, device=self.sums.device)
        elif len(rows) < len(self.folded):
            self.folded = self.folded[to_device(torch.tensor(rows), self.folded.device)]
        self.folded_rows = rows
        return self.folded


def blank(rows: int, tracked: int, device: torch.device) -> Buffers:
    """Create buffers without figures."""
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
    """Add the figures of a step to the buffers.

    Args:
        buffers: what to add to.
        figures: those of the step.
        row_of: index of a parameter to its row; −1 if another process adds it.
        slots: index of a parameter to positions in ``Buffers.tracked``: (4, elements).
        folds: whether to fold distributions, so that ranks can add them up.
    """
    device = buffers.sums.device
    skip = None
    if figures.skipped is not None:
        skip = figures.skipped.detach().reshape(()).to(device, non_blocking=True) != 0
    for vectors in figures.vectors:
        _add_vectors(buffers, vectors, row_of, figures, skip, folds=folds)
    resting = [i for i in figures.resting if row_of[i] >= 0]
    if resting:
        at = to_device(torch.tensor([row_of[i] for i in resting]), device)
        squares = [to_device_float64(figures.resting[i], device) for i in resting]
        param = SUMS.index("param_square")
        buffers.sums[:, param] = buffers.sums[:, param].index_add(0, at, torch.stack(squares))
    _fill_known(buffers, figures, row_of)
    for i, where in slots.items():
        if i in figures.tracked and row_of[i] >= 0:
            values = to_device_float64(figures.tracked[i], device)
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
    """Add the figures of some pieces; for a skipped step, only those that stay valid."""
    device = buffers.sums.device
    rows = np.array([row_of[i] for i in vectors.at], np.int64)
    mine = np.flatnonzero(rows >= 0)
    if not len(mine):
        return
    table = to_device_float64(vectors.table, device)
    if len(mine) < len(rows):
        table = table[to_device(torch.from_numpy(mine), device)]
    at = to_device(torch.from_numpy(rows[mine]), device)
    order, signs, stays = _merging(device)
    table = table.index_select(1, order)
    sums, maxima = table[:, : len(_SUM_FIGURES)], table[:, len(_SUM_FIGURES) :] * signs
    counts = np.ones((len(mine), len(_COUNTS)))
    counts[:, _COUNTS.index("elements")] = np.array(vectors.numel)[mine]
    counted = to_device(torch.from_numpy(counts), device)
    sums = torch.cat([counted, sums], 1)
    maxima = maxima.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    if skip is not None:
        if figures.scale is not None:  # the gradients of a skipped step are still scaled
            grad = SUMS.index("grad_square")
            scale = to_device_float64(figures.scale.detach().reshape(()), device)
            sums[:, grad] = torch.where(skip, sums[:, grad] / scale**2, sums[:, grad])
        sums = torch.where(skip & ~stays, 0.0, sums)
        maxima = torch.where(skip, -torch.inf, maxima)
    buffers.sums.index_add_(0, at, sums)
    index = at.unsqueeze(1).expand(-1, len(_MAX_FIGURES))
    buffers.maxima[:, : len(_MAX_FIGURES)].scatter_reduce_(0, index, maxima, "amax")
    failed = np.isin(vectors.at, list(figures.failed)) & (rows >= 0)
    if failed.any():
        buffers.maxima[
            to_device(torch.from_numpy(rows[failed]), device), MAXIMA.index("failed")
        ] = 1.0
    _add_rates(buffers, vectors, rows, skip, folds=folds)


@cache
def _merging(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Column order (sums, then maxima), signs of the maxima, and a mask of ``_STAYS``."""
    figures = (*FIGURES, *CHECKS)
    added = [i for i, f in enumerate(figures) if f.merge == "sum"]
    greatest = [i for i, f in enumerate(figures) if f.merge != "sum"]
    signs = [-1.0 if figures[i].merge == "min" else 1.0 for i in greatest]
    return (
        to_device(torch.tensor([*added, *greatest]), device),
        to_device(torch.tensor(signs, dtype=torch.float64), device),
        to_device(torch.tensor([name in _STAYS for name in SUMS]), device),
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
            sent = to_device(torch.from_numpy(folded(mine, count)), device)
            sent = sent if skip is None else torch.where(skip, 0.0, sent)
            buffers.folded = sent if buffers.folded is None else buffers.folded + sent
        else:
            before = [] if buffers.bins is None else [buffers.bins]
            buffers.bins = Bins.joined([*before, mine])
    if vectors.folded is not None:
        if buffers.folded is None:
            buffers.folded = torch.zeros((count, FOLDED), dtype=torch.float64, device=device)
        mine_at = np.flatnonzero(rows >= 0)
        at = to_device(torch.from_numpy(rows[mine_at]), device)
        table = vectors.folded if skip is None else torch.where(skip, 0, vectors.folded)
        if len(mine_at) < len(rows):
            table = table[to_device(torch.from_numpy(mine_at), table.device)]
        buffers.folded.index_add_(0, at, to_device_float64(table, device))


def _fill_known(buffers: Buffers, figures: StepFigures, row_of: Sequence[int]) -> None:
    """Add the rates of the groups; plain numbers are copied to the device together."""
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
    known = to_device(_nan_to_minus_inf(torch.from_numpy(numbers)), device)
    torch.maximum(target, known, out=target)  # keeps what earlier calls of this step have set
    if tensors:
        unique = {id(value): value for _, _, value in tensors}
        read = {key: to_device_float64(x.detach().reshape(()), device) for key, x in unique.items()}
        values = _nan_to_minus_inf(torch.stack([read[id(value)] for _, _, value in tensors]))
        places = torch.tensor([[row, column] for row, column, _ in tensors])
        buffers.maxima[to_device(places[:, 0], device), to_device(places[:, 1], device)] = values


def _nan_to_minus_inf(values: Tensor) -> Tensor:
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

    def maximum(self, name: str) -> NDArray[np.float64]:
        """One of ``MAXIMA``, NaN where there is no value: (rows,)."""
        values = self.maxima[: len(self.sums), MAXIMA.index(name)]
        return np.where(values == -np.inf, np.nan, values)
