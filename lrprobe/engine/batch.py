"""Batches: pieces of one kind that one call processes together, and their memory addresses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrprobe.engine.check import Samples
from lrprobe.engine.eager import add_whole_statistics
from lrprobe.engine.pieces import SAMPLE, is_dense, is_per_element, is_strided, sample
from lrprobe.engine.recording import Recorded
from lrprobe.rules.base import Coded, Entry, Rule, SparseRows

Backends = Mapping[str, ModuleType]
"""Device type to the module that generates code for it."""


@dataclass(slots=True)
class Batch:
    """Pieces of one kind: the same rule, group, dtypes, device and state entries.

    Attributes:
        at: indices of their parameters.
        entries: the tensors of each piece.
        group, rule: shared by all pieces.
        columns: name of an element-wise tensor to its address in each piece; empty unless every
            such tensor can be read by address.
        whole: whether all of these tensors are contiguous.
        memo: scalars that the programs of the batch share.
        sampled: like ``columns``, of the check samples, by name in programs; empty if these have
            to be copied.
        kept: names of the samples from before the step, of each piece; only with ``sampled``.
        may_be_eager: whether eager code may compute it, because the entries hold the elements;
            otherwise only ``columns`` lead to them.
    """

    at: list[int]
    entries: list[Entry]
    group: Mapping[str, Any]
    rule: Rule | None
    columns: dict[str, list[int]] = field(default_factory=dict)
    whole: bool = True
    memo: dict[Any, Any] = field(default_factory=dict)
    sampled: dict[str, list[int]] = field(default_factory=dict)
    kept: list[Collection[str]] = field(default_factory=list)
    may_be_eager: bool = True

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.at)))

    def add(self, i: int, entry: Entry, addresses: Mapping[str, int]) -> None:
        """Add a piece."""
        self.at.append(i)
        self.entries.append(entry)
        for name, address in addresses.items():
            self.columns.setdefault(name, []).append(address)


def batch_of(
    backends: Backends, i: int, entry: Entry, group: Mapping[str, Any], rule: Rule | None
) -> Batch:
    """A batch of one piece."""
    _, addresses, contiguous = describe(backends, entry)
    batch = Batch([], [], group, rule, whole=contiguous)
    batch.add(i, entry, addresses if entry.param.numel() else {})
    return batch


def describe(backends: Backends, entry: Entry) -> tuple[tuple[Any, ...], dict[str, int], bool]:
    """The batch key of a piece, the addresses of its tensors, and whether it is contiguous.

    There are no addresses unless all tensors have the same dense layout.
    """
    param, grad = entry.param, entry.grad
    shape, strides, device = param.shape, param.stride(), param.device
    backend = backends.get("cpu" if param.is_cpu else device.type)
    if isinstance(grad, Tensor):
        tensors: list[tuple[str, Any]] = [("param", param), ("grad", grad)]
    else:
        backend, tensors = None, [("param", param)]
    addresses: dict[str, int] = {}
    kinds: list[Any] = [device, type(grad) is SparseRows]
    for name, value in (*tensors, *entry.state.items()):
        if name in ("param", "grad") and value is not param and value is not grad:
            backend = None  # a state entry, for which programs would read the tensor of that name
        if not is_strided(value):
            kinds.append((name, value is None))
            backend = None if isinstance(value, Coded) else backend
            continue
        same = value.shape == shape
        kinds.append((name, value.dtype, same))
        if same and (shape or value.device == device):
            if (
                backend is None
                or value.device != device
                or value.stride() != strides
                or not backend.is_addressable(value)
            ):
                backend = None
            else:
                addresses[name] = value.data_ptr()
        elif value.dim() and is_per_element(value, shape):
            backend = None  # generated code does not broadcast
    contiguous = param.is_contiguous()
    if backend is None or not (contiguous or is_dense(param)):
        addresses = {}
    return (*kinds, bool(addresses)), addresses, contiguous


def add_batch_statistics(
    backends: Backends, batch: Batch, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Add what ``Rule.whole`` computes to each entry, and refresh the addresses.

    ``groups`` has the group of each entry, at the time of its step.
    """
    if batch.rule is not None:
        for entry, group in zip(batch.entries, groups, strict=True):
            add_whole_statistics(entry, group, batch.rule)
    found = [describe(backends, entry) for entry in batch.entries]
    alike = len({kind for kind, _, _ in found}) == 1 and all(a for _, a, _ in found)
    names = found[0][1] if alike else ()
    batch.columns = {name: [addresses[name] for _, addresses, _ in found] for name in names}


def addresses_of(
    recorded: Recorded, batch: Batch, samples: Samples | None, backend: ModuleType
) -> tuple[NDArray[np.int64], list[torch.dtype], list[Tensor]] | None:
    """Addresses and dtypes of the leaves of each piece, and tensors to keep alive meanwhile.

    None if a tensor that the program reads has no address.
    """
    columns: list[list[int]] = []
    dtypes: list[torch.dtype] = []
    alive: list[Tensor] = []
    wanted: list[tuple[list[int], int, Tensor]] = []
    for leaf in recorded.program.leaves:
        name = leaf.removeprefix("old ")
        source = "grad" if name == "previous" else name
        if source not in batch.columns:
            return None
        dtypes.append(leaf_of(batch.entries[0], source).dtype)
        if samples is None:
            column = batch.columns[name]
        elif leaf in batch.sampled:
            column = batch.sampled[leaf]
        elif leaf != name:
            device = batch.entries[0].param.device
            column = [samples.address(i, name, device) for i in batch.at]
        else:
            column = list(batch.columns[name])
            wanted += [(column, n, tensor) for n, tensor in _uncopied(batch, name, column, alive)]
        columns.append(column)
    if wanted:
        buffer, starts = backend.gather([tensor for _, _, tensor in wanted])
        alive.append(buffer)
        for (column, n, _), start in zip(wanted, starts, strict=True):
            column[n] = buffer.data_ptr() + start
    table = np.array(columns, np.int64).reshape(len(columns), len(batch.at)).T
    return np.ascontiguousarray(table), dtypes, alive


def _uncopied(
    batch: Batch, name: str, column: list[int], alive: list[Tensor]
) -> list[tuple[int, Tensor]]:
    """The tensors of which a check sample has to be gathered; puts others into the column."""
    large = [n for n, entry in enumerate(batch.entries) if entry.param.numel() > SAMPLE]
    wanted = []
    for n in large if batch.whole else batch:
        tensor = leaf_of(batch.entries[n], name)
        if not tensor.is_contiguous():
            alive.append(sample(tensor, tensor.shape))
            column[n] = alive[-1].data_ptr()
        elif n in large:
            wanted.append((n, tensor))
    return wanted


def leaf_of(entry: Entry, name: str) -> Any:
    """A tensor of an entry, by its name in programs."""
    if name in ("param", "grad"):
        return entry.param if name == "param" else entry.grad
    return entry.state.get(name)
