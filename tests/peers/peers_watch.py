"""Attaches a probe to every optimizer that a process creates, and notes what that changes.

The same is noted without probes, so that two runs can be compared: after each ``step()`` a digest
of the parameters, of the names in the optimizer's state and of the random states of torch, NumPy
and ``random``.
"""

from __future__ import annotations

import functools
import random
import threading
import time
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import lrprobe
import lrprobe.text
from lrprobe.names import find_optimizers
from lrprobe.rules import find_rule


class Watch:
    """What happens to the optimizers of one test, or of one script.

    Args:
        attaches: whether they get a probe; without, all the rest is done.
    """

    def __init__(self, *, attaches: bool) -> None:
        self.attaches = attaches
        self._known: dict[int, weakref.ref[Optimizer]] = {}
        self._probes: list[tuple[Any, type[Optimizer]]] = []
        self._depth = 0
        self.begin()

    def install(self) -> None:
        """Watch from now on, in this process."""
        # Not `Optimizer.__init__`, which returns before the subclass has made all that it has.
        for cls in [Optimizer, *_subclasses(Optimizer)]:
            self._watch_class(cls)
        watch = self._watch_class
        Optimizer.__init_subclass__ = classmethod(lambda cls, **_: watch(cls))  # type: ignore[assignment]
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)
        lrprobe.text.warnings = SimpleNamespace(warn=self._warn)  # type: ignore[attr-defined]

    def _warn(self, message: str, stacklevel: int) -> None:
        self.said.append(message)
        warnings.warn(message, stacklevel=stacklevel + 1)

    def begin(self) -> None:
        """Forget what was before."""
        self.steps: list[str] = []
        self.errors: list[str] = []
        self.said: list[str] = []
        self.own_seconds = 0.0
        """Of the processor's time, spent here and not in lrprobe."""
        self.optimizers = 0

    def end(self) -> dict[str, Any]:
        """Close the probes; what was noted since ``begin``, as plain values."""
        rows = 0
        measured: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        closing = 0.0
        for probe, cls in self._probes:
            try:
                frame = probe.frame()
                rows += len(frame)
                if find_rule(cls) is not None:
                    measured[cls.__name__] += int((frame["rule"] == "measured").sum())
                before = time.process_time()
                probe.close()
                closing += time.process_time() - before
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                errors[f"{type(error).__name__}: {error}"] += 1
        found = {
            "steps": self.steps,
            "optimizers": self.optimizers,
            "rows": rows,
            "errors": [*self.errors, *errors],
            "warnings": self.said,
            "measured": {name: count for name, count in measured.items() if count},
            "leftovers": self._leftovers(),
            "closing": closing,
        }
        self._known.clear()
        self._probes.clear()
        return found

    def _leftovers(self) -> list[str]:
        found = [t.name for t in threading.enumerate() if "lrprobe" in t.name]
        for reference in self._known.values():
            optimizer = reference()
            if optimizer is not None and _ours(optimizer):
                found.append(f"hooks on {type(optimizer).__name__}")
        return found

    def _watch_class(self, cls: type[Optimizer]) -> None:
        """Be told when an object of it is made."""
        init: Callable[..., None] | None = vars(cls).get("__init__")
        if init is None:
            return

        @functools.wraps(init)
        def made(optimizer: Optimizer, /, *args: Any, **kwargs: Any) -> None:
            self._depth += 1
            try:
                init(optimizer, *args, **kwargs)
            finally:
                self._depth -= 1
            # One inside another's constructor is met at its first step.
            if self._depth == 0:
                self._meet(optimizer)

        cls.__init__ = made  # type: ignore[method-assign]

    def _meet(self, optimizer: Optimizer) -> None:
        known = self._known.get(id(optimizer))
        if known is not None and known() is optimizer:
            return
        self._known[id(optimizer)] = weakref.ref(optimizer)
        self.optimizers += 1
        if not self.attaches:
            return
        try:
            target = next(iter(find_optimizers(optimizer).values()))
        except TypeError:
            return  # it never called Optimizer's constructor, and runs no hooks
        if target is not optimizer:
            self._meet(target)
            return
        try:
            self._probes.append((lrprobe.attach(optimizer, every=1), type(optimizer)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            self.errors.append(f"attach: {type(error).__name__}: {error}")

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._meet(optimizer)

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        start = time.process_time()
        self.steps.append(digest(optimizer))
        self.own_seconds += time.process_time() - start


def digest(optimizer: Optimizer) -> str:
    """Of what a probe must not change."""
    sums = [
        zlib.crc32(torch.get_rng_state().numpy().tobytes()),
        hash(random.getstate()[1]) & 0xFFFFFFFF,
        zlib.crc32(np.random.get_state()[1].tobytes()),  # type: ignore[union-attr] # noqa: NPY002
    ]
    names = [sorted(vars(optimizer))]
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            names.append(sorted(map(str, state)) if isinstance(state, dict) else [])
            sums.append(_sum(param))
    sums.append(zlib.crc32(repr(names).encode()))
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def _sum(param: torch.Tensor) -> int:
    with torch.no_grad():
        try:
            value = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return zlib.crc32(value.numpy())
        except Exception as error:  # noqa: BLE001 - a tensor without bytes: meta, a subclass
            return zlib.crc32(type(error).__name__.encode())


def _ours(optimizer: Optimizer) -> bool:
    hooks = [getattr(optimizer, f"_optimizer_step_{at}_hooks", {}) for at in ("pre", "post")]
    return any("lrprobe" in getattr(each, "__module__", "") for d in hooks for each in d.values())


def _subclasses(cls: type) -> list[type]:
    direct = cls.__subclasses__()
    return [*direct, *(below for each in direct for below in _subclasses(each))]


def seed_all(seed: int) -> None:
    """Give ``random``, NumPy and torch the same state in each run."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what other projects draw from
    torch.manual_seed(seed)


def declare_operators() -> None:
    """Have torchvision imported though its operators are built for another torch (CUDA's)."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
