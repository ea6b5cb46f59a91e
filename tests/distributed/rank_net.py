"""A small net, its optimizers, and a training of it on one part of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

import lrprobe

STEPS = 4
BATCH = 8


class Net(nn.Module):
    """Layers that split unevenly: rows of 5 over 4 ranks leave the last one nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(18, 300)
        self.norm = nn.LayerNorm(300)
        self.middle = nn.Linear(300, 28, bias=False)
        self.down = nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.norm(self.up(x).tanh())).tanh())


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One batch, the same everywhere; each rank takes its part."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 18, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if is_matrix(name)]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not is_matrix(name)]


def is_matrix(name: str) -> bool:
    """By name: FSDP1 makes everything flat."""
    return name.endswith(("up.weight", "middle.weight", "down.weight"))


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4),
    "adadelta": lambda m: optim.Adadelta(m.parameters()),
    "adafactor": lambda m: optim.Adafactor(m.parameters()),
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "muon": lambda m: [
        optim.Muon(matrices(m), lr=1e-2),
        optim.AdamW(vectors(m), lr=1e-2),
    ],
    "several": lambda m: {
        "a": optim.AdamW(matrices(m), lr=1e-2, eps=1e-4),
        "b": optim.SGD(vectors(m), lr=0.1, momentum=0.9),
    },
}


def each_of(optimizers: Any) -> list[optim.Optimizer]:
    if isinstance(optimizers, dict):
        return list(optimizers.values())
    return optimizers if isinstance(optimizers, list) else [optimizers]


def train(
    model: nn.Module,
    optimizers: Any,
    *,
    dtype: torch.dtype = torch.float64,
    part: tuple[int, int] = (0, 1),
    steps: int = STEPS,
    start: int = 0,
) -> None:
    """Steps of a training, on one part of each batch."""
    at, parts = part
    for step in range(start, start + steps):
        x, y = (t.chunk(parts)[at] for t in data(step, dtype))
        for each in each_of(optimizers):
            each.zero_grad()
        (model(x) - y).square().mean().backward()
        for each in each_of(optimizers):
            each.step()


def frames(probe: lrprobe.Probe) -> dict[str, Any]:
    return {
        **{by: probe.frame(by) for by in ("parameter", "module", "group", "model")},
        "elements": probe.elements(),
        "histograms": probe.histograms(),
    }


def alone(kind: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> dict[str, Any]:
    """The same training in one process."""
    model = net(dtype)
    optimizers = OPTIMIZERS[kind](model)
    options = {"every": 2, "track": 3, "batch_size": BATCH, **kwargs}
    with lrprobe.attach(optimizers, model, **options) as probe:
        train(model, optimizers, dtype=dtype)
        return frames(probe)
