"""What a rule receives and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Scalar: TypeAlias = float | Tensor
"""A number, or a tensor that broadcasts against the elements (0-dim, or one value a row)."""

Fetch: TypeAlias = "Callable[[str], Tensor]"
"""Reads a slice's elements by name: ``param``, ``grad``, ``touched`` or a state entry; with the
prefix ``old ``, its value before the step."""


@dataclass(frozen=True, slots=True)
class Update:
    """One step according to a rule, element by element.

    θ_after = θ_before · (1 − decay) − effective_lr ⊙ direction

    Attributes:
        effective_lr: the factor of the direction; a scalar if all elements share it.
        direction: what the rate multiplies, shaped like ``Slice.param``.
        decay: the decoupled decay of this step, a scalar.
        rms_grad: root of the second-moment estimate, bias-corrected if the rule corrects it,
            without ε; None if the rule has none.
        rms_update: the same of past updates (Adadelta's √E[Δx²] before this step).
        eps: the statistic to which ε is added, and ε, on the scale where it is added.
        grad: the gradient, like ``Slice.grad``, if the optimizer overwrites ``p.grad``; otherwise
            None.
    """

    effective_lr: Scalar
    direction: Tensor
    decay: Scalar = 0.0
    rms_grad: Tensor | None = None
    rms_update: Tensor | None = None
    eps: tuple[Tensor, Scalar] | None = None
    grad: Tensor | None = None


class SparseRows:
    """A gradient that is sparse in its first dimension, read densely on demand."""

    def __init__(self, shape: torch.Size, rows: Tensor, values: Tensor) -> None:
        self.shape = shape
        self.rows = rows
        self.values = values

    @classmethod
    def of(cls, grad: Tensor) -> SparseRows:
        """Create from a ``torch.sparse_coo`` gradient with one sparse dimension."""
        grad = grad.coalesce()
        return cls(grad.shape, grad.indices()[0], grad.values())

    def pattern(self) -> SparseRows:
        """The same rows, with ones."""
        return SparseRows(self.shape, self.rows, torch.ones_like(self.values))

    def read(self, at: Tensor) -> Tensor:
        """The values at flat, row-major positions."""
        if not len(self.rows):
            return self.values.new_zeros(len(at))
        width = self.values[0].numel()
        row = at // max(width, 1)
        stored = torch.searchsorted(self.rows, row).clamp_(max=len(self.rows) - 1)
        values = self.values.reshape(len(self.rows), -1)[stored, at % max(width, 1)]
        return torch.where(self.rows[stored] == row, values, 0)


class Coded:
    """A low-bit state: blocks of codes with one scale each, decoded on reading."""

    def __init__(
        self,
        shape: torch.Size,
        codes: Tensor,
        scale: Tensor,
        block: int,
        table: Tensor | None = None,
    ) -> None:
        """Wrap the tensors of a low-bit state.

        Args:
            shape: shape of the decoded tensor.
            codes: 8-bit codes of the elements in row-major order, or 4-bit codes, two per byte, the
                first in the upper half.
            scale: one per block.
            block: adjacent elements in a block.
            table: code to value; None if the codes are numbers themselves.
        """
        self.shape = shape
        self.codes = codes.reshape(-1)
        self.scale = scale.reshape(-1)
        self.table = table
        self._packed = 2 * len(self.codes) == shape.numel()
        self._block = block

    def read(self, at: Tensor) -> Tensor:
        """The values at flat, row-major positions, in float32; shaped like ``at``."""
        if self._packed:
            byte = self.codes[at // 2]
            codes = torch.where(at % 2 == 0, byte >> 4, byte & 15)
        else:
            codes = self.codes[at]
        values = codes.float() if self.table is None else self.table[codes.int()]
        return values * self.scale[at // self._block]


Readable: TypeAlias = "Tensor | SparseRows | Coded"
"""Anything that can be read element by element."""


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter, or a local piece of one, during one step.

    Attributes:
        param: the parameter after the step, real (a complex one seen as pairs).
        grad: its gradient, real and of the same shape; a ``SparseRows`` if it is sparse.
        state: the optimizer's state of the parameter, real, and what ``Rule.before`` and
            ``Rule.whole`` added.
    """

    param: Tensor
    grad: Tensor | SparseRows
    state: Mapping[str, Any] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any]) -> None:
        """Add to the state that rules see; the optimizer's own state is unchanged."""
        self.state = {**self.state, **values}

    def wide_state(self) -> dict[str, Tensor]:
        """The floating state entries that are shaped like the parameter.

        Wrapper subclasses (low-bit states) and sparse tensors are left out, because they cannot be
        read as dense tensors.
        """
        shape = self.param.shape
        return {
            name: value
            for name, value in self.state.items()
            if isinstance(value, Tensor)
            and value.shape == shape
            and value.is_floating_point()
            and value.layout == torch.strided
            and (value.dim() or name != "step")
            and not is_traceable_wrapper_subclass(value)
        }


_MIN_SHARE = 1e-3
"""Smallest share of θ_before left in θ_after from which it is recovered; below, rounding wins."""


class Slice:
    """Some elements of one step: (n,) of one parameter, or (rows, n) of several.

    Everything is real, detached, in one floating dtype and in the same order: element i of
    ``grad``, ``param`` and each state entry belong together.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        group: Mapping[str, Any],
        fetch: Fetch,
        memo: dict[Any, Any] | None = None,
        kept: Collection[str] = (),
        had: Callable[[str], Scalar] | None = None,
    ) -> None:
        """Create a view of some elements.

        Args:
            entries: the entries that the elements belong to.
            group: their parameter group.
            fetch: reads the elements.
            memo: caches scalars for other slices of the same entries.
            kept: names of tensors known from before the step.
            had: returns 1 per entry if it had the named state before the step, else 0; by default
                1 for every name in ``kept``.
        """
        self.group = group
        self._kept = kept
        self._had = had
        self._memo = {} if memo is None else memo
        self._entries = entries
        self._fetch = fetch

    @cached_property
    def param(self) -> Tensor:
        """The parameter after the step."""
        return self._fetch("param")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which torch keeps the parameter."""
        return self._entries[0].param.dtype

    @cached_property
    def grad(self) -> Tensor:
        """The gradient, negated under ``maximize``, without weight decay."""
        grad = self._fetch("grad")
        return -grad if self.group.get("maximize", False) else grad

    @cached_property
    def touched(self) -> Scalar:
        """1 in the rows of a sparse gradient, 0 elsewhere; 1 if the gradient is dense."""
        entry = self._entries[0]
        if isinstance(entry.grad, SparseRows) or "touched" in entry.state:
            return self._fetch("touched")
        return 1.0

    def __contains__(self, name: str) -> bool:
        return all(e.state.get(name) is not None for e in self._entries)

    def __getitem__(self, name: str) -> Tensor:
        """A state entry at these elements; one of another shape is broadcast to the parameter's."""
        return self._fetch(name)

    def scalar(self, name: str) -> Scalar:
        """A state entry that is one number per parameter, such as the step count."""
        values = [e.state[name] for e in self._entries]
        if len(values) == 1:
            value = values[0]
            return value.detach() if isinstance(value, Tensor) else value
        return column(values, self._entries[0].param.device)

    def t(self, *float32_if: str) -> Tensor:
        """The number of this step, counted from 1, in float64.

        Args:
            float32_if: flags of the group under which torch computes with its own float32 tensor,
                so that a rule rounds as torch does.
        """
        if float32_if not in self._memo:
            step = torch.as_tensor(self.scalar("step"))
            rounds = any(self.group.get(flag) for flag in float32_if)
            self._memo[float32_if] = step if rounds else step.double()
        return cast("Tensor", self._memo[float32_if])

    def group_step(self, name: str = "step") -> Tensor:
        """The number of this step, where the group counts, in float64."""
        return torch.as_tensor(self.group[name]).double()

    def correction(self, beta: Scalar, *float32_if: str) -> Tensor:
        """1 − βᵗ, the bias correction of a moment that starts at 0: 0-dim, or one per row."""
        which = id(beta) if isinstance(beta, Tensor) else beta
        key = ("correction", which, *float32_if)
        if key not in self._memo:  # β is stored too, so that its id is not reused
            self._memo[key] = beta, 1 - power(beta, self.t(*float32_if))
        return cast("Tensor", self._memo[key][1])

    @property
    def lr(self) -> Tensor:
        """The group's rate during this step: 0-dim, and float64 unless it already is a tensor."""
        if "lr" not in self._memo:
            lr = self.group["lr"]
            self._memo["lr"] = (
                lr.detach().squeeze()
                if isinstance(lr, Tensor)
                else torch.tensor(lr, dtype=torch.float64, device="cpu")
            )
        return cast("Tensor", self._memo["lr"])

    @property
    def decay(self) -> Scalar:
        """The decoupled decay of this step, lr·λ; 0 if the group's decay is coupled."""
        return 0.0 if self._is_coupled else self.lr * self.group["weight_decay"]

    @property
    def coupled(self) -> Scalar:
        """The λ of θ_before in the gradient; 0 if the group's decay is decoupled."""
        return cast("Scalar", self.group.get("weight_decay", 0.0) if self._is_coupled else 0.0)

    @property
    def _is_coupled(self) -> bool:
        return not self.group.get("decoupled_weight_decay")

    def solve_decay(
        self, direction: Tensor, effective_lr: Scalar, *, share: Scalar = 1.0, decay: Scalar = 0.0
    ) -> Tensor:
        """Add a coupled weight decay to a direction: direction + share·λ·θ_before.

        θ_before no longer exists after the step, but follows from θ_after, because the direction
        is affine in it: θ_before = (θ_after + e·d₀) / (1 − decay − e·share·λ).
        """
        weight_decay = self.coupled
        if not isinstance(weight_decay, Tensor) and weight_decay == 0:
            return direction
        before = self.before
        if before is None:
            left = as_tensor(1.0 - decay - effective_lr * (share * weight_decay))
            # The share of θ_before in θ_after: if nothing is left, θ_before cannot be recovered.
            threshold = 0.0 if left.dim() and left.shape[-1] != 1 else _MIN_SHARE
            left = torch.where(left.abs() <= threshold, torch.nan, left)
            before = (self.param + effective_lr * direction) / left
        total: Tensor = direction + (share * weight_decay) * before
        return total

    @property
    def decayed_grad(self) -> Tensor:
        """The gradient with a coupled weight decay; requires that θ_before was kept."""
        if not isinstance(self.coupled, Tensor) and self.coupled == 0:
            return self.grad
        before = self.before
        if before is None:
            raise RuntimeError("the value of the parameter from before the step was not kept")
        return self.grad + self.coupled * before

    @property
    def before(self) -> Tensor | None:
        """The parameter before the step, if it was kept (``inspect_step``, the check)."""
        return self._fetch("old param") if "param" in self._kept else None

    def old(self, name: str, default: float = 0.0) -> Scalar:
        """A state entry before the step; ``default`` if it did not exist yet."""
        if name not in self._kept:
            return default
        value = self._fetch(f"old {name}")  # 0 if the entry did not exist
        return value if default == 0 else value + default * (1 - self.had(name))

    def had(self, name: str) -> Scalar:
        """1 if a state entry existed before the step, else 0."""
        if self._had is None or name not in self._kept:
            return float(name in self._kept)
        return self._had(name)

    def keeps(self, name: str) -> bool:
        """Whether ``old`` knows this entry."""
        return name in self._kept

    @property
    def states(self) -> list[str]:
        """Names of the floating state entries that are shaped like the parameter."""
        return [*self._entries[0].wide_state()]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a state entry."""
        value: Tensor = self._entries[0].state[name]
        return value.dtype


class Whole:
    """One whole parameter, for rules that need a statistic of all of it (Adafactor, Muon)."""

    def __init__(
        self, entry: Entry, group: Mapping[str, Any], slices: Callable[[], Iterable[Slice]]
    ) -> None:
        self.entry = entry
        self.group = group
        self._slices = slices

    @property
    def state(self) -> Mapping[str, Any]:
        """The optimizer's state of this parameter."""
        return self.entry.state

    def sum(self, function: Callable[[Slice], Tensor]) -> Tensor:
        """Sum of an element-wise function over the whole parameter: 0-dim, float64."""
        parts = [function(piece).sum(dtype=torch.float64) for piece in self._slices()]
        if not parts:
            return torch.zeros((), dtype=torch.float64, device=self.entry.param.device)
        return torch.stack(parts).sum()


Before: TypeAlias = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Scalar]]
"""Given the parameter, its state and its group before the step: scalars to keep."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How to reconstruct one optimizer's step.

    Attributes:
        name: value of the frame's column ``rule``.
        update: the equation: a pure function of a ``Slice``.
        before: given (parameter, state, group), returns scalars to keep from before the step, for
            rules whose state no longer contains them afterwards. ``Slice.scalar`` reads them back.
        whole: statistics of the whole parameter, computed after the step. ``Slice.scalar`` reads
            them back, or ``Slice[...]`` if they are shaped like the parameter.
        advance: computes the state after the step from the state before it (``Slice.old``) and the
            gradient: a mapping of state entries to their elements. The check compares it with the
            actual state.
        writes: given a group, returns how often torch writes the parameter in one step; each write
            rounds it.
        shared_rate: whether all elements of a parameter always have the same rate.
        needs_grad: whether ``effective_lr`` itself depends on the gradient.
        overwrites: whether, given a group, the optimizer overwrites the gradient. If it does,
            ``update`` returns the gradient, and its norm is computed before the step.
        tolerance: largest error at which a step still counts as explained, for optimizers that
            round their state after using it; 0 for the rounding of the parameter's dtype alone.
    """

    name: str
    update: Callable[[Slice], Update]
    before: Before | None = None
    whole: Callable[[Whole], Mapping[str, Scalar]] | None = None
    advance: Callable[[Slice], Mapping[str, Scalar]] | None = None
    writes: Callable[[Mapping[str, Any]], int] | None = None
    shared_rate: bool = False
    needs_grad: bool = False
    overwrites: Callable[[Mapping[str, Any]], bool] | None = None
    tolerance: float = 0.0


def writes_of(rule: Rule, group: Mapping[str, Any]) -> int:
    """How often a step writes the parameter: by default once, plus once for a decoupled decay."""
    if rule.writes is not None:
        return rule.writes(group)
    decoupled = group.get("decoupled_weight_decay", True) and group.get("weight_decay", 0.0)
    return 1 + bool(isinstance(decoupled, Tensor) or decoupled)


def overwrites_gradient(rule: Rule | None, group: Mapping[str, Any]) -> bool:
    """Whether a step overwrites the gradient; without a rule, it may."""
    return rule is None or (rule.overwrites is not None and rule.overwrites(group))


def tolerance(dtype: torch.dtype, rule: Rule) -> float:
    """Reconstruction error above which a rule does not explain the step."""
    return max(rule.tolerance, 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3)


def has_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``step`` was called with a closure; ``args`` begins with the optimizer."""
    return any(map(callable, (*args[1:], *kwargs.values())))


def power(base: Scalar, exponent: Tensor) -> Tensor:
    """base ** exponent, in the dtype of a tensor base, as torch computes it for tensor betas."""
    if isinstance(base, Tensor):
        base = base.detach().squeeze().to(exponent.device)
        return base ** exponent.to(base.dtype)
    return base**exponent


def as_tensor(value: Any) -> Tensor:
    """Convert a number to a tensor; return a tensor, or a symbol of a traced rule, unchanged."""
    return cast("Tensor", value) if hasattr(value, "dim") else torch.as_tensor(value)


def nonzero(value: Any) -> Tensor:
    """Replace 0 by 1, so that it can be a divisor."""
    value = as_tensor(value)
    return torch.where(value == 0, torch.ones_like(value), value)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without synchronizing."""
    if device.type in ("cpu", "mps"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # from pageable memory, torch would wait


def to_device_float64(number: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device in float64, without synchronizing."""
    if number.device.type == "cpu":
        return to_device(number.double(), device)
    return number.to(device, torch.float64, non_blocking=True)


def column(values: Sequence[Any], device: torch.device) -> Tensor:
    """One number per row: 0-dim if all are known to be equal, else (rows, 1)."""
    first = values[0]
    if not all(isinstance(value, Tensor) for value in values):
        if all(value is first or value == first for value in values):
            return torch.as_tensor(first, dtype=torch.float64)
        column = torch.tensor(values, dtype=torch.float64)
    else:
        column = torch.stack([v.reshape(()) if v.dim() else v for v in values]).detach()
    if column.device.type == "cpu":
        numbers = column.double().numpy()
        if (numbers == numbers[0]).all():
            return column[0]
    column = column.unsqueeze(1)
    return to_device(column, device) if column.device.type == "cpu" else column.to(device)
