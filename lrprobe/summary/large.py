"""Large parameters: which of them are read block by block, together, or as a sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.rules.base import Entry, Rule
from lrprobe.summary.figures import state_like, suspicious
from lrprobe.summary.fused import COLUMNS
from lrprobe.summary.histogram import Counts
from lrprobe.summary.joint import MOST, Reader
from lrprobe.summary.nonfinite import hidden_states
from lrprobe.summary.stream import read_singly


class Found(NamedTuple):
    """Figures of some of several parameters.

    Attributes:
        at: which.
        parts: (parameters, PARTS).
        counts: fine histograms of their rates, or of a sample.
    """

    at: Sequence[int]
    parts: Tensor
    counts: Counts


def large_figures(
    entries: Sequence[Entry],
    group: Mapping[str, Any],
    rule: Rule,
    pivots: Sequence[Tensor] | None,
    *,
    sample: int | None = None,
    compile: bool = False,  # noqa: A002 - as in `attach`
) -> list[Found]:
    """PARTS, and fine histograms of a sample of the rates; of each once, in any order.

    Args:
        entries: large parameters of one group and device.
        group: theirs.
        rule: theirs.
        pivots: a value among each one's rates, 0-dim; None where all its elements share a rate.
        sample: estimate the figures from that many elements, but for the norms of parameter and
            gradient, which stay exact.
        compile: with a compiled kernel where there can be one.
    """
    if sample is not None and compile:
        sample = -(-sample // COLUMNS) * COLUMNS  # whole rows of a kernel

    def figures(way: _Way, some: Sequence[int], *, exact: bool) -> Found:
        chosen = [entries[i] for i in some]
        middle = None if pivots is None else [pivots[i] for i in some]
        first = chosen[0]
        states = tuple(state_like(first)) if exact else hidden_states(first, group, rule)
        if way == "singly":
            read = read_singly(chosen, group, rule, middle, states, compile=compile, exact=exact)
            return Found(some, *read)
        reader = Reader(first, group, rule, states, compile=compile, exact=exact)
        if way == "sample":
            return Found(some, *reader.sample(chosen, middle, cast("int", sample)))
        order, parts, counts = reader.whole(chosen, middle)
        return Found([some[i] for i in order], parts, counts)

    ways: dict[_Way, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        ways[_way(entry, sample)].append(i)
    on_host = entries[0].param.device.type == "cpu"
    result = []
    for way, some in ways.items():
        # A device must not be asked what came out: there it is computed the sure way at once.
        found = figures(way, some, exact=not on_host)
        wrong = suspicious(found.parts.numpy()) if on_host else np.zeros(len(some), np.bool_)
        if wrong.any():
            again = [i for i, bad in zip(found.at, wrong, strict=True) if bad]
            result.append(figures(way, again, exact=True))
        if not wrong.all():
            result.append(_without(found, wrong) if wrong.any() else found)
    return result


_Way = Literal["sample", "singly", "jointly"]


def _way(entry: Entry, sample: int | None) -> _Way:
    """How a parameter is read."""
    numel = entry.param.numel()
    if sample is not None and sample < numel:
        return "sample"
    return "singly" if numel >= MOST else "jointly"


def _without(found: Found, wrong: NDArray[np.bool_]) -> Found:
    keep = np.flatnonzero(~wrong).tolist()
    counts = Counts(found.counts.table[keep], found.counts.first)
    return Found([found.at[i] for i in keep], found.parts[keep], counts)
