"""A recorded program as the text of a loop that numba compiles.

A chunk of elements is gone through up to three times, while it is in the first cache: once for the
rule and most sums; then, over the rates alone, for their sums and extremes; then to count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lrprobe.engine.distribution import BINS, EXACT, SHIFT, STRIDE, ZERO
from lrprobe.engine.program import BOOL, REAL, WIDE, Line, Program, Symbol
from lrprobe.engine.recording import Recorded

CHUNK = 4096
"""Elements that are added up before they are added to others."""
LANES = 4
"""Tables that take turns in counting, so that no count waits for the one before it."""

LOADED = {
    torch.float32: ("{0}", "np.float32", 4),
    torch.float64: ("{0}", "np.float64", 8),
    torch.bfloat16: ("from_bfloat16({0})", "np.uint16", 2),
    torch.float16: ("from_float16({0})", "np.uint16", 2),
}
"""Dtype of a tensor to how an element is read, its type in NumPy, and its bytes."""

OPERATIONS = {
    **{op: f"{{0}} {sign} {{1}}" for op, sign in
       {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">", "lt": "<", "ge": ">=",
        "le": "<=", "eq": "==", "ne": "!=", "and": "&", "or": "|"}.items()},
    "neg": "-{0}", "not": "not {0}", "copy": "{0}", "abs": "abs({0})",
    "reciprocal": "ONE / {0}",
    "max": "({0} if ({0} > {1}) | ({0} != {0}) else {1})",
    "min": "({0} if ({0} < {1}) | ({0} != {0}) else {1})",
    "sign": "(ONE if {0} > ZERO else (-ONE if {0} < ZERO else {0} * ZERO))",
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

@njit(nogil=True, error_model="numpy", cache=True, fastmath={{"reassoc", "nsz", "contract", "arcp"}})
def kernel(who, slot, pointers, numel, owner, start, bounds, scalars, out, pool, begin, end, scratch):
    rates = np.empty({chunk}, real)
    moving = np.empty({chunk}, real)
    counts = scratch[slot]
    lowest, highest, seen, at = ALL, NONE, 0, begin[who]
    for c in range(bounds[who], bounds[who + 1]):
        t = owner[c]
        n = min({chunk}, numel[t] - start[c])
"""

COUNT = """\
        if low <= high:
            lowest, highest = min(lowest, low), max(highest, high)
        step = 1 if seen < {exact} else {stride}
        i = (-start[c]) % step
        while i < n:
            for lane in range({lanes}):
                if i < n and moving[i] != ZERO:
                    bits = ordered32(np.float32(rates[i]))
                    counts[lane, np.int64(bits >> np.int32({shift})) + {zero}] += step
                i += step
        seen += np.int64(moved)
        if c + 1 == bounds[who + 1] or owner[c + 1] != t:
            if lowest <= highest:
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
    """The text of a module with a function ``kernel``.

    Args:
        recorded: what it computes.
        dtypes: of the leaves.
        exact: whether elements are computed in float64.
    """
    names = _Names(recorded.program, recorded.values)
    stages = _staged(recorded)
    counted = recorded.rate is not None
    pad = " " * 8
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
    body = [*stages.first, *stages.second]
    lines += [pad + text for text in names.hoisted(body)]
    for at, (leaf, dtype) in enumerate(zip(recorded.program.leaves, dtypes, strict=True)):
        _, kind, size = LOADED[dtype]
        lines.append(
            f"{pad}p{at} = carray(pointer(pointers[t, {at}] + start[c] * {size}), (n,), {kind})"
            f"  # {leaf}"
        )
    found = [i for i, value in enumerate(recorded.values) if isinstance(value, Symbol)]
    lines += [pad + _begin(recorded, i) for i in found]
    if counted:
        lines.append(f"{pad}low, high = ALL, NONE")
    lines.append(f"{pad}for i in range(n):")
    inner = pad + "    "
    for at, dtype in enumerate(dtypes):
        if f"x{at}" in stages.leaves:
            lines.append(f"{inner}x{at} = real({LOADED[dtype][0].format(f'p{at}[i]')})")
    lines += [inner + names.printed(line) for line in stages.first]
    lines += [inner + _add(recorded, i) for i in found if i not in stages.later]
    if recorded.rate is not None and recorded.moves is not None:
        lines.append(f"{inner}rates[i] = {recorded.rate.label}")
        lines.append(f"{inner}moving[i] = ONE if {recorded.moves.label} else ZERO")
        lines.append(f"{pad}moved = ZERO")
        lines.append(f"{pad}for i in range(n):")
        lines.append(f"{inner}{recorded.rate.label} = rates[i]")
        lines.append(f"{inner}{recorded.moves.label} = moving[i] != ZERO")
        lines += [inner + names.printed(line) for line in stages.second]
        lines += [inner + _add(recorded, i) for i in stages.later]
        lines.append(f"{inner}moved += moving[i]")
        lines.append(f"{inner}key = order({recorded.rate.label})")
        lines.append(f"{inner}low = min(low, key if {recorded.moves.label} else ALL)")
        lines.append(f"{inner}high = max(high, key if {recorded.moves.label} else NONE)")
        lines.append(
            COUNT.format(exact=EXACT, stride=STRIDE, lanes=LANES, shift=SHIFT, zero=ZERO).rstrip()
        )
    for column, i in enumerate(found):
        merge = recorded.table[i].merge
        value = f"value_of(a{i})" if merge != "sum" else f"a{i}"
        if merge == "min":
            value = f"np.inf if a{i} == ALL else value_of(a{i})"
        elif merge == "max":
            value = f"-np.inf if a{i} == NONE else value_of(a{i})"
        lines.append(f"{pad}out[c, {column}] = {value}")
    lines.append("    end[who] = at")
    return "\n".join(lines) + "\n"


class _Names:
    """Variables of a program as the loop calls them."""

    def __init__(self, program: Program, values: Iterable[object]) -> None:
        self._kinds = {line.target: line.kind for line in program.lines}

    def _is_wide(self, line: Line) -> bool:
        if line.kind != BOOL:
            return line.kind == WIDE
        return any(isinstance(a, str) and self._kinds.get(a, REAL) == WIDE for a in line.args)

    def printed(self, line: Line) -> str:
        """One assignment."""
        letter = "w" if self._is_wide(line) or line.op == "ulp" else "s"
        args = [arg if isinstance(arg, str) else f"{letter}{arg}" for arg in line.args]
        return f"{line.target} = {OPERATIONS[line.op].format(*args)}"

    def hoisted(self, lines: Iterable[Line]) -> list[str]:
        """The scalars that they use, read once a chunk."""
        used: dict[str, str] = {}
        for line in lines:
            is_wide = self._is_wide(line) or line.op == "ulp"
            for arg in line.args:
                if not isinstance(arg, str):
                    value = f"scalars[t, {arg}]"
                    used[f"{'w' if is_wide else 's'}{arg}"] = value if is_wide else f"real({value})"
        return [f"{name} = {value}" for name, value in used.items()]


class _Stages:
    """Which lines and figures belong to the pass over all tensors, and which to the rates'."""

    def __init__(
        self, first: list[Line], second: list[Line], later: list[int], leaves: set[str]
    ) -> None:
        self.first, self.second, self.later, self.leaves = first, second, later, leaves


def _staged(recorded: Recorded) -> _Stages:
    program = recorded.program
    made = {line.target: line for line in program.lines}
    stops = {s.label for s in (recorded.rate, recorded.moves) if s is not None}

    def needed(name: str, stop: set[str], seen: set[str]) -> set[str]:
        if name in seen:
            return seen
        seen.add(name)
        if name in made and name not in stop:
            for arg in made[name].args:
                if isinstance(arg, str):
                    needed(arg, stop, seen)
        return seen

    later: list[int] = []
    second: set[str] = set()
    first: set[str] = set()
    for i, value in enumerate(recorded.values):
        if not isinstance(value, Symbol):
            continue
        # Of the rates alone: nothing else is read on the way.
        reads = needed(value.label, stops, set())
        if recorded.rate is not None and not any(_is_leaf(n) and n not in stops for n in reads):
            later.append(i)
            second |= reads - stops
        else:
            needed(value.label, set(), first)
    for name in stops:
        needed(name, set(), first)
    return _Stages(
        [line for line in program.lines if line.target in first],
        [line for line in program.lines if line.target in second],
        later,
        {name for name in first if _is_leaf(name)},
    )


def _is_leaf(name: str) -> bool:
    return name.startswith("x")


def _begin(recorded: Recorded, i: int) -> str:
    merge = recorded.table[i].merge
    if merge != "sum":
        return f"a{i} = {'ALL' if merge == 'min' else 'NONE'}"
    return f"a{i} = {'ZERO' if _kind(recorded, i) == BOOL else 'np.float64(0)'}"


def _kind(recorded: Recorded, i: int) -> str:
    value: Symbol = recorded.values[i]
    return value.kind


def _add(recorded: Recorded, i: int) -> str:
    """Add one element to a figure."""
    figure, name = recorded.table[i], recorded.values[i].label
    moves = recorded.moves.label if figure.moving and recorded.moves is not None else ""
    if figure.merge == "min":
        return f"a{i} = min(a{i}, order({name}) if {moves or True} else ALL)"
    if figure.merge == "max":
        return f"a{i} = max(a{i}, order({name}) if {moves or True} else NONE)"
    if _kind(recorded, i) == BOOL:
        return f"a{i} += ONE if {f'{name} & {moves}' if moves else name} else ZERO"
    value = f"np.float64({name})"
    return f"a{i} += {f'({value} if {moves} else 0.0)' if moves else value}"


__all__ = ["BINS", "CHUNK", "LANES", "LOADED", "source"]
