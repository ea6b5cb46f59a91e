"""The check sample: elements kept from before the step, to compare with the actual step."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from lrprobe.engine.pieces import SAMPLE, sample, sample_runs

Place: TypeAlias = tuple[int, int, torch.dtype, int]
"""Where a sample is: (index of the buffer, byte offset, dtype, elements)."""


@cache
def zeros(device: torch.device) -> Tensor:
    """A buffer of zeros that is a check sample in any dtype."""
    return torch.zeros(SAMPLE * 8, dtype=torch.uint8, device=device)


class Samples:
    """Check samples of many tensors; contiguous tensors of one device share a buffer."""

    def __init__(self, backends: dict[str, ModuleType]) -> None:
        self._backends = backends
        self._buffers: list[Tensor] = []
        self._places: dict[int, dict[str, Place]] = {}
        """By parameter index and tensor name."""
        self._requested: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
        self._borrowed: Tensor | None = None
        self._borrowed_number = 0

    @classmethod
    def over(
        cls,
        backends: dict[str, ModuleType],
        buffers: list[Tensor],
        places: dict[int, dict[str, Place]],
    ) -> Samples:
        """Samples that lie in existing buffers of bytes."""
        samples = cls(backends)
        samples._buffers, samples._places = buffers, places
        return samples

    def request(self, at: int, name: str, tensor: Tensor) -> None:
        """Sample a tensor now, or together with others when ``take`` is called."""
        backend = self._backends.get("cpu" if tensor.is_cpu else tensor.device.type)
        if backend is not None and tensor.is_contiguous() and backend.is_addressable(tensor):
            self._requested.setdefault(tensor.device, []).append((at, name, tensor))
        else:
            self.put(at, name, sample(tensor, tensor.shape).clone())

    def put(self, at: int, name: str, kept: Tensor) -> None:
        """Add an existing flat sample."""
        self._places.setdefault(at, {})[name] = len(self._buffers), 0, kept.dtype, len(kept)
        self._buffers.append(kept)

    def borrow(self, at: int, name: str, other: Samples, their: int) -> None:
        """Refer to a sample in another ``Samples``, without a copy."""
        number, start, dtype, numel = other._places[their][name]
        buffer = other._buffers[number]
        if self._borrowed is not buffer:
            self._borrowed = buffer
            self._buffers.append(buffer)
            self._borrowed_number = len(self._buffers) - 1
        self._places.setdefault(at, {})[name] = self._borrowed_number, start, dtype, numel

    def take(self) -> None:
        """Copy all requested samples, in one call per device."""
        for device, some in self._requested.items():
            buffer, starts = self._backends[device.type].gather([tensor for _, _, tensor in some])
            for (at, name, tensor), start in zip(some, starts, strict=True):
                runs, run, _ = sample_runs(tensor.numel())
                place = len(self._buffers), start, tensor.dtype, runs * run
                self._places.setdefault(at, {})[name] = place
            self._buffers.append(buffer)
        self._requested = {}

    def names(self, at: int) -> dict[str, Place]:
        """The samples of a parameter, by tensor name."""
        return self._places.get(at, {})

    def address(self, at: int, name: str, device: torch.device) -> int:
        """Address of a sample; that of ``zeros`` if nothing was kept."""
        place = self._places.get(at, {}).get(name)
        if place is None:
            return zeros(device).data_ptr()
        return self._buffers[place[0]].data_ptr() + place[1]

    def tensor(self, at: int, name: str) -> Tensor:
        """A sample as a flat tensor."""
        number, start, dtype, numel = self._places[at][name]
        buffer = self._buffers[number]
        if buffer.dtype == dtype != torch.uint8:
            return buffer[:numel]
        return buffer[start : start + numel * dtype.itemsize].view(dtype)

    def has(self, at: int, name: str, dtype: torch.dtype, numel: int) -> bool:
        """Whether there is a sample of this dtype and number of elements."""
        return self._places.get(at, {}).get(name, ())[2:] == (dtype, numel)

    def old(self, at: int) -> dict[str, Tensor]:
        """All samples of a parameter, as flat tensors by name."""
        return {name: self.tensor(at, name) for name in self.names(at)}
