"""Counts the backward passes of a step, for the column ``samples``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import unserializable_hook

_WATCHED = 4
"""Parameters that count passes: with several heads, only the trunk takes part in all of them."""


class Passes:
    """Counts the backward passes of a step, as the maximum over a few parameters."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.ranks = 1
        """Number of data-parallel ranks, each with its own samples."""
        self._external = 0
        self._all = False
        self._steps = 1
        self._instead: Sequence[Callable[[], Tensor | None]] = ()
        self._params: Sequence[Callable[[], Tensor | None]] = ()
        self._counters: list[_PassCounter] = []

    def watch(self, params: Sequence[Callable[[], Tensor | None]]) -> None:
        """Choose a few of these parameters to count passes."""
        self._params = self._instead or params
        self._choose(_can_count)

    def set_ranks(self, ranks: int, instead: Sequence[Tensor]) -> None:
        """Set the number of ranks; count on the parameters in ``instead``, if it has any.

        With FSDP1, autograd sees its flat parameters, not those given to the optimizer.
        """
        self.ranks = ranks
        if instead:
            self._instead = [weakref.ref(param) for param in instead]
            self.watch(self._instead)

    def count_all(self, leaves: Sequence[Callable[[], Tensor | None]], ranks: int) -> None:
        """Count every pass through some of these parameters, without looking at gradients.

        DeepSpeed removes the gradients in the middle of a pass.
        """
        self.ranks, self._all = ranks, True
        self.watch(leaves)

    def add_external(self, passes: int) -> None:
        """Add passes of another framework, which hooks cannot count."""
        self._external += passes

    def divide_by(self, steps: int) -> None:
        """Divide the next count by so many steps, of which all but the last were skipped."""
        self._steps = steps

    def take(self) -> float:
        """Samples of the step that has just been taken; NaN if no pass was counted."""
        external, self._external = self._external, 0
        steps, self._steps = self._steps, 1
        count = external or max((counter.take() for counter in self._counters), default=0)
        count = round(count / steps)
        if count:
            return float(count * self._batch_size * self.ranks)
        if self._all:
            return math.nan
        # The chosen parameters took no part in the passes; choose others.
        self._choose(lambda p: _can_count(p) and p.grad is not None)
        return math.nan

    def remove(self) -> None:
        """Remove the hooks."""
        for counter in self._counters:
            counter.remove()
        self._counters = []

    def _choose(self, which: Callable[[Tensor], bool]) -> None:
        """Watch the first and last parameter that qualifies, and some in between."""
        found = [(ref, p) for ref in self._params if (p := ref()) is not None and which(p)]
        last = len(found) - 1
        count = min(_WATCHED, len(found))
        chosen = [found[last * i // max(count - 1, 1)] for i in range(count)]
        # Keep existing counters: their hooks may be running now, and must not be removed then.
        known = {id(p): c for c in self._counters if (p := c.param()) is not None}
        counters = [known.get(id(p)) or _PassCounter(ref, p, every=self._all) for ref, p in chosen]
        for counter in self._counters:
            if counter not in counters:
                counter.remove()
        self._counters = counters


class _PassCounter:
    """Counts the passes that one parameter takes part in during one step."""

    def __init__(
        self, ref: Callable[[], Tensor | None], param: Tensor, *, every: bool = False
    ) -> None:
        """Register the hooks; with ``every``, count all passes without looking at gradients."""
        self.param = ref
        self._every = every
        self._count = 0
        self._in_backward = False  # another hook takes the step during backward, before ours
        self._grad = 0  # id, because a reference would prevent `swap_tensors`; see `names.Place`
        self._version = 0
        after: Any = param.register_post_accumulate_grad_hook
        before: Any = param.register_hook
        self._handles = (
            [before(self._begins)] if every else [before(self._begins), after(self._passed)]
        )

    def take(self) -> int:
        """Return the passes so far, and start counting the next step."""
        count = self._count or int(self._in_backward)  # then each pass is a step
        self._count, self._grad = 0, 0
        return count

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @unserializable_hook  # type: ignore[untyped-decorator] # torch.save warns of others
    def _begins(self, _incoming: Tensor) -> None:
        """Before a gradient is accumulated, check whether ``grad`` belongs to the same step.

        If a gradient scaler skipped a step, no hook marked its end. The old gradient was then
        dropped, or zeroed in place. Zeros are only looked for on the host, and only if the gradient
        was changed in place, so this never synchronizes.
        """
        if self._every:
            self._count += 1
            return
        param = self.param()
        if getattr(param, "_saved_grad_shard", None) is not None:
            return  # FSDP1 accumulates there, and `grad` holds one pass only
        grad = None if param is None else param.grad
        known = grad is not None and id(grad) == self._grad
        if grad is None or not known or (_version(grad) != self._version and _zero(grad)):
            self._count = 0

    def _passed(self, param: Tensor) -> None:
        grad = param.grad
        self._in_backward = grad is None
        if grad is not None:
            self._count += 1
            self._grad = id(grad)  # under create_graph=True, each pass creates a new tensor
            self._version = _version(grad)


def _version(grad: Tensor) -> int:
    """How often a tensor was changed in place."""
    return int(grad._version)  # noqa: SLF001 - the documented way


def _zero(grad: Tensor) -> bool:
    """Whether a plain tensor on the host is all zeros; false for any other tensor."""
    if type(grad) is not Tensor or grad.device.type != "cpu":
        return False
    return not (grad._values() if grad.is_sparse else grad).any()  # noqa: SLF001 - it need not be coalesced for this


def _can_count(param: Tensor) -> bool:
    return param.requires_grad and param.is_leaf  # torch refuses the hook on others
