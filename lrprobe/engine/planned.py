"""Reads steps as planned: before and after each, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lrprobe.engine import Engine, PreStep, copied
from lrprobe.engine.batch import Batch, add_batch_statistics, batch_of
from lrprobe.engine.buffers import StepFigures, Vectors
from lrprobe.engine.check import Place, Samples, zeros
from lrprobe.engine.copies import Copy, is_number
from lrprobe.engine.figures import GRADIENT
from lrprobe.engine.pieces import WatchedParameter
from lrprobe.engine.plan import (
    Piece,
    Plan,
    UnusualError,
    is_own,
    plain_groups,
)
from lrprobe.rules.base import Entry, Rule, Scalar, column

_MAX_MISSES = 40
_CPU = torch.device("cpu")


@dataclass(slots=True)
class PlannedPreStep(PreStep):
    """What is kept from before a step, all of it in one buffer."""

    plan: Plan | None = None
    buffer: Tensor | None = None


class Planned:
    """Reads the steps of one optimizer by a plan, as long as that pays off."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._plan: Plan | None = None
        self._watched: list[WatchedParameter] = []
        self._misses = 0

    def before(
        self, watched: list[WatchedParameter], optimizer: Any, *, closure: bool
    ) -> PlannedPreStep | None:
        """Copy what the step will overwrite; None if the step is unusual."""
        if watched is not self._watched:
            self._watched, self._misses = watched, 0
        if self._misses > _MAX_MISSES or getattr(optimizer, "found_inf", None) is not None:
            return None
        try:
            plan, entries = self._fitting(watched, optimizer, closure)
            buffer = plan.copy_before(entries)
            scalars = _scalars(watched, entries, optimizer)
        except UnusualError:
            self._plan = None
            self._misses = _MAX_MISSES + 1
            return None
        if buffer is None:
            self._misses += 2
            return None
        grads: dict[int, Tensor] = {}
        if not closure:  # then they do not exist yet
            grads = {i: e.grad for i, e in enumerate(entries) if isinstance(e.grad, Tensor)}
        for w in watched:
            w.initial_lr = optimizer.param_groups[w.group].get("initial_lr", w.initial_lr)
        samples = Samples.over(self._engine.backends, [buffer], plan.before.places)
        return PlannedPreStep(samples, grads=grads, scalars=scalars, plan=plan, buffer=buffer)

    def _fitting(
        self, watched: list[WatchedParameter], optimizer: Any, closure: bool
    ) -> tuple[Plan, list[Entry]]:
        plan = self._plan
        entries = None
        if plan is not None and plan.closure == closure:
            entries = plan.find(watched, optimizer)
        if plan is None or entries is None:
            self._misses += 4
            plain_groups(optimizer)
            plan = self._plan = Plan(self._engine.backends, watched, optimizer, closure=closure)
            entries = plan.find(watched, optimizer)
        if entries is None:
            raise UnusualError
        return plan, entries

    def after(self, optimizer: Any, pre: PlannedPreStep) -> Copy | None:
        """Copy the step that was taken; None if its tensors are not those that were planned."""
        plan, buffer = pre.plan, pre.buffer
        if plan is None or buffer is None:
            return None
        entries = plan.find(plan.watched, optimizer)
        if entries is None:
            return None
        try:
            groups = plain_groups(optimizer)
        except UnusualError:
            return None
        for i, grad in pre.grads.items():
            if entries[i].grad is None:  # the step dropped it
                entries[i].grad = grad
        after = plan.copy_after(entries)
        if after is None:
            return None
        self._misses = max(0, self._misses - 1)
        latest = Samples.over(self._engine.backends, [buffer, after], plan.previous)
        initial = [w.initial_lr for w in plan.watched]
        previous = [w.previous for w in plan.watched]
        for i, w in enumerate(plan.watched):
            w.previous = latest, i
        numbers = plan.numbers(entries) if plan.small else []
        entries = [] if plan.small else entries
        buffers = [buffer, after]
        return Copy(plan, buffers, numbers, groups, initial, pre.scalars, previous, entries)

    def restored(self, pre: PlannedPreStep) -> PreStep:
        """What was kept, for a step that turned out to be unusual."""
        plan = pre.plan
        if plan is None or pre.buffer is None:
            return pre
        self._misses += 2
        places = {at: dict(names) for at, names in plan.before.places.items()}
        pre.samples = Samples.over(self._engine.backends, [pre.buffer], places)
        for at, w in enumerate(plan.watched):
            if "grad" in places[at]:
                grad = pre.samples.tensor(at, "grad")
                pre.gradient[at] = self._engine.tensor_figures(GRADIENT, grad)
            _borrow(pre.samples, at, w.previous, plan.after.places[at]["grad"])
        return pre


def _scalars(
    watched: Sequence[WatchedParameter], entries: Sequence[Entry], optimizer: Any
) -> dict[int, Mapping[str, Scalar]]:
    """What ``Rule.before`` returns."""
    found: dict[int, Mapping[str, Scalar]] = {}
    for i, (w, entry) in enumerate(zip(watched, entries, strict=True)):
        if w.rule is not None and w.rule.before is not None:
            try:
                group = optimizer.param_groups[w.group]
                kept = w.rule.before(entry.param.detach(), entry.state, group)
                found[i] = {name: copied(value) for name, value in kept.items()}
            except Exception as error:
                raise UnusualError from error
    return found


def figures_of(engine: Engine, copies: Sequence[Copy]) -> StepFigures:
    """Figures of some steps of one kind; parameter i of step k is k · parameters + i.

    Steps that are not small come one at a time, at once: the figures read the optimizer's tensors.
    """
    plan, count = copies[0].plan, len(copies[0].plan.watched)
    found = StepFigures()
    steps = list(enumerate(copies))
    pre = PreStep(Samples({}) if plan.small else _kept(engine, steps))
    for k, copy in enumerate(copies):
        for i, (w, initial) in enumerate(zip(plan.watched, copy.initial, strict=True)):
            rate = copy.groups[w.group].get("lr")
            found.lr[k * count + i] = math.nan if rate is None else rate
            found.initial_lr[k * count + i] = math.nan if initial is None else initial
    for rule, pieces in plan.kinds():
        _add_figures(engine, steps, rule, pieces, pre, found)
    return found


def _add_figures(
    engine: Engine,
    steps: Sequence[tuple[int, Copy]],
    rule: Rule | None,
    pieces: Sequence[Piece],
    pre: PreStep,
    found: StepFigures,
) -> None:
    """Add the figures of some pieces in some steps, which are numbered."""
    batch = _batch(steps, rule, pieces)
    try:
        if rule is not None and rule.whole is not None:
            _add_whole(engine, batch, steps, pieces)
        if "grad" in steps[0][1].plan.before.places[pieces[0].at]:
            _add_gradients(engine, batch, pre)
        found.vectors.append(engine.checked_figures(batch, pre))
    except torch.OutOfMemoryError:  # not the rule's fault
        raise
    except Exception:  # noqa: BLE001 - no code can be generated, or the rule fails
        if len(steps) > 1:  # it may fail because a hyperparameter is not one number
            for step in steps:
                _add_figures(engine, [step], rule, pieces, pre, found)
        else:
            pre.samples = _kept(engine, steps)
            for row, piece in enumerate(pieces):
                found.vectors += _alone(engine, batch, row, steps[0][1], piece, pre, found)


def _kept(engine: Engine, steps: Sequence[tuple[int, Copy]]) -> Samples:
    """What was kept from before each of some numbered steps."""
    places: dict[int, dict[str, Place]] = {}
    count = len(steps[0][1].plan.watched)
    for buffer, (k, copy) in enumerate(steps):
        for at, names in copy.plan.before.places.items():
            places[k * count + at] = {name: (buffer, *place[1:]) for name, place in names.items()}
    samples = Samples.over(engine.backends, [copy.buffers[0] for _, copy in steps], places)
    for k, copy in steps:
        for at, previous in enumerate(copy.previous):
            _borrow(samples, k * count + at, previous, copy.plan.after.places[at]["grad"])
    return samples


def _borrow(samples: Samples, at: int, previous: tuple[Samples, int] | None, grad: Place) -> None:
    """Refer to the gradient of the last recorded step, if there is one that fits."""
    if _fits(previous, grad):
        samples.borrow(at, "previous", *previous)


def _fits(previous: tuple[Samples, int] | None, grad: Place) -> TypeGuard[tuple[Samples, int]]:
    """Whether a gradient of the last recorded step is known, of the same dtype and size."""
    return previous is not None and previous[0].has(previous[1], "previous", *grad[2:])


def _batch(steps: Sequence[tuple[int, Copy]], rule: Rule | None, pieces: Sequence[Piece]) -> Batch:
    """The batch of some pieces of all steps; numbers that differ between steps are columns."""
    copies = [copy for _, copy in steps]
    plan, group, count = copies[0].plan, pieces[0].group, len(copies[0].plan.watched)
    if len(copies) == 1 or is_own(rule):
        known = _group(copies[0], group, rule)
    else:  # each step has its own ``params``
        known = {**copies[0].groups[group]}
    for name, first in copies[0].groups[group].items():
        values = [copy.groups[group][name] for copy in copies]
        if is_number(first) and any(value != first for value in values):
            known[name] = column([value for value in values for _ in pieces], _CPU)
    indices = [piece.at for piece in pieces]
    rows = [k * count + at for k, _ in steps for at in indices]
    one = len(rows) == 1
    entries = [copy.entry_for_rules(at, one=one) for copy in copies for at in indices]
    batch = Batch(rows, entries, known, rule, may_be_eager=not plan.small)
    if isinstance(known.get("lr"), Tensor):
        batch.memo["lr"] = known["lr"]
    after = [copy.buffers[1] for copy in copies]
    for name in (*pieces[0].tensors, "grad"):
        copied = plan.after.addresses(after, name, indices)
        where = copied if plan.small else [piece.addresses[name] for piece in pieces]
        batch.columns[name] = where
        batch.sampled[name] = [a or b for a, b in zip(copied, where, strict=True)]
    _add_kept(batch, copies, indices)
    return batch


def _add_kept(batch: Batch, copies: Sequence[Copy], pieces: Sequence[int]) -> None:
    """Add the samples from before the steps, and the gradients of the recorded steps before."""
    plan = copies[0].plan
    names = plan.before.places.get(pieces[0], {})
    for name in names:
        before = [copy.buffers[0] for copy in copies]
        batch.sampled[f"old {name}"] = plan.before.addresses(before, name, pieces)
    nothing = zeros(_CPU).data_ptr()
    previous = batch.sampled["old previous"] = []
    alone, known = frozenset(names), frozenset([*names, "previous"])
    for copy in copies:
        for at in pieces:
            last = copy.previous[at]
            if _fits(last, plan.after.places[at]["grad"]):
                previous.append(last[0].address(last[1], "previous", _CPU))
                batch.kept.append(known)
            else:
                previous.append(nothing)
                batch.kept.append(alone)


def _group(copy: Copy, group: int, rule: Rule | None) -> dict[str, Any]:
    """A group in a step; only a user's rule gets parameters with values."""
    pieces = [piece for piece in copy.plan.pieces if piece.group == group]
    params = [piece.like.param for piece in pieces]
    if not is_own(rule):
        entries = [copy.entry(piece.at) for piece in pieces]
        params = [entry.param for entry in entries]
        if copy.plan.small:
            for entry in entries:
                entry.param.grad = entry.grad  # type: ignore[assignment]
    return {**copy.groups[group], "params": params}


def _add_whole(
    engine: Engine, batch: Batch, steps: Sequence[tuple[int, Copy]], pieces: Sequence[Piece]
) -> None:
    """Replace the entries by such with values, and add ``Rule.whole``'s statistics of each."""
    batch.entries[:] = [copy.entry(piece.at) for _, copy in steps for piece in pieces]
    groups = [_group(copy, pieces[0].group, batch.rule) for _, copy in steps]
    each = [group for group in groups for _ in pieces]
    add_batch_statistics(engine.backends, batch, each)


def _add_gradients(engine: Engine, batch: Batch, pre: PreStep) -> None:
    """Figures of gradients that the step may have overwritten."""
    addresses = batch.sampled["old grad"]
    columns = {"param": addresses, "grad": addresses}
    grads = Batch(batch.at, batch.entries, {}, None, columns, may_be_eager=False)
    table = engine.figures(GRADIENT, grads, rates=False).table
    pre.gradient |= dict(zip(batch.at, table, strict=True))


def _alone(
    engine: Engine,
    batch: Batch,
    row: int,
    copy: Copy,
    piece: Piece,
    pre: PreStep,
    found: StepFigures,
) -> list[Vectors]:
    """Figures of one piece of a batch, from tensors of its own."""
    at, entry = batch.at[row], copy.entry(piece.at)
    if "grad" in pre.samples.names(at):
        grad = pre.samples.tensor(at, "grad")
        pre.gradient[at] = engine.tensor_figures(GRADIENT, grad)
    group = _group(copy, piece.group, batch.rule)
    one = batch_of(engine.backends, at, entry, group, batch.rule)
    return engine.batch_figures(one, pre, found)
