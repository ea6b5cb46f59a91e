"""Fine histograms of rates, counted on the device that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrprobe.rules.base import Scalar
from lrprobe.summary.figures import BINS, PER_OCTAVE, SHIFT, is_scalar
from lrprobe.summary.reading import Lines


class Counts(NamedTuple):
    """Fine histograms of several parameters, of the bins in which there are rates.

    Attributes:
        table: counts: (parameters, bins), int32.
        first: which bin the first is; the start of an octave.
    """

    table: Tensor
    first: int


def histograms(rate: Scalar, like: Tensor, lines: Lines) -> Counts:
    """Of each owner's rates; without any bins where all share one."""
    if is_scalar(rate, like):
        return no_counts(lines.owners, like.device)
    return counts_of(cast("Tensor", rate), lines)


def no_counts(owners: int, device: torch.device) -> Counts:
    """Of parameters that have no rates of their own."""
    return Counts(torch.zeros((owners, 0), dtype=torch.int32, device=device), 0)


def fine_bins(rates: Tensor) -> Tensor:
    """Fine bin of each rate, by the bits of a float32: (as ``rates``), int32.

    What is negative is in the first, NaN beyond that of inf.
    """
    bins = rates.to(torch.float32).contiguous().view(torch.int32) >> SHIFT
    # Seldom has one the bit of the sign, which a NaN may have: a device is not asked.
    if bins.device.type != "cpu" or (bins.numel() and bins.amin().numpy() < 0):
        bins = torch.where(rates.isnan(), BINS - 1, bins.clamp_(min=0))
    return bins


def counts_of(rates: Tensor, lines: Lines) -> Counts:
    """Of each owner's rates: (lines, n)."""
    bins = fine_bins(rates)
    first, width = 0, BINS
    on_host = bins.device.type == "cpu"
    if on_host:  # as many bins as are needed, which are few; a device is not asked
        low, high = (int(each.numpy()) // PER_OCTAVE for each in torch.aminmax(bins))
        first, width = low * PER_OCTAVE, (high + 1 - low) * PER_OCTAVE
    size = lines.owners * width
    start = torch.arange(0, size, width, dtype=bins.dtype, device=bins.device) - first
    at = bins.add_(lines.spread(start).unsqueeze(1)).view(-1)
    if on_host:
        return Counts(torch.bincount(at, minlength=size).int().view(-1, width), first)
    counts = torch.zeros(size, dtype=bins.dtype, device=bins.device)  # `bincount` would wait
    counts.index_add_(0, at, torch.ones_like(at))
    return Counts(counts.view(-1, width), first)


def added(each: Sequence[Counts]) -> Counts:
    """Of all rates of the same parameters."""
    same = aligned(each)
    return Counts(sum((one.table for one in same[1:]), same[0].table), same[0].first)


def listed(each: Sequence[Counts]) -> Counts:
    """Of the first ones' parameters, and then of the next ones'."""
    same = aligned(each)
    return Counts(torch.cat([one.table for one in same]), same[0].first)


def aligned(each: Sequence[Counts]) -> list[Counts]:
    """All of the same bins."""
    spans = [(one.first, one.first + one.table.shape[1]) for one in each if one.table.shape[1]]
    first = min((start for start, _ in spans), default=0)
    last = max((end for _, end in spans), default=0)
    result = []
    for table, start in each:
        before = start - first if table.shape[1] else 0
        after = last - first - table.shape[1] - before
        result.append(Counts(pad(table, (before, after)) if before or after else table, first))
    return result
