"""The check sample: elements kept from before the step, to compare with the step really taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lrprobe.engine.pieces import SAMPLE, sample, sample_runs


@cache
def zeros(device: torch.device) -> Tensor:
    """A check sample of zeros of any dtype."""
    return torch.zeros(SAMPLE * 8, dtype=torch.uint8, device=device)


class Wanted(NamedTuple):
    """A tensor of which a sample is kept: number of the parameter, name of the tensor."""

    at: int
    name: str
    tensor: Tensor


class Samples:
    """Check samples of many tensors, those of one way in one buffer."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, str], tuple[Tensor, int, torch.dtype, int]] = {}
        self._names: dict[int, list[str]] = defaultdict(list)

    @classmethod
    def of(cls, wanted: Sequence[Wanted], ways: dict[str, ModuleType]) -> Samples:
        """Copy them: at once where a way of their device can, else one by one."""
        samples = cls()
        together: dict[torch.device, list[Wanted]] = defaultdict(list)
        for each in wanted:
            way = ways.get(each.tensor.device.type)
            if way is not None and each.tensor.is_contiguous() and way.is_addressable(each.tensor):
                together[each.tensor.device].append(each)
            else:
                kept = sample(each.tensor, each.tensor.shape).clone()
                samples._add(each.at, each.name, kept, 0, kept)
        for device, some in together.items():
            buffer, starts = ways[device.type].gather([each.tensor for each in some])
            for each, start in zip(some, starts, strict=True):
                samples._add(each.at, each.name, buffer, start, each.tensor)
        return samples

    def _add(self, at: int, name: str, buffer: Tensor, start: int, of: Tensor) -> None:
        runs, run, _ = sample_runs(of.numel())
        self._places[at, name] = buffer, start, of.dtype, runs * run
        self._names[at].append(name)

    def names(self, at: int) -> list[str]:
        """What was kept of a parameter, sorted."""
        return sorted(self._names.get(at, ()))

    def address(self, at: int, name: str, device: torch.device) -> int:
        """Where a sample begins; that of zeros where nothing was kept."""
        if (at, name) not in self._places:
            return zeros(device).data_ptr()
        buffer, start, _, _ = self._places[at, name]
        return buffer.data_ptr() + start

    def tensor(self, at: int, name: str) -> Tensor:
        """A sample: flat."""
        buffer, start, dtype, numel = self._places[at, name]
        if buffer.dtype == dtype:
            return buffer.reshape(-1)[:numel]
        return buffer[start : start + numel * dtype.itemsize].view(dtype)

    def old(self, at: int) -> dict[str, Tensor]:
        """All that was kept of a parameter."""
        return {name: self.tensor(at, name) for name in self.names(at)}
