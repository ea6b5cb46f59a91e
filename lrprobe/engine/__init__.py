"""How a step becomes figures: what is kept before it, and what is computed after it.

    before: a check sample of each parameter, its state and its gradient
    after:  rule → figures of each local piece, in one call for all pieces of a kind

Nothing here reads device values on the host, so no hook synchronizes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrprobe.engine import eager
from lrprobe.engine.backends import EngineName, backends_for, warn_eager_once
from lrprobe.engine.batch import Batch, add_batch_statistics, addresses_of, batch_of, describe
from lrprobe.engine.buffers import StepFigures, Vectors, column
from lrprobe.engine.check import Samples
from lrprobe.engine.distribution import Bins, fold
from lrprobe.engine.figures import CHECKS, FIGURES, GRADIENT, Elements, Figure
from lrprobe.engine.pieces import (
    WatchedParameter,
    entry_of,
    flattened,
    is_strided,
    local,
    local_real,
    read,
    sample,
    sample_runs,
    sampled,
)
from lrprobe.engine.program import Program, UnknownOperationError
from lrprobe.engine.recording import Recorded, record
from lrprobe.rules.base import (
    Entry,
    Rule,
    Scalar,
    overwrites_gradient,
    to_device,
    to_device_float64,
)

_MAX_PROGRAMS = 256

PARAM: tuple[Figure, ...] = tuple(f for f in FIGURES if f.name == "param_square")
"""The figures of a parameter without a gradient."""


@dataclass(slots=True)
class PreStep:
    """What is kept from before a step; keys are indices of watched parameters.

    Attributes:
        samples: check samples of parameters, their state, and gradients that may be overwritten.
        grads: references to the gradients, because the step may set ``grad`` to None.
        gradient: ``GRADIENT`` figures of the gradients that may be overwritten.
        scalars: what ``Rule.before`` returned.
        tracked: tracked elements of the parameter, and of a gradient that may be overwritten.
        failed: the error that ``Rule.before`` raised.
    """

    samples: Samples
    grads: dict[int, Tensor] = field(default_factory=dict)
    gradient: dict[int, Tensor] = field(default_factory=dict)
    scalars: dict[int, Mapping[str, Scalar]] = field(default_factory=dict)
    tracked: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def empty_pre_step() -> PreStep:
    """Return a ``PreStep`` without samples; with it, no parameter counts as stepped."""
    return PreStep(Samples({}))


class Engine:
    """Computes the figures of steps, with generated code where a backend is available."""

    def __init__(self, engine: EngineName) -> None:
        self.backends = backends_for(engine)
        self._programs: dict[Any, Program] = {}
        """(table, first parameter of a batch, size of the batch) to its last recorded program."""

    def before(
        self,
        watched: Sequence[WatchedParameter],
        optimizer: torch.optim.Optimizer,
        *,
        closure: bool = False,
    ) -> PreStep:
        """Keep what the step overwrites; with a closure the gradients do not exist yet."""
        pre = PreStep(Samples(self.backends))
        for i, w in enumerate(watched):
            param = w.place()
            # An optimizer also steps a frozen parameter that still has a gradient.
            if param is None or not (param.requires_grad or param.grad is not None):
                continue
            group, state = optimizer.param_groups[w.group], optimizer.state.get(param, {})
            if "initial_lr" in group:  # a scheduler may be made after the probe
                w.initial_lr = copied(group["initial_lr"])
            _run_before(w, param, state, group, pre, i)
            flat = local_real(param, w.span)
            pre.samples.request(i, "param", flat)
            if w.tracked is not None:
                at = to_device(w.tracked, flat.device)
                pre.tracked[i] = {"param": _read_flat(flat, at)}
            if w.rule is not None and w.rule.advance is not None:
                shape = param.shape
                for name, value in state.items():
                    if is_strided(value) and value.shape == shape and name != "step":
                        pre.samples.request(i, name, local_real(value, w.span))
            if param.grad is not None and not closure:
                pre.grads[i] = param.grad
                self._keep_gradient(i, w, param, group, pre)
            if w.previous is not None and w.previous[0].has(
                w.previous[1], "previous", flat.dtype, _checked(flat.numel())
            ):
                pre.samples.borrow(i, "previous", *w.previous)
        pre.samples.take()
        return pre

    def _keep_gradient(
        self,
        i: int,
        w: WatchedParameter,
        param: Tensor,
        group: Mapping[str, Any],
        pre: PreStep,
    ) -> None:
        """Keep samples and figures of a gradient that the optimizer may overwrite."""
        grad = param.grad
        if not overwrites_gradient(w.rule, group):
            return
        partial = any(each.is_partial() for each in getattr(grad, "placements", ()))
        if grad is None or grad.is_sparse or partial:
            return
        flat = local_real(grad, w.span)
        pre.samples.request(i, "grad", flat)
        if w.tracked is not None:
            at = to_device(w.tracked, flat.device)
            pre.tracked[i]["grad"] = _read_flat(flat, at)
        pre.gradient[i] = self.tensor_figures(GRADIENT, flat)

    def after(
        self,
        watched: Sequence[WatchedParameter],
        optimizer: torch.optim.Optimizer,
        pre: PreStep,
        grads: Mapping[int, Tensor | None] | None = None,
    ) -> StepFigures:
        """Reconstruct and summarise the step that has just been taken.

        Args:
            watched: the parameters.
            optimizer: their optimizer.
            pre: what ``before`` kept.
            grads: id of a parameter to the gradient to use instead of its own; None marks a
                gradient that is unknown.
        """
        found = StepFigures(failed=dict(pre.failed))
        found.skipped = copied(getattr(optimizer, "found_inf", None))
        found.scale = copied(getattr(optimizer, "grad_scale", None))
        rates = [_rate_of(group) for group in optimizer.param_groups]
        batches: dict[Any, Batch] = {}
        resting: list[tuple[int, Tensor]] = []
        latest = Samples(self.backends)
        for i, w in enumerate(watched):
            param = w.place()
            if param is None:
                continue
            found.lr[i] = rates[w.group]
            found.initial_lr[i] = torch.nan if w.initial_lr is None else w.initial_lr
            grad = param.grad if param.grad is not None else pre.grads.get(i)
            if grads is not None and id(param) in grads:
                grad = grads[id(param)]
            if grad is not None and "param" in pre.samples.names(i):
                group, state = optimizer.param_groups[w.group], optimizer.state.get(param, {})
                entry = entry_of(param, state, pre.scalars.get(i, {}), grad, w.span)
                self._assign(i, w, entry, group, pre, batches, found)
            else:
                resting.append((i, param))
        for batch in batches.values():
            found.vectors += self.batch_figures(batch, pre, found)
            self._track(batch, watched, pre, found)
            self._remember_gradients(batch, watched, pre, latest)
        latest.take()
        for i, param in resting:
            found.resting[i] = self._resting(param, watched[i].span)
        return found

    def _assign(
        self,
        i: int,
        w: WatchedParameter,
        entry: Entry,
        group: Mapping[str, Any],
        pre: PreStep,
        batches: dict[Any, Batch],
        found: StepFigures,
    ) -> None:
        """Add a piece to the batch of its kind; compute an empty piece's figures directly."""
        rule = None if i in pre.failed else w.rule
        if entry.param.numel() == 0:
            found.vectors.append(_empty_figures(i, entry, group, rule, found))
            return
        kind, addresses, contiguous = describe(self.backends, entry)
        key = w.group, rule, "grad" in pre.samples.names(i), contiguous, kind
        if key not in batches:
            batches[key] = Batch([], [], group, rule, whole=contiguous)
        batches[key].add(i, entry, addresses)

    def batch_figures(self, batch: Batch, pre: PreStep, found: StepFigures) -> list[Vectors]:
        """Figures of a batch by its rule; measured figures for pieces on which the rule fails."""
        if batch.rule is not None:
            try:
                if batch.rule.whole is not None:
                    add_batch_statistics(self.backends, batch, [batch.group] * len(batch.at))
                return [self.checked_figures(batch, pre)]
            except torch.OutOfMemoryError:  # not the rule's fault
                raise
            except Exception as error:  # noqa: BLE001 - a rule must never stop a training
                if len(batch.at) > 1:  # find the pieces on which it fails
                    return [
                        vectors
                        for i, entry in zip(batch.at, batch.entries, strict=True)
                        for vectors in self.batch_figures(
                            batch_of(self.backends, i, entry, batch.group, batch.rule), pre, found
                        )
                    ]
                found.failed[batch.at[0]] = cause(error)
                batch.rule = None
        return [self.checked_figures(batch, pre)]

    def checked_figures(self, batch: Batch, pre: PreStep) -> Vectors:
        """``FIGURES`` and ``CHECKS`` of a batch."""
        ruled = batch.rule is not None
        whole = self.figures(FIGURES, batch, rates=ruled)
        checks = self.figures(CHECKS, batch, rates=not ruled, samples=pre.samples)
        for row, i in enumerate(batch.at):
            if i in pre.gradient:
                for at, figure in enumerate(GRADIENT):
                    whole.table[row, column(figure.name)] = pre.gradient[i][at]
        scale = torch.tensor([n / _checked(n) for n in whole.numel], dtype=torch.float64)
        checked = checks.table * to_device(scale.unsqueeze(1), checks.table.device)
        table = torch.cat([whole.table, checked.to(whole.table.device, non_blocking=True)], 1)
        rates = whole if ruled else checks
        return Vectors(batch.at, table, whole.numel, rates.bins, rates.folded)

    def figures(
        self,
        table: Sequence[Figure],
        batch: Batch,
        *,
        rates: bool,
        samples: Samples | None = None,
    ) -> Vectors:
        """Figures of a batch: of all elements, or of the check sample if ``samples`` is given.

        Generated code reads tensors that are dense in memory; eager code handles all others.

        Raises:
            UnknownOperationError: if no code can be generated for a batch that may not be eager.
        """
        found = self._generated(table, batch, rates=rates, samples=samples)
        if found is not None:
            return found
        if not batch.may_be_eager:
            raise UnknownOperationError
        return _eager(table, batch, rates=rates, samples=samples)

    def _generated(
        self, table: Sequence[Figure], batch: Batch, *, rates: bool, samples: Samples | None
    ) -> Vectors | None:
        backend = self.backends.get(batch.entries[0].param.device.type)
        if backend is None or not batch.columns:
            return None
        recorded = self._recorded(table, batch, rates=rates, samples=samples)
        found = None if recorded is None else addresses_of(recorded, batch, samples, backend)
        if recorded is None or found is None:
            return None
        addresses, dtypes, _alive = found
        numel = [entry.param.numel() for entry in batch.entries]
        taken = numel if samples is None else [_checked(n) for n in numel]
        exact = samples is not None or batch.entries[0].param.dtype == torch.float64
        values, bins, folds = backend.figures(
            recorded, addresses, np.array(taken, np.int64), dtypes, exact=exact
        )
        return Vectors(batch.at, values, numel, bins, folds)

    def _recorded(
        self, table: Sequence[Figure], batch: Batch, *, rates: bool, samples: Samples | None
    ) -> Recorded | None:
        """The batch's program; None if the batch has to be computed eagerly."""
        kept: Sequence[Collection[str]] = ()
        if samples is not None:
            kept = batch.kept or [samples.names(i) for i in batch.at]
        key = table[0].name, batch.at[0], len(batch.at)
        if len(self._programs) > _MAX_PROGRAMS:
            self._programs.clear()
        try:
            recorded = record(
                table,
                batch.entries,
                batch.group,
                batch.rule,
                rates=rates,
                kept=kept,
                memo=batch.memo,
                known=self._programs.get(key),
            )
        except UnknownOperationError as error:
            name = batch.rule.name if batch.rule is not None else "the table"
            warn_eager_once(f"no code can be generated for {error} in the rule {name!r}")
            return None
        except Exception:  # noqa: BLE001 - if it is the rule's own error, eager code raises it too
            return None
        self._programs[key] = recorded.program
        return recorded

    def _track(
        self,
        batch: Batch,
        watched: Sequence[WatchedParameter],
        pre: PreStep,
        found: StepFigures,
    ) -> None:
        """Rate, update, gradient and value of the tracked elements."""
        for i, entry in zip(batch.at, batch.entries, strict=True):
            at, rule = watched[i].tracked, None if i in found.failed else batch.rule
            if at is None or not len(at) or i not in pre.tracked:
                continue
            at = to_device(at, entry.param.device)
            kept = {name: value.double() for name, value in pre.tracked[i].items()}
            s = eager.slice_of(entry, batch.group, at, torch.float64, old=kept, chosen=True)
            e = Elements(s, rule)
            if rule is None:
                rate: Any = torch.where(e.has_grad, e.measured_rate, torch.nan)
                change: Any = e.observed
            else:
                rate, change = torch.as_tensor(e.rate, dtype=torch.float64), e.change
                rate = to_device_float64(rate, e.param.device).expand(e.param.shape)
            sign = -1.0 if batch.group.get("maximize", False) else 1.0
            found.tracked[i] = torch.stack([rate, change, sign * e.grad, e.param])

    def _remember_gradients(
        self, batch: Batch, watched: Sequence[WatchedParameter], pre: PreStep, latest: Samples
    ) -> None:
        """Keep the check sample of each gradient for the next recorded step."""
        for i, entry in zip(batch.at, batch.entries, strict=True):
            if "grad" in pre.samples.names(i):  # the optimizer may have overwritten p.grad
                latest.put(i, "previous", pre.samples.tensor(i, "grad").clone())
            elif isinstance(entry.grad, Tensor):
                latest.request(i, "previous", entry.grad)
            else:
                latest.put(i, "previous", sample(entry.grad, entry.param.shape))
            watched[i].previous = latest, i

    def _resting(self, param: Tensor, span: slice | None) -> Tensor:
        """Σθ² of a parameter that took no step; NaN if its values cannot be read."""
        unknown = torch.tensor(torch.nan, dtype=torch.float64)
        if param.device.type == "meta":  # it has no values
            return unknown
        try:
            return self.tensor_figures(PARAM, local_real(param, span))[0]
        except (RuntimeError, NotImplementedError, TypeError):
            return unknown  # a tensor subclass with its own storage format

    def tensor_figures(self, table: Sequence[Figure], tensor: Tensor) -> Tensor:
        """Figures of one tensor that need no rule."""
        batch = batch_of(self.backends, 0, Entry(tensor, tensor), {}, None)
        return self.figures(table, batch, rates=False).table[0]


def _eager(
    table: Sequence[Figure], batch: Batch, *, rates: bool, samples: Samples | None
) -> Vectors:
    """Compute the figures of a batch piece by piece, with plain tensor operations."""
    values, bins, folds, numel = [], [], [], []
    for place, (i, entry) in enumerate(zip(batch.at, batch.entries, strict=True)):
        numel.append(entry.param.numel())
        if samples is None:
            found, counts = eager.figures(
                table, flattened(entry), batch.group, batch.rule, rates=rates
            )
        else:
            found, counts = eager.figures(
                table,
                sampled(entry),
                batch.group,
                batch.rule,
                rates=rates,
                dtype=torch.float64,
                old=samples.old(i),
            )
        values.append(found)
        if counts is not None and counts.table.device.type == "cpu":
            bins.append(Bins.of(place, counts))
        elif counts is not None:
            folds.append(fold(counts.table))
    return Vectors(
        batch.at,
        torch.stack(values),
        numel,
        Bins.joined(bins) if bins else None,
        torch.stack(folds) if folds else None,
    )


def _empty_figures(
    i: int, entry: Entry, group: Mapping[str, Any], rule: Rule | None, found: StepFigures
) -> Vectors:
    try:
        values, _ = eager.figures(FIGURES, entry, group, rule, rates=False, dtype=torch.float64)
    except Exception as error:
        if rule is None:
            raise
        found.failed[i] = cause(error)
        return _empty_figures(i, entry, group, None, found)
    checks = torch.zeros(len(CHECKS), dtype=torch.float64)
    return Vectors([i], torch.cat([values.cpu(), checks]).unsqueeze(0), [0])


def _run_before(
    w: WatchedParameter,
    param: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    pre: PreStep,
    i: int,
) -> None:
    if w.rule is not None and w.rule.before is not None:
        try:
            pre.scalars[i] = w.rule.before(local(param).detach(), state, group)
        except Exception as error:  # noqa: BLE001 - a rule must never stop a training
            pre.failed[i] = cause(error)


def _read_flat(flat: Tensor, at: Tensor) -> Tensor:
    return read(flat, at, flat.shape)


def _checked(numel: int) -> int:
    """Number of elements in the check sample of a piece."""
    runs, run, _ = sample_runs(numel)
    return runs * run


def _rate_of(group: Mapping[str, Any]) -> Scalar:
    rate: Scalar = copied(torch.nan if group.get("lr") is None else group["lr"])
    return rate


def undisturbed() -> AbstractContextManager[Any]:
    """Shield the figures from the user's autograd and autocast settings."""
    casting = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return _without_autocast(casting) if casting else torch.no_grad()


@contextmanager
def _without_autocast(kinds: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def copied(value: Any) -> Any:
    """A hyperparameter's current value: a tensor is copied, anything else returned as it is."""
    return local(value).detach().clone() if isinstance(value, Tensor) else value


def cause(error: Exception) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}"
