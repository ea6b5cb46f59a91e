"""Tensors that an optimizer steps but that are not known to be parameters of the model.

A library may step its own flat buffers (Megatron's distributed optimizer, an unknown ZeRO). If all
ranks hold the same values, they hold copies. Otherwise each rank holds a different part, and their
figures must not be merged as if they were replicas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrprobe.engine.pieces import local, local_real
from lrprobe.text import listed

if TYPE_CHECKING:
    from lrprobe.distributed.ranks import Kind


def content_digest(tensor: Tensor) -> str:
    """A digest of a tensor's values; unique to the rank if all values are equal."""
    rank = torch.distributed.get_rank()
    values = local_real(local(tensor)).detach().flatten()
    if not len(values) or values.device.type == "meta" or bool((values == values[0]).all()):
        return f"nothing, on rank {rank}"
    raw = values.cpu().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:16]


def rename_differing(
    kinds: Sequence[Kind], optimizer: str, ranks: Sequence[int]
) -> tuple[list[Kind], list[dict[str, str]]]:
    """Prefix the names of tensors that differ between ranks with their rank.

    Args:
        kinds: the specs of all ranks.
        optimizer: name of an optimizer.
        ranks: global rank of each rank in the group.

    Returns:
        The kinds with the new names, and for each kind, old names to new ones.
    """
    contents: dict[str, set[str]] = {}
    for kind in kinds:
        for holding in dict(kind.spec.holdings).get(optimizer, ()):
            if holding.content and not holding.key:
                contents.setdefault(holding.name, set()).add(holding.content)
    apart = {name for name, found in contents.items() if len(found) > 1}
    renamed, result = [], []
    for kind in kinds:
        new = {name: f"rank{ranks[kind.ranks[0]]}.{name}" for name in sorted(apart)}
        renamed.append(new)
        holdings = tuple(
            (
                each,
                tuple(replace(h, name=new.get(h.name, h.name)) for h in held)
                if each == optimizer
                else held,
            )
            for each, held in kind.spec.holdings
        )
        result.append(replace(kind, spec=replace(kind.spec, holdings=holdings)))
    return result, renamed


def unmerged_warning(names: Mapping[str, str], why: str) -> str:
    """A warning about tensors that are not merged over ranks."""
    new = next(iter(names.values()))
    what = f"{listed(list(names))}{f' ({why})' if why else ''}"
    return (
        "the optimizer steps tensors that are not parameters of the model, and each rank may hold "
        f"a different part: {what}. They are not merged: each rank has its own rows, named by rank "
        f"and group, as in {new}"
    )
