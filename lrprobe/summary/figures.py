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
from lrprobe.summary.fused import COLUMNS, ROWS, SUMS, kernel_for
from lrprobe.summary.reading import (
    BLOCK,
    Spread,
    blocks,
    is_flat,
    pieces,
    precision,
    take_all,
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
_PER_OCTAVE = 64
"""A bin of the fine histogram: the upper 14 bits below the sign of a float32, 64 bins an octave."""
_CHUNK = 256
_STATE = "sum of "
_ROW = 1024
"""Elements of a row whose norm is taken at once."""
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
        """All of it from a flat position on (of a ``flat`` entry), in order; or the sample."""
        memo: dict[Any, Any] = {}
        if self.sample is not None:
            yield Slice([self.entry], self.group, take_flat(self.sample, self.dtype), memo=memo)
        elif is_flat(self.entry):
            take = take_all(self.dtype)
            for piece in pieces(self.entry, start):
                yield Slice([piece], self.group, take, memo=memo)
        else:
            for block in blocks(self.entry.param.shape):
                yield Slice([self.entry], self.group, take_block(block, self.dtype), memo=memo)

    def figures(self) -> tuple[Tensor, Tensor]:
        """PARTS (1, ·), and the fine histogram of a sample of the rates: (1, BINS), int32."""
        device = self.entry.param.device
        sample = RateSample(self.entry.param, device, None if self.sample is None else 1)
        total = _Total()
        found, start, decay, pivot = self._fused(sample)
        names = list(state_like(self.entry))
        for s in self.slices(start):
            update = self.rule.update(s)
            decay = update.decay
            if pivot is None:
                pivot = _pivot(update, s)
            total.add(self._block(s, update, pivot, names))
            sample.add(update.effective_lr, start, s.param)
            start += s.param.shape[0]
        found = _together(found, total.finish())
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        scalar = torch.as_tensor(pivot, dtype=torch.float64, device=device).reshape(())
        if "rate_min" in found:
            # Σ(x−c) and Σ(x−c)² to mean and Σ(x−mean)².
            low, high, away = found["rate_min"], found["rate_max"], found["rate_away"]
            shift = away / start
            found["rate_m2"] = (found["rate_m2"] - shift * away).clamp(min=0)
            found["rate_mean"] = torch.where(high.isinf(), high, (scalar + shift).clamp(low, high))
            if self.dtype is not torch.float64:
                octaves = found["rate_log"] * 2.0**-23 + start * (sample.log2_correction() - 127.0)
                found["rate_log"] = octaves * math.log(2)
        else:  # one rate for all
            found |= dict.fromkeys(("rate_mean", "rate_min", "rate_max"), scalar)
            found["rate_m2"], found["rate_log"] = nothing, start * scalar.log()
            found["ee"] = scalar * scalar * found["dd"]
            found["ep"], found["eg"] = scalar * found.get("dp", nothing), scalar * found["dg"]
        found["decay"] = torch.as_tensor(decay, dtype=torch.float64, device=device).reshape(())
        found["zeros"] = start - found["nonzero"]
        for name in ("ep", "pg"):  # only a decay asks for them: zero times them
            found.setdefault(name, nothing)
        if not self.exact:  # 0, or NaN where a state is not finite; the rest shows in its products
            states = [found[name] for name in found if name.startswith(_STATE)]
            found["nonfinite"] = sum(states, nothing) * 0
        absent = torch.full_like(nothing, torch.nan)
        parts = torch.stack([found.get(name, absent) for name in PARTS]).unsqueeze(0)
        if self.sample is not None:
            self._scale(parts, self.numel / start)
        return parts, sample.histogram().unsqueeze(0)

    def _fused(self, sample: RateSample) -> tuple[dict[str, Tensor], int, Scalar, Scalar | None]:
        """Whole calls of a compiled kernel: totals, elements they took, the decay, the pivot."""
        size = ROWS * COLUMNS
        entry = self.entry
        if not self.compile or self.exact or self.sample is not None or self.numel < size:
            return {}, 0, 0.0, None
        first = Slice([entry], self.group, take_range(0, COLUMNS, torch.float32))
        kernel = kernel_for(entry, self.group, self.rule, first)
        if kernel is None:
            return {}, 0, 0.0, None
        pivot = cast("Tensor", self.rule.update(first).effective_lr).mean()
        scalars, decay = kernel.scalars_of(entry, first.lr)
        flat = [t.view(-1) for t in (entry.param, cast("Tensor", entry.grad))]
        states = [entry.state[name].view(-1) for name in kernel.states]
        total = _Total()
        start = 0
        for start in range(0, self.numel - size + 1, size):
            param, grad = (t[start : start + size] for t in flat)
            parts = [t[start : start + size] for t in states]
            sums, low, high, rate = kernel.run(param, grad, parts, scalars, pivot)
            cells = [*sums.double().sum(1), low.amin().double(), high.amax().double()]
            total.add(dict(zip((*SUMS, "rate_min", "rate_max"), cells, strict=True)))
            sample.add(rate, start, rate)
        return total.finish(), start + size, decay, pivot

    def _scale(self, parts: Tensor, factor: float) -> None:
        """Figures of a sample to those of all, with the exact norms."""
        parts[:, [PARTS.index(name) for name in ADDITIVE]] *= factor
        plain = plain_figures([self.entry], counts=False)
        for name in ("pp", "gg"):
            parts[:, PARTS.index(name)] = plain[name]
        bad = parts[:, PARTS.index("nonfinite")]
        bad.copy_(torch.maximum(bad, plain["nonfinite"].double()))

    def _block(
        self, s: Slice, update: Update, pivot: Scalar, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The sums and extremes of one block."""
        p, g, d = s.param, s.grad, update.direction
        rate: Any = update.effective_lr
        decays = isinstance(update.decay, Tensor) or update.decay != 0
        found = {"dd": self._square(d), "pp": self._square(p), "gg": self._square(g)}
        if _is_scalar(rate, p):
            found["dg"] = self._dot(d, g)
            if decays:
                found["dp"] = torch.dot(d, p)
        else:
            found["rate_min"], found["rate_max"] = rate.amin(), rate.amax()
            found["rate_log"] = self._log_sum(rate)
            deviation = rate - pivot
            found["rate_away"] = deviation.sum()
            found["rate_m2"] = self._square(deviation)
            e = torch.mul(rate, d, out=deviation)
            found["ee"] = self._square(e)
            found["eg"] = self._dot(e, g)
            if decays:
                found["ep"] = torch.dot(e, p)
        if decays:
            found["pg"] = torch.dot(p, g)
        # A sum of ones is exact in any order, and takes half the time of ``count_nonzero``.
        signs = torch.sign(g, out=self._room(g))
        found["nonzero"] = torch.dot(signs, signs)
        if update.rms_grad is not None:
            found["rms_grad"] = update.rms_grad.sum()
        if update.rms_update is not None:
            found["rms_update"] = update.rms_update.sum()
        if update.eps is not None:
            found["below_eps"] = self._count_below(*update.eps)
        if self.exact:
            bad = ~(torch.isfinite(p) & torch.isfinite(g))
            for name in names:
                bad |= ~torch.isfinite(s[name])
            found["nonfinite"] = torch.count_nonzero(bad).double()
        else:  # NaN where some state is not finite; parameter and gradient show in their products
            found |= {_STATE + name: s[name].sum() for name in names}
        return found

    def _count_below(self, statistic: Tensor, eps: Scalar) -> Tensor:
        low = statistic.amin()
        # Mostly none is: on the host a look at the least saves the count.
        if low.device.type == "cpu" and low.numpy() > eps:
            return torch.zeros_like(low)
        return torch.le(statistic, eps, out=self._room(statistic)).sum()

    def _square(self, values: Tensor) -> Tensor:
        """Σ x², by short rows: along long ones torch adds equal numbers up with errors of 1e-4."""
        if values.shape[0] % _ROW:
            return self._dot(values, values)
        norms = torch.linalg.vector_norm(values.view(-1, _ROW), dim=1)
        return torch.dot(norms, norms)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ a·b where all of it may have one sign: ``torch.dot`` has that error too."""
        return torch.mul(a, b, out=self._room(a)).sum()

    def _room(self, like: Tensor) -> Tensor:
        size = like.shape[0]
        if self._scratch is None or self._scratch.shape[0] != size:
            self._scratch = torch.empty_like(like)
        return self._scratch

    def _log_sum(self, rate: Tensor) -> Tensor:
        return rate.log().sum() if self.dtype is torch.float64 else bits_sum(rate)


class _Total:
    """What the blocks of one parameter add up to, by name.

    Their figures are copied together at once: small tensors that stay, between large ones that
    are freed, would drive the allocator through ever new memory.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Take the figures of a block: 0-dim, of one dtype, the same ones from each block."""
        values = list(found.values())
        at = self._count % _CHUNK
        if at == 0:
            self._names = list(found)
            self._rows.append(values[0].new_empty((_CHUNK, len(values))))
        torch.stack(values, out=self._rows[-1][at])
        self._count += 1

    def finish(self) -> dict[str, Tensor]:
        """Name to total: 0-dim, float64."""
        if not self._rows:
            return {}
        columns = torch.cat(self._rows)[: self._count].double().unbind(1)
        return {
            name: _EXTREME.get(name, Tensor.sum)(column)
            for name, column in zip(self._names, columns, strict=True)
        }


_EXTREME = {"rate_min": Tensor.amin, "rate_max": Tensor.amax}


def _together(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Totals of two parts of a parameter to those of both."""
    result = first | second
    for name in first.keys() & second.keys():
        both = torch.stack([first[name], second[name]])
        result[name] = _EXTREME.get(name, Tensor.sum)(both)
    return result


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
        self._counts: Tensor | None = None

    def add(self, rate: Scalar, start: int, like: Tensor) -> None:
        """Take the rates of one block that starts at flat position ``start``."""
        if not _is_scalar(rate, like):
            flat = cast("Tensor", rate).reshape(-1)
            some = flat[(-start) % self.stride :: self.stride]
            # A copy, since a view would keep all of the rates in memory.
            self.pieces.append(some.to(torch.float32, copy=True))

    def log2_correction(self) -> Tensor:
        """Mean of log₂ less what ``bits_sum`` takes for it, to 0.0035: 0-dim, float64."""
        within = self.histogram().view(-1, _PER_OCTAVE).sum(0).double()
        share = (
            torch.arange(_PER_OCTAVE, dtype=torch.float64, device=self.device) + 0.5
        ) / _PER_OCTAVE
        return ((1 + share).log2() - share) @ within / within.sum()

    def histogram(self) -> Tensor:
        """Counts: (BINS,), int32; zeros where all elements share one rate."""
        if self._counts is None:
            self._counts = torch.zeros(BINS, dtype=torch.int32, device=self.device)
            if self.pieces:
                at = bins_of(torch.cat(self.pieces))
                if self.device.type == "cpu":
                    self._counts = torch.bincount(at, minlength=BINS).int()
                else:  # `bincount` would wait for the device
                    self._counts.index_add_(0, at, torch.ones_like(at))
        return self._counts


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
    if tensor.dtype == dtype and tensor.is_contiguous():
        flat = tensor.view(-1)
        even = len(flat) // _ROW * _ROW
        norms = torch.linalg.vector_norm(flat[:even].view(-1, _ROW), dim=1)
        return _sum_of_squares(norms) + _sum_of_squares(flat[even:])
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in blocks(tensor.shape):
        total = total + _sum_of_squares(tensor[block].reshape(-1).to(dtype))
    return total


def _sum_of_squares(values: Tensor) -> Tensor:
    return values.square().sum(dtype=torch.float64)


def whole_of(entry: Entry, group: Mapping[str, Any], rule: Rule) -> None:
    """Add what the rule needs to know of the whole parameter to the entry's state."""
    if rule.whole is not None:
        stream = Stream(entry, group, rule, exact=entry.param.numel() <= BLOCK)
        entry.state.update(rule.whole(Whole(entry, group, stream.slices)))
