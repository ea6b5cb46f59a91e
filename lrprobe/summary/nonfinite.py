"""Which state entries need a look of their own for what is not finite.

Most do not: a NaN in Adam's moments makes its direction or its rate NaN, and so a sum that is taken
anyway. Which, is found by trying, since only the rule knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrprobe.rules.base import Entry, Rule, Slice, Update
from lrprobe.summary.figures import state_like
from lrprobe.summary.reading import WHOLE, is_flat, positions, precision, spread, take_all

_hidden: dict[Any, tuple[str, ...]] = {}


def hidden_states(entry: Entry, group: Mapping[str, Any], rule: Rule) -> tuple[str, ...]:
    """Names of state entries in which a NaN or inf might not show in any other figure.

    Tried on a sample of a large parameter, once for each kind of parameter and of group.
    """
    names = tuple(state_like(entry))
    if not names or not is_flat(entry) or entry.param.device.type != "cpu":
        return names
    # What is switched on in a group may change which state the rule reads; how much may not.
    switches = [(k, bool(v)) for k, v in group.items() if isinstance(v, bool | int | float | None)]
    key = rule, names, entry.param.dtype, tuple(switches)
    if key not in _hidden:
        _hidden[key] = tuple(name for name in names if not _shows(name, entry, group, rule))
    return _hidden[key]


def _shows(name: str, entry: Entry, group: Mapping[str, Any], rule: Rule) -> bool:
    at = spread(entry.param.numel(), min(WHOLE, entry.param.numel()), entry.param.device)
    some = {k: positions(v, at) for k, v in entry.state.items() if _is_wide(v)}
    param, grad = positions(entry.param, at), positions(entry.grad, at)
    take = take_all(precision(entry.param))
    for value in (math.nan, math.inf, -math.inf):
        state = {**entry.state, **some, name: torch.full_like(some[name], value)}
        update = rule.update(Slice([Entry(param, grad, state)], group, take))
        if not _spoilt(update, param).numpy().all():
            return False
    return True


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _spoilt(update: Update, like: Tensor) -> Tensor:
    """Whether an element shows in a sum, or in the least rate: (as ``like``), bool."""
    shown = ~torch.isfinite(update.direction)
    for values in (update.effective_lr, update.rms_grad, update.rms_update):
        if isinstance(values, Tensor) and values.shape == like.shape:
            shown |= ~torch.isfinite(values)
            if values is update.effective_lr:
                shown |= values == 0
    return shown
