"""Sums and extremes over elements, block by block: what the figures of a parameter are made of.

A block is added up by rows of ``ROW`` elements, in its own precision; the rows of many blocks are
added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Scalar, Slice, Update
from lrprobe.summary.figures import PARTS, ROW, gradient, is_scalar, scalar

_NORMS = ("dd", "ee", "uu", "pp", "gg", "rate_m2")
"""Squares, of which a row has the root."""
_SUMS = ("ug", "rate_away", "rate_log", "zeros", "rms_grad", "rms_update", "below_eps", "nonfinite")
_STATE = "sum of "
_PER_OCTAVE = 64


class Sums:
    """Figures of blocks of one parameter, or of one block of several parameters."""

    def __init__(self, states: Sequence[str], *, exact: bool, owners: int = 1) -> None:
        """Set up for blocks that are to come.

        Args:
            states: names of the state entries that are looked through for what is not finite.
            exact: count what is not finite (which is for float64); else a sum that NaN or inf
                spoils shows it.
            owners: parameters in a block, each with as many elements of it.
        """
        self._states, self._exact, self._owners = states, exact, owners
        self._block: _Block | None = None
        self._totals: list[dict[str, Tensor]] = []
        self._decay: Tensor | None = None

    def add(self, s: Slice, update: Update, pivot: Tensor | None) -> None:
        """Take a block: (n,), or (owners, n).

        Args:
            s: its elements.
            update: what the rule says of them; the decay is that of the first block.
            pivot: in the elements' dtype, a value among the rates of each owner: 0-dim, or
                (owners, 1); None where each owner's elements share a rate.
        """
        p = s.param
        block = self._block
        if block is None or not block.fits(p):
            self._finish_block()
            block = self._block = _Block(p, self._owners, self._states, exact=self._exact)
            self._decay = _decay_of(update, p)
        g, d = cast_to(gradient(s, update), p), cast_to(update.direction, p)
        # What was written last is read next, while it is in cache.
        for name, values in (("rms_grad", update.rms_grad), ("rms_update", update.rms_update)):
            if values is not None:
                block.sum(name, cast_to(values, p))
        if update.eps is not None:
            block.count_below("below_eps", *update.eps)
        rate: Any = update.effective_lr
        if pivot is None:
            rate = scalar(rate, p).to(p.dtype)
        else:
            rate = cast_to(rate, p)
            block.rates(rate, pivot)
        block.norm("dd", d)
        u = block.step(rate, d, p, self._decay)
        block.sum("ug", torch.mul(u, g, out=block.room))
        block.norm("pp", p)
        block.norm("gg", g)
        # A comparison into floats, and their sum, takes half the time of ``count_nonzero``.
        block.sum("zeros", torch.eq(g, 0, out=block.room))
        if self._exact:
            bad = ~(torch.isfinite(p) & torch.isfinite(g))
            for name in self._states:
                bad |= ~torch.isfinite(s[name])
            block.sum("nonfinite", bad.to(p.dtype))
        else:
            for name in self._states:
                block.sum(_STATE + name, cast_to(s[name], p))
        block.collect()

    def totals(self) -> dict[str, Tensor]:
        """Name of each figure to its sum, or extreme: (owners,), float64; empty without blocks."""
        self._finish_block()
        found = self._totals[0] if self._totals else {}
        for other in self._totals[1:]:
            found = together(found, other)
        return found

    def _finish_block(self) -> None:
        if self._block is not None:
            self._totals.append(self._block.totals())
            self._block = None


class _Block:
    """Blocks of one size, seen as rows: figures of the newest, and what they add up to."""

    def __init__(self, like: Tensor, owners: int, states: Sequence[str], *, exact: bool) -> None:
        self._like = like.shape
        self._owners = owners
        self._short = like.shape[-1] % ROW == 0
        self._shape = (-1, ROW) if self._short else (owners, -1)
        self._on_host = like.device.type == "cpu"
        self._states = [] if exact else [_STATE + name for name in states]
        self._layout = (*_NORMS, *_SUMS, *self._states, "rate_min", "rate_max")
        rows = like.numel() // ROW if self._short else owners
        self.room = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._newest = like.new_zeros((len(self._layout), rows))
        self._slots = dict(zip(self._layout, self._newest.unbind(), strict=True))
        self._total = torch.zeros_like(self._newest[:-2], dtype=torch.float64)
        self._extremes: tuple[Tensor, Tensor] | None = None
        self._used: set[str] = set()

    def fits(self, like: Tensor) -> bool:
        """Whether a block has the size of these."""
        return like.shape == self._like

    def sum(self, name: str, values: Tensor) -> None:
        """Σ x of each row."""
        self._used.add(name)
        torch.sum(values.view(self._shape), 1, out=self._slots[name])

    def norm(self, name: str, values: Tensor) -> None:
        """√Σ x² of each row."""
        self._used.add(name)
        slot = self._slots[name]
        if self._short:
            torch.linalg.vector_norm(values.view(self._shape), dim=1, out=slot)
        else:
            torch.sum(values.square().view(self._shape), 1, out=slot).sqrt_()

    def rates(self, rate: Tensor, pivot: Tensor) -> None:
        """Figures of rates that differ."""
        rows = rate.view(self._shape)
        self._used |= {"rate_min", "rate_max"}
        torch.amin(rows, 1, out=self._slots["rate_min"])
        torch.amax(rows, 1, out=self._slots["rate_max"])
        if rate.dtype == torch.float64:
            self.sum("rate_log", rate.log())
        else:  # the sum of their bits, of which ``logs`` makes that of their logarithms
            self.sum("rate_log", self.room.copy_(rate.view(torch.int32)))
        # A pivot of 0 stands for rates that differ enough to do without one.
        centered = self._on_host and not pivot.numpy().any()
        deviation = rate if centered else torch.sub(rate, pivot, out=self.room)
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
                self._used.add(name)
                self._slots[name].zero_()
                return
        self.sum(name, torch.le(statistic, eps, out=self.room))

    def collect(self) -> None:
        """Add the figures of the newest block to those before it."""
        self._newest[: len(_NORMS)].square_()
        self._total += self._newest[:-2]
        low, high = self._slots["rate_min"], self._slots["rate_max"]
        if self._extremes is None:
            self._extremes = low.clone(), high.clone()
        else:
            torch.minimum(self._extremes[0], low, out=self._extremes[0])
            torch.maximum(self._extremes[1], high, out=self._extremes[1])

    def totals(self) -> dict[str, Tensor]:
        """As ``Sums.totals``."""
        table = self._total.view(len(self._total), self._owners, -1).sum(2)
        named = dict(zip(self._layout, table.unbind(), strict=False))
        if self._extremes is not None:
            low, high = (each.double().view(self._owners, -1) for each in self._extremes)
            named |= {"rate_min": low.amin(1), "rate_max": high.amax(1)}
        found = {name: named[name] for name in self._layout if name in self._used}
        looked = [found.pop(name) for name in self._states]
        if "nonfinite" not in found:
            found["states"] = sum(looked, torch.zeros_like(table[0]))
        if "ee" in found:  # without a decay they are the same
            found.setdefault("uu", found["ee"])
        return found


def pivots(rates: Tensor) -> Tensor:
    """What to subtract from the rates of each parameter before they are squared: (parameters,).

    It saves the variance of rates that are nearly the same from cancelling out; 0 where they are
    not. ``rates`` is a sample: (parameters, n), float64.
    """
    mean = rates.mean(1)
    return torch.where(rates.std(1) > 0.25 * mean, 0.0, mean)


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
        if type(decay) is Tensor and decay.device.type == "cpu" and not decay.numpy().any():
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


def row_figures(s: Slice, update: Update, states: Sequence[str]) -> Tensor:
    """Figures of all elements of several small parameters, as many of each: (rows, PARTS).

    Args:
        s: the elements: (rows, n), float64.
        update: what the rule says of them.
        states: names of state entries of theirs.
    """
    p = s.param
    owners, n = p.shape
    rate: Any = update.effective_lr
    one = is_scalar(rate, p)
    pivot = None if one else rate.mean(1, keepdim=True)
    sums = Sums(states, exact=True, owners=owners)
    sums.add(s, update, pivot)
    numel = p.new_full((owners,), n)
    center = column(rate, p) if pivot is None else pivot[:, 0]
    return finished(sums.totals(), numel, column(update.decay, p), center, None)


def column(value: Scalar, like: Tensor) -> Tensor:
    """A scalar of an update as float64, one value a row of ``like``: (rows,)."""
    return scalar(value, like).reshape(-1).expand(like.shape[0])


def logs(bits: Tensor, n: Tensor, counts: Tensor) -> Tensor:
    """Σ log of n positive float32 values to 0.3 %, given the sum of their bits: (rows,), float64.

    The bits are 2²³ · (log₂ + 127), linear between powers of two: a logarithm for the price of a
    conversion. Each is up to 0.086 octaves too small; how much on average, the fine histogram
    ``counts`` (rows, BINS) tells to 0.0035.
    """
    within = counts.view(len(counts), -1, _PER_OCTAVE).sum(1).double()
    share = torch.arange(_PER_OCTAVE, dtype=torch.float64, device=counts.device)
    share = (share + 0.5) / _PER_OCTAVE
    correction = within @ ((1 + share).log2() - share) / within.sum(1)
    return (bits * 2.0**-23 + n * (correction - 127.0)) * math.log(2)
