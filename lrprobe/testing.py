"""The oracle for rules: compares a rule with the optimizer's actual steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrprobe.engine.pieces import entry_of, local_real
from lrprobe.inspect import reconstruct, step_error
from lrprobe.rules import Rule, find_rule

SHAPES = ((5, 7), (11,), (3, 2, 4, 2), ())


def check_rule(
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    steps: int = 10,
    tolerance: float = 1e-12,
) -> float:
    """Verify an optimizer's rule against real steps, with a gradient spike in the middle.

    After each step, θ_before·(1 − decay) − effective_lr⊙direction, reconstructed from the state
    after the step, must equal θ_after.

    Args:
        make_optimizer: given parameters, returns the optimizer with the options to verify.
        shapes: shapes of the parameters.
        dtype: their dtype.
        steps: how many steps to take.
        tolerance: largest error allowed, relative to the step, beyond one rounding of the
            parameter.

    Returns:
        The largest error seen.

    Raises:
        AssertionError: if the rule does not explain a step; the message shows both numbers.
        TypeError: if ``make_optimizer`` is not a function, or does not return an optimizer.
        LookupError: if the optimizer's class has no rule.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    params: list[Tensor] = [nn.Parameter(random(shape)) for shape in shapes]
    optimizer = _made(make_optimizer, params)
    if any(group.get("differentiable") for group in optimizer.param_groups):
        params = [param.clone() for param in params]  # torch refuses to step a leaf then
        optimizer = _made(make_optimizer, params)
    rule = find_rule(type(optimizer))
    if rule is None:
        raise LookupError(
            f"{type(optimizer).__name__} has no rule: register one with lrprobe.register_rule"
        )
    worst = 0.0
    for step in range(1, steps + 1):
        owned = [(group, param) for group in optimizer.param_groups for param in group["params"]]
        for param in params:
            scale = 1e3 if step == steps // 2 else 1.0
            param.grad = random(param.shape) * scale
        before = [local_real(param).clone() for _, param in owned]
        kept = [
            dict(rule.before(p.detach(), optimizer.state.get(p, {}), g)) if rule.before else {}
            for g, p in owned
        ]
        optimizer.step()
        for (group, param), old, extra in zip(owned, before, kept, strict=True):
            error, numbers = _explained(param, old, extra, group, rule, optimizer)
            worst = max(worst, error)
            if numbers and not error <= tolerance:
                raise AssertionError(
                    f"rule {rule.name!r} does not explain step {step} of a parameter of shape "
                    f"{tuple(param.shape)} under {type(optimizer).__name__}: error {error:.3g} > "
                    f"{tolerance:g}\n{numbers}"
                )
    return worst


def _made(make_optimizer: Callable[[list[Tensor]], Optimizer], params: list[Tensor]) -> Optimizer:
    if not callable(make_optimizer):
        raise TypeError(
            f"check_rule takes a function that accepts parameters; got {make_optimizer!r}"
        )
    made = make_optimizer(params)
    if not isinstance(made, Optimizer):
        raise TypeError(f"make_optimizer must return an Optimizer; got {made!r}")
    return made


def _explained(
    param: Tensor,
    old: Tensor,
    extra: dict[str, Any],
    group: dict[str, Any],
    rule: Rule,
    optimizer: Optimizer,
) -> tuple[float, str]:
    """The error of one parameter's step, and a text with the element that differs most.

    The text is empty if nothing moved.
    """
    with torch.no_grad():
        entry = entry_of(param, optimizer.state.get(param, {}), extra)
        s, update = reconstruct(entry, group, rule)
        start = old.reshape(-1).to(s.param.dtype)
        predicted = start * (1 - update.decay) - update.effective_lr * update.direction
        change = (predicted - start).double()
        observed = (s.param - start).double()
        after = s.param.double()
        decay = float(update.decay)
        error = step_error(change, start.double(), after, group, rule, decay, old.dtype)
    if not bool(change.count_nonzero()) and not bool(observed.count_nonzero()):
        return 0.0, ""
    at = int((predicted - s.param).abs().nan_to_num(torch.inf).argmax())
    return error, (
        f"  largest at element {at}: before {start[at]:.17g}\n"
        f"  after, by the rule:      {predicted[at]:.17g}\n"
        f"  after, actual:           {s.param[at]:.17g}"
    )
