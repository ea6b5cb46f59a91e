"""Tensors that an optimizer steps and that are nobody's parameters: copies on all ranks, or parts.

A library may keep flat buffers of its own (Megatron's distributed optimizer, a ZeRO that is not
known here). Ranks that have the same values in one have copies of it; else each has another part,
and the figures of one rank are not those of the others.
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
    """What tells a tensor from another one, by its values; where these are all one, by the rank."""
    rank = torch.distributed.get_rank()
    values = local_real(local(tensor)).detach().flatten()
    if not len(values) or values.device.type == "meta" or bool((values == values[0]).all()):
        return f"nothing, on rank {rank}"
    raw = values.cpu().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:16]


def rename_differing(
    kinds: Sequence[Kind], optimizer: str, ranks: Sequence[int]
) -> tuple[list[Kind], list[dict[str, str]]]:
    """Give tensors that differ between ranks names of their own.

    Args:
        kinds: what all ranks hold.
        optimizer: name of an optimizer.
        ranks: global rank of each rank in the group.

    Returns:
        The kinds with those names, and for each kind, old names to new ones.
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
    """A warning that speaks of them."""
    new = next(iter(names.values()))
    what = f"{listed(list(names))}{f' ({why})' if why else ''}"
    return (
        "the optimizer steps what is no parameter of the model, and each rank may have another "
        f"part of it: {what}. It is not merged: a row has what one rank has, and is named by group "
        f"and rank, as in {new}"
    )
