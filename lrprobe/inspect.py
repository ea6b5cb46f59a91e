"""Everything about one step, per element: ``inspect_step`` and ``effective_lr``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrprobe.distributed import deepspeed
from lrprobe.engine.eager import add_whole_statistics, slice_of
from lrprobe.engine.figures import Elements, unexplained
from lrprobe.engine.pieces import entry_of, local_real, precision
from lrprobe.names import Names, find_optimizers, name_parameters
from lrprobe.notebook import step_html
from lrprobe.rules import Rule, Slice, Update, find_rule
from lrprobe.rules.base import Entry, has_closure, tolerance, writes_of
from lrprobe.text import listed, warn


@dataclass(frozen=True, slots=True)
class StepView:
    """One parameter's step: θ_after = θ_before · (1 − decay) − effective_lr ⊙ direction.

    Tensors have the parameter's shape, in float64 for float64 parameters, else float32. Those of
    a complex parameter are complex, and hold the value for each real and imaginary part.

    Attributes:
        effective_lr: the factor of each element's direction; NaN if it was measured and the
            gradient is 0.
        direction: what the rate multiplies, according to the optimizer's rule.
        decay: the decoupled weight decay of this step.
        update: Δθ as intended, before the parameter's dtype rounds it, decay included.
        rule: name of the rule, or ``measured``.
        error: how far the rule is from the actual step, as ``reconstruction_error`` in the
            frame; NaN if nothing moved or there is no rule.
    """

    effective_lr: Tensor
    direction: Tensor
    decay: float
    update: Tensor
    rule: str
    error: float

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.effective_lr.shape)) or "a scalar"
        dtype = str(self.effective_lr.dtype).removeprefix("torch.")
        return f"<StepView {shape} {dtype}, rule {self.rule}, error {self.error:.2g}>"

    def _repr_html_(self) -> str:
        return step_html(self)


class Steps(Mapping[str, StepView]):
    """Name to :class:`StepView`, of the last step taken inside ``inspect_step``."""

    def __init__(self) -> None:
        self._views: dict[str, StepView] = {}
        self._taken = False

    def set(self, views: Mapping[str, StepView]) -> None:
        """Set the views of a step."""
        self._views.update(views)
        self._taken = True

    def __getitem__(self, name: str) -> StepView:
        if not self._taken:
            raise RuntimeError(
                "no step was taken inside inspect_step: call optimizer.step() in the with block"
            )
        if name not in self._views:
            raise KeyError(f"{name!r} took no step; these parameters did: {', '.join(self._views)}")
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        if not self._taken:
            return "<no step yet>"
        views = (f"{name!r}: {view!r}" for name, view in self._views.items())
        return f"{{{', '.join(views)}}}"


@contextmanager
def inspect_step(optimizer: Any, model: nn.Module | None = None) -> Iterator[Steps]:
    """Reconstruct everything about the step taken inside the ``with`` block, per element.

    Keeps a copy of the parameters while it is open.

    Args:
        optimizer: as for :func:`lrprobe.attach`.
        model: gives the parameters their names.

    Yields:
        Name to :class:`StepView`, filled when ``optimizer.step()`` returns.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or ``model`` is not a module.
    """
    names = Names(model)
    steps = Steps()
    handles = []
    for each in find_optimizers(optimizer).values():
        watch = _StepWatcher(_OptimizerParameters(each, names), steps)
        handles.append(each.register_step_pre_hook(watch.before))
        handles.append(each.register_step_post_hook(watch.after))
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


class _OptimizerParameters:
    """The parameters of an optimizer: tensors of their own, or ranges of flat tensors."""

    def __init__(self, optimizer: Optimizer, names: Names) -> None:
        self._names = names
        self._parts = deepspeed.parts_of(optimizer, names)

    def all_of(
        self, optimizer: Optimizer, *, now: bool = False
    ) -> Iterator[tuple[Mapping[str, Any], str, Tensor, slice | None]]:
        """(group, name, tensor, range of it); with ``now``, only those of the current call."""
        groups: list[dict[str, Any]] = optimizer.param_groups
        if self._parts is None:
            for index, name, param in name_parameters(optimizer, self._names.now()):
                yield groups[index], name, param, None
            return
        self._parts.begin(optimizer)
        here = {id(param) for group in groups for param in group["params"]}
        groups = self._parts.param_groups
        for each in self._parts.watchable():
            tensor = each.place()
            empty = each.span is not None and each.span.start == each.span.stop
            if tensor is not None and not empty and (not now or id(tensor) in here):
                yield groups[each.group], each.name, tensor, each.span


class _StepWatcher:
    def __init__(self, held: _OptimizerParameters, steps: Steps) -> None:
        self._held = held
        self._steps = steps
        self._kept: dict[str, tuple[int, Tensor, dict[str, Any], Tensor | None]] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rule = find_rule(type(optimizer))
        for group, name, param, span in self._held.all_of(optimizer, now=True):
            extra: dict[str, Any] = {}
            if rule is not None and rule.before is not None:
                extra.update(rule.before(param.detach(), optimizer.state.get(param, {}), group))
            grad = param.grad if rule is None and not has_closure(args, kwargs) else None
            grad = None if grad is None else grad.detach().clone()
            self._kept[name] = id(param), local_real(param, span).clone(), extra, grad

    @torch.no_grad()
    def after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        views: dict[str, StepView] = {}
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return  # a fused optimizer skipped the step for the gradient scaler
        own = find_rule(type(optimizer))
        unexplained = []
        for group, name, param, span in self._held.all_of(optimizer, now=True):
            kept, old, extra, grad = self._kept.get(name, (0, param, {}, None))
            if param.grad is None or kept != id(param):
                continue
            entry = entry_of(param, optimizer.state.get(param, {}), extra, grad, span)
            rule = None if own is not None and own.whole and span is not None else own
            try:
                view = _view(entry, group, rule, old, param)
            except Exception:  # noqa: BLE001 - a rule that fails explains nothing
                view = _view(entry, group, None, old, param, float("inf"))
            if rule is not None and view.error > tolerance(param.dtype, rule):
                unexplained.append(name)
                view = _view(entry, group, None, old, param, view.error)
            views[name] = view
        if unexplained:
            warn(
                f"the rule {own.name if own else ''!r} does not explain the step of "
                f"{listed(unexplained)}, so it is shown as measured"
            )
        self._steps.set(views)


def reconstruct(
    entry: Entry, group: Mapping[str, Any], rule: Rule, old: Mapping[str, Tensor] | None = None
) -> tuple[Slice, Update]:
    """A whole parameter as one flat slice, and the update of its rule.

    ``old`` has flat tensors from before the step.
    """
    add_whole_statistics(entry, group, rule)
    everything = slice(0, entry.param.numel())
    s = slice_of(entry, group, everything, precision(entry.param), old=old)
    return s, rule.update(s)


def _view(
    entry: Entry,
    group: Mapping[str, Any],
    rule: Rule | None,
    old: Tensor,
    param: Tensor,
    error: float = float("nan"),
) -> StepView:
    before = old.reshape(-1).to(torch.float64)
    after = entry.param.reshape(-1).to(torch.float64)
    if rule is None:
        everything = slice(0, len(after))
        e = Elements(slice_of(entry, group, everything, torch.float64, old={"param": before}), None)
        # If the rate is 0, nothing moved, and the direction is arbitrary.
        rate: Any = torch.where(e.has_grad, e.measured_rate, torch.nan)
        direction = torch.where(rate == 0, e.grad, -e.observed / rate)
        change, decay, name = e.observed, 0.0, "measured"
    else:
        _, update = reconstruct(entry, group, rule, {"param": old.reshape(-1)})
        rate, direction, decay = update.effective_lr, update.direction, float(update.decay)
        change = -decay * old.reshape(-1).to(direction.dtype) - rate * direction
        name = rule.name
        error = step_error(change.double(), before, after, group, rule, decay, old.dtype)

    def shaped(value: Any) -> Tensor:
        value = torch.as_tensor(value, dtype=precision(entry.param), device=after.device)
        value = value.expand(after.shape).reshape(entry.param.shape).clone()
        return torch.view_as_complex(value) if param.is_complex() else value

    return StepView(shaped(rate), shaped(direction), decay, shaped(change), name, error)


def step_error(
    change: Tensor,
    before: Tensor,
    after: Tensor,
    group: Mapping[str, Any],
    rule: Rule,
    decay: float,
    dtype: torch.dtype,
) -> float:
    """``reconstruction_error`` of all elements of a parameter, in float64."""
    observed = after - before
    writes = writes_of(rule, group)
    beyond = unexplained(change, before, after, dtype, writes=writes, decays=decay != 0)
    moved = torch.maximum(change.norm(), observed.norm())
    return float(beyond.norm() / moved)


def effective_lr(optimizer: Any, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the rate of each element in the last step, from the optimizer's state alone.

    Call it right after ``optimizer.step()``, before a scheduler changes the rate or the next
    backward pass changes the gradients.

    Args:
        optimizer: as for :func:`lrprobe.attach`.
        model: gives the parameters their names.

    Returns:
        Name to a tensor of the parameter's shape; parameters that have not stepped are omitted.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or ``model`` is not a module.
        RuntimeError: before the first step, or if the state no longer determines the rate; use
            ``inspect_step`` then.
    """
    names = Names(model)
    rates: dict[str, Tensor] = {}
    for each in find_optimizers(optimizer).values():
        rule = find_rule(type(each))
        kind = type(each).__name__
        if rule is None or rule.before is not None:
            raise RuntimeError(
                f"the state of {kind} after a step does not determine its effective rate; "
                "use lrprobe.inspect_step around optimizer.step()"
            )
        found = {}
        held = _OptimizerParameters(each, names)
        # If all gradients are zero, zero_grad(set_to_none=False) was called.
        gradients = [p.grad for g in each.param_groups for p in g["params"] if p.grad is not None]
        zeroed = rule.needs_grad and not any(bool(torch.count_nonzero(g)) for g in gradients)
        for group, name, param, span in held.all_of(each):
            state = each.state.get(param, {})
            if span is not None and rule.whole:
                continue
            if state or (param.grad is not None and not _keeps_state(rule, group)):
                found[name] = _last_rate(param, state, group, rule, kind, span, zeroed=zeroed)
        if not found:
            raise RuntimeError(
                f"the state of {kind} shows no step: call effective_lr after optimizer.step() "
                "and before zero_grad(), or use lrprobe.inspect_step around the step"
            )
        rates |= found
    return rates


def _keeps_state(rule: Rule, group: Mapping[str, Any]) -> bool:
    return not (rule.name == "sgd" and not group.get("momentum"))


@torch.no_grad()
def _last_rate(
    param: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    rule: Rule,
    kind: str,
    span: slice | None,
    *,
    zeroed: bool,
) -> Tensor:
    if rule.needs_grad and (param.grad is None or zeroed):
        raise RuntimeError(
            f"the effective rate of {kind} depends on the gradient of the step, which no longer "
            "exists: call effective_lr before zero_grad(), or use lrprobe.inspect_step"
        )
    if param.grad is None:
        blank = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
        entry = entry_of(param, state, {}, blank, span)
    else:
        entry = entry_of(param, state, {}, None, span)
    try:
        _, update = reconstruct(entry, group, rule)
    except Exception as error:
        raise RuntimeError(
            f"the state of {kind} does not determine its effective rate ({type(error).__name__}: "
            f"{error}); use lrprobe.inspect_step around optimizer.step()"
        ) from error
    rate: Any = update.effective_lr
    rate = torch.as_tensor(rate, dtype=precision(entry.param), device=param.device)
    rate = rate.expand(entry.param.numel()).reshape(entry.param.shape).clone()
    return torch.view_as_complex(rate) if param.is_complex() else rate
