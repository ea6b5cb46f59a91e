"""One recorded step, on the device: what is kept from before it, and its figures after it.

``before`` runs in the optimizer's pre-hook, ``after`` in its post-hook. Parameters are taken in
batches: small ones whole, many at a time; large ones block by block, with a sample of each checked
against the step really taken. What comes out is a ``Raw``: a few tensors, still on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lrprobe.names import Place
from lrprobe.rules.base import Entry, Rule, Scalar, Slice, SparseRows, Update
from lrprobe.summary import figures
from lrprobe.summary.large import large_figures
from lrprobe.summary.reading import (
    WHOLE,
    Lines,
    Positions,
    Spread,
    block_size,
    entry_of,
    local,
    parted,
    positions,
    real,
    spread,
    take_rows,
)
from lrprobe.summary.stream import whole_of
from lrprobe.summary.sums import column, pivots, row_figures


@dataclass(slots=True, eq=False)
class Watched:
    """One parameter that a probe watches.

    Attributes:
        name: its name in the frame.
        group: index of its parameter group.
        ref: where its optimizer has it.
        rule: the equation of its optimizer; None where its rate can only be measured.
        tracked: flat positions whose elements are recorded, or None.
        numel: its real elements (a complex one counts twice).
        initial_lr: what the frame shows; None until first seen.
        bad_steps: recorded steps in a row that the rule did not explain.
    """

    name: str
    group: int
    ref: Place
    rule: Rule | None
    tracked: Tensor | None
    numel: int
    initial_lr: Scalar | None = None
    bad_steps: int = 0


@dataclass(frozen=True, slots=True)
class How:
    """How figures are taken.

    Attributes:
        sample: of larger parameters from that many elements; None for all.
        compile: with a compiled kernel where there can be one.
    """

    sample: int | None = None
    compile: bool = False


_PLAIN = How()


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient as it stood before the step.

    Attributes:
        sample: its elements where the parameter's are checked.
        tracked: its tracked elements, or None.
        figures: ``figures.plain_figures`` of it: (2,), its squared norm and its zeros.
    """

    sample: Tensor
    tracked: Tensor | None
    figures: Tensor


@dataclass(slots=True)
class Before:
    """What is kept from before a step: a sample of each parameter, and a few scalars."""

    samples: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """Position of a parameter to a table, which others share, and its row in it."""
    tracked: dict[int, Tensor] = field(default_factory=dict)
    scalars: dict[int, Mapping[str, Scalar]] = field(default_factory=dict)
    grads: dict[int, Gradient] = field(default_factory=dict)
    """Of those that the optimizer may overwrite."""
    errors: dict[int, str] = field(default_factory=dict)
    """Position of a parameter to what its rule raised."""

    def sample(self, at: Sequence[int]) -> Tensor:
        """Samples of parameters that have as many elements in it: (parameters, n)."""
        table, first = self.samples[at[0]]
        if all(self.samples[i][0] is table for i in at):
            rows = [self.samples[i][1] for i in at]
            if rows == list(range(first, first + len(rows))):
                return table[first : first + len(rows)]
        return torch.stack([self.samples[i][0][self.samples[i][1]] for i in at])


@dataclass(slots=True)
class Rows:
    """Figures of some of the watched parameters, still on the device.

    Attributes:
        at: their positions among the watched.
        parts, checks: ``figures.PARTS`` and ``figures.CHECKS``, float64.
        rates: all rates of small parameters, or measured ones of a sample (NaN: none): (rows, n).
        bins: fine histograms of large parameters: (rows, bins), int32.
        first_bin: which bin the first is.
        tracked: rate, update, gradient, parameter of tracked elements: (4, rows, k).
    """

    at: list[int]
    parts: Tensor | None = None
    checks: Tensor | None = None
    rates: Tensor | None = None
    bins: Tensor | None = None
    first_bin: int = 0
    tracked: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are there."""
        for name in ("parts", "checks", "rates", "bins", "tracked"):
            value = getattr(self, name)
            if value is not None:
                yield name, value


@dataclass(slots=True)
class Raw:
    """All figures of one recorded step."""

    stepped: list[int] = field(default_factory=list)
    """Positions of the parameters that had a gradient."""
    rows: list[Rows] = field(default_factory=list)
    lr: dict[int, Scalar] = field(default_factory=dict)
    """Per group."""
    found_inf: Tensor | None = None
    """Nonzero where a fused optimizer skipped the step for the gradient scaler."""
    grad_scale: Tensor | None = None
    """Factor still in the gradients of a skipped step."""
    errors: dict[int, str] = field(default_factory=dict)
    """Position of a parameter to what its rule raised."""
    resting: list[Tensor] | None = None
    """Of gradients that no row tells of, whether they have an element that is not 0; None where
    some rate is known not to be 0."""


def tolerance(dtype: torch.dtype, rule: Rule) -> float:
    """Error of a reconstruction above which a rule does not explain the step."""
    return max(rule.tolerance, 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3)


def has_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``step`` was called with a closure; ``args`` begins with the optimizer."""
    return any(map(callable, (*args[1:], *kwargs.values())))


def before(
    watched: Sequence[Watched], optimizer: torch.optim.Optimizer, *, closure: bool = False
) -> Before:
    """Keep what cannot be told after the step; with a closure there is no gradient yet."""
    kept = Before()
    alike: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, w in enumerate(watched):
        param = w.ref()
        # What is frozen is stepped all the same where an old gradient was left.
        if param is None or not (param.requires_grad or param.grad is not None):
            continue
        remember(w, param, optimizer, i, kept.scalars, kept.errors)
        flat = real(param)
        shape = flat.shape if w.numel <= WHOLE else None
        alike[shape, flat.dtype, flat.device].append((i, flat))
        if w.tracked is not None:
            kept.tracked[i] = positions(flat, w.tracked.to(flat.device, non_blocking=True))
        there = param.grad is not None and not param.grad.is_sparse and not closure
        if there and may_overwrite(w, optimizer):
            grad = real(cast("Tensor", param.grad))
            kept.grads[i] = gradient_before(grad, _sample_of(grad), w.tracked)
    for some in alike.values():
        tensors = [flat for _, flat in some]
        table = take_rows([_sample_of(flat) for flat in tensors], tensors[0].dtype)(tensors)
        kept.samples.update((i, (table, row)) for row, (i, _) in enumerate(some))
    return kept


def remember(
    w: Watched,
    param: Tensor,
    optimizer: torch.optim.Optimizer,
    at: int,
    scalars: dict[int, Mapping[str, Scalar]],
    errors: dict[int, str],
) -> None:
    """Keep at ``at`` what the rule asks for from before the step, and the group's initial rate."""
    group = optimizer.param_groups[w.group]
    if "initial_lr" in group:  # a scheduler may be made after the probe
        w.initial_lr = copied(group["initial_lr"])
    if w.rule is not None and w.rule.before is not None:
        state = optimizer.state.get(param, {})
        try:
            scalars[at] = w.rule.before(local(param).detach(), state, group)
        except Exception as error:  # noqa: BLE001 - a rule must never stop a training
            errors[at] = cause(error)


def may_overwrite(w: Watched, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer may leave something else where a gradient was."""
    if w.rule is None or w.rule.overwrites is None:
        return w.rule is None
    return w.rule.overwrites(optimizer.param_groups[w.group])


def as_given(parts: Tensor, grads: Sequence[Gradient | None]) -> Tensor:
    """PARTS of the gradients as they stood before the step, where all of them were kept."""
    known = [each.figures for each in grads if each is not None]
    if len(known) == len(grads):
        columns = zip(("gg", "zeros"), torch.stack(known).unbind(1), strict=True)
        for name, values in columns:
            parts[:, figures.PARTS.index(name)] = values
    return parts


def gradient_before(grad: Tensor, sample: Positions, tracked: Tensor | None) -> Gradient:
    """A gradient as it stands, of an optimizer that may overwrite it."""
    return Gradient(
        positions(grad, sample).clone(),
        None if tracked is None else positions(grad, tracked.to(grad.device, non_blocking=True)),
        torch.stack([figures.square_sum(grad), figures.zeros(grad)]),
    )


def at_rest(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether every rate is 0; None where a device would have to be asked."""
    known: bool | None = True
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            known = None
        elif lr is None or (lr.any() if isinstance(lr, Tensor) else lr != 0):
            return False
    return known


def moves(optimizer: torch.optim.Optimizer) -> bool:
    """Whether some gradient has an element that is not 0, or none has elements; asks the device."""
    grads = [
        local(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None
    ]
    values = [g._values() if g.is_sparse else g for g in grads if g.numel()]  # noqa: SLF001 - as below
    return not values or any(bool(each.detach().any()) for each in values)


def resting(optimizer: torch.optim.Optimizer) -> Raw:
    """All that tells a step from one with a rate of 0 and zero gradients, which is none.

    Checkpoint libraries take the latter, so that there is a state to load into.
    """
    return _with_resting(Raw(lr=_rates(optimizer)), optimizer, set())


def _with_resting(raw: Raw, optimizer: torch.optim.Optimizer, seen: set[int]) -> Raw:
    params = (p for group in optimizer.param_groups for p in group["params"] if id(p) not in seen)
    grads = (local(p.grad) for p in params if p.grad is not None)
    raw.resting = [(g._values() if g.is_sparse else g).detach().any() for g in grads]  # noqa: SLF001 - it need not be coalesced for this
    return raw


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, Scalar]:
    return {
        index: copied(torch.nan if group.get("lr") is None else group["lr"])
        for index, group in enumerate(optimizer.param_groups)
    }


class _Alike(NamedTuple):
    """What parameters that are read together have in common."""

    group: int
    rule: Rule | None
    small: bool
    shape: torch.Size | None
    """Of small ones that are not read in lines."""
    wide: tuple[str, ...] | None
    """States of those that are, but for 0-dim ones."""
    dim: int
    dtype: torch.dtype
    device: torch.device
    states: tuple[str, ...]
    sparse: bool
    kept: bool
    """Whether the gradient was kept from before the step."""


_WIDTH = 64
"""Small parameters whose sizes are multiples of it are read in lines, whatever their shapes."""


_CHECKED = 1 << 16
"""Elements of check samples that are computed at once."""


def _lines_of(entry: Entry) -> tuple[str, ...] | None:
    """States of a small parameter that can be read in lines with it; None where it cannot be."""
    states = {k: v for k, v in entry.state.items() if isinstance(v, Tensor) and v.dim()}
    shape = entry.param.shape
    alike = shape.numel() > 0 and all(value.shape == shape for value in states.values())
    return tuple(states) if alike else None


def after(
    watched: Sequence[Watched],
    optimizer: torch.optim.Optimizer,
    kept: Before,
    how: How = _PLAIN,
) -> Raw:
    """Reconstruct and summarise the step that has just been taken.

    Args:
        watched: the parameters.
        optimizer: theirs.
        kept: what ``before`` kept.
        how: how figures are taken.
    """
    raw = Raw(
        lr=_rates(optimizer),
        found_inf=copied(getattr(optimizer, "found_inf", None)),
        grad_scale=copied(getattr(optimizer, "grad_scale", None)),
    )
    raw.errors.update(kept.errors)
    batches: dict[_Alike, dict[Any, list[tuple[int, Entry]]]]
    batches = defaultdict(lambda: defaultdict(list))
    seen: set[int] = set()
    for i, w in enumerate(watched):
        param = w.ref()
        if param is None:
            continue
        if param.grad is None or i not in kept.samples:
            if param.device.type != "meta":  # which has no values
                raw.rows.append(_norms_only(i, real(param)))
            continue
        raw.stepped.append(i)
        seen.add(id(param))
        state = optimizer.state.get(param, {})
        entry = entry_of(param, state, kept.scalars.get(i, {}))
        rule = None if i in kept.errors else w.rule
        shape = param.shape if w.numel <= WHOLE else None
        in_lines = shape is not None and rule is not None and not w.numel % _WIDTH
        wide = _lines_of(entry) if in_lines else None
        alike = _Alike(
            group=w.group,
            rule=rule,
            small=shape is not None,
            shape=shape if wide is None else None,
            wide=wide,
            dim=entry.param.dim() if wide is None and state else 0,
            dtype=param.dtype,
            device=param.device,
            states=tuple(k for k, v in state.items() if v is not None),
            sparse=isinstance(entry.grad, SparseRows),
            kept=i in kept.grads,
        )
        batches[alike][shape].append((i, entry))
    for alike, by_shape in batches.items():
        group = optimizer.param_groups[alike.group]
        batch = list(chain(*by_shape.values()))
        sizes = [min(entry.param.numel(), WHOLE) for _, entry in batch]
        for part in parted(batch, sizes, block_size(torch.float64)):
            _summarise(part, group, alike.rule, watched, kept, raw, how)
    if at_rest(optimizer) is not False:
        _with_resting(raw, optimizer, seen)
    return raw


def _summarise(
    batch: Sequence[tuple[int, Entry]],
    group: Mapping[str, Any],
    rule: Rule | None,
    watched: Sequence[Watched],
    kept: Before,
    raw: Raw,
    how: How,
) -> None:
    at = [i for i, _ in batch]
    empty = batch[0][1].param.numel() == 0
    if rule is not None:
        try:
            if empty:
                raw.rows.append(empty_rows(batch, group, rule))
            else:
                raw.rows += _reconstructed(batch, group, rule, watched, kept, how)
        except torch.OutOfMemoryError:  # which is no fault of the rule's
            raise
        except Exception as error:  # noqa: BLE001 - a rule must never stop a training
            shapes = [list(each) for _, each in groupby(batch, lambda one: one[1].param.shape)]
            if not empty and len(shapes) > 1:
                for some in shapes:  # which of them it cannot explain
                    _summarise(some, group, rule, watched, kept, raw, how)
                return
            raw.errors.update(dict.fromkeys(at, cause(error)))
        else:
            return
    if empty:
        raw.rows.append(empty_rows(batch, group, None))
        return
    raw.rows += _measured(batch, group, watched, kept)


def _reconstructed(
    batch: Sequence[tuple[int, Entry]],
    group: Mapping[str, Any],
    rule: Rule,
    watched: Sequence[Watched],
    kept: Before,
    how: How,
) -> list[Rows]:
    entries = [entry for _, entry in batch]
    for entry in entries:
        whole_of(entry, group, rule)
    if entries[0].param.numel() <= WHOLE:
        result = _read_whole(batch, group, rule, kept)
    else:
        result = _read_large(batch, group, rule, kept, how)
    for rows in result:
        if rows.parts is not None:
            as_given(rows.parts, [kept.grads.get(i) for i in rows.at])
    return result + _tracked(batch, group, rule, watched, kept)


def _read_whole(
    batch: Sequence[tuple[int, Entry]], group: Mapping[str, Any], rule: Rule, kept: Before
) -> list[Rows]:
    """Small parameters: all of them at once, and rows for each shape."""
    entries = [entry for _, entry in batch]
    at = [i for i, _ in batch]
    lines = Lines.of(entries)
    # What was kept for the check is at hand for a coupled decay, which else is solved for.
    old = lines.cut([kept.sample(some) for some in lines.split(at)])
    s = Slice(lines.each(entries), group, lines.take(torch.float64), old)
    update = rule.update(s)
    checks = lines.owned(figures.check_figures(s, update, old))
    parts = row_figures(s, update, list(figures.state_like(entries[0])), lines)
    rates = _all_rates(update, s.param)
    count = [n for n, _ in lines.runs]
    each_rates = [None] * len(count) if rates is None else lines.tables(rates)
    found = zip(
        lines.split(at),
        torch.split(parts, count),
        torch.split(checks, count),
        each_rates,
        strict=True,
    )
    return [Rows(list(some), parts=p, checks=c, rates=r) for some, p, c, r in found]


def _read_large(
    batch: Sequence[tuple[int, Entry]],
    group: Mapping[str, Any],
    rule: Rule,
    kept: Before,
    how: How,
) -> list[Rows]:
    """Large parameters: a sample of each checked, and all of them block by block."""
    entries = [entry for _, entry in batch]
    at = [i for i, _ in batch]
    checks, middle = _checked(entries, group, rule, kept.sample(at))
    found = large_figures(entries, group, rule, middle, sample=how.sample, compile=how.compile)
    return [
        Rows([at[i] for i in some], parts=parts, bins=counts.table, first_bin=counts.first)
        for some, parts, counts in found
    ] + [Rows(at, checks=checks)]


def _checked(
    entries: Sequence[Entry], group: Mapping[str, Any], rule: Rule, old: Tensor
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """CHECKS of samples of large parameters, and pivots of their rates where these differ."""
    sampled = [_sample_of(e.param) for e in entries]
    checks: list[Tensor] = []
    middle: list[Tensor] = []
    differ = False
    for some in parted(range(len(entries)), [WHOLE] * len(entries), _CHECKED):
        at = slice(some[0], some[-1] + 1)
        s = Slice(entries[at], group, take_rows(sampled[at], torch.float64), old[at])  # as above
        update = rule.update(s)
        checks.append(figures.check_figures(s, update, old[at]))
        rates = _all_rates(update, s.param)
        differ |= rates is not None
        middle += (
            column(update.effective_lr, s.param) if rates is None else pivots(rates)
        ).unbind()
    return torch.cat(checks), middle if differ else None


def _all_rates(update: Update, like: Tensor) -> Tensor | None:
    rate = update.effective_lr
    if isinstance(rate, Tensor) and rate.shape == like.shape:
        return rate
    return None  # a scalar: the extremes tell it


def _measured(
    batch: Sequence[tuple[int, Entry]],
    group: Mapping[str, Any],
    watched: Sequence[Watched],
    kept: Before,
) -> list[Rows]:
    entries = [entry for _, entry in batch]
    at = [i for i, _ in batch]
    s = Slice(entries, group, take_rows([_sample_of(e.param) for e in entries], torch.float64))
    parts, checks, rates = measured_rows(
        s, entries, kept.sample(at), [kept.grads.get(i) for i in at]
    )
    rows = Rows(at, parts=parts, checks=checks, rates=rates)
    return [rows, *_tracked(batch, group, None, watched, kept)]


def measured_rows(
    s: Slice, entries: Sequence[Entry], old: Tensor, grads: Sequence[Gradient | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """PARTS, CHECKS and measured rates of parameters without a rule: (parameters, ·).

    Args:
        s: their check samples after the step.
        entries: the parameters.
        old: the samples before it.
        grads: their gradients before it; those after it count where one is None.
    """
    known = [each for each in grads if each is not None]
    if len(known) < len(grads):
        known = []
    grad = signed(torch.stack([each.sample for each in known]), s.group) if known else s.grad
    checks, rates = figures.measured_figures(s, grad, old)
    parts = checks.new_full((len(entries), len(figures.PARTS)), torch.nan)
    for name, values in figures.plain_figures(entries, counts=True).items():
        parts[:, figures.PARTS.index(name)] = values
    return as_given(parts, grads), checks, rates


def _tracked(
    batch: Sequence[tuple[int, Entry]],
    group: Mapping[str, Any],
    rule: Rule | None,
    watched: Sequence[Watched],
    kept: Before,
) -> list[Rows]:
    by_count: dict[int, list[tuple[int, Entry]]] = defaultdict(list)
    for i, entry in batch:
        where = watched[i].tracked
        if where is not None:
            by_count[len(where)].append((i, entry))
    result = []
    for some in by_count.values():
        at = [i for i, _ in some]
        entries = [entry for _, entry in some]
        old = torch.stack([kept.tracked[i] for i in at]).double()
        s = Slice(entries, group, take_rows(_tracked_at(some, watched), torch.float64), old)
        found = tracked_figures(s, rule, old, [kept.grads.get(i) for i in at])
        result.append(Rows(at, tracked=found))
    return result


def tracked_figures(
    s: Slice, rule: Rule | None, old: Tensor, grads: Sequence[Gradient | None]
) -> Tensor:
    """Rate, update, gradient and parameter of tracked elements: (4, parameters, elements).

    Args:
        s: the elements after the step.
        rule: theirs; None where the rate is measured.
        old: the elements before it, float64.
        grads: as for ``measured_rows``.
    """
    if rule is None:
        change, grad = s.param - old, s.grad
        elements = [each.tracked for each in grads if each is not None and each.tracked is not None]
        if len(elements) == len(grads):
            grad = signed(torch.stack(elements), s.group)
        rate = figures.measured_rates(change, grad)
    else:
        update = rule.update(s)
        change = figures.intended(update, s)
        rate = figures.scalar(update.effective_lr, s.param).expand(s.param.shape)
        grad = figures.gradient(s, update)
    # The sign of `maximize` is its own inverse.
    return torch.stack([rate, change, signed(grad, s.group), s.param])


def signed(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """As rules see it, under ``maximize``; float64."""
    return -grad.double() if group.get("maximize", False) else grad.double()


def _tracked_at(some: list[tuple[int, Entry]], watched: Sequence[Watched]) -> list[Tensor]:
    return [
        cast("Tensor", watched[i].tracked).to(entry.param.device, non_blocking=True)
        for i, entry in some
    ]


def empty_rows(
    batch: Sequence[tuple[int, Entry]], group: Mapping[str, Any], rule: Rule | None
) -> Rows:
    """Parameters without elements: their sums are 0, and they have no rate."""
    like = batch[0][1].param
    parts = torch.zeros((len(batch), len(figures.PARTS)), dtype=torch.float64, device=like.device)
    for name in ("decay", "rate_mean", "rate_min", "rate_max", "rms_grad", "rms_update"):
        parts[:, figures.PARTS.index(name)] = torch.nan
    if rule is not None and rule.whole is None:
        entries = [entry for _, entry in batch]
        update = rule.update(Slice(entries, group, take_rows([None] * len(batch), torch.float64)))
        parts[:, 0] = column(update.decay, parts)
        for name in ("rms_grad", "rms_update"):  # or they would hide those of other parameters
            if getattr(update, name) is not None:
                parts[:, figures.PARTS.index(name)] = 0.0
    checks = parts.new_zeros((len(batch), len(figures.CHECKS)))
    return Rows([i for i, _ in batch], parts=parts, checks=checks)


def _norms_only(i: int, param: Tensor) -> Rows:
    shape = (1, len(figures.PARTS))
    parts = torch.full(shape, torch.nan, dtype=torch.float64, device=param.device)
    try:
        parts[0, figures.PARTS.index("pp")] = figures.square_sum(param)
    except (RuntimeError, NotImplementedError, TypeError):
        return Rows([i])  # of a subclass that holds its values in a way of its own
    return Rows([i], parts=parts)


def _sample_of(param: Tensor) -> Spread | None:
    if param.numel() <= WHOLE:
        return None
    return spread(param.numel(), WHOLE, param.device)


def cause(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}"


def copied(value: Any) -> Any:
    """A hyperparameter as it stands now: a tensor's copy, anything else itself."""
    return local(value).detach().clone() if isinstance(value, Tensor) else value
