"""One rank's share of the figures of a step, in buffers that merge by ``max`` and ``+``.

All ranks agree on a ``Table``: the rows of the frame, and the layout of two float64 buffers. A rank
fills in what it holds; the elementwise maximum of the one and the sum of the other over all ranks
are the figures of the whole parameters, which ``Table.arrived`` reads on the host. Which elements
are sampled is decided by positions in the whole parameter, never by what a rank happens to hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Scalar, Slice, SparseRows, Update
from lrprobe.summary import figures, finish
from lrprobe.summary.distribution import Rates
from lrprobe.summary.figures import CHECKS, PARTS
from lrprobe.summary.histogram import fine_bins
from lrprobe.summary.large import large_figures
from lrprobe.summary.pending import Arrived
from lrprobe.summary.reading import (
    WHOLE,
    Lines,
    Positions,
    block_size,
    entry_of,
    positions,
    precision,
    real,
    spread,
    take_rows,
)
from lrprobe.summary.snapshot import (
    Gradient,
    Watched,
    as_given,
    cause,
    copied,
    empty_rows,
    gradient_before,
    may_overwrite,
    measured_rows,
    remember,
    tracked_figures,
)
from lrprobe.summary.stream import stride_for, whole_of
from lrprobe.summary.sums import column, row_figures

Floats = NDArray[np.float64]
Cuts: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]

MAXIMA = ("rate_max", "rate_min", "rate_nan", "lr", "initial_lr", "decay", "failed")
"""Merged by ``max``: (rows, ·); −inf where a rank has nothing. ``rate_min`` is negated;
``rate_nan`` is 1 where some rate is NaN, ``failed`` where a rule raised."""

_MOMENTS = ("n_a", "n_aa", "n_d", "n_ad", "m2")
"""n rates of mean a + d, with a of few bits so that the products are exact: see ``_moments``."""

_ADDED = tuple(
    name for name in PARTS if name not in ("decay", "rate_mean", "rate_m2", "rate_min", "rate_max")
)
SUMS = ("elements", "stepped", "with_grad", "unused_gg", *_MOMENTS, *_ADDED, *CHECKS)
"""Merged by ``+``: (rows, ·). Elements that took the step; ranks where it was taken; ranks with a
gradient; squares of gradients that were not used; then sums over elements."""

EXACT_SLOTS = 1 << 20
"""Elements of small parameters that cross one by one, for exact quantiles; of those beyond it the
quantiles are read off histograms."""

COUNTS = 1 << 24
"""Counts that all histograms together have at most, as long as each has ``COARSEST``."""

FINEST, COARSEST = 4096, 512
OCTAVES = 256
"""A histogram counts rates by their 8 exponent bits, and, folded to 64 octaves, in FINEST bins (64
an octave), or fewer where there are many parameters. Few parameters have rates 64 octaves apart;
there a folded count is shared out as the octaves are."""

_FOLD = 64  # octaves
_INFINITE = OCTAVES - 1  # the octave of inf and NaN


@dataclass(frozen=True, slots=True)
class Region:
    """Which elements of a parameter a rank holds: in each dimension, ranges of indices.

    Attributes:
        shape: of the whole parameter (complex: with a last dimension of 2).
        cuts: per dimension the ascending (start, stop) that it holds.
    """

    shape: tuple[int, ...]
    cuts: Cuts

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Region:
        """The whole parameter."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what is held."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.cuts)

    @property
    def numel(self) -> int:
        """Elements held."""
        return math.prod(self.local_shape)

    @property
    def whole(self) -> bool:
        """Whether everything is held."""
        return self.local_shape == self.shape

    def global_positions(self) -> Tensor:
        """Flat position in the whole parameter of each element held, in order: (numel,)."""
        flat = torch.zeros((), dtype=torch.int64)
        for size, ranges in zip(self.shape, self.cuts, strict=True):
            index = torch.cat([torch.arange(*r) for r in ranges] or [torch.arange(0)])
            flat = flat.unsqueeze(-1) * size + index
        return flat.reshape(-1)

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some global flat positions are held: their indices, and local flat positions."""
        if self.whole:
            return torch.arange(len(wanted)), wanted
        held = torch.ones_like(wanted, dtype=torch.bool)
        flat, stride, rest = torch.zeros_like(wanted), 1, wanted
        for size, ranges in zip(reversed(self.shape), reversed(self.cuts), strict=True):
            index, rest = rest % size, rest // size
            local, seen = torch.full_like(index, -1), 0
            for start, stop in ranges:
                inside = (start <= index) & (index < stop)
                local = torch.where(inside, index - start + seen, local)
                seen += stop - start
            held &= local >= 0
            flat += local * stride
            stride *= seen
        at = held.nonzero().squeeze(1)
        return at, flat[at]


@dataclass(slots=True)
class Row:
    """One parameter of the frame, as all ranks know it.

    Attributes:
        name, group: as in the frame.
        shape: of the whole parameter (complex: with a last dimension of 2).
        rule: name of its rule; ``measured`` where there is none.
        tolerance: error of a reconstruction above which the rule does not explain a step.
        tracked: flat positions of tracked elements, or None.
        bad_steps: recorded steps in a row that the rule did not explain.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    rule: str
    tolerance: float
    tracked: Tensor | None = None
    bad_steps: int = 0

    @property
    def numel(self) -> int:
        """Its real elements."""
        return math.prod(self.shape)


class Table:
    """The rows of the frame, and where their figures are in the buffers.

    The sums are: (rows, SUMS), a slot for each element of small parameters, four for each tracked
    element, and the packed histograms of the other parameters.
    """

    def __init__(self, rows: Sequence[Row], sample: int | None = None) -> None:
        self.rows = list(rows)
        self.sample = sample
        self.slots: dict[int, int] = {}
        """Row to its first slot, where its rates cross one by one."""
        self.binned: dict[int, int] = {}
        """Row to its number among those with a histogram."""
        self.tracked: dict[int, int] = {}
        """Row to the first slot of its tracked elements."""
        end = len(rows) * len(SUMS)
        used, most = 0, WHOLE
        for at, row in enumerate(self.rows):
            if row.numel <= WHOLE and used + row.numel <= EXACT_SLOTS:
                self.slots[at] = end
                used, end = used + row.numel, end + row.numel
            else:
                self.binned[at] = len(self.binned)
                most = max(most, _quantile_count(row.shape, sample))
        for at, row in enumerate(self.rows):
            if row.tracked is not None:
                self.tracked[at] = end
                end += 4 * len(row.tracked)
        self._histograms = end
        self.bins = FINEST
        while self.bins > COARSEST and len(self.binned) * (self.bins + OCTAVES) > COUNTS:
            self.bins //= 2
        # So many bits hold the largest count; a float64 holds integers of 53.
        self._bits = max(most, 2 * WHOLE).bit_length()
        self._fields = 52 // self._bits
        self._words = -(-(self.bins + OCTAVES) // self._fields)
        self.numbers = end + self._words * len(self.binned)
        """Length of the buffer that is added up."""

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the two messages of a recorded step."""
        return 8 * (len(self.rows) + 1) * len(MAXIMA), 8 * self.numbers

    def blank(self, device: torch.device) -> Buffers:
        """Buffers of a rank that has nothing. The last row of the maxima is the caller's."""
        shape = (len(self.rows) + 1, len(MAXIMA))
        maxima = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        return Buffers(maxima, torch.zeros(self.numbers, dtype=torch.float64, device=device))

    def count(self, sums: Tensor, row: Tensor, rates: Tensor, weight: Tensor) -> None:
        """Add rates (not NaN where their weight is 1) to the histograms of their rows."""
        with_rate = weight * (~rates.isnan()).double()
        bins = fine_bins(rates)
        octave = bins >> 6
        counted = with_rate * ((octave > 0) & (octave < _INFINITE)).double()
        folded = OCTAVES + (bins % (_FOLD * 64)) // (FINEST // self.bins)
        for at, amount in ((octave, with_rate), (folded, counted)):
            word = self._histograms + row * self._words + at // self._fields
            field_ = torch.full_like(amount, 2.0) ** (self._bits * (at % self._fields))
            sums.index_add_(0, word, amount * field_)

    def histogram(self, sums: Floats, at: int) -> Rates | None:
        """The histogram of a row; None where no rate was counted."""
        start = self._histograms + self.binned[at] * self._words
        words = sums[start : start + self._words].astype(np.int64)
        shifts = self._bits * np.arange(self._fields)
        counts = ((words[:, None] >> shifts) & ((1 << self._bits) - 1)).reshape(-1)
        octaves = counts[:OCTAVES].astype(np.float64)
        if not octaves.any():
            return None
        folded = counts[OCTAVES : OCTAVES + self.bins].astype(np.float64).reshape(_FOLD, -1)
        inner = np.flatnonzero(octaves[1:_INFINITE]) + 1
        where = inner % _FOLD
        total = folded.sum(1)[where]
        fine = folded[where] * (octaves[inner] / total)[:, None]
        # Coarser bins are spread over the fine ones that they cover.
        width = FINEST // self.bins
        fine = np.repeat(fine, width, axis=1) / width
        bins = (inner[:, None] * 64 + np.arange(64)).reshape(-1)
        ends = [octaves[0]], [octaves[_INFINITE]]
        bins = np.concatenate([[0], bins, [_INFINITE * 64]])
        values = np.concatenate([ends[0], fine.reshape(-1), ends[1]])
        some = values > 0
        return Rates(bins=bins[some], counts=values[some])

    def arrived(self, maxima: Floats, sums: Floats, rules: Sequence[str]) -> Arrived:
        """The figures of the whole parameters, from the merged buffers.

        Args:
            maxima: as in ``Buffers``.
            sums: as in ``Buffers``.
            rules: names of the rules of all rows during that step.
        """
        n = len(self.rows)
        high = dict(zip(MAXIMA, maxima[:n].T, strict=True))
        table = sums[: n * len(SUMS)].reshape(n, len(SUMS))
        total = dict(zip(SUMS, table.T, strict=True))
        rules = [
            "measured" if bad > 0 else rule for rule, bad in zip(rules, high["failed"], strict=True)
        ]
        parts = self._parts(high, total)
        parts["gg"] = np.where(total["stepped"] > 0, total["gg"], total["unused_gg"])
        stepped = total["stepped"] > 0
        summary = finish.Summary(
            numel=np.array([row.numel for row in self.rows], dtype=np.int64),
            stepped=stepped,
            measured=np.array([rule == "measured" for rule in rules]),
            parts=np.stack([parts[name] for name in PARTS], axis=1),
            checks=np.stack([total[name] for name in CHECKS], axis=1),
            rates=self._rates(rules, high["failed"] > 0, total, sums),
            counted=total["elements"],
        )
        return Arrived(
            names=[row.name for row in self.rows],
            groups=[row.group for row in self.rows],
            rules=rules,
            summary=summary,
            unused=~stepped & (total["with_grad"] > 0),
            grad_scale=1.0,
            lr=_known(high["lr"]),
            initial_lr=_known(high["initial_lr"]),
            tracked={at: self._elements(at, sums) for at in self.tracked},
        )

    def _parts(self, high: dict[str, Floats], total: dict[str, Floats]) -> dict[str, Floats]:
        n = total["elements"]
        low, top = _known(-high["rate_min"], np.inf), _known(high["rate_max"])
        nan = high["rate_nan"] > 0
        with np.errstate(all="ignore"):
            mean = ((total["n_a"] + total["n_d"]) / n).clip(low, top)
            mean = np.where(np.isinf(top), top, mean)
            # Σ(x − c)² around a c of few bits, then around the mean: see ``_moments``.
            c = _few_bits(total["n_a"] / n)
            between = total["n_aa"] - 2 * c * total["n_a"] + c * c * n
            between += 2 * (total["n_ad"] - c * total["n_d"])
            m2 = total["m2"] + between - n * ((total["n_a"] - c * n + total["n_d"]) / n) ** 2
        return {
            **total,
            "decay": _known(high["decay"]),
            "rate_mean": np.where(nan, np.nan, mean),
            "rate_m2": np.where(nan | np.isinf(top), np.nan, m2.clip(min=0)),
            "rate_min": np.where(nan, np.nan, low),
            "rate_max": np.where(nan, np.nan, top),
        }

    def _rates(
        self,
        rules: Sequence[str],
        failed: NDArray[np.bool_],
        total: dict[str, Floats],
        sums: Floats,
    ) -> list[Rates | None]:
        result: list[Rates | None] = [None] * len(self.rows)
        known = (total["stepped"] > 0) & ~failed  # else some ranks had a rule, others none
        for at in self.binned:
            rates = self.histogram(sums, at) if known[at] else None
            if rates is not None and rules[at] == "measured":
                rates.looked_at = float(total["checked"][at])
            result[at] = rates
        for at, start in self.slots.items():
            if known[at]:
                result[at] = Rates(values=sums[start : start + self.rows[at].numel])
        return result

    def _elements(self, at: int, sums: Floats) -> tuple[NDArray[np.int64], Floats]:
        where = self.rows[at].tracked
        if where is None:
            raise ValueError(f"row {at} has no tracked elements")
        start = self.tracked[at]
        return where.numpy(), sums[start : start + 4 * len(where)].reshape(4, -1)

    def judge(self, maxima: Floats, sums: Floats) -> dict[int, str]:
        """Rows whose rule turns out not to explain their steps, and why.

        From then on they are measured. All ranks come to the same, as they see the same figures.
        """
        n = len(self.rows)
        total = dict(zip(SUMS, sums[: n * len(SUMS)].reshape(n, -1).T, strict=True))
        with np.errstate(all="ignore"):
            moved = np.sqrt(np.maximum(total["intended"], total["observed"]))
            error = np.sqrt(total["residual"]) / moved
        # A rule that says NaN of a step that was taken does not explain it.
        error = np.where(np.isnan(error) & (total["observed"] > 0), np.inf, error)
        raised = maxima[:, MAXIMA.index("failed")] > 0
        failed = {}
        for at, row in enumerate(self.rows):
            if row.rule == "measured":
                continue
            if raised[at]:
                failed[at] = "it raised an error"
            elif total["stepped"][at] and not np.isnan(error[at]):
                row.bad_steps = row.bad_steps + 1 if error[at] > row.tolerance else 0
                if row.bad_steps >= 2:
                    failed[at] = f"error {error[at]:.2g} of the step really taken"
        for at in failed:
            self.rows[at].rule = "measured"
        return failed


@dataclass(slots=True)
class Buffers:
    """What one rank adds: ``MAXIMA`` by maximum, (rows + 1, ·), and the sums: (numbers,)."""

    maxima: Tensor
    sums: Tensor


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank holds of one row.

    Attributes:
        row: position in the table.
        watched: the parameter.
        region: which elements of it are here.
        check: local positions of the check sample.
        quantile: local positions of those in the histogram; None where the rates have slots.
        slots: index in the sums of each element that has a slot.
        tracked: local positions of tracked elements, and the index of each one's first slot.
    """

    row: int
    watched: Watched
    region: Region
    check: Positions
    quantile: Tensor | None
    slots: Tensor | None
    tracked: tuple[Tensor, Tensor, int] | None


@dataclass(slots=True)
class Kept:
    """What is kept from before a step, by row."""

    samples: dict[int, Tensor] = field(default_factory=dict)
    tracked: dict[int, Tensor] = field(default_factory=dict)
    scalars: dict[int, Mapping[str, Scalar]] = field(default_factory=dict)
    grads: dict[int, Gradient] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Share:
    """One rank's share of a table: its figures of a step, in buffers."""

    def __init__(
        self,
        table: Table,
        held: Sequence[tuple[int, Watched, Region]],
        device: torch.device,
        *,
        compile: bool = False,  # noqa: A002 - as in `attach`
    ) -> None:
        """``held`` are the rows that this rank contributes to; ``device`` is the buffers'."""
        self.table = table
        self.device = device
        self.compile = compile
        self.pieces = [self._piece(row, watched, region) for row, watched, region in held]

    def _piece(self, at: int, watched: Watched, region: Region) -> Piece:
        param = watched.ref()
        device = self.device if param is None else real(param).device
        row = self.table.rows[at]
        chosen = _chosen(row.shape, region, self.table.sample, device)
        slots = tracked = None
        if at in self.table.slots:
            slots = (self.table.slots[at] + region.global_positions()).to(self.device)
        if row.tracked is not None:
            index, local = region.find(row.tracked)
            first = (self.table.tracked[at] + index).to(self.device)
            tracked = local.to(device), first, len(row.tracked)
        quantile = chosen[1] if at in self.table.binned else None
        return Piece(at, watched, region, chosen[0], quantile, slots, tracked)

    def before(self, optimizer: torch.optim.Optimizer, *, closure: bool = False) -> Kept:
        """Keep what cannot be told after the step; with a closure there is no gradient yet."""
        kept = Kept()
        for piece in self.pieces:
            w = piece.watched
            param = w.ref()
            if param is None or not (param.requires_grad or param.grad is not None):
                continue
            remember(w, param, optimizer, piece.row, kept.scalars, kept.errors)
            flat = real(param)
            kept.samples[piece.row] = positions(flat, piece.check).clone()
            if piece.tracked is not None:
                kept.tracked[piece.row] = positions(flat, piece.tracked[0])
            grad = param.grad
            partial = any(each.is_partial() for each in getattr(grad, "placements", ()))
            if (
                grad is not None
                and not closure
                and not (grad.is_sparse or partial)
                and may_overwrite(w, optimizer)
            ):
                where = None if piece.tracked is None else piece.tracked[0]
                kept.grads[piece.row] = gradient_before(real(grad), piece.check, where)
        return kept

    def after(
        self,
        optimizer: torch.optim.Optimizer,
        kept: Kept,
        grads: Mapping[int, Tensor | None] | None = None,
    ) -> Buffers:
        """The figures of the step that has just been taken.

        Args:
            optimizer: which took it.
            kept: what ``before`` kept.
            grads: id of a parameter to the gradient that stands in for its own; None: unknown.
        """
        taken = _Taken(self, optimizer, kept, grads or {})
        return taken.buffers


class _Taken:
    """Fills the buffers for one step."""

    def __init__(
        self,
        share: Share,
        optimizer: torch.optim.Optimizer,
        kept: Kept,
        grads: Mapping[int, Tensor | None],
    ) -> None:
        self.share, self.kept, self.device = share, kept, share.device
        self.table = share.table
        self.buffers = self.table.blank(share.device)
        found_inf = copied(getattr(optimizer, "found_inf", None))
        scale = copied(getattr(optimizer, "grad_scale", None))
        self.used = torch.ones((), dtype=torch.float64, device=self.device)
        """1, or 0 where a fused optimizer skipped the step for the gradient scaler."""
        if found_inf is not None:
            self.used = (torch.as_tensor(found_inf).reshape(()) == 0).to(self.used)
        self.scale = torch.ones_like(self.used)
        if scale is not None:
            self.scale = torch.as_tensor(scale).reshape(()).to(self.used)
        self.rates: list[tuple[int, Scalar | None, Scalar | None]] = []
        """Row, the group's lr and the initial one."""
        self.without: list[tuple[Piece, Tensor]] = []
        """Without a gradient, and Σθ²."""
        self.rows: list[int] = []
        self.maxima: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.slots: list[tuple[Tensor, Tensor]] = []
        self.counted: list[tuple[int, Tensor]] = []
        batches: dict[Any, list[tuple[Piece, Entry]]] = defaultdict(list)
        for piece in share.pieces:
            self._sort(piece, optimizer, grads, batches)
        for batch in batches.values():
            group = optimizer.param_groups[batch[0][0].watched.group]
            width = max(min(batch[0][0].region.numel, WHOLE), 1)
            most = max(1, block_size(torch.float64) // width)
            for start in range(0, len(batch), most):
                self._batch(batch[start : start + most], group)
        if self.without:
            pieces, squares = zip(*self.without, strict=True)
            shape = (len(pieces), len(PARTS))
            parts = torch.zeros(shape, dtype=torch.float64, device=self.device)
            parts[:, PARTS.index("pp")] = torch.stack(squares)
            self._add(pieces, parts, None, with_grad=False)
        self._fill()

    def _sort(
        self,
        piece: Piece,
        optimizer: torch.optim.Optimizer,
        grads: Mapping[int, Tensor | None],
        batches: dict[Any, list[tuple[Piece, Entry]]],
    ) -> None:
        w = piece.watched
        param = w.ref()
        if param is None:
            return
        lr = optimizer.param_groups[w.group].get("lr")
        self.rates.append((piece.row, lr, w.initial_lr))
        grad = grads.get(id(param), param.grad)
        if grad is None or piece.row not in self.kept.samples:
            self.without.append((piece, figures.square_sum(real(param)).to(self.device)))
            return
        state = optimizer.state.get(param, {})
        extra = self.kept.scalars.get(piece.row, {})
        entry = entry_of(param, state, extra, grad)
        small = piece.region.numel <= WHOLE
        names = tuple(k for k, v in state.items() if v is not None)
        batches[
            w.group,
            None if piece.row in self.kept.errors else w.rule,
            piece.region.numel if small else None,
            len(self.kept.samples[piece.row]),
            piece.slots is None,
            param.dtype,
            entry.param.device,
            names,
            isinstance(entry.grad, SparseRows),
            entry.param.dim() if names else 0,
        ].append((piece, entry))

    def _batch(self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any]) -> None:
        pieces = [piece for piece, _ in batch]
        rule = None if pieces[0].row in self.kept.errors else pieces[0].watched.rule
        if pieces[0].region.numel == 0:
            self._empty(batch, group, rule)
            return
        if rule is not None:
            marks = len(self.rows), len(self.slots), len(self.counted)
            try:
                self._reconstructed(batch, group, rule)
            except torch.OutOfMemoryError:  # which is no fault of the rule's
                raise
            except Exception as error:  # noqa: BLE001 - a rule must never stop a training
                self.kept.errors.update({piece.row: cause(error) for piece in pieces})
                del self.rows[marks[0] :], self.slots[marks[1] :], self.counted[marks[2] :]
                count = sum(len(t) for t in self.sums) - marks[0]
                while count > 0:
                    count -= len(self.sums.pop())
                    self.maxima.pop()
            else:
                return
        self._measured(batch, group)

    def _reconstructed(
        self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any], rule: Rule
    ) -> None:
        pieces = [piece for piece, _ in batch]
        entries = [entry for _, entry in batch]
        for entry in entries:
            whole_of(entry, group, rule)
        old = torch.stack([self.kept.samples[piece.row] for piece in pieces])
        if pieces[0].region.numel <= WHOLE:
            parts, checks = self._small(batch, group, rule, old)
        else:
            # A function's, so that what it makes is gone while large parameters are read.
            checks = _checks(batch, group, rule, old)[0]
            parts = torch.cat([self._large(piece, entry, group, rule) for piece, entry in batch])
        if pieces[0].slots is None:
            for piece, entry in batch:
                self._sampled_rates(piece, entry, group, rule)
        self._tracked(batch, group, rule)
        self._add(pieces, as_given(parts, [self.kept.grads.get(p.row) for p in pieces]), checks)

    def _small(
        self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any], rule: Rule, old: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """PARTS and CHECKS of what is here of small parameters, whose rates are put in place."""
        entries = [entry for _, entry in batch]
        checks, s, update = _checks(batch, group, rule, old)
        if update is None or batch[0][0].check is not None:
            s = Slice(entries, group, take_rows([None] * len(batch), torch.float64))
            update = rule.update(s)
        states = list(figures.state_like(entries[0]))
        if batch[0][0].slots is not None:
            rates = _expanded(update.effective_lr, s.param)
            for (piece, _), row in zip(batch, rates, strict=True):
                self._put(piece.slots, row)
        return row_figures(s, update, states, Lines.of(entries)), checks

    def _large(self, piece: Piece, entry: Entry, group: Mapping[str, Any], rule: Rule) -> Tensor:
        """Figures of what is here of a large parameter: (1, PARTS)."""
        sample, numel = self.table.sample, self.table.rows[piece.row].numel
        if sample is not None and sample < numel:  # its share of what is sampled
            sample = max(1, -(-sample * piece.region.numel // numel))
        some = spread(piece.region.numel, WHOLE, entry.param.device)
        s = Slice([entry], group, take_rows([some], torch.float64))
        rate = rule.update(s).effective_lr
        pivot = None if figures.is_scalar(rate, s.param) else [torch.as_tensor(rate).mean()]
        compiled = self.share.compile
        (found,) = large_figures([entry], group, rule, pivot, sample=sample, compile=compiled)
        return found.parts

    def _sampled_rates(
        self, piece: Piece, entry: Entry, group: Mapping[str, Any], rule: Rule
    ) -> None:
        if piece.quantile is None or not len(piece.quantile):
            return
        s = Slice([entry], group, take_rows([piece.quantile], precision(entry.param)))
        rate = rule.update(s).effective_lr
        if isinstance(rate, Tensor) and not figures.is_scalar(rate, s.param):
            # (One rate for all elements is told by its extremes.)
            self.counted.append((self.table.binned[piece.row], rate.reshape(-1).to(self.device)))

    def _measured(self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any]) -> None:
        pieces = [piece for piece, _ in batch]
        entries = [entry for _, entry in batch]
        old = torch.stack([self.kept.samples[piece.row] for piece in pieces])
        s = Slice(entries, group, take_rows([p.check for p in pieces], torch.float64))
        known = [self.kept.grads.get(piece.row) for piece in pieces]
        parts, checks, rates = measured_rows(s, entries, old, known)
        for piece, row in zip(pieces, rates, strict=True):
            if piece.slots is not None:
                self._put(piece.slots, row)
            elif len(row):
                self.counted.append((self.table.binned[piece.row], row.to(self.device)))
        self._tracked(batch, group, None)
        self._add(pieces, parts, checks)

    def _empty(
        self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any], rule: Rule | None
    ) -> None:
        pieces = [piece for piece, _ in batch]
        whole = all(piece.region.whole for piece in pieces)  # else another rank knows its decay
        rows = empty_rows([(0, entry) for _, entry in batch], group, rule if whole else None)
        parts = torch.zeros((len(batch), len(PARTS)), dtype=torch.float64, device=self.device)
        if rows.parts is not None:
            parts[:, PARTS.index("decay")] = rows.parts[:, PARTS.index("decay")].to(self.device)
        self._add(pieces, parts, None)

    def _tracked(
        self, batch: list[tuple[Piece, Entry]], group: Mapping[str, Any], rule: Rule | None
    ) -> None:
        for piece, entry in batch:
            if piece.tracked is None or not len(piece.tracked[0]):
                continue
            where, first, count = piece.tracked
            old = self.kept.tracked[piece.row].double().unsqueeze(0)
            s = Slice([entry], group, take_rows([where], torch.float64), old)
            found = tracked_figures(s, rule, old, [self.kept.grads.get(piece.row)])
            for at, values in enumerate(found):
                self._put(first + at * count, values.reshape(-1))

    def _put(self, slots: Tensor | None, values: Tensor) -> None:
        if slots is not None:
            self.slots.append((slots, values.double().to(self.device)))

    def _add(
        self,
        pieces: Sequence[Piece],
        parts: Tensor,
        checks: Tensor | None,
        *,
        with_grad: bool = True,
    ) -> None:
        """Columns of some rows, from ``PARTS`` and ``CHECKS`` of what is here."""
        parts = parts.to(self.device)
        part = dict(zip(PARTS, parts.T, strict=True))
        nothing, one = torch.zeros_like(part["pp"]), torch.ones_like(part["pp"])
        numel = torch.tensor([piece.region.numel for piece in pieces], dtype=torch.float64)
        elements = numel.to(self.device) * with_grad
        moments = _moments(elements, part["rate_mean"], part["rate_m2"])
        values = {
            "elements": elements,
            "stepped": one,
            **{name: torch.where(elements > 0, value, 0.0) for name, value in moments.items()},
            **{name: part[name] for name in _ADDED},
            **dict.fromkeys(CHECKS, nothing),
        }
        if checks is not None:
            values.update(zip(CHECKS, checks.to(self.device).T, strict=True))
        used = (self.used > 0) & with_grad
        unused = (self.used == 0) & with_grad
        # Not by a product, which would let NaN through.
        values = {name: torch.where(used, value, 0.0) for name, value in values.items()}
        values["with_grad"] = one * with_grad
        values["unused_gg"] = torch.where(unused, part["gg"] / self.scale.square(), 0.0)
        values["nonfinite"] += torch.where(unused, part["nonfinite"], 0.0)
        values["pp"] = part["pp"]
        self.rows += [piece.row for piece in pieces]
        self.sums.append(torch.stack([values[name] for name in SUMS], dim=1))
        low, high, decay = part["rate_min"], part["rate_max"], part["decay"]
        has_rate = used & (elements > 0)
        failed = [float(piece.row in self.kept.errors) for piece in pieces]
        highs = {
            "rate_max": torch.where(has_rate & ~high.isnan(), high, -torch.inf),
            "rate_min": torch.where(has_rate & ~low.isnan(), -low, -torch.inf),
            "rate_nan": torch.where(has_rate, (low.isnan() | high.isnan()).double(), -torch.inf),
            "decay": torch.where(used & ~decay.isnan(), decay, -torch.inf),
            "failed": torch.tensor(failed, dtype=torch.float64).to(self.device),
        }
        self.maxima.append(torch.stack([highs[name] for name in _STEP_MAXIMA], dim=1))

    def _fill(self) -> None:
        maxima, sums = self.buffers.maxima, self.buffers.sums
        if self.rows:
            rows = torch.tensor(self.rows).to(self.device, non_blocking=True)
            table = sums[: len(self.table.rows) * len(SUMS)].view(-1, len(SUMS))
            table.index_copy_(0, rows, torch.cat(self.sums))
            columns = torch.tensor([MAXIMA.index(name) for name in _STEP_MAXIMA])
            maxima[rows.unsqueeze(1), columns.to(self.device)] = torch.cat(self.maxima)
        self._fill_rates(maxima)
        if self.slots:
            slots, values = zip(*self.slots, strict=True)
            sums.index_copy_(0, torch.cat(slots), torch.cat(values))
        if self.counted:
            rates = torch.cat([rates.double() for _, rates in self.counted])
            sizes = torch.tensor([len(rates) for _, rates in self.counted])
            row = torch.tensor([number for number, _ in self.counted]).repeat_interleave(sizes)
            self.table.count(sums, row.to(self.device), rates, self.used.expand(len(rates)))

    def _fill_rates(self, maxima: Tensor) -> None:
        for name, at in (("lr", 1), ("initial_lr", 2)):
            column = maxima[:, MAXIMA.index(name)]
            given = [(each[0], each[at]) for each in self.rates]
            known = [(row, x) for row, x in given if not isinstance(x, Tensor | None)]
            if known:  # numbers cross to the device together
                rows, numbers = zip(*known, strict=True)
                values = torch.tensor(numbers, dtype=torch.float64).to(self.device)
                column[torch.tensor(rows).to(self.device)] = torch.where(
                    values.isnan(), -torch.inf, values
                )
            for row, x in given:
                if isinstance(x, Tensor):
                    number = x.detach().reshape(()).to(column)
                    column[row] = torch.where(number.isnan(), -torch.inf, number)


_FEW_BITS = -1 << 42  # sign, exponent and the first 10 of 52 bits of a float64
_STEP_MAXIMA = ("rate_max", "rate_min", "rate_nan", "decay", "failed")
"""Those that are known after the step, batch by batch."""


def _moments(n: Tensor, mean: Tensor, m2: Tensor) -> dict[str, Tensor]:
    """Sums from which the variance over all ranks follows without cancellation.

    A mean is a + d, a being its first 11 bits. Where all ranks have nearly the same mean,
    which is where Σ(mean_r − mean)² cancels, they have the same a, and n·a² is exact.
    """
    a = torch.where(mean.isfinite(), mean, 0.0).contiguous()
    a = (a.view(torch.int64) & _FEW_BITS).view(torch.float64)
    n_a, n_d = n * a, n * (mean - a)
    return {
        "n_a": n_a,
        "n_aa": a * n_a,
        "n_d": n_d,
        "n_ad": a * n_d,
        "m2": m2 + n * (mean - a).square(),
    }


def _few_bits(values: Floats) -> Floats:
    return (values.view(np.int64) & _FEW_BITS).view(np.float64)


def _known(values: Floats, nothing: float = -math.inf) -> Floats:
    return np.where(values == nothing, np.nan, values)


def _checks(
    batch: list[tuple[Piece, Entry]], group: Mapping[str, Any], rule: Rule, old: Tensor
) -> tuple[Tensor | None, Slice, Update | None]:
    """CHECKS of the samples, and what they are of; None where no element of them is here."""
    entries = [entry for _, entry in batch]
    # What was kept for the check is at hand for a coupled decay, which else is solved for.
    sampled = take_rows([piece.check for piece, _ in batch], torch.float64)
    s = Slice(entries, group, sampled, old)
    if not old.shape[1]:
        return None, s, None
    update = rule.update(s)
    return figures.check_figures(s, update, old), s, update


def _expanded(rate: Scalar, like: Tensor) -> Tensor:
    """The rate of every element: (rows, n)."""
    if isinstance(rate, Tensor) and rate.shape == like.shape:
        return rate
    return column(rate, like).unsqueeze(1).expand(like.shape)


def _quantile_positions(shape: Sequence[int], sample: int | None) -> Positions:
    """Those of the elements that are sorted into the histogram; None for all."""
    numel = math.prod(shape)
    if sample is not None and sample < numel and numel > WHOLE:
        return spread(numel, sample, torch.device("cpu"))
    stride = stride_for(numel, shape[-1] if shape else 1)
    return None if stride == 1 else torch.arange(0, numel, stride)


def _quantile_count(shape: Sequence[int], sample: int | None) -> int:
    where = _quantile_positions(shape, sample)
    return math.prod(shape) if where is None else len(where)


@lru_cache(maxsize=512)
def _chosen(
    shape: tuple[int, ...], region: Region, sample: int | None, device: torch.device
) -> tuple[Positions, Tensor]:
    """Local positions of the check sample (None: all), and of the elements in the histogram."""
    numel = math.prod(shape)
    check: Positions = None
    if numel > WHOLE:
        check = spread(numel, WHOLE, device)
        if not region.whole:
            check = region.find(spread(numel, WHOLE, torch.device("cpu")).flat())[1].to(device)
    where = _quantile_positions(shape, sample)
    if where is None:
        return check, torch.arange(region.numel).to(device)
    flat = where if isinstance(where, Tensor) else where.flat()
    return check, region.find(flat)[1].to(device)
