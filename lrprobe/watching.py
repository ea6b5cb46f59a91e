"""Which parameters of one optimizer are watched, and what the frame shows of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lrprobe.arguments import Options
from lrprobe.distributed import deepspeed
from lrprobe.distributed.layouts import has_ranks
from lrprobe.distributed.parts import Parts, Watchable, numel_of
from lrprobe.distributed.unknown_tensors import content_digest
from lrprobe.engine import copied
from lrprobe.engine.columns import Row
from lrprobe.engine.pieces import WatchedParameter, draw_tracked
from lrprobe.names import name_parameters, places
from lrprobe.rules import find_rule
from lrprobe.rules.base import tolerance


class Watching:
    """The parameters of one optimizer.

    Attributes:
        parts: where the optimizer has flat tensors, stepped one after another.
        watched: the parameters; another list where they have changed.
        rows: what the frame shows of those that this process holds whole.
        names: id of each parameter to its name, which stays.
    """

    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self._options = options
        self._class = type(optimizer)
        self.parts: Parts | None = deepspeed.parts_of(optimizer, options.names)
        self.watched: list[WatchedParameter] = []
        self.rows: list[Row] = []
        self.names: dict[int, str] = {}
        self._seen: list[list[tuple[int, int]]] = []
        """By group, id and elements of its parameters."""
        self._renamed: dict[str, str] = {}

    def all_of(self, optimizer: Optimizer) -> Any:
        """The optimizer, or one that has all its tensors also while it steps some of them."""
        return optimizer if self.parts is None else self.parts

    def knows(self, names: Collection[int]) -> bool:
        """Whether some parameter is one of these, by id; of flat tensors it is said elsewhere."""
        return self.parts is not None or any(
            at in names for params in self._seen for at, _ in params
        )

    def forget(self) -> None:
        """The optimizer is gone."""
        self.watched, self.rows, self.parts = [], [], None

    def rename(self, renamed: Mapping[str, str], optimizer: Optimizer) -> None:
        """Call some parameters otherwise from now on."""
        self._renamed |= renamed
        self._seen = []
        self.refresh(optimizer)

    def refresh(self, optimizer: Optimizer) -> list[Any] | None:
        """Follow added groups and exchanged parameters; where they are, if any have changed."""
        whole = self.all_of(optimizer)
        groups = [group["params"] for group in whole.param_groups]
        seen = [[(id(param), numel_of(param)) for param in params] for params in groups]
        if seen == self._seen:
            return None
        self._seen = seen
        own = {new: name for name, new in self._renamed.items()}
        known = {_key(own.get(w.name, w.name), w): w for w in self.watched}
        self.watched = []
        found = self._watchable(whole)
        self._options.chosen.see(each.name for each in found)
        for each in found:
            if each.numel < 0 or not self._options.chosen.takes(each.name):
                continue
            watched = known.get(_key(each.name, each)) or self._new(each, whole)
            watched.name = self._renamed.get(each.name, each.name)
            watched.group, watched.place = each.group, each.place
            watched.group_name = group_name(whole, each.group)
            self.watched.append(watched)
        self.rows = [self._row(watched) for watched in self.watched]
        return [each.place for each in found]

    def _new(self, each: Watchable, optimizer: Any) -> WatchedParameter:
        rule = find_rule(self._class)
        param = each.place()
        unknown = param is not None and self._is_unknown(param)
        return WatchedParameter(
            name=each.name,
            group=each.group,
            place=each.place,
            # The optimizer asks of the flat tensor what such a rule asks of the parameter.
            rule=None if rule is not None and rule.whole and each.span else rule,
            tracked=draw_tracked(each.name, each.numel, self._options.track),
            numel=each.numel,
            initial_lr=_initial_lr(optimizer.param_groups[each.group]),
            span=each.span,
            layout=each.layout,
            content=content_digest(param) if unknown and param is not None else "",
        )

    def _is_unknown(self, param: Tensor) -> bool:
        """Whether it is nobody's parameter, as far as is known here.

        Ranks that have a copy of a model have the same; of such a tensor they may have parts.
        """
        if not has_ranks():
            return False
        if self.parts is not None:
            return bool(self.parts.unknown)
        names = self._options.names
        if names.model is None:
            return not isinstance(param, nn.Parameter)
        return id(param) not in names.now()

    def _watchable(self, optimizer: Any) -> list[Watchable]:
        """All parameters there are, with their names."""
        if self.parts is not None:
            return self.parts.watchable()
        gone = self.names.keys() - {at for params in self._seen for at, _ in params}
        self._options.names.forget(gone)
        given = {at: name for at, name in self.names.items() if at not in gone}
        named = list(name_parameters(optimizer, self._options.names.now(given)))
        self.names = {id(param): name for _, name, param in named}
        found = places(optimizer)
        return [
            Watchable(name, group, place, numel_of(param))
            for (group, name, param), place in zip(named, found, strict=True)
        ]

    def _row(self, watched: WatchedParameter) -> Row:
        """What the frame shows of a parameter that this process holds whole."""
        param = watched.place()
        known = next((row for row in self.rows if row.name == watched.name), None)
        measured = watched.rule is None or param is None
        return Row(
            name=watched.name,
            group=watched.group,
            group_name=watched.group_name,
            shared_rate=watched.rule is not None and watched.rule.shared_rate,
            shape=(watched.numel,),
            rule="measured" if watched.rule is None else watched.rule.name,
            tolerance=0.0 if measured else tolerance(param.dtype, watched.rule),  # type: ignore[union-attr,arg-type]
            tracked=watched.tracked,
            bad_steps=0 if known is None else known.bad_steps,
        )


def group_name(optimizer: Any, group: int) -> str:
    """The group's own name, else its number."""
    given = optimizer.param_groups[group].get("name")
    return f"group{group}" if given is None else str(given)


def _key(name: str, each: WatchedParameter | Watchable) -> tuple[Any, ...]:
    """The same for what is the same parameter."""
    return name, each.place.id, each.span and (each.span.start, each.span.stop), each.numel


def _initial_lr(group: Mapping[str, Any]) -> Any:
    rate = group.get("initial_lr", group.get("lr"))
    rate = math.nan if rate is None else rate  # Transformers' Adafactor finds its own
    return copied(rate)
