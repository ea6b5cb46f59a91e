"""Detects dummy steps, which checkpoint libraries take to create the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrprobe.engine.pieces import local


def device_of(optimizer: Optimizer) -> torch.device:
    """The device on which figures merge: an accelerator if a parameter is on one."""
    found = {local(p).device for g in optimizer.param_groups for p in g["params"]}
    far = [device for device in found if device.type not in ("cpu", "meta")]
    return min(far, key=str) if far else torch.device("cpu")


def all_rates_zero(optimizer: Optimizer) -> bool | None:
    """Whether every rate is 0; None if that would need a synchronization."""
    known: bool | None = True
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            known = None
        elif lr is None or (lr.any() if isinstance(lr, Tensor) else lr != 0):
            return False
    return known


def any_gradient(optimizer: Optimizer) -> bool:
    """Whether a gradient has a nonzero element, or there are no elements; may synchronize."""
    grads = _gradients(optimizer)
    return not grads or any(bool(each.any()) for each in grads)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """All gradients with elements; the values of sparse ones."""
    grads = [
        local(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None
    ]
    values = [g._values() if g.is_sparse else g for g in grads if g.numel()]  # noqa: SLF001 - it need not be coalesced for this
    return [each.detach() for each in values]


def step_moved(optimizer: Optimizer, device: torch.device) -> Any:
    """0 if all rates or all gradients are 0, else 1 (also without gradients); never synchronizes.

    A checkpoint library takes such a step to create the state that it loads into.
    """
    if all_rates_zero(optimizer) is False:
        return 1.0
    grads = _gradients(optimizer)
    if not grads:
        return 1.0
    given = [group["lr"] for group in optimizer.param_groups]
    rates = [v.detach().reshape(()) for v in given if isinstance(v, Tensor)]  # a float here is 0
    # A few launches for all gradients together, as torch clips them.
    sizes = torch._foreach_norm(grads, torch.inf)  # noqa: SLF001 - torch has no other name for it
    alike: dict[Any, list[Tensor]] = {}
    for value in {id(each): each for each in (*rates, *sizes)}.values():
        alike.setdefault((value.device, value.dtype), []).append(value)
    largest = [torch.stack(each).abs().amax() for each in alike.values()]
    sent = [each.to(device, torch.float64, non_blocking=True) for each in largest]
    return (torch.stack(sent) != 0).any().double()
