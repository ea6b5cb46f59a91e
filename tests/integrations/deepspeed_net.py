"""The training that DeepSpeed's are compared with: a small net, in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, optim

import lrprobe

STEPS = 4
BATCH = 8


class Net(nn.Module):
    """Layers that split unevenly over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(18, 61)
        self.norm = nn.LayerNorm(61)
        self.middle = nn.Linear(61, 27, bias=False)
        self.down = nn.Linear(27, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.norm(self.up(x).tanh())).tanh())


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def data(step: int) -> tuple[Tensor, Tensor]:
    """One batch, the same everywhere; each rank takes its part."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 18, generator=generator), torch.randn(BATCH, 5, generator=generator)


def groups_of(model: nn.Module, options: set[str]) -> list[Any]:
    """One group, or three that differ."""
    if "groups" not in options:
        return [{"params": list(model.parameters())}]
    named = dict(model.named_parameters())
    thin = [p for p in named.values() if p.ndim < 2]
    wide = [p for name, p in named.items() if p.ndim > 1 and not name.startswith("down")]
    return [
        {"params": wide, "name": "wide"},
        {"params": thin, "lr": 0.005, "weight_decay": 0.0},
        {"params": [named["down.weight"]], "lr": 0.02},
    ]


def make(kind: str, groups: list[Any]) -> optim.Optimizer:
    if kind == "adamw":
        return optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=1e-2)
    if kind == "sgd":
        return optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    return optim.Adadelta(groups, lr=1.0)


def learner(engine: Any, options: set[str]) -> Any:
    """What is attached to: the wrapper; or the torch optimizer in it."""
    return engine.optimizer.optimizer if "inner" in options else engine.optimizer


def frames(probe: lrprobe.Probe) -> dict[str, Any]:
    return {
        **{by: probe.frame(by) for by in ("parameter", "module", "group", "model")},
        "elements": probe.elements(),
        "histograms": probe.histograms(),
    }


def alone(case: str) -> dict[str, Any]:
    """The same training in one process, in fp32."""
    _, kind, *rest = case.split("-")
    options = set(rest)
    model = net()
    optimizer = make(kind, groups_of(model, options))
    with lrprobe.attach(optimizer, model, every=2, track=3, batch_size=BATCH) as probe:
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = data(step)
            (model(x) - y).square().mean().backward()
            if "clip" in options:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        return frames(probe)
