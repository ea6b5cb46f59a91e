"""Records steps on a device that is not there: what reads a value of it, or waits for it, fails.

A program of its own, since a device is registered for the whole of a process.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from lrprobe.summary.snapshot import How, Watched, after, before
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lrprobe.rules import find_rule

FAR = torch.device("privateuseone", 0)
SHAPES = ((90, 90), (70, 90), (90,), (5, 3), (90,))


class Unknown(torch.optim.SGD):
    """An optimizer without a rule."""


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, foreach=False, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, weight_decay=0.1, foreach=False),
    "RAdam": lambda p: torch.optim.RAdam(p, foreach=False),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p, foreach=False),
    "unknown": lambda p: Unknown(p, lr=0.1, foreach=False),
}


class NoWaiting(TorchDispatchMode):
    """Refuses copies from host to device, or back, that the host would wait for."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            assert not waits or source.device == result.device, f"{name} waits for the device"
        return result


def far(tensor: Any, mode: FakeTensorMode) -> Any:
    """As large as it, on the device that is not there; a number stays where it is."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return tensor
    return FakeTensor(mode, tensor.detach().to("meta"), FAR)


def record(make: Any, options: dict[str, Any]) -> None:
    """Three steps here, whose state is then taken to be there, and a recorded one there."""
    near = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(near)
    for _ in range(3):
        for param in near:
            param.grad = torch.randn_like(param)
        optimizer.step()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        there = [nn.Parameter(far(param, mode)) for param in near]
        taken = make(there)
        for param, other in zip(near, there, strict=True):
            other.grad = far(param.grad, mode)
            taken.state[other] = {k: far(v, mode) for k, v in optimizer.state[param].items()}
        rule = find_rule(type(taken)) if type(taken) is not Unknown else None
        tracked = torch.tensor([0, 2])
        watched = [
            Watched(str(i), 0, weakref.ref(param), rule, tracked, param.numel())
            for i, param in enumerate(there)
        ]
        with torch.no_grad(), NoWaiting(mode):
            raw = after(watched, taken, before(watched, taken), How(**options))
    assert not raw.errors, next(iter(raw.errors.values()))[:300]
    devices = {t.device for rows in raw.rows for _, t in rows.tensors()}
    assert devices == {FAR}, devices
    assert sorted(at for rows in raw.rows if rows.parts is not None for at in rows.at) == [
        0,
        1,
        2,
        3,
        4,
    ]


def main() -> None:
    """Every optimizer, whole and sampled."""
    _setup_privateuseone_for_python_backend()
    cases = list(itertools.product(MAKERS, ({}, {"sample": 5000})))
    for name, options in cases:
        try:
            record(MAKERS[name], dict(options))
        except Exception as error:
            raise AssertionError(f"{name} {options}") from error
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
