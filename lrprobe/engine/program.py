"""Traces a rule: runs it once on symbols and records the element-wise operations.

Scalars stay real tensors, 0-dim or one value per piece, and are computed immediately in float64.
So a rule may branch on its hyperparameters, and changing a hyperparameter does not change the
program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrprobe.rules.base import to_device

REAL, WIDE, BOOL = "real", "wide", "bool"
"""Kinds of variables: in the precision of the elements, in that of the sums, or a condition."""

_DTYPES = {REAL: torch.float32, WIDE: torch.float64, BOOL: torch.bool}

Argument: TypeAlias = str | int
"""A variable by its name, or a scalar by its index."""


_numbers: dict[Any, int] = {}
_count = itertools.count()


class UnknownOperationError(Exception):
    """The rule uses an element-wise operation for which no code can be generated."""


@dataclass(frozen=True, slots=True)
class Line:
    """One assignment: ``target = op(*args)``."""

    target: str
    op: str
    args: tuple[Argument, ...]
    kind: str


@dataclass(slots=True)
class Program:
    """The recorded operations on one element of each piece.

    Attributes:
        rows: number of pieces.
        lines: the operations, in order.
        leaves: names of the tensors that are read, in order of first use.
        scalars: numbers, 0-dim tensors, or one value per piece: (rows, 1).
    """

    rows: int
    lines: list[Line] = field(default_factory=list)
    leaves: list[str] = field(default_factory=list)
    scalars: list[Any] = field(default_factory=list)
    _known: dict[tuple[Any, ...], tuple[Symbol, Line]] = field(default_factory=dict)
    _read: dict[str, Symbol] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)
    _emitted: set[str] = field(default_factory=set)
    _previous: tuple[list[Line], list[str]] | None = None
    _number: int | None = None

    def rewind(self) -> None:
        """Start recording the operations of another step, reusing the symbols."""
        self._previous = self.lines, self.leaves
        self.lines, self.leaves, self.scalars = [], [], []
        self._slots, self._emitted = {}, set()

    @property
    def repeated(self) -> bool:
        """Whether the same operations were recorded since ``rewind`` as before it."""
        return (self.lines, self.leaves) == self._previous

    @property
    def number(self) -> int:
        """A number that equal programs share; read it only after recording is complete."""
        if self._number is None:
            key = tuple(self.lines), tuple(self.leaves)
            self._number = _numbers.setdefault(key, next(_count))
        return self._number

    def leaf(self, name: str) -> Symbol:
        """A symbol for the elements of one tensor of each piece."""
        if name not in self.leaves:
            self.leaves.append(name)
        if name not in self._read:
            self._read[name] = Symbol(self, f"x{len(self._read)}", REAL)
        return self._read[name]

    def scalar(self, value: Any) -> int:
        """Index of a scalar. Equal values get separate ones, so the program ignores values."""
        if isinstance(value, Tensor):
            if value.dim() and value.shape[-1] != 1:
                raise UnknownOperationError(f"a tensor of shape {tuple(value.shape)}")
            if id(value) in self._slots:
                return self._slots[id(value)]
            self._slots[id(value)] = len(self.scalars)
        self.scalars.append(value if isinstance(value, Tensor) else float(value))
        return len(self.scalars) - 1

    def emit(self, op: str, args: Sequence[Any], kind: str | None = None) -> Symbol:
        """Record an operation, unless it is recorded already; return its result."""
        names: list[Argument] = []
        widest = REAL
        for arg in args:
            if type(arg) is Symbol:
                names.append(arg.label)
                widest = WIDE if arg.kind == WIDE else widest
            else:
                names.append(self.scalar(arg))
        kind = widest if kind is None else kind
        key = op, kind, *names
        known = self._known.get(key)
        if known is None:
            line = Line(f"t{len(self._known)}", op, tuple(names), kind)
            known = self._known[key] = Symbol(self, line.target, kind), line
        symbol, line = known
        if line.target not in self._emitted:
            self._emitted.add(line.target)
            self.lines.append(line)
        return symbol

    def table(self, device: torch.device) -> Tensor:
        """All scalars: (rows, scalars), float64; on the host unless one of them is on a device."""
        columns: list[Any] = []
        numbers = [value for value in self.scalars if not _is_far(value)]
        near = torch.empty((self.rows, len(numbers)), dtype=torch.float64, device="cpu")
        columns_of = near.numpy()  # faster than writing through torch
        for at, value in enumerate(numbers):
            is_tensor = isinstance(value, Tensor)
            columns_of[:, at] = value.detach().numpy().reshape(-1) if is_tensor else value
        if device.type == "cpu" or len(numbers) == len(self.scalars):
            return near
        sent = iter(to_device(near, device).unbind(1))
        for value in self.scalars:
            if _is_far(value):
                columns.append(value.detach().double().reshape(-1).expand(self.rows))
            else:
                columns.append(next(sent))
        return torch.stack(columns, 1)


def _is_far(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


class Symbol:
    """A placeholder for elements, which acts like a tensor (rows, 2), so that scalars broadcast."""

    __slots__ = ("kind", "label", "program")
    __hash__ = object.__hash__
    __array_ufunc__ = None  # makes NumPy scalars defer to our operators

    def __init__(self, program: Program, label: str, kind: str) -> None:
        self.program, self.label, self.kind = program, label, kind

    def __repr__(self) -> str:
        return f"<{self.kind} {self.label}>"

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that it stands for."""
        return torch.Size([self.program.rows, 2])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its values in a float32 computation."""
        return _DTYPES[self.kind]

    def dim(self) -> int:
        """Number of dimensions."""
        return 2

    def __bool__(self) -> bool:
        """Raise an error, because a rule must not branch on element values."""
        raise UnknownOperationError("a branch that depends on elements")

    def __getattr__(self, name: str) -> Any:
        """Raise an error for tensor methods without generated code."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownOperationError(name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Symbol:
        """Record an operation instead of computing it."""
        kwargs = kwargs or {}
        name = func.__name__
        if name.startswith("__"):  # of an operator; `add_` is not `add`
            name = name[2:-2]
        if name not in _EMITTERS:
            raise UnknownOperationError(name)
        program = next(each.program for each in (*args, *kwargs.values()) if type(each) is Symbol)
        return _EMITTERS[name](program, name, args, kwargs)


def wide(value: Any) -> Any:
    """A symbol in the precision of sums; real tensors already have the caller's precision."""
    if isinstance(value, Symbol) and value.kind == REAL:
        return value.program.emit("wide", (value,), WIDE)
    return value


def is_elementwise(value: Any) -> bool:
    """Whether a value is a symbol or an element-wise tensor, and not a scalar."""
    return isinstance(value, Symbol) or (
        isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] != 1
    )


# ---- torch's operations -------------------------------------------------------------------------


def _number(value: Any) -> Any:
    """Convert a condition to 0 and 1; return anything else unchanged."""
    if type(value) is Symbol and value.kind == BOOL:
        return value.program.emit("float", (value,), REAL)
    return value


def _plain(program: Program, name: str, args: Any, _: Any) -> Symbol:
    return program.emit(_RENAMED.get(name, name), [_number(arg) for arg in args])


def _add(program: Program, name: str, args: Any, kwargs: Any) -> Symbol:
    left, right = map(_number, args[:2])
    alpha = kwargs.get("alpha", 1)
    if alpha != 1:
        right = program.emit("mul", (right, alpha)) if isinstance(right, Symbol) else right * alpha
    if name == "rsub":
        left, right, name = right, left, "sub"
    return program.emit(name, (left, right))


def _rdiv(program: Program, _: str, args: Any, kwargs: Any) -> Symbol:
    return _div(program, "div", args[::-1], kwargs)


def _div(program: Program, _: str, args: Any, kwargs: Any) -> Symbol:
    if kwargs.get("rounding_mode") is not None:
        raise UnknownOperationError("div with a rounding mode")
    above, below = map(_number, args)
    if isinstance(below, Symbol):
        return program.emit("div", (above, below))
    # One division per piece instead of one per element.
    return program.emit("mul", (above, 1 / torch.as_tensor(below, dtype=torch.float64)))


def _pow(program: Program, _: str, args: Any, __: Any) -> Symbol:
    base, exponent = args
    known = isinstance(base, Symbol) and isinstance(exponent, int | float)
    if known and exponent == 2:
        return program.emit("mul", (base, base))
    if known and exponent == 3:
        return program.emit("mul", (program.emit("mul", (base, base)), base))
    if known and exponent == 0.5:
        return program.emit("sqrt", (base,))
    if known and exponent == -0.5:
        return program.emit("reciprocal", (program.emit("sqrt", (base,)),))
    if known and exponent == 1:
        return _same(program, "pow", args, {})
    raise UnknownOperationError(f"pow with exponent {exponent}")


def _square(program: Program, _: str, args: Any, __: Any) -> Symbol:
    return program.emit("mul", (args[0], args[0]))


def _rsqrt(program: Program, _: str, args: Any, __: Any) -> Symbol:
    return program.emit("reciprocal", (program.emit("sqrt", (args[0],)),))


def _clamp(program: Program, name: str, args: Any, kwargs: Any) -> Symbol:
    value, low, high = ([*args, None, None])[:3]
    if name == "clamp_max":
        low, high = None, low
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if low is not None:
        value = program.emit("max", (value, low))
    if high is not None:
        value = program.emit("min", (value, high))
    clamped: Symbol = value
    return clamped


def _compare(program: Program, name: str, args: Any, _: Any) -> Symbol:
    return program.emit(name, [_number(arg) for arg in args], BOOL)


def _logic(program: Program, name: str, args: Any, _: Any) -> Symbol:
    if any(not isinstance(arg, Symbol) or arg.kind != BOOL for arg in args):
        raise UnknownOperationError(f"{name} of values that are not conditions on elements")
    name = name.removeprefix("bitwise_").removeprefix("logical_")
    return program.emit("not" if name == "invert" else name, args, BOOL)


def _where(program: Program, _: str, args: Any, __: Any) -> Symbol:
    condition, left, right = args
    if not isinstance(condition, Symbol):
        condition = program.emit("ne", (torch.as_tensor(condition).double(), 0.0), BOOL)
    return program.emit("where", (condition, _number(left), _number(right)))


def _addcmul(program: Program, name: str, args: Any, kwargs: Any) -> Symbol:
    start, left, right = args
    term = program.emit("div" if name == "addcdiv" else "mul", (left, right))
    value = kwargs.get("value", 1)
    if value == -1:
        return program.emit("sub", (start, term))
    return program.emit("add", (start, term if value == 1 else program.emit("mul", (term, value))))


def _lerp(program: Program, _: str, args: Any, __: Any) -> Symbol:
    start, end, weight = args
    return program.emit(
        "add", (start, program.emit("mul", (program.emit("sub", (end, start)), weight)))
    )


def _same(_: Program, __: str, args: Any, ___: Any) -> Symbol:
    value: Symbol = args[0]
    return value


def _to(program: Program, name: str, args: Any, kwargs: Any) -> Symbol:
    value = args[0]
    dtype = _CONVERTED.get(name) or next(
        (each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)), None
    )
    if value.kind == BOOL:
        return value if dtype is torch.bool else program.emit("float", (value,), REAL)
    if dtype in (torch.bfloat16, torch.float16):
        return program.emit(f"round_{str(dtype).removeprefix('torch.')}", (value,), REAL)
    if dtype is torch.float64:
        return wide(value)  # type: ignore[no-any-return]
    same: Symbol = value
    return same


def _filled(program: Program, name: str, args: Any, _: Any) -> Symbol:
    value = {"ones_like": 1.0, "zeros_like": 0.0}.get(name)
    return program.emit("copy", (args[1] if value is None else value,), REAL)


_CONVERTED = {"float": torch.float32, "double": torch.float64, "bool": torch.bool}
_SAME = ("detach", "expand", "clone", "contiguous", "reshape", "view")
_RENAMED = {"maximum": "max", "minimum": "min", "absolute": "abs", "sgn": "sign"}
_EMITTERS: Mapping[str, Callable[[Program, str, Any, Any], Symbol]] = {
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(
        (
            *("mul", "sqrt", "neg", "abs", "absolute", "sign", "sgn", "maximum", "minimum"),
            *("reciprocal", "exp", "log", "log2", "tanh", "sin", "cos"),
        ),
        _plain,
    ),
    **dict.fromkeys(("div", "truediv", "true_divide"), _div),
    **dict.fromkeys(("rdiv", "rtruediv"), _rdiv),
    "pow": _pow,
    "square": _square,
    "rsqrt": _rsqrt,
    **dict.fromkeys(("addcmul", "addcdiv"), _addcmul),
    "lerp": _lerp,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _compare),
    "where": _where,
    **dict.fromkeys(
        (
            *("and", "or", "invert", "bitwise_and", "bitwise_or", "bitwise_not"),
            *("logical_and", "logical_or", "logical_not"),
        ),
        _logic,
    ),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("to", "float", "double", "bool"), _to),
    **dict.fromkeys(("ones_like", "zeros_like", "full_like"), _filled),
}
"""Name of a torch function, method or operator to the function that records it."""


def _method(name: str) -> Callable[..., Symbol]:
    emitter = _EMITTERS[name]

    def method(self: Symbol, *args: Any, **kwargs: Any) -> Symbol:
        return emitter(self.program, name, (self, *args), kwargs)

    return method


def _reflected(name: str) -> Callable[..., Symbol]:
    emitter = _EMITTERS[name]
    return lambda self, other: emitter(self.program, name, (other, self), {})


_OPERATORS = (
    *("add", "sub", "mul", "truediv", "pow", "neg", "abs", "gt", "lt", "ge", "le", "eq", "ne"),
    *("and", "or", "invert"),
)
for _name in _EMITTERS:
    setattr(Symbol, _name, _method(_name))
for _name in _OPERATORS:
    setattr(Symbol, f"__{_name}__", _method(_name))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Symbol, f"__r{_name}__", _reflected(_name))
