"""Short runs into datasets and logdirs, for what looks at runs."""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrprobe


def record(
    to: Path, model: nn.Module | None = None, *, every: int = 1, steps: int = 30, eps: float = 1e-8
) -> Path:
    """Steps of Adam on four random inputs; gives back where they were recorded."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    adam = torch.optim.Adam(model.parameters(), eps=eps)
    with lrprobe.attach(adam, model, to=str(to), every=every):
        for _ in range(steps):
            adam.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            adam.step()
    return to


def references(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[weakref.ReferenceType[Any]]:
    """To model, optimizer, parameters, gradients and state."""
    params = list(model.parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [
        weakref.ref(each)
        for each in (model, optimizer, *params, *(p.grad for p in params), *states)
    ]
