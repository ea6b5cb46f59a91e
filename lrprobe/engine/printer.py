"""Prints a recorded program as the source of a loop that numba compiles.

Up to three passes go over a chunk of elements while it is in the L1 cache: one for the rule and
most sums, one over the rates for their sums and extremes, and one to count the rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lrprobe.engine.distribution import EXACT, SHIFT, STRIDE, ZERO
from lrprobe.engine.program import BOOL, REAL, WIDE, Line, Program, Symbol
from lrprobe.engine.recording import Recorded

CHUNK = 4096
"""Elements that are summed separately before their sums are combined."""
LANES = 4
"""Counting tables used in turn, so that a count does not wait for the store of the previous one."""

LOADED = {
    torch.float32: ("{0}", "np.float32", 4),
    torch.float64: ("{0}", "np.float64", 8),
    torch.bfloat16: ("from_bfloat16({0})", "np.uint16", 2),
    torch.float16: ("from_float16({0})", "np.uint16", 2),
}
"""Dtype of a tensor to the expression that reads an element, its NumPy type, and its size."""

OPERATIONS = {
    **{op: f"{{0}} {sign} {{1}}" for op, sign in
       {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">", "lt": "<", "ge": ">=",
        "le": "<=", "eq": "==", "ne": "!=", "and": "&", "or": "|"}.items()},
    "neg": "-{0}", "not": "not {0}", "copy": "{0}", "abs": "abs({0})",
    "reciprocal": "ONE / {0}",
    "max": "({0} if ({0} > {1}) | ({0} != {0}) else {1})",
    "min": "({0} if ({0} < {1}) | ({0} != {0}) else {1})",
    "sign": "(ONE if {0} > ZERO else (-ONE if {0} < ZERO else ZERO))",
    "where": "({1} if {0} else {2})", "float": "(ONE if {0} else ZERO)",
    "wide": "np.float64({0})", "ulp": "ulp({0}, {1}, {2})",
    "round_bfloat16": "real(round_bfloat16(np.float32({0})))",
    "round_float16": "real(round_float16(np.float32({0})))",
    "fast_log2": "fast_log2({0})",
    **{name: f"{name}({{0}})" for name in ("sqrt", "exp", "log", "log2", "tanh", "sin", "cos")},
}  # fmt: skip

HEAD = """\
import numpy as np
from math import cos, exp, log, log2, sin, sqrt, tanh
from numba import carray, njit
from lrprobe.engine.intrinsics import *
from lrprobe.engine.intrinsics import {log} as fast_log2, {order} as order, {value} as value_of

real = {real}
ONE, ZERO, NONE, ALL = real(1), real(0), {key}({least}), {key}({most})

FAST = {{"reassoc", "nsz", "contract", "arcp"}}  # not nnan, not ninf: they would lose a NaN

@njit(nogil=True, error_model="numpy", cache=True, fastmath=FAST)
def kernel(
    who, slot, pointers, numel, owner, start, bounds, scalars, out, pool, begin, end, scratch
):
    rates = np.empty({chunk}, real)
    moving = np.empty({chunk}, real)
    bins = np.empty({chunk}, np.uint16)
    counts = scratch[slot]
    lowest, highest, seen, at = ALL, NONE, 0, begin[who]
    for c in range(bounds[who], bounds[who + 1]):
        t = owner[c]
        n = min({chunk}, numel[t] - start[c])
"""

PACK = """\
        m = n
        if moved < n:  # the rates of elements that move, side by side
            m = 0
            for i in range(n):
                rates[m] = rates[i]
                m += np.int64(moving[i])
"""

COUNT = """\
        if m > 0:
            lowest, highest = min(lowest, low), max(highest, high)
        step = 1 if seen < {exact} else {stride}
        i, shift = 0, c % step
        while i + {lanes} * step <= m:
            for lane in range({lanes}):
                counts[lane, bins[i + lane * step + shift]] += step
            i += {lanes} * step
            shift = shift + 1 if shift + 1 < step else 0
        while i < m:
            counts[0, bins[i]] += step
            i += step
        seen += m
        if c + 1 == bounds[who + 1] or owner[c + 1] != t:
            if seen > 0:
                first = np.int64(ordered32(np.float32(value_of(lowest))) >> np.int32({shift}))
                last = np.int64(ordered32(np.float32(value_of(highest))) >> np.int32({shift}))
                for b in range(first + {zero}, last + {zero} + 1):
                    total = np.int64(0)
                    for lane in range({lanes}):
                        total += counts[lane, b]
                        counts[lane, b] = 0
                    if total > 0:
                        pool[at, 0], pool[at, 1], pool[at, 2] = t, b - {zero}, total
                        at += 1
            lowest, highest, seen = ALL, NONE, 0
"""


def source(recorded: Recorded, dtypes: Sequence[torch.dtype], *, exact: bool) -> str:
    """The source of a module with a function ``kernel``.

    Args:
        recorded: what to compute.
        dtypes: of the leaves.
        exact: whether elements are computed in float64.
    """
    scalar = "scalars[t, {0}]"
    names = Names(recorded.program, OPERATIONS, f"real({scalar})", scalar)
    stages = _split_passes(recorded)
    pad, inner = " " * 8, " " * 12
    lines = [
        HEAD.format(
            chunk=CHUNK,
            real="np.float64" if exact else "np.float32",
            log="fast_log2_64" if exact else "fast_log2_32",
            order="ordered64" if exact else "ordered32",
            value="value64" if exact else "value32",
            key="np.int64" if exact else "np.int32",
            most=0x7FFFFFFFFFFFFFFF if exact else 0x7FFFFFFF,
            least=-0x8000000000000000 if exact else -0x80000000,
        )
    ]
    lines += [pad + text for text in names.hoisted([*stages.element_lines, *stages.rate_lines])]
    for at, (leaf, dtype) in enumerate(zip(recorded.program.leaves, dtypes, strict=True)):
        _, kind, size = LOADED[dtype]
        lines.append(
            f"{pad}p{at} = carray(pointer(pointers[t, {at}] + start[c] * {size}), (n,), {kind})"
            f"  # {leaf}"
        )
    lines += [f"{pad}{accumulator.begin}" for accumulator in (*stages.sums, *stages.rate_sums)]
    lines.append(f"{pad}for i in range(n):")
    for at, dtype in enumerate(dtypes):
        if f"x{at}" in stages.leaves:
            lines.append(f"{inner}x{at} = real({LOADED[dtype][0].format(f'p{at}[i]')})")
    lines += [inner + names.printed(line) for line in stages.element_lines]
    lines += [inner + accumulator.add for accumulator in stages.sums]
    if recorded.rate is not None and recorded.moves is not None:
        rate, moves = recorded.rate.label, recorded.moves.label
        lines += [f"{inner}rates[i] = {rate}", f"{inner}moving[i] = ONE if {moves} else ZERO"]
        lines += [f"{pad}moved = ZERO", f"{pad}for i in range(n):", f"{inner}moved += moving[i]"]
        lines += [PACK.rstrip(), f"{pad}low, high = ALL, NONE", f"{pad}for i in range(m):"]
        lines += [f"{inner}{rate} = rates[i]", f"{inner}key = order({rate})"]
        lines += [f"{inner}low = min(low, key)", f"{inner}high = max(high, key)"]
        bits = f"ordered32(np.float32({rate}))"
        lines.append(f"{inner}bins[i] = ({bits} >> np.int32({SHIFT})) + np.int32({ZERO})")
        lines += [inner + names.printed(line) for line in stages.rate_lines]
        lines += [inner + accumulator.add for accumulator in stages.rate_sums]
        fixed = {"exact": EXACT, "stride": STRIDE, "lanes": LANES, "shift": SHIFT, "zero": ZERO}
        lines.append(COUNT.format(**fixed).rstrip())
    for column, i in enumerate(differing(recorded)):
        lines.append(f"{pad}out[c, {column}] = {stages.results[i]}")
    lines.append("    end[who] = at")
    return "\n".join(lines) + "\n"


def differing(recorded: Recorded) -> list[int]:
    """Indices of the figures whose values differ by element, which the loop reduces."""
    return [i for i, value in enumerate(recorded.values) if isinstance(value, Symbol)]


class Names:
    """Prints lines in a target language: templates of its operations, and of reading a scalar."""

    def __init__(
        self, program: Program, operations: Mapping[str, str], real: str, wide: str
    ) -> None:
        self._kinds = {line.target: line.kind for line in program.lines}
        self._operations, self._real, self._wide = operations, real, wide

    def _is_wide(self, line: Line) -> bool:
        if line.kind != BOOL:
            return line.kind == WIDE
        return any(isinstance(a, str) and self._kinds.get(a, REAL) == WIDE for a in line.args)

    def printed(self, line: Line) -> str:
        """One assignment."""
        letter = "w" if self._is_wide(line) or line.op == "ulp" else "s"
        args = [arg if isinstance(arg, str) else f"{letter}{arg}" for arg in line.args]
        return f"{line.target} = {self._operations[line.op].format(*args)}"

    def hoisted(self, lines: Iterable[Line]) -> list[str]:
        """Statements that read the scalars of these lines, once per chunk."""
        used: dict[str, str] = {}
        for line in lines:
            is_wide = self._is_wide(line) or line.op == "ulp"
            for arg in line.args:
                if not isinstance(arg, str):
                    value = (self._wide if is_wide else self._real).format(arg)
                    used[f"{'w' if is_wide else 's'}{arg}"] = value
        return [f"{name} = {value}" for name, value in used.items()]


@dataclass(frozen=True, slots=True)
class _Accumulator:
    """A variable that accumulates a figure: its initialisation, and its update per element."""

    begin: str
    add: str


@dataclass(slots=True)
class _Stages:
    """The program split into the pass over all tensors and the pass over the rates.

    Attributes:
        element_lines, rate_lines: the lines of each pass.
        leaves: variables that the first pass reads from memory.
        sums, rate_sums: the accumulators of each pass.
        results: number of a figure to the expression of its value after the loops.
    """

    element_lines: list[Line]
    rate_lines: list[Line]
    leaves: set[str]
    sums: list[_Accumulator] = field(default_factory=list)
    rate_sums: list[_Accumulator] = field(default_factory=list)
    results: dict[int, str] = field(default_factory=dict)


def _split_passes(recorded: Recorded) -> _Stages:
    program = recorded.program
    made = {line.target: line for line in program.lines}
    rate = None if recorded.rate is None else recorded.rate.label
    stops = {s.label for s in (recorded.rate, recorded.moves) if s is not None}

    def needed(name: str, stop: set[str], seen: set[str]) -> set[str]:
        if name not in seen:
            seen.add(name)
            for arg in made[name].args if name in made and name not in stop else ():
                if isinstance(arg, str):
                    needed(arg, stop, seen)
        return seen

    first: set[str] = set()
    second: set[str] = set()
    of_rates: set[int] = set()
    for i in differing(recorded):
        label = recorded.values[i].label
        reads = needed(label, {rate or ""}, set())
        # It depends on the rates only, so the second pass can compute it.
        if rate in reads and not any(_is_leaf(name) and name != rate for name in reads):
            of_rates.add(i)
            second |= reads - {rate}
        else:
            needed(label, set(), first)
    for name in stops:
        needed(name, set(), first)
    stages = _Stages(
        [line for line in program.lines if line.target in first],
        [line for line in program.lines if line.target in second],
        {name for name in first if _is_leaf(name)},
    )
    _accumulate(recorded, stages, of_rates)
    return stages


def _accumulate(recorded: Recorded, stages: _Stages, of_rates: set[int]) -> None:
    """Give each figure an accumulator; figures with the same reduction share one."""
    known: dict[tuple[Any, ...], str] = {}
    moving = None if recorded.moves is None else recorded.moves.label
    for i in differing(recorded):
        figure, value = recorded.table[i], recorded.values[i]
        if moving is not None and value.label == moving and recorded.rate is not None:
            stages.results[i] = "moved"
            continue
        if i in of_rates and figure.merge != "sum" and value.label == recorded.rate.label:  # type: ignore[union-attr]
            extreme = "low" if figure.merge == "min" else "high"
            stages.results[i] = _from_key(extreme, figure.merge)
            continue
        masked = moving if figure.moving and i not in of_rates else None
        key = figure.merge, value.label, masked
        if key not in known:
            known[key] = name = f"a{i}"
            made = _accumulator(name, figure.merge, value, masked)
            (stages.rate_sums if i in of_rates else stages.sums).append(made)
        name = known[key]
        stages.results[i] = name if figure.merge == "sum" else _from_key(name, figure.merge)


def _accumulator(name: str, merge: str, value: Symbol, masked: str | None) -> _Accumulator:
    label = value.label
    if merge != "sum":
        start = "ALL" if merge == "min" else "NONE"
        key = f"order({label})" if masked is None else f"(order({label}) if {masked} else {start})"
        return _Accumulator(f"{name} = {start}", f"{name} = {merge}({name}, {key})")
    if value.kind == BOOL:
        condition = label if masked is None else f"{label} & {masked}"
        return _Accumulator(f"{name} = ZERO", f"{name} += ONE if {condition} else ZERO")
    zero = "np.float64(0)" if value.kind == WIDE else "ZERO"
    term = label if masked is None else f"({label} if {masked} else {zero})"
    return _Accumulator(f"{name} = {zero}", f"{name} += {term}")


def _from_key(name: str, merge: str) -> str:
    start, value = ("ALL", "np.inf") if merge == "min" else ("NONE", "-np.inf")
    return f"{value} if {name} == {start} else value_of({name})"


def _is_leaf(name: str) -> bool:
    return name.startswith("x")
