"""Sums and extremes over elements, block by block: what the figures of a parameter are made of.

A block is added up by rows of at most ``ROW`` elements, where its size can be cut into such, in its
own precision; the rows of many blocks are added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Scalar, Slice, Update
from lrprobe.summary.figures import PARTS, PER_OCTAVE, ROW, gradient, is_scalar, scalar
from lrprobe.summary.histogram import Counts, listed
from lrprobe.summary.reading import Lines

_NORMS = ("dd", "ee", "uu", "pp", "gg", "rate_m2")
"""Squares, of which a row has the root."""
_SUMS = ("ug", "rate_away", "rate_log", "zeros", "rms_grad", "rms_update", "below_eps", "nonfinite")
_STATE = "sum of "
DEPTH = 16
"""Blocks whose rows are kept before they are added up, which takes as long for many as for one."""


class Sums:
    """Figures of blocks of one parameter, or of one block of several, then of the next."""

    def __init__(self, states: Sequence[str], *, exact: bool) -> None:
        """Set up for blocks that are to come.

        Args:
            states: names of the state entries that are looked through for what is not finite.
            exact: count what is not finite (which is for float64); else a sum that NaN or inf
                spoils shows it.
        """
        self._states, self._exact = states, exact
        self._tables: dict[torch.Size, _Table] = {}
        self._decay: Tensor | None = None

    def add(self, s: Slice, update: Update, pivot: Tensor | None) -> None:
        """Take a block: (n,), or (owners, n) of as many parameters.

        Args:
            s: its elements.
            update: what the rule says of them; the decay is that of the first block.
            pivot: what is taken from rates that differ before they are squared, in the elements'
                dtype: 0-dim, or (owners, 1); None for nothing.
        """
        p = s.param
        if not any(each.used for each in self._tables.values()):
            self._decay = _decay_of(update, p)
        table = self._tables.get(p.shape)
        if table is None:
            table = _Table(p, self._states, exact=self._exact)
            self._tables[p.shape] = table
        table.begin()
        g, d = cast_to(gradient(s, update), p), cast_to(update.direction, p)
        # What was written last is read next, while it is in cache.
        for name, values in (("rms_grad", update.rms_grad), ("rms_update", update.rms_update)):
            if values is not None:
                table.sum(name, cast_to(values.expand(p.shape), p))
        if update.eps is not None:
            statistic, eps = update.eps
            table.count_below("below_eps", statistic.expand(p.shape), eps)
        rate: Any = update.effective_lr
        if is_scalar(rate, p):
            rate = scalar(rate, p).to(p.dtype)
        else:
            rate = cast_to(rate, p)
            table.rates(rate, pivot)
        table.norm("dd", d)
        u = table.step(rate, d, p, self._decay)
        table.sum("ug", torch.mul(u, g, out=table.room))
        table.norm("pp", p)
        table.norm("gg", g)
        # A comparison into floats, and their sum, takes half the time of ``count_nonzero``.
        table.sum("zeros", torch.eq(g, 0, out=table.room))
        if self._exact:
            table.count_nonfinite("nonfinite", [p, g, *(s[name] for name in self._states)])
        else:
            for name in self._states:
                table.sum(_STATE + name, cast_to(s[name], p))

    def totals(self) -> dict[str, Tensor]:
        """Name of each figure to its sum, or extreme: (owners,), float64; empty without blocks.

        What is added later is another parameter's.
        """
        found: dict[str, Tensor] = {}
        for table in self._tables.values():
            if table.used:
                found = together(found, table.totals())
        # That of the largest blocks serves the next parameter too; so may that of its remainder.
        largest = max(self._tables, key=torch.Size.numel, default=None)
        last = next(reversed(self._tables), None)
        self._tables = {k: v for k, v in self._tables.items() if k in (largest, last)}
        if not found:
            return found
        looked = [found.pop(_STATE + name) for name in self._states if _STATE + name in found]
        if "nonfinite" not in found:
            found["states"] = sum(looked, torch.zeros_like(found["pp"]))
        if "ee" in found:  # without a decay they are the same
            found.setdefault("uu", found["ee"])
        return found


class _Table:
    """Figures of blocks of one size, seen as rows: of the newest blocks, and their total.

    Attributes:
        room: for results that are no longer needed when their figure is taken: (as a block).
        used: names of the figures that were asked for since the last ``totals``.
    """

    def __init__(self, like: Tensor, states: Sequence[str], *, exact: bool) -> None:
        self._owners = len(like) if like.dim() > 1 else 1
        row = _row_length(like.shape[-1])
        self._short = row <= ROW
        self._shape = (-1, row)
        self._on_host = like.device.type == "cpu"
        looked = () if exact else [_STATE + name for name in states]
        self._layout = (*_NORMS, *_SUMS, *looked, "rate_min", "rate_max")
        self._rows = like.numel() // row
        self.room = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.used: set[str] = set()
        self._newest: list[Tensor] = []
        self._slots: list[dict[str, Tensor]] = []
        self._filled = 0
        self._total: list[Tensor] = []

    def begin(self) -> None:
        """Go on to the next block."""
        if self._filled == DEPTH:
            self._collect()
        if self._filled == len(self._newest):
            figures = self.room.new_zeros((len(self._layout), self._rows))
            self._newest.append(figures)
            self._slots.append(dict(zip(self._layout, figures.unbind(), strict=True)))
        self._now = self._slots[self._filled]
        self._filled += 1

    def sum(self, name: str, values: Tensor) -> None:
        """Σ x of each row."""
        self.used.add(name)
        torch.sum(values.view(self._shape), 1, out=self._now[name])

    def norm(self, name: str, values: Tensor) -> None:
        """√Σ x² of each row."""
        self.used.add(name)
        slot = self._now[name]
        if self._short:
            torch.linalg.vector_norm(values.view(self._shape), dim=1, out=slot)
        else:
            torch.sum(values.square().view(self._shape), 1, out=slot).sqrt_()

    def rates(self, rate: Tensor, pivot: Tensor | None) -> None:
        """Figures of rates that differ."""
        rows = rate.view(self._shape)
        self.used |= {"rate_min", "rate_max"}
        torch.amin(rows, 1, out=self._now["rate_min"])
        torch.amax(rows, 1, out=self._now["rate_max"])
        if rate.dtype == torch.float64:
            self.sum("rate_log", rate.log())
        else:  # the sum of their bits, of which ``logs`` makes that of their logarithms
            self.sum("rate_log", self.room.copy_(rate.view(torch.int32)))
        deviation = rate if pivot is None else torch.sub(rate, pivot, out=self.room)
        self.sum("rate_away", deviation)
        self.norm("rate_m2", deviation)

    def step(self, rate: Tensor, direction: Tensor, param: Tensor, decay: Tensor | None) -> Tensor:
        """What is subtracted from the parameter, but for 1 − decay, and its norm.

        One rate for all is a factor that is left out where there is no decay beside it.
        """
        if decay is None and rate.shape != param.shape:
            return direction
        moved = torch.mul(direction, rate, out=self.room)
        if rate.shape == param.shape:
            self.norm("ee", moved)
        if decay is not None:
            torch.addcmul(moved, param, decay, out=moved)
            self.norm("uu", moved)
        return moved

    def count_below(self, name: str, statistic: Tensor, eps: Scalar) -> None:
        """How many of each row are at most ε."""
        # Mostly none is: on the host a look at the least saves the count.
        if self._on_host and not isinstance(eps, Tensor):
            low = torch.amin(statistic.reshape(self._shape), 1)
            if low.numpy().min() > eps:
                self.used.add(name)
                self._now[name].zero_()
                return
        self.sum(name, torch.le(statistic, eps, out=self.room))

    def count_nonfinite(self, name: str, tensors: Sequence[Tensor]) -> None:
        """How many elements of each row are not finite in one of the tensors."""
        if self._on_host and all(math.isfinite(each.sum().numpy()) for each in tensors):
            self.used.add(name)
            self._now[name].zero_()
            return
        finite = torch.isfinite(tensors[0])
        for each in tensors[1:]:
            finite &= torch.isfinite(each)
        self.sum(name, finite.logical_not().to(self.room.dtype))

    def totals(self) -> dict[str, Tensor]:
        """Name of each figure to its sum, or extreme: (owners,), float64."""
        self._collect()
        table = torch.stack(self._total)
        self._total = []
        sums = table[:, :-2].sum(0).unbind()
        found = dict(zip(self._layout, sums, strict=False))
        found |= {"rate_min": table[:, -2].amin(0), "rate_max": table[:, -1].amax(0)}
        found = {name: found[name] for name in self._layout if name in self.used}
        self.used = set()
        return found

    def _collect(self) -> None:
        """Add up the figures of the newest blocks: (figures, owners), float64."""
        newest = torch.stack(self._newest[: self._filled])
        self._filled = 0
        newest[:, : len(_NORMS)].square_()
        newest = newest.double().view(*newest.shape[:2], self._owners, -1)
        low, high = newest[:, -2].amin((0, 2)), newest[:, -1].amax((0, 2))
        self._total.append(torch.cat([newest[:, :-2].sum((0, 3)), torch.stack([low, high])]))


@lru_cache(maxsize=256)
def _row_length(n: int) -> int:
    """At most ``ROW``, and not much less, where n has such a divisor; else n."""
    if n <= ROW:
        return max(n, 1)
    return next((length for length in range(ROW, ROW // 8, -1) if n % length == 0), n)


def pivots(rates: Tensor) -> Tensor:
    """What to subtract from the rates of each parameter before they are squared: (parameters,).

    It saves the variance of rates that are nearly the same from cancelling out; 0 where they are
    not. ``rates`` is a sample: (parameters, n), float64.
    """
    mean = rates.mean(1)
    # (`Tensor.std` takes several times as long.)
    deviation = torch.linalg.vector_norm(rates - mean.unsqueeze(1), dim=1) / rates.shape[1] ** 0.5
    return torch.where(deviation > 0.25 * mean, 0.0, mean)


def unless_zero(pivot: Tensor) -> Tensor | None:
    """A pivot; None where it takes nothing away (a device is not asked)."""
    return pivot if pivot.device.type != "cpu" or pivot.numpy().any() else None


def together(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Totals of two parts of a parameter to those of both."""
    result = first | second
    for name in first.keys() & second.keys():
        pair = torch.stack([first[name], second[name]])
        result[name] = _EXTREMES.get(name, Tensor.sum)(pair, 0)
    return result


_EXTREMES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rate_min": Tensor.amin,
    "rate_max": Tensor.amax,
}


def cast_to(values: Tensor, like: Tensor) -> Tensor:
    """In memory order and the dtype of another tensor."""
    if values.dtype is not like.dtype:
        values = values.to(like.dtype)
    return values.contiguous()


def _decay_of(update: Update, like: Tensor) -> Tensor | None:
    """The decoupled decay in the dtype of ``like``; None where it is 0 (a device is not asked)."""
    decay = update.decay
    if isinstance(decay, Tensor):
        if (
            type(decay) is Tensor
            and decay.device.type == "cpu"
            and not decay.double().numpy().any()
        ):
            return None
    elif decay == 0:
        return None
    return scalar(decay, like).to(like.dtype)


def finished(
    found: dict[str, Tensor],
    numel: Tensor,
    decay: Tensor,
    pivot: Tensor,
    counts: Tensor | None,
) -> Tensor:
    """PARTS of parameters: (parameters, PARTS), float64.

    Args:
        found: ``Sums.totals`` of them.
        numel: elements that they are of.
        decay: the decoupled decay.
        pivot: what was taken from the rates before they were added up, or the one rate of all.
        counts: fine histograms of the rates, where ``rate_log`` is of their bits.
    """
    nothing, absent = torch.zeros_like(numel), torch.full_like(numel, torch.nan)
    if "rate_min" in found:
        # Σ(x−c) and Σ(x−c)² to mean and Σ(x−mean)².
        low, high, away = found["rate_min"], found["rate_max"], found["rate_away"]
        shift = away / numel
        found["rate_m2"] = (found["rate_m2"] - shift * away).clamp(min=0)
        found["rate_mean"] = torch.where(high.isinf(), high, (pivot + shift).clamp(low, high))
        if counts is not None:
            found["rate_log"] = logs(found["rate_log"], numel, counts)
    else:  # one rate for all
        found |= dict.fromkeys(("rate_mean", "rate_min", "rate_max"), pivot)
        found["rate_m2"], found["rate_log"] = nothing, numel * pivot.log()
        found["ee"] = pivot * pivot * found["dd"]
        if "uu" not in found:
            found["uu"], found["ug"] = found["ee"], pivot * found["ug"]
    found["decay"] = decay
    # u = effective_lr ⊙ direction + decay · θ_after, and Δθ = −u/(1 − decay).
    found["uu"] = found["uu"] / (1 - decay).square()
    found["ug"] = found["ug"] / (1 - decay)
    if "nonfinite" not in found:
        # 0, or NaN where a state is not finite; the rest shows in its products.
        found["nonfinite"] = found["states"] * 0
    return torch.stack([found.get(name, absent) for name in PARTS], dim=1)


def all_finished(
    totals: Sequence[dict[str, Tensor]], n: Tensor, counts: Sequence[Counts] | None
) -> Tensor:
    """PARTS of parameters that were read one after the other: (parameters, PARTS), float64.

    Args:
        totals: ``Sums.totals`` of some of them, with their ``decay`` and ``pivot``, then of the
            next ones. What one rule says of some may lack what it says of others.
        n: elements that they are of.
        counts: as for ``finished``, of each of the totals.
    """
    figures, end = [], 0
    for _, run in groupby(range(len(totals)), lambda i: totals[i].keys()):
        at = list(run)
        found = {k: torch.cat([totals[i][k] for i in at]) for k in totals[at[0]]}
        decay, pivot = found.pop("decay"), found.pop("pivot")
        start, end = end, end + len(pivot)
        table = None if counts is None else listed([counts[i] for i in at]).table
        figures.append(finished(found, n[start:end], decay, pivot, table))
    return torch.cat(figures)


def row_figures(s: Slice, update: Update, states: Sequence[str], lines: Lines) -> Tensor:
    """Figures of all elements of several small parameters: (parameters, PARTS).

    Args:
        s: the elements: (lines, n), float64.
        update: what the rule says of them.
        states: names of state entries of theirs.
        lines: whose they are.
    """
    p = s.param
    rate: Any = update.effective_lr
    if is_scalar(rate, p):
        pivot, center = None, lines.owned(column(rate, p), Tensor.amin)
    else:
        center = lines.owned(rate.mean(1), Tensor.mean)
        pivot = lines.spread(center).unsqueeze(1)
    sums = Sums(states, exact=True)
    sums.add(s, update, pivot)
    found = owned(sums.totals(), lines)
    numel = lines.owned(p.new_full(p.shape[:1], p.shape[1]))
    decay = lines.owned(column(update.decay, p), Tensor.amin)
    return finished(found, numel, decay, center, None)


def owned(found: dict[str, Tensor], lines: Lines) -> dict[str, Tensor]:
    """Totals of lines, by name, to those of their owners."""
    if lines.uncut:
        return found
    extremes = {k: lines.owned(found[k], how) for k, how in _EXTREMES.items() if k in found}
    added = {k: v for k, v in found.items() if k not in extremes}
    table = lines.owned(torch.stack(list(added.values()), 1))
    return dict(zip(added, table.unbind(1), strict=True)) | extremes


def column(value: Scalar, like: Tensor) -> Tensor:
    """A scalar of an update as float64, one value a row of ``like``: (rows,)."""
    return scalar(value, like).reshape(-1).expand(like.shape[0])


def logs(bits: Tensor, n: Tensor, counts: Tensor) -> Tensor:
    """Σ log of n positive float32 values to 0.3 %, given the sum of their bits: (rows,), float64.

    The bits are 2²³ · (log₂ + 127), linear between powers of two: a logarithm for the price of a
    conversion. Each is up to 0.086 octaves too small; how much on average, the fine histogram
    ``counts`` (rows, whole octaves of bins) tells to 0.0035.
    """
    within = counts.view(len(counts), -1, PER_OCTAVE).sum(1).double()
    share = torch.arange(PER_OCTAVE, dtype=torch.float64, device=counts.device)
    share = (share + 0.5) / PER_OCTAVE
    correction = within @ ((1 + share).log2() - share) / within.sum(1)
    return (bits * 2.0**-23 + n * (correction - 127.0)) * math.log(2)
