"""Prints a recorded program as the source of a Triton kernel.

Each program instance processes a chunk of one piece, block by block; a thread reads one row of
adjacent elements. Sums are kept per thread, and reduced at the end of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrprobe.engine.printer import Names, differing
from lrprobe.engine.program import BOOL
from lrprobe.engine.recording import Recorded

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
_NAN = "propagate_nan=tl.PropagateNan.ALL"
OPERATIONS = {
    **{op: f"{{0}} {sign} {{1}}" for op, sign in
       {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">", "lt": "<", "ge": ">=",
        "le": "<=", "eq": "==", "ne": "!=", "and": "&", "or": "|"}.items()},
    "neg": "-{0}", "not": "{0} == 0", "copy": "{0} + NOTHING_YET", "abs": "tl.abs({0})",
    "reciprocal": "1.0 / {0}", "sqrt": "root({0})", "fast_log2": "tl.log2({0})",
    "max": f"tl.maximum({{0}}, {{1}}, {_NAN})", "min": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to(REAL)",
    "where": "tl.where({0}, {1}, {2})", "float": "tl.where({0}, 1.0, 0.0).to(REAL)",
    "wide": "{0}.to(WIDE)", "ulp": "ulp({0}, {1}, {2})",
    "round_bfloat16": "rounded({0}, tl.bfloat16)", "round_float16": "rounded({0}, tl.float16)",
    "tanh": "1.0 - 2.0 / (tl.exp(2.0 * {0}) + 1.0)",
    **{name: f"tl.{name}({{0}})" for name in ("exp", "log", "log2", "sin", "cos")},
}  # fmt: skip

HEAD = """\
import triton
import triton.language as tl
from lrprobe.engine.blocks import *

@triton.jit
def chunk(table, scalars, out, wide, counts, seen, row, t, start, numel, recount,
          FULL: tl.constexpr, AGAIN: tl.constexpr,
          REAL: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr):
    FAST: tl.constexpr = WIDE == tl.float32
    BLOCK: tl.constexpr = ROWS * LANES
    NOTHING_YET = tl.zeros([ROWS, LANES], REAL)
    n = tl.minimum(numel, tl.load(table + CHUNK)).to(tl.int32)
    addresses = table + tl.load(table + ADDRESSES) + t * {leaves}
    s = scalars + t * tl.load(table + WIDTH)
"""

TAIL = """

@triton.jit
def kernel(table, scalars, out, wide, counts, seen,
           FULL: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr):
    row, t, start, n = place(table, tl.program_id(0).to(tl.int64), False, FULL)
    chunk(table, scalars, out, wide, counts, seen, row, t, start, n, n < 0,
          FULL, False, REAL, WIDE, LANES)

@triton.jit
def again(table, scalars, out, wide, counts, seen,
          REAL: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr):
    row, t, start, n = place(table, tl.program_id(0).to(tl.int64), True, False)
    recount = row < 0
    if {counted}:
        moving = tl.load(seen + t)
        recount = (start + n > ALL) & (moving <= ALL) & (moving > 0)
    wrong = row < 0
    if REAL == tl.float32:
        wrong = tl.load(out + row * {width} + {width} - 1) == 0
    if wrong | recount:
        chunk(table, scalars, out, wide, counts, seen, row, t, start, n, recount,
              False, True, REAL, WIDE, LANES)
"""

_TINY = "1e-28"
"""A smaller sum of squares may have lost terms to underflow."""


def source(recorded: Recorded, dtypes: Sequence[torch.dtype]) -> str:
    """The source of a module with the kernels ``kernel`` and ``again``; ``dtypes`` are the leaves'.

    ``again`` recomputes chunks whose float32 sums are not sound with sums in float64, and counts
    the rates of large pieces with few moving elements in full.
    """
    names = Names(
        recorded.program, OPERATIONS, "tl.load(s + {0}).to(REAL)", "tl.load(s + {0}).to(WIDE)"
    )
    lines, found = recorded.program.lines, differing(recorded)
    sums = [Sum(recorded, i) for i in found]
    counted = recorded.rate is not None and recorded.moves is not None
    pad, inner = " " * 4, " " * 8
    text = [HEAD.format(leaves=len(dtypes))]
    text += [pad + each for each in names.hoisted(lines)]
    for at, dtype in enumerate(dtypes):
        kind = f"tl.pointer_type({TYPES[dtype]})"
        text += [f"{pad}p{at} = tl.load(addresses + {at}).to({kind}) + start"]
        text += [f"{pad}if FULL:", f"{inner}p{at} = tl.multiple_of(p{at}, 16)"]
    text += [f"{pad}{line}" for one in sums for line in one.begin]
    text += [
        f"{pad}inside = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]",
        f"{pad}for k in range(0, n, BLOCK):",
        f"{inner}at = k + inside",
        f"{inner}ok = at < n",
    ]
    for at in range(len(dtypes)):
        masked = f"tl.load(p{at} + at, mask=ok, other=0.0)"
        text += [f"{inner}x{at} = (tl.load(p{at} + at) if FULL else {masked}).to(REAL)"]
    text += [inner + names.printed(line) for line in lines]
    if recorded.moves is not None:
        moves = recorded.moves.label
        text += [f"{inner}move = {moves} if FULL else {moves} & ok"]
    text += [f"{inner}{line}" for one in sums for line in one.add]
    if counted:
        count = f"count(counts + t * BINS, {recorded.rate.label}, move, at, start, start + numel"  # type: ignore[union-attr]
        text += [
            f"{inner}if AGAIN:",
            f"{inner}    if recount:",
            f"{inner}        {count}, True)",
            f"{inner}else:",
            f"{inner}    {count}, False)",
        ]
    text += [f"{pad}{line}" for one in sums for line in one.end]
    text += _stored(sums, counted=counted)
    return "\n".join(text) + TAIL.format(width=len(sums) + 1, counted=counted)


def _stored(sums: Sequence[Sum], *, counted: bool) -> list[str]:
    """Lines that store the sums of a chunk, and whether they are sound."""
    pad, inner = " " * 4, " " * 8
    width = len(sums) + 1
    by_name = {one.name: one.value for one in sums}
    text = [f"{pad}if FAST:"]
    text += [f"{inner}o = out + row * {width}"]
    text += [f"{inner}tl.store(o + {at}, {one.value})" for at, one in enumerate(sums)]
    finite = " + ".join(f"({one.value} - {one.value})" for one in sums if one.merge == "sum")
    text += [f"{inner}sound = {finite or '0.0'} == 0.0"]
    moved = f"({by_name['moving']} > 0)" if "moving" in by_name else "(n > 0)"
    rated = f"{moved} & ({by_name['rate_max']} > 0)" if "rate_max" in by_name else moved
    guards = {
        "direction_square": moved, "moved_square": rated, "update_square": rated,
        "param_square": "(n > 0)",
        "grad_square": f"({by_name['zeros']} < n)" if "zeros" in by_name else "(n > 0)",
    }  # fmt: skip
    for one in sums:
        if one.name in guards:
            text += [f"{inner}sound &= ({one.value} > {_TINY}) | ({guards[one.name]} == 0)"]
        elif one.name == "rate_square" and one.pivoted:
            mean = by_name["rate"]
            text += [f"{inner}sound &= ({mean} * {mean} > {_TINY}) | (({rated}) == 0)"]
    text += [f"{inner}tl.store(o + {width - 1}, sound.to(tl.float32))", f"{pad}else:"]
    text += [f"{inner}o = wide + row * {width}"]
    text += [f"{inner}tl.store(o + {at}, {one.value})" for at, one in enumerate(sums)]
    if counted and "moving" in by_name:
        count = f"{by_name['moving']}.to(tl.int32)"
        text += [f"{pad}if not AGAIN:", f"{inner}tl.atomic_add(seen + t, {count}, sem='relaxed')"]
    return text


class Sum:
    """How a figure is reduced over a chunk.

    Attributes:
        name, merge: those of the figure.
        pivoted: whether it is computed, if sums are in float32, as a mean or as a sum of squared
            distances to the mean.
        begin, add, end: lines before, inside and after the loop.
        value: the variable that holds the result.
    """

    def __init__(self, recorded: Recorded, i: int) -> None:
        figure, value = recorded.table[i], recorded.values[i]
        rate = recorded.rate
        self.name, self.merge = figure.name, figure.merge
        self.value = f"b{i}"
        ok = "move" if figure.moving and recorded.moves is not None else "ok"
        a, x = f"a{i}", value.label
        self.pivoted = figure.name in ("rate", "rate_square") and rate is not None
        if figure.merge != "sum":
            none = f"float('{'inf' if figure.merge == 'min' else '-inf'}')"
            start = f"extreme(REAL, {figure.merge == 'min'})"
            self.begin = [f"{a} = tl.zeros([ROWS], ordered(NOTHING_YET).dtype) + {start}"]
            self.add = [f"key{i} = tl.where({ok}, ordered({x}), {start})"]
            self.add += [f"{a} = tl.{figure.merge}imum({a}, tl.{figure.merge}(key{i}, axis=1))"]
            self.end = [f"key{i} = tl.{figure.merge}({a})"]
            self.end += [f"b{i} = tl.where(key{i} == {start}, {none}, value_of(key{i}))"]
            return
        self.begin = [f"{a} = tl.zeros([ROWS], WIDE)"]
        if value.kind == BOOL:
            x = f"tl.where({x}, 1.0, 0.0)"
        self.add, self.end = [f"{a} += {added(x, ok)}"], [f"b{i} = tl.sum({a})"]
        if self.pivoted:
            self._pivot(recorded, i, figure.name == "rate")

    def _pivot(self, recorded: Recorded, i: int, first: bool) -> None:
        """In float32, sum the distances to each row's first mean instead of the values."""
        rate = recorded.rate.label  # type: ignore[union-attr]
        plain, end = self.add[0], self.end[0]
        if not first:
            self.add = ["if FAST:", f"    a{i} += {added('apart * apart')}"]
            self.add += ["else:", f"    {plain}"]
            self.end = ["if not FAST:", f"    {end}", "else:", f"    b{i} = spread"]
            return
        self.begin += ["many, pivot = tl.zeros([ROWS], WIDE), tl.zeros([ROWS], WIDE)"]
        self.add = [
            "if FAST:",
            f"    more = {added('NOTHING_YET + 1.0')}",
            f"    middle = {added(rate)} / tl.maximum(more, 1.0)",
            "    pivot = tl.where(many == 0, middle, pivot)",
            "    many += more",
            f"    apart = {rate} - pivot[:, None]",
            f"    a{i} += {added('apart')}",
            "else:",
            f"    {plain}",
        ]
        self.end = ["if not FAST:", f"    {end}", "else:"]
        self.end += [f"    b{i}, spread = mean_and_spread(many, pivot, a{i}, a{i + 1})"]


def added(value: str, ok: str = "move") -> str:
    """An expression for the sum of the selected elements of each row."""
    masked = f"tl.where({ok}, ({value}).to(WIDE), 0.0)"
    if ok == "ok":
        masked = f"({value}).to(WIDE) if FULL else {masked}"
    return f"tl.sum({masked}, axis=1)"
