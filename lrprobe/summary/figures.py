"""Tensors to additive figures, on the device: nothing here reads a value on the host.

A row of figures belongs to one parameter; its columns are ``PARTS``. All of them are sums, extremes
or a mean with its squared deviations, so that rows of shards, modules and groups merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Scalar, Slice, SparseRows, Update, Whole
from lrprobe.summary.fused import COLUMNS, ROWS, kernel_for
from lrprobe.summary.reading import (
    BLOCK,
    Spread,
    blocks,
    precision,
    take_block,
    take_flat,
    take_range,
)

PARTS = (
    "decay",
    "rate_mean",
    "rate_m2",  # Σ(rate − mean)²
    "rate_log",  # Σ log rate
    "rate_min",
    "rate_max",
    "dd",  # sums of products: d direction, e rate ⊙ direction, p parameter after, g gradient
    "ee",
    "ep",
    "eg",
    "pp",
    "pg",
    "gg",
    "zeros",
    "rms_grad",
    "rms_update",
    "below_eps",
    "nonfinite",
)
ADDITIVE = tuple(
    name for name in PARTS if name not in ("decay", "rate_mean", "rate_min", "rate_max")
)
"""Those that are sums over elements."""
CHECKS = (
    "checked",  # elements in the check sample
    "lost",
    "residual",  # Σ of squares, beyond one ulp
    "intended",
    "observed",
    "sample_gg",
    "sample_og",  # Σ observed · gradient
)

BINS = 1 << 14
SHIFT = 17
"""A bin of the fine histogram: the upper 14 bits below the sign of a float32, 64 bins an octave."""
SAMPLE = 1 << 16
"""Elements of a large parameter whose rates are sorted into the fine histogram, at least."""


def column(value: Scalar, like: Tensor) -> Tensor:
    """A scalar of an update as float64, one value a row of ``like`` (0-dim for a flat one)."""
    value = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if like.dim() == 1:
        return value.reshape(())
    return value.reshape(-1).expand(like.shape[0])


def _is_scalar(rate: Scalar, like: Tensor) -> bool:
    return not isinstance(rate, Tensor) or rate.shape != like.shape


def row_figures(s: Slice, update: Update, states: Sequence[Tensor]) -> Tensor:
    """Figures of small parameters that were read whole, in float64: (rows, PARTS)."""
    p, g, d = s.param, s.grad, update.direction
    n = p.shape[1]
    if _is_scalar(update.effective_lr, p):
        rate = column(update.effective_lr, p)
        nothing = torch.zeros_like(rate)
        moments = [rate, nothing, n * rate.log(), rate, rate]
        e = rate.unsqueeze(1) * d
    else:
        rates: Any = update.effective_lr
        mean = rates.mean(1)
        low, high = rates.aminmax(dim=1)
        # A constant must not get a deviation from the rounding of its mean.
        deviation = (rates - mean.clamp(low, high).unsqueeze(1)).square().sum(1)
        moments = [mean.clamp(low, high), deviation, rates.log().sum(1), low, high]
        e = rates * d
    bad = ~(torch.isfinite(p) & torch.isfinite(g))
    for state in states:
        bad |= ~torch.isfinite(state)
    nan = p.new_full((p.shape[0],), torch.nan)
    return torch.stack(
        [
            column(update.decay, p),
            *moments,
            *((a * b).sum(1) for a, b in ((d, d), (e, e), (e, p), (e, g), (p, p), (p, g), (g, g))),
            (g == 0).sum(1),
            nan if update.rms_grad is None else update.rms_grad.sum(1),
            nan if update.rms_update is None else update.rms_update.sum(1),
            nan if update.eps is None else (update.eps[0] <= update.eps[1]).sum(1),
            bad.sum(1),
        ],
        dim=1,
    )


def check_figures(
    s: Slice, update: Update, before: Tensor, after: Tensor, dtype: torch.dtype
) -> Tensor:
    """The update as reconstructed against the one observed, on a sample: (rows, CHECKS).

    Args:
        s: the sample, in float64.
        update: what the rule says of it.
        before: the parameter before the step, in its own dtype: (rows, n).
        after: the same after the step.
        dtype: the parameter's dtype, whose rounding is no error.
    """
    old = before.double()
    change = intended(update, s)
    observed = s.param - old
    # A decay is a rounding more: of the factor 1 − decay, and of its product with θ.
    roundings = 1.0 if isinstance(update.decay, float) and update.decay == 0 else 1.5
    residual = ((change - observed).abs() - roundings * ulp(old, dtype)).clamp(min=0)
    return torch.stack(
        [
            torch.full_like(old[:, 0], old.shape[1]),
            ((change != 0) & (before == after)).sum(1).double(),
            residual.square().sum(1),
            change.square().sum(1),
            observed.square().sum(1),
            s.grad.square().sum(1),
            (observed * s.grad).sum(1),
        ],
        dim=1,
    )


def measured_figures(s: Slice, before: Tensor) -> tuple[Tensor, Tensor]:
    """What can be said without a rule: CHECKS, and |Δθ|/|g| where g ≠ 0 (NaN elsewhere)."""
    observed = s.param - before.double()
    nan = torch.full_like(observed[:, 0], torch.nan)
    checks = torch.stack(
        [
            torch.full_like(nan, observed.shape[1]),
            nan,
            nan,
            nan,
            observed.square().sum(1),
            s.grad.square().sum(1),
            (observed * s.grad).sum(1),
        ],
        dim=1,
    )
    return checks, measured_rates(observed, s.grad)


def measured_rates(observed: Tensor, grad: Tensor) -> Tensor:
    """|Δθ|/|g|, NaN where the gradient is 0."""
    return torch.where(grad == 0, torch.nan, observed.abs() / grad.abs())


def intended(update: Update, s: Slice) -> Tensor:
    """Δθ before any rounding, from the state after the step alone: (as ``s.param``)."""
    moved: Tensor = update.effective_lr * update.direction + update.decay * s.param
    return -moved / (1 - update.decay)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of float64 values to the next one in ``dtype``: (as ``values``)."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    spacing = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    return spacing.clamp(min=info.smallest_normal * info.eps)


def suspicious(parts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows of PARTS whose float32 sums may have overflowed, underflowed or met a NaN: (rows,).

    They are computed again, exactly.
    """
    named = dict(zip(PARTS, parts.T, strict=True))
    optional = ("rms_grad", "rms_update", "below_eps")
    wrong = ~np.isfinite([named[k] for k in PARTS if k not in optional]).all(axis=0)
    for name in optional:
        wrong |= np.isinf(named[name])
    squares = np.array([named[k] for k in ("dd", "ee", "pp", "gg")])
    wrong |= (squares < 1e-24).any(axis=0)
    same = named["rate_min"] == named["rate_max"]
    wrong |= ~same & ((named["rate_min"] < 1e-37) | (named["rate_max"] > 1e37))
    return cast("NDArray[np.bool_]", wrong | (~same & (named["rate_m2"] < 1e-24)))


class Stream:
    """One large parameter, block by block."""

    def __init__(
        self,
        entry: Entry,
        group: Mapping[str, Any],
        rule: Rule,
        *,
        exact: bool,
        sample: Spread | None = None,
        compile: bool = False,  # noqa: A002 - as in `attach`
    ) -> None:
        """``exact`` computes in float64 and counts what is not finite.

        Else a row that float32 may have spoiled comes out ``suspicious``. With ``sample`` the
        figures are estimates from these elements, but for the norms of parameter and gradient.
        """
        self.entry, self.group, self.rule, self.exact = entry, group, rule, exact
        self.sample = sample
        self.compile = compile
        self.dtype = torch.float64 if exact else precision(entry.param)
        self.numel = entry.param.numel()
        self._scratch: Tensor | None = None

    def slices(self, start: int = 0) -> Iterator[Slice]:
        """All of it from a flat position on, in order; or the sample."""
        if self.sample is not None:
            take = take_flat(self.sample, self.dtype)
            yield Slice([self.entry], self.group, take)
            return
        if start:  # what a kernel left over: less than one call of it
            for at in range(start, self.numel, BLOCK):
                take = take_range(at, min(at + BLOCK, self.numel), self.dtype)
                yield Slice([self.entry], self.group, take)
            return
        for block in blocks(self.entry.param.shape):
            yield Slice([self.entry], self.group, take_block(block, self.dtype))

    def figures(self) -> tuple[Tensor, Tensor]:
        """PARTS (1, ·), and the fine histogram of a sample of the rates: (1, BINS), int32."""
        device = self.entry.param.device
        sample = RateSample(self.entry.param, device, None if self.sample is None else 1)
        slots: list[Tensor] = []
        extremes: list[Tensor] = []
        start, decay, pivot = self._fused(sample, slots, extremes)
        names = list(state_like(self.entry))
        for s in self.slices(start):
            update = self.rule.update(s)
            decay = update.decay
            if pivot is None:
                pivot = _pivot(update, s)
            values, extreme = self._block(s, update, pivot, names)
            slots.append(torch.stack(values))
            extremes.append(extreme)
            sample.add(update.effective_lr, start, s.param)
            start += len(s.param)
        sums = torch.stack(slots).double().sum(0)
        low_high = torch.stack(extremes).double()
        pivot64 = column(pivot if pivot is not None else 0.0, sums)
        # Σ(x−c) and Σ(x−c)² to mean and Σ(x−mean)².
        low, high = low_high[:, 0].amin(), low_high[:, 1].amax()
        shift = sums[0] / start
        m2 = (sums[1] - shift * sums[0]).clamp(min=0)
        mean = torch.where(high.isinf(), high, (pivot64 + shift).clamp(low, high))
        log = sums[2]
        if self.dtype is not torch.float64:
            octaves = log * 2.0**-23 + start * (sample.log2_correction() - 127.0)
            log = octaves * math.log(2)
        head = torch.stack([column(decay, sums), mean, m2, log, low, high])
        parts = torch.cat([head, sums[3:]]).unsqueeze(0)
        if self.sample is not None:
            self._scale(parts, self.numel / start)
        return parts, sample.histogram().unsqueeze(0)

    def _fused(
        self, sample: RateSample, slots: list[Tensor], extremes: list[Tensor]
    ) -> tuple[int, Scalar, Scalar | None]:
        """Whole calls of a compiled kernel; how many elements they took, the decay, the pivot."""
        size = ROWS * COLUMNS
        entry = self.entry
        if not self.compile or self.exact or self.sample is not None or self.numel < size:
            return 0, 0.0, None
        first = Slice([entry], self.group, take_range(0, COLUMNS, torch.float32))
        kernel = kernel_for(entry, self.group, self.rule, first)
        if kernel is None:
            return 0, 0.0, None
        pivot = cast("Tensor", self.rule.update(first).effective_lr).mean()
        scalars, decay = kernel.scalars_of(entry, first.lr)
        flat = [t.view(-1) for t in (entry.param, cast("Tensor", entry.grad))]
        states = [entry.state[name].view(-1) for name in kernel.states]
        start = 0
        for start in range(0, self.numel - size + 1, size):
            param, grad = (t[start : start + size] for t in flat)
            pieces = [t[start : start + size] for t in states]
            sums, low, high, rate = kernel.run(param, grad, pieces, scalars, pivot)
            total = sums.double().sum(1)
            total[-1] *= 0  # NaN where some state is not finite
            slots.append(total)
            extremes.append(torch.stack([low.amin(), high.amax()]))
            sample.add(rate, start, rate)
        return start + size, decay, pivot

    def _scale(self, parts: Tensor, factor: float) -> None:
        """Figures of a sample to those of all, with the exact norms."""
        for name in ADDITIVE:
            parts[:, PARTS.index(name)] *= factor
        plain = plain_figures([self.entry], counts=False)
        for name in ("pp", "gg"):
            parts[:, PARTS.index(name)] = plain[name]
        bad = parts[:, PARTS.index("nonfinite")]
        bad.copy_(torch.maximum(bad, plain["nonfinite"].double()))

    def _block(
        self, s: Slice, update: Update, pivot: Scalar, names: Sequence[str]
    ) -> tuple[list[Tensor], Tensor]:
        p, g, d = s.param, s.grad, update.direction
        rate: Any = update.effective_lr
        scalar = _is_scalar(rate, p)
        zero = p.new_zeros(())
        nan = p.new_full((), torch.nan)
        if scalar:
            rate = torch.as_tensor(rate, dtype=torch.float64, device=p.device).reshape(())
            moments = [zero, zero, zero]  # one rate for all: the extremes tell it
            extreme = torch.stack([rate, rate])
            dd, dp, dg = self._sum(d, d), torch.dot(d, p), torch.dot(d, g)
            products = [x.to(p.dtype) for x in (dd, rate * rate * dd, rate * dp, rate * dg)]
        else:
            deviation = rate - pivot
            moments = [deviation.sum(), self._sum(deviation, deviation), self._log_sum(rate)]
            extreme = torch.stack(torch.aminmax(rate))
            e = torch.mul(rate, d, out=deviation)
            products = [self._sum(d, d), self._sum(e, e), torch.dot(e, p), torch.dot(e, g)]
        below = nan
        if update.eps is not None:
            below = self._count_below(*update.eps)
        return [
            *moments,
            *products,
            self._sum(p, p),
            torch.dot(p, g),
            self._sum(g, g),
            (len(g) - torch.count_nonzero(g)).to(p.dtype),
            nan if update.rms_grad is None else update.rms_grad.sum(),
            nan if update.rms_update is None else update.rms_update.sum(),
            below,
            self._nonfinite(s, names),
        ], extreme

    def _count_below(self, statistic: Tensor, eps: Scalar) -> Tensor:
        low = statistic.amin()
        # Mostly none is: on the host a look at the least saves the count.
        if low.device.type == "cpu" and low.numpy() > eps:
            return torch.zeros_like(low)
        return torch.count_nonzero(statistic <= eps).to(statistic.dtype)

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ a·b of squares: ``torch.dot`` adds equal numbers up with an error of 2e-5."""
        if self._scratch is None or len(self._scratch) < len(a):
            self._scratch = torch.empty_like(a)
        return torch.mul(a, b, out=self._scratch[: len(a)]).sum()

    def _log_sum(self, rate: Tensor) -> Tensor:
        return rate.log().sum() if self.dtype is torch.float64 else bits_sum(rate)

    def _nonfinite(self, s: Slice, names: Sequence[str]) -> Tensor:
        if self.exact:
            bad = ~(torch.isfinite(s.param) & torch.isfinite(s.grad))
            for name in names:
                bad |= ~torch.isfinite(s[name])
            return torch.count_nonzero(bad).to(s.param.dtype)
        # 0, or NaN where some state is not finite; parameter and gradient show in their products.
        total = s.param.new_zeros(())
        for name in names:
            total = total + s[name].sum()
        return total * 0


def bits_sum(rate: Tensor) -> Tensor:
    """2²³ · (Σ log₂ + 127) of positive float32 values, linear between powers of two: 0-dim.

    The bits of a float32 are that, but for an offset: a logarithm for the price of a conversion.
    Each is up to 0.086 too small; how much on average, a sample tells.
    """
    return rate.view(torch.int32).to(torch.float32).sum()


def _pivot(update: Update, s: Slice) -> Scalar:
    rate = update.effective_lr
    if _is_scalar(rate, s.param):
        return rate
    return cast("Tensor", rate).mean()


def state_like(entry: Entry) -> Iterator[str]:
    """Names of the floating state entries that are shaped like the parameter."""
    for name, value in entry.state.items():
        if (
            isinstance(value, Tensor)
            and value.shape == entry.param.shape
            and value.is_floating_point()
        ):
            yield name


class RateSample:
    """The fine histogram of evenly spread elements of a large parameter's rates."""

    def __init__(self, param: Tensor, device: torch.device, stride: int | None = None) -> None:
        """``stride`` is chosen for the parameter's shape unless it is given."""
        self.stride = stride or stride_for(param.numel(), param.shape[-1])
        self.device = device
        self.pieces: list[Tensor] = []

    def add(self, rate: Scalar, start: int, like: Tensor) -> None:
        """Take the rates of one block that starts at flat position ``start``."""
        if not _is_scalar(rate, like):
            flat = cast("Tensor", rate).reshape(-1)
            self.pieces.append(flat[(-start) % self.stride :: self.stride].float())

    def _rates(self) -> Tensor:
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces)]
        return self.pieces[0]

    def log2_correction(self) -> Tensor:
        """Mean of log₂ less what ``bits_sum`` takes for it: 0-dim, float64."""
        if not self.pieces:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        mantissa, _ = torch.frexp(self._rates())
        doubled = 2 * mantissa  # in [1, 2)
        return (doubled.log2() - (doubled - 1)).mean(dtype=torch.float64)

    def histogram(self) -> Tensor:
        """Counts: (BINS,), int32; zeros where all elements share one rate."""
        counts = torch.zeros(BINS, dtype=torch.int32, device=self.device)
        if not self.pieces:
            return counts
        at = bins_of(self._rates())
        return counts.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))


def bins_of(rates: Tensor) -> Tensor:
    """Bin of each float32 rate, by its bits."""
    return (rates.contiguous().view(torch.int32) >> SHIFT).clamp_(0, BINS - 1)


def stride_for(numel: int, width: int) -> int:
    """A stride that takes at least ``SAMPLE`` elements and no column more often than others."""
    stride = max(1, numel // SAMPLE)
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def plain_figures(entries: Sequence[Entry], *, counts: bool) -> dict[str, Tensor]:
    """What needs no rule, of whole parameters, exactly: name in PARTS to (entries,).

    Args:
        entries: the parameters.
        counts: whether zeros, and what is not finite in the optimizer's state, are counted too.
    """
    rows = []
    for entry in entries:
        grad = entry.grad.values if isinstance(entry.grad, SparseRows) else entry.grad
        nonzero = torch.zeros((), dtype=torch.int64, device=entry.param.device)
        for block in blocks(grad.shape) if counts else ():
            nonzero = nonzero + torch.count_nonzero(grad[block])
        squares = [square_sum(entry.param), square_sum(grad)]
        tensors = [entry.param, grad]
        if counts:
            tensors += [entry.state[name] for name in state_like(entry)]
        sums = [*squares, *(tensor.sum(dtype=torch.float64) for tensor in tensors[2:])]
        # Their sums tell whether anything is not finite; a device is not asked, but counts.
        if grad.device.type == "cpu" and all(np.isfinite(each.numpy()) for each in sums):
            bad = torch.zeros_like(nonzero)
        else:
            bad = _nonfinite_count(tensors)
        rows.append(torch.stack([*squares, entry.param.numel() - nonzero, bad]))
    return dict(zip(("pp", "gg", "zeros", "nonfinite"), torch.stack(rows).T, strict=True))


def _nonfinite_count(tensors: Sequence[Tensor]) -> Tensor:
    same = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]
    count = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for block in blocks(tensors[0].shape):
        finite = torch.isfinite(tensors[0][block])
        for tensor in same[1:]:
            finite = finite & torch.isfinite(tensor[block])
        count = count + torch.count_nonzero(~finite)
    for tensor in tensors:  # the rows of a sparse gradient
        if tensor.shape != tensors[0].shape:
            count = count + torch.count_nonzero(~torch.isfinite(tensor))
    return count


def square_sum(tensor: Tensor) -> Tensor:
    """Σx² in float64, without a copy of the tensor's size: 0-dim."""
    fast = precision(tensor)
    total = _square_sum(tensor, fast)
    if tensor.device.type == "cpu" and fast is torch.float32:
        safe = 1e-24 < float(total.numpy()) < np.inf
        return total if safe else _square_sum(tensor, torch.float64)
    return total if fast is torch.float64 else _square_sum(tensor, torch.float64)


def _square_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in blocks(tensor.shape):
        piece = tensor[block].reshape(-1).to(dtype)
        total = total + torch.dot(piece, piece)
    return total


def whole_of(entry: Entry, group: Mapping[str, Any], rule: Rule) -> None:
    """Add what the rule needs to know of the whole parameter to the entry's state."""
    if rule.whole is not None:
        stream = Stream(entry, group, rule, exact=entry.param.numel() <= BLOCK)
        entry.state.update(rule.whole(Whole(entry, group, stream.slices)))
