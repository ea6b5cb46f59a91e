"""Counts the backward passes of a step, so that nobody has to."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Passes:
    """Counts the backward passes of a step, on one parameter."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._count = 0
        self._grad: weakref.ref[Tensor] | None = None
        self._param: weakref.ref[Tensor] | None = None
        self._handle: Any = None
        self._params: list[weakref.ref[Tensor]] = []
        self._in_backward = False  # another hook on the parameter takes the step, before we count

    def watch(self, params: Sequence[Tensor]) -> None:
        """Choose among these parameters; the first trainable one until another must do."""
        self._params = [weakref.ref(p) for p in params]
        current = self._param() if self._param is not None else None
        if current is None or not current.requires_grad:
            self._choose(next(filter(_can_count, params), None))

    def take(self) -> float:
        """Samples of the step that has just been taken; NaN where nothing was counted."""
        count = self._count or int(self._in_backward)  # there, each pass has a step of its own
        self._count, self._grad = 0, None
        if count:
            return float(count * self._batch_size * _world_size())
        # This parameter takes no part; another one may.
        alive = (p for p in (ref() for ref in self._params) if p is not None)
        self._choose(next((p for p in alive if _can_count(p) and p.grad is not None), None))
        return math.nan

    def remove(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _choose(self, param: Tensor | None) -> None:
        same = self._handle is not None and self._param is not None and self._param() is param
        if same and param is not None:
            return  # its hooks may be running just now, and must not be changed then
        self.remove()
        if param is not None:
            self._param = weakref.ref(param)
            register: Any = param.register_post_accumulate_grad_hook
            self._handle = register(self._passed)

    def _passed(self, param: Tensor) -> None:
        grad = param.grad
        if grad is None:
            self._in_backward = True
            return
        self._in_backward = False
        # A new tensor: the old gradients were dropped, by a step or by a scaler that skipped one.
        if self._grad is None or self._grad() is not grad:
            self._count = 0
            self._grad = weakref.ref(grad)
        self._count += 1


def _can_count(param: Tensor) -> bool:
    return param.requires_grad and param.is_leaf  # torch refuses the hook on others


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
