"""THE TABLE of figures: what each accumulates over elements, and how it merges.

Eager code, generated code, the messages between ranks and the columns of the frame are derived
from it. A figure of a parameter is a sum, a minimum or a maximum over its elements, so figures of
blocks, pieces, parameters, modules and ranks all merge the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lrprobe.engine.program import Symbol, is_elementwise, wide
from lrprobe.rules.base import Rule, Slice, Update, as_tensor, writes_of

STATES = 3
"""Maximum number of state entries of a rule that the check compares."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table.

    Attributes:
        name: its name in ``columns.py``.
        of: computes its value at each element; a scalar if all elements share it, None if there
            is none.
        merge: the reduction over elements, pieces, parameters and ranks.
        moving: whether only elements that move count.
        squared: whether the squares of the values are reduced.
    """

    name: str
    of: Callable[[Elements], Any]
    merge: Literal["sum", "min", "max"] = "sum"
    moving: bool = False
    squared: bool = False

    def value(self, e: Elements) -> Any:
        """What is reduced."""
        value = self.of(e)
        if not self.squared or value is None:
            return value
        value = value.double() if isinstance(value, Tensor) else value  # a scalar, maybe float32
        return value * value


class Elements:
    """What figures read: elements of one step, and the rule's update of them.

    Values are element-wise tensors or symbols, or scalars if all elements share a value.
    """

    def __init__(self, s: Slice, rule: Rule | None) -> None:
        self._s = s
        self._rule = rule
        self._update: Update | None = None if rule is None else rule.update(s)

    @cached_property
    def param(self) -> Tensor:
        """θ after the step."""
        return wide(self._s.param)  # type: ignore[no-any-return]

    @cached_property
    def raw_grad(self) -> Tensor:
        """The gradient of the step, even if the optimizer has overwritten ``p.grad``."""
        given = None if self._update is None else self._update.grad
        if given is None and self._update is None and self._s.keeps("grad"):
            old: Any = self._s.old("grad")  # an optimizer without a rule may have overwritten it
            given = -old if self._s.group.get("maximize", False) else old
        return self._s.grad if given is None else given

    @cached_property
    def grad(self) -> Tensor:
        """The gradient in the precision of sums."""
        return wide(self.raw_grad)  # type: ignore[no-any-return]

    @property
    def rate(self) -> Any:
        """The effective learning rate, in the precision of the elements."""
        return None if self._update is None else self._update.effective_lr

    @cached_property
    def wide_rate(self) -> Any:
        """The effective learning rate in the precision of sums."""
        return wide(self.rate)

    @cached_property
    def direction(self) -> Any:
        """What the rate multiplies."""
        return None if self._update is None else wide(self._update.direction)

    @cached_property
    def moves(self) -> Any:
        """Whether an element moves: its direction is not exactly 0."""
        if self._update is None:
            return None
        direction = self._update.direction
        return True if _has_no_zero(direction) else direction != 0

    @cached_property
    def extremes(self) -> tuple[Any, Any]:
        """The smallest and the largest rate, if all elements move and can be looked at."""
        if self.moves is True and _on_host(self.rate):
            return torch.aminmax(self.rate)
        return self.rate, self.rate

    @cached_property
    def moved(self) -> Any:
        """rate ⊙ direction."""
        return None if self._update is None else self.wide_rate * self.direction

    @cached_property
    def descent(self) -> Any:
        """−Δθ before any rounding, computed from the state after the step only."""
        if self._update is None:
            return None
        decay = self._update.decay
        if not isinstance(decay, Tensor) and decay == 0:
            return self.moved
        decay = torch.as_tensor(decay, dtype=torch.float64)
        left = 1 / (1 - decay)
        if _on_host(self.param) and decay.is_cpu and decay.numel() == 1:  # one pass less
            return torch.add(self.moved * left, self.param, alpha=(decay * left).numpy().item())
        return (self.moved + decay * self.param) * left

    @property
    def decay(self) -> Any:
        """The decoupled decay, a scalar."""
        return None if self._update is None else self._update.decay

    @property
    def rms_grad(self) -> Any:
        """Root of the second-moment estimate."""
        return None if self._update is None else self._update.rms_grad

    @property
    def rms_update(self) -> Any:
        """Root of the estimate of squared updates."""
        return None if self._update is None else self._update.rms_update

    @cached_property
    def below_eps(self) -> Any:
        """Whether ε is at least as large as the statistic that it is added to."""
        if self._update is None or self._update.eps is None:
            return None
        statistic, eps = self._update.eps
        if _on_host(statistic) and (statistic.amin() > eps).numpy():
            return False
        return statistic <= eps

    @property
    def zeros(self) -> Any:
        """Whether the gradient is 0."""
        return False if _has_no_zero(self.raw_grad) else self.raw_grad == 0

    @cached_property
    def nonfinite(self) -> Any:
        """Whether parameter, gradient or a state entry is NaN or infinite."""
        tensors = self._s.param, self._s.grad, *map(self._s.__getitem__, self._s.states)
        if _on_host(tensors[0]) and all(math.isfinite(t.sum().numpy()) for t in tensors):
            return False
        nothing: Any = tensors[0] * 0  # NaN for NaN and infinity; x - x is simplified to 0
        for tensor in tensors[1:]:
            nothing = nothing + tensor * 0
        return nothing != 0

    # The rest is defined on the check sample only, which has values from before the step.

    @cached_property
    def observed(self) -> Tensor:
        """The actual Δθ."""
        return self.param - self.before

    @property
    def before(self) -> Tensor:
        """θ before the step."""
        return cast("Tensor", self._s.before)

    @cached_property
    def change(self) -> Any:
        """Δθ according to the rule."""
        return None if self.descent is None else -self.descent

    @cached_property
    def lost(self) -> Any:
        """Whether the intended update is not 0 but the parameter did not change at all."""
        if self.change is None:
            return None
        return (self.change != 0) & (self.before == self.param)

    @cached_property
    def residual(self) -> Any:
        """The part of |Δθ − observed| that rounding of the parameter does not explain."""
        if self.change is None or self._rule is None:
            return None
        writes = writes_of(self._rule, self._s.group)
        decays = isinstance(self.decay, Tensor) or self.decay != 0
        return unexplained(
            self.change, self.before, self.param, self._s.dtype, writes=writes, decays=decays
        )

    @cached_property
    def measured_rate(self) -> Tensor:
        """|Δθ|/|g|."""
        return self.observed.abs() / self.grad.abs()

    @cached_property
    def has_grad(self) -> Tensor:
        """Whether the gradient is not 0."""
        return self.grad != 0

    @property
    def previous_grad(self) -> Any:
        """The gradient of the previous recorded step."""
        if not self._s.keeps("previous"):
            return None
        previous = self._s.old("previous")
        return -previous if self._s.group.get("maximize", False) else previous

    @cached_property
    def states(self) -> list[tuple[Any, Any]]:
        """Per state entry: the error of ``Rule.advance`` beyond rounding, and the change."""
        if self._rule is None or self._rule.advance is None:
            return []
        found = []
        for name, expected in self._rule.advance(self._s).items():
            if name not in self._s:
                continue
            after, before = self._s[name], self._s.old(name)
            largest = after.abs()
            if isinstance(before, Tensor):
                largest = torch.maximum(largest, before.abs())
            slack = 2 * ulp(largest, self._s.dtype_of(name))
            found.append((((expected - after).abs() - slack).clamp(min=0), after - before))
        return found[:STATES]


def unexplained(
    change: Tensor,
    before: Tensor,
    after: Tensor,
    dtype: torch.dtype,
    *,
    writes: int,
    decays: bool,
) -> Tensor:
    """The part of |Δθ − observed| that rounding in so many writes does not explain."""
    # Half an ulp per write, and half an ulp for the arithmetic.
    largest = torch.maximum(before.abs(), after.abs())
    slack = (0.5 + 0.5 * writes) * ulp(largest, dtype)
    if decays:  # torch also rounds the factor 1 − decay to the dtype
        slack = slack + 0.5 * torch.finfo(dtype).eps * largest
    return ((change - (after - before)).abs() - slack).clamp(min=0)


def ulp(values: Any, dtype: torch.dtype) -> Tensor:
    """Distance from float64 values to the next number of ``dtype``; shaped like ``values``."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    if isinstance(values, Symbol):
        return values.program.emit("ulp", (values, info.eps, smallest))  # type: ignore[return-value]
    power: Tensor = (values.contiguous().view(torch.int64) & _EXPONENT).view(torch.float64)
    return power.mul_(info.eps).clamp_(min=smallest)


def _on_host(value: Any) -> bool:
    """Whether elements can be looked at: a device is not waited for, and a symbol has none."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() > 1


def _has_no_zero(values: Any) -> bool:
    """Whether it is seen at once that no element is 0, nor NaN."""
    return _on_host(values) and bool(values.abs().amin().numpy() > 0)


_EXPONENT = 0x7FF << 52  # exponent bits of a float64


def _product(left: str, right: str) -> Callable[[Elements], Any]:
    def of(e: Elements) -> Any:
        a, b = getattr(e, left), getattr(e, right)
        return None if a is None or b is None else a * b

    return of


def _plain(name: str) -> Callable[[Elements], Any]:
    return lambda e: getattr(e, name)


def _wide(name: str) -> Callable[[Elements], Any]:
    return lambda e: wide(getattr(e, name))


def _log_rate(e: Elements) -> Any:
    if e.rate is None:
        return None
    low, high = e.extremes
    rates: Any = as_tensor(e.rate)
    if low is not high:  # products of rates have fewer logarithms, with the same sum
        least, most = low.tolist(), high.tolist()
        while least > 1e-15 and most < 1e15 and len(rates) % 4 == 0:
            left, right = rates.chunk(2)
            rates, least, most = left * right, least * least, most * most
    size = rates.abs()
    return size.program.emit("fast_log2", (size,)) if isinstance(size, Symbol) else size.log2()


def _state(at: int, which: int) -> Callable[[Elements], Any]:
    def of(e: Elements) -> Any:
        return e.states[at][which] if at < len(e.states) else None

    return of


FIGURES: tuple[Figure, ...] = (
    Figure("moving", _plain("moves")),
    Figure("rate", _plain("wide_rate"), moving=True),
    Figure("rate_square", _plain("wide_rate"), moving=True, squared=True),
    Figure("rate_log2", _log_rate, moving=True),
    Figure("rate_min", lambda e: e.extremes[0], "min", moving=True),
    Figure("rate_max", lambda e: e.extremes[1], "max", moving=True),
    Figure("below_eps", _plain("below_eps"), moving=True),
    Figure("direction_square", _plain("direction"), squared=True),
    Figure("moved_square", _plain("moved"), squared=True),
    Figure("update_square", _plain("descent"), squared=True),
    Figure("update_grad", _product("descent", "grad")),
    Figure("param_square", _plain("param"), squared=True),
    Figure("grad_square", _plain("grad"), squared=True),
    Figure("zeros", _plain("zeros")),
    Figure("rms_grad", _wide("rms_grad")),
    Figure("rms_update", _wide("rms_update")),
    Figure("nonfinite", _plain("nonfinite")),
    Figure("decay", _plain("decay"), "max"),
)
"""Figures of all elements of a parameter."""

CHECKS: tuple[Figure, ...] = (
    Figure("checked", lambda _: 1.0),
    Figure("lost", _plain("lost")),
    Figure("residual", _plain("residual"), squared=True),
    Figure("intended", _plain("change"), squared=True),
    Figure("observed", _plain("observed"), squared=True),
    Figure("changed", lambda e: e.observed != 0),
    Figure("sample_grad_square", _plain("grad"), squared=True),
    Figure("observed_grad", _product("observed", "grad")),
    Figure("persistence", _product("grad", "previous_grad")),
    Figure("previous_square", _plain("previous_grad"), squared=True),
    *(Figure(f"state{i}_residual", _state(i, 0), squared=True) for i in range(STATES)),
    *(Figure(f"state{i}_change", _state(i, 1), squared=True) for i in range(STATES)),
)
"""Figures of the check sample, in float64; sums are scaled to all elements."""

GRADIENT: tuple[Figure, ...] = tuple(f for f in FIGURES if f.name in ("grad_square", "zeros"))
"""Figures of a gradient that the step may overwrite, computed before the step."""

FIGURE_NAMES = tuple(figure.name for figure in FIGURES)
CHECK_NAMES = tuple(figure.name for figure in CHECKS)

__all__ = ["CHECKS", "CHECK_NAMES", "FIGURES", "FIGURE_NAMES", "GRADIENT", "Elements", "Figure"]
__all__ += ["is_elementwise", "ulp"]
