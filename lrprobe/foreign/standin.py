"""A stand-in for an optimizer of another framework, with what the hooks need from torch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of another framework.

    Attributes:
        name: its name in the frame.
        value: its current value; only its shape, dtype and device are used.
        group: hyperparameters that it shares with others; equal ones form a group.
    """

    name: str
    value: Tensor
    group: Mapping[str, Any] = field(default_factory=dict)


class StandIn(Optimizer):
    """Has groups and state like a torch optimizer; the other framework takes the steps.

    Before a step, call ``show`` with the current values, then ``before``. After it, call ``show``
    again, then ``after``; omit both if no step was taken. ``forget`` drops the values.
    """

    def __init__(self, parameters: Sequence[Parameter], lr: float) -> None:
        """Create groups in order of first appearance; ``lr`` is the rate of the first step."""
        groups: list[dict[str, Any]] = []
        self.shown: list[nn.Parameter] = []
        for each in parameters:
            group = next((g for g in groups if g["shared"] == each.group), None)
            if group is None:
                group = {"shared": each.group, "params": [], "param_names": []}
                groups.append(group)
            self.shown.append(nn.Parameter(_blank(each.value)))
            group["params"].append(self.shown[-1])
            group["param_names"].append(each.name)
        for group in groups:
            group.update(group.pop("shared"))
        super().__init__(groups, {"lr": lr})

    def show(
        self,
        at: int,
        value: Tensor,
        grad: Tensor | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the current values of the parameter at this position; nothing is copied."""
        param = self.shown[at]
        param.data = value
        param.grad = None if grad is None else grad.to(param.dtype)
        self.state[param] = state or {}

    def before(self) -> None:
        """Run the hooks before a step."""
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, (self,), {})

    def after(self) -> None:
        """Run the hooks after a step."""
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (self,), {})

    def forget(self, positions: Iterable[int]) -> None:
        """Drop all references to what was shown."""
        for at in positions:
            self.show(at, _blank(self.shown[at]))


def _blank(like: Tensor) -> Tensor:
    """Return a tensor of this shape that takes no memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
