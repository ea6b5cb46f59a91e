"""Fine histograms of rates, counted on the device that has them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lrprobe.rules.base import Scalar
from lrprobe.summary.figures import BINS, SHIFT, is_scalar


def histograms(rate: Scalar, like: Tensor) -> Tensor:
    """Counts in fine bins of each row of rates: (rows, BINS), int32; zeros for a shared rate."""
    if is_scalar(rate, like):
        return torch.zeros((like.shape[0], BINS), dtype=torch.int32, device=like.device)
    return counts_of(cast("Tensor", rate))


def fine_bins(rates: Tensor) -> Tensor:
    """Fine bin of each rate, by the bits of a float32: (as ``rates``), int32."""
    bits = rates.to(torch.float32).contiguous().view(torch.int32) >> SHIFT
    return bits.clamp_(0, BINS - 1)


def counts_of(rates: Tensor) -> Tensor:
    """Counts in fine bins of each row: (rows, BINS), int32."""
    bins = fine_bins(rates)
    rows, size = len(bins), len(bins) * BINS
    bins += torch.arange(0, size, BINS, dtype=bins.dtype, device=bins.device).unsqueeze(1)
    at = bins.view(-1).long()  # of which `bincount` takes half the time that it takes of int32
    if at.device.type == "cpu":
        return torch.bincount(at, minlength=size).int().view(rows, BINS)
    counts = torch.zeros(size, dtype=torch.int32, device=at.device)  # `bincount` would wait
    return counts.index_add_(0, at, torch.ones_like(at, dtype=torch.int32)).view(rows, BINS)
