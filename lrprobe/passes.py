"""Counts the backward passes of a step, so that nobody has to."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import unserializable_hook

_WATCHED = 4
"""Parameters that count; of several heads each has its own passes, and all are the trunk's."""


class Passes:
    """Counts the backward passes of a step: the most that any of a few parameters took part in."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.ranks = 1
        """Data-parallel ranks, each with samples of its own."""
        self._external = 0
        self._all = False
        self._steps = 1
        self._instead: Sequence[Callable[[], Tensor | None]] = ()
        self._params: Sequence[Callable[[], Tensor | None]] = ()
        self._counters: list[_PassCounter] = []

    def watch(self, params: Sequence[Callable[[], Tensor | None]]) -> None:
        """Choose among these parameters."""
        self._params = self._instead or params
        self._choose(_can_count)

    def set_ranks(self, ranks: int, instead: Sequence[Tensor]) -> None:
        """Over so many ranks; ``instead`` has the parameters that autograd sees, where others are.

        (FSDP1 hands gradients on to the parameters that were given to the optimizer.)
        """
        self.ranks = ranks
        if instead:
            self._instead = [weakref.ref(param) for param in instead]
            self.watch(self._instead)

    def count_all(self, leaves: Sequence[Callable[[], Tensor | None]], ranks: int) -> None:
        """Count each pass through some of these parameters, whatever becomes of their gradients.

        (DeepSpeed takes them away in the middle of a pass.)
        """
        self.ranks, self._all = ranks, True
        self.watch(leaves)

    def add_external(self, passes: int) -> None:
        """Of passes that are not torch's, which nobody here can count."""
        self._external += passes

    def divide_by(self, steps: int) -> None:
        """What is counted until ``take`` is of so many steps: all but the last were skipped."""
        self._steps = steps

    def take(self) -> float:
        """Samples of the step that has just been taken; NaN where nothing was counted."""
        external, self._external = self._external, 0
        steps, self._steps = self._steps, 1
        count = external or max((counter.take() for counter in self._counters), default=0)
        count = round(count / steps)
        if count:
            return float(count * self._batch_size * self.ranks)
        if self._all:
            return math.nan
        # These parameters take no part; others may.
        self._choose(lambda p: _can_count(p) and p.grad is not None)
        return math.nan

    def remove(self) -> None:
        """Remove the hooks."""
        for counter in self._counters:
            counter.remove()
        self._counters = []

    def _choose(self, which: Callable[[Tensor], bool]) -> None:
        """Watch the first of such parameters, the last, and some between."""
        found = [(ref, p) for ref in self._params if (p := ref()) is not None and which(p)]
        last = len(found) - 1
        most = min(_WATCHED, len(found))
        chosen = [found[last * i // max(most - 1, 1)] for i in range(most)]
        # One that is watched stays so: its hooks may be running just now, and must not change then.
        known = {id(p): c for c in self._counters if (p := c.param()) is not None}
        counters = [known.get(id(p)) or _PassCounter(ref, p, every=self._all) for ref, p in chosen]
        for counter in self._counters:
            if counter not in counters:
                counter.remove()
        self._counters = counters


class _PassCounter:
    """Counts the passes that one parameter takes part in since its gradient began."""

    def __init__(
        self, ref: Callable[[], Tensor | None], param: Tensor, *, every: bool = False
    ) -> None:
        """Begin; with ``every`` no gradient is looked at, which may be gone at once."""
        self.param = ref
        self._every = every
        self._count = 0
        self._in_backward = False  # another hook on the parameter takes the step, before we count
        self._grad = 0  # id: a reference would keep modules from being moved, as in `names.Place`
        self._version = 0
        after: Any = param.register_post_accumulate_grad_hook
        before: Any = param.register_hook
        self._handles = (
            [before(self._begins)] if every else [before(self._begins), after(self._passed)]
        )

    def take(self) -> int:
        """The passes so far; from here on they are of the next step."""
        count = self._count or int(self._in_backward)  # there, each pass has a step of its own
        self._count, self._grad = 0, 0
        return count

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @unserializable_hook  # type: ignore[untyped-decorator] # torch.save warns of others
    def _begins(self, _incoming: Tensor) -> None:
        """Before a gradient is added: see whether what it is added to is of the same step.

        It is not where a gradient scaler skipped that step, so that no hook told of its end. Then
        the old gradient was dropped, or set to zero in place. The latter is looked for on the host
        only, and only where something changed the gradient: no device is asked for its values.
        """
        if self._every:
            self._count += 1
            return
        param = self.param()
        if getattr(param, "_saved_grad_shard", None) is not None:
            return  # FSDP1 keeps there the sum of the passes before, and begins anew in each
        grad = None if param is None else param.grad
        known = grad is not None and id(grad) == self._grad
        if grad is None or not known or (_version(grad) != self._version and _zero(grad)):
            self._count = 0

    def _passed(self, param: Tensor) -> None:
        grad = param.grad
        self._in_backward = grad is None
        if grad is not None:
            self._count += 1
            self._grad = id(grad)  # a new one each time under create_graph=True
            self._version = _version(grad)


def _version(grad: Tensor) -> int:
    """How often it was changed in place."""
    return int(grad._version)  # noqa: SLF001 - the documented way to see that


def _zero(grad: Tensor) -> bool:
    """Whether every element is 0, where that can be told at once and by this process alone."""
    if type(grad) is not Tensor or grad.device.type != "cpu":
        return False
    return not (grad._values() if grad.is_sparse else grad).any()  # noqa: SLF001 - it need not be coalesced for this


def _can_count(param: Tensor) -> bool:
    return param.requires_grad and param.is_leaf  # torch refuses the hook on others
