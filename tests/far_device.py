"""Records steps on a device that is not there: what reads a value of it, or waits for it, fails.

A program of its own, since a device is registered for the whole of a process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from lrprobe.arguments import Filter, Options
from lrprobe.engine import cuda
from lrprobe.engine.flight import StepInFlight
from lrprobe.hooks import Hooks
from lrprobe.names import Names

FAR = torch.device("privateuseone", 0)
SHAPES = ((90, 90), (70, 90), (90,), (5, 3), (90,))


class Unknown(torch.optim.SGD):
    """An optimizer without a rule."""


def tensor_lr(params: Any) -> torch.optim.Optimizer:
    """AdamW as it is captured into a CUDA graph: its rate and its step counts are there."""
    near = all(p.device.type == "cpu" for p in params)
    optimizer = torch.optim.AdamW(params, lr=0.01, foreach=False)
    if not near:
        optimizer.param_groups[0].update(lr=far(torch.zeros(1)).reshape(()), capturable=True)
    return optimizer


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, tensor lr": tensor_lr,
    "Adam": lambda p: torch.optim.Adam(p, foreach=False, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, weight_decay=0.1, foreach=False),
    "RAdam": lambda p: torch.optim.RAdam(p, foreach=False),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p, foreach=False),
    "unknown": lambda p: Unknown(p, lr=0.1, foreach=False),
}

mode = FakeTensorMode(allow_non_fake_inputs=True)


class Event:
    """One that never comes."""

    def record(self, stream: Any) -> None:
        """Nothing."""


class Device(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What torch asks of the module of a device."""

    Event = Event

    def current_stream(self, device: Any) -> None:
        """There is one."""


class Pinned:
    """Host tensors that torch can send without waiting."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept.append(tensor)
        return tensor

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return any(tensor is each for each in self.kept)


class Watching(TorchDispatchMode):
    """Counts what is launched there; refuses what the host would wait for.

    What is of the host alone is done; of the rest only shapes are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.pinned = Pinned()

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = list(tree_iter((args, kwargs)))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        if not any(isinstance(each, FakeTensor) for each in tensors) and FAR not in given:
            with _disable_current_modes():
                return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        fake, named = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with mode:
            result = func(*fake, **named)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                assert not waits, f"{name} waits for the device"
                fast = source.device == FAR or source in self.pinned
                assert fast, f"{name} of memory that is not pinned waits for the device"
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        made = any(isinstance(each, torch.Tensor) for each in tree_iter(result))
        computes = made and not name.startswith(("empty", "new_empty"))
        if computes and not is_view:
            self.launches[name] += 1
        return result


class Owner:
    """Takes the figures of a step."""

    run: dict[str, Any] = {}  # noqa: RUF012 - nobody adds to it
    rank = 0
    waiting = False

    def __init__(self) -> None:
        self.steps: list[StepInFlight] = []

    def add(self, hooks: Hooks, step: StepInFlight) -> None:
        self.steps.append(step)

    def collect(self) -> None:
        """Nothing has arrived."""

    def look(self, _: Any) -> None:
        """Nothing to be said of who steps what."""

    def describe(self) -> None:
        """Nothing is asked."""


def raised(_: Any, error: Exception) -> None:
    """Instead of going on with the training."""
    raise error


def far(tensor: Any, shape: Sequence[int] | None = None) -> Any:
    """As large as it, on the device that is not there; a number stays where it is."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return tensor
    kept = torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, kept, FAR)


def record(
    make: Callable[[Any], torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    *,
    small: bool = False,
    track: int = 0,
    recorded: int = 2,
) -> tuple[Counter[str], StepInFlight]:
    """Steps here, whose state is then taken to be there, and recorded ones there.

    Args:
        make: the optimizer of parameters.
        shapes: of the parameters.
        small: whether those of the steps here are tiny.
        track: elements to track.
        recorded: steps there; the last is the one that is reported.
    """
    near = [nn.Parameter(torch.randn([2] * len(s) if small else s)) for s in shapes]
    optimizer = make(near)
    for _ in range(3):
        for param in near:
            param.grad = torch.randn_like(param)
        optimizer.step()
    there = [nn.Parameter(far(p, s)) for p, s in zip(near, shapes, strict=True)]
    taken = make(there)
    moves_too = any(g.get("fused") or g.get("capturable") for g in taken.param_groups)
    for param, other in zip(near, there, strict=True):
        other.grad = far(param.grad, other.shape)
        taken.state[other] = {
            name: far(value, other.shape if value.shape == param.shape and value.dim() else None)
            if value.dim() or not moves_too
            else far(value.reshape(1)).reshape(())
            for name, value in optimizer.state[param].items()
            if isinstance(value, torch.Tensor)
        }
        others = {k: v for k, v in optimizer.state[param].items() if k not in taken.state[other]}
        taken.state[other].update(others)
    owner = Owner()
    options = Options(Names(None), Filter(None, None), 1, None, track, None)
    hooks = Hooks("far", taken, options, owner)
    hooks.engine.backends = {FAR.type: cuda}
    for _ in range(recorded):
        watching = Watching()
        torch.Tensor.pin_memory = lambda tensor, w=watching: w.pinned(tensor)  # type: ignore[method-assign]

        def launch(program: Any, *_: Any, to: Counter[str] = watching.launches, **__: Any) -> None:
            to[program.__name__] += 1

        cuda.launch = launch
        with watching:
            hooks._before_step(taken, (taken,), {})
            hooks._after_step(taken)
    return watching.launches, owner.steps[-1]


def begin() -> None:
    """Have the device."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    backend_registration._setup_privateuseone_for_python_backend(backend_module=Device())
    Hooks.failed = raised  # type: ignore[method-assign]
    FakeTensor.data_ptr = lambda _: 1 << 20  # type: ignore[method-assign]
    cuda.DEVICES.add(FAR.type)


def main() -> None:
    """Every optimizer."""
    begin()
    for name, make in MAKERS.items():
        try:
            launches, step = record(make, SHAPES, track=2)
        except Exception as error:
            raise AssertionError(name) from error
        kept = step._buffers
        assert {t.device for t in (kept.sums, kept.maxima, kept.tracked)} == {FAR}, name
        print(name, launches.total(), dict(launches))
    print(f"{len(MAKERS)} cases")


if __name__ == "__main__":
    main()
