"""Which parameters of one optimizer are watched, and their rows in the frame."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
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
from lrprobe.text import listed, warn


class Watching:
    """The watched parameters of one optimizer.

    Attributes:
        parts: the optimizer's flat tensors, if it steps those one after another; else None.
        watched: the parameters; a new list each time they change.
        rows: the frame's rows of the parameters that this process holds whole.
        names: id of each parameter to its name, which does not change.
        repeated: ids of the parameters that the optimizer has, and steps, more than once.
    """

    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self._options = options
        self._class = type(optimizer)
        self.parts: Parts | None = deepspeed.parts_of(optimizer, options.names)
        self.watched: list[WatchedParameter] = []
        self.rows: list[Row] = []
        self.names: dict[int, str] = {}
        self.repeated: set[int] = set()
        self._seen: list[list[tuple[int, int]]] = []
        """Per group, the (id, elements) of its parameters."""
        self._renamed: dict[str, str] = {}

    def all_of(self, optimizer: Optimizer) -> Any:
        """The optimizer, or ``parts``, which has all tensors even while it steps only some."""
        return optimizer if self.parts is None else self.parts

    def knows(self, names: Collection[int]) -> bool:
        """Whether a parameter has one of these ids; always true for flat tensors."""
        return self.parts is not None or any(
            at in names for params in self._seen for at, _ in params
        )

    def forget(self) -> None:
        """Drop everything, because the optimizer was collected."""
        self.watched, self.rows, self.parts = [], [], None

    def rename(self, renamed: Mapping[str, str], optimizer: Optimizer) -> None:
        """Rename parameters from now on."""
        self._renamed |= renamed
        self._seen = []
        self.refresh(optimizer)

    def refresh(
        self, optimizer: Optimizer, at_change: Callable[[], None] | None = None
    ) -> list[Any] | None:
        """Follow added groups and replaced parameters; return their places if any changed.

        If so, ``at_change`` is called first.
        """
        whole = self.all_of(optimizer)
        groups = [group["params"] for group in whole.param_groups]
        seen = [[(id(param), numel_of(param)) for param in params] for params in groups]
        if seen == self._seen:
            return None
        if at_change is not None:
            at_change()
        self._seen = seen
        counts = Counter(at for params in seen for at, _ in params)
        before = self.repeated
        self.repeated = {at for at, count in counts.items() if count > 1}
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
            if each.place.id in self.repeated:
                watched.rule = None
            self.watched.append(watched)
        self.rows = [self._row(watched) for watched in self.watched]
        new = [each.name for each in self.watched if each.place.id in self.repeated - before]
        if new:
            warn(
                f"{self._class.__name__} has {listed(new)} more than once, and one step moves it "
                "as often: no rule explains that, so its effective rate is measured as |Δθ|/|g| "
                "on a sample"
            )
        return [each.place for each in found]

    def _new(self, each: Watchable, optimizer: Any) -> WatchedParameter:
        rule = find_rule(self._class)
        if rule is not None and rule.whole and each.span:
            rule = None  # the optimizer computes `whole` statistics over the entire flat tensor
        param = each.place()
        unknown = param is not None and self._is_unknown(param)
        return WatchedParameter(
            name=each.name,
            group=each.group,
            place=each.place,
            rule=rule,
            tracked=draw_tracked(each.name, each.numel, self._options.track),
            numel=each.numel,
            initial_lr=_initial_lr(optimizer.param_groups[each.group]),
            span=each.span,
            layout=each.layout,
            content=content_digest(param) if unknown and param is not None else "",
        )

    def _is_unknown(self, param: Tensor) -> bool:
        """Whether a tensor is not known to be a parameter of the model.

        Replicas of a model hold copies of its parameters. Ranks may instead hold different parts
        of an unknown tensor, so its content has to be compared.
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
        """All parameters of the optimizer, with their names."""
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
        """The frame's row of a parameter that this process holds whole."""
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
    """The group's own name, else ``group<i>``."""
    given = optimizer.param_groups[group].get("name")
    return f"group{group}" if given is None else str(given)


def _key(name: str, each: WatchedParameter | Watchable) -> tuple[Any, ...]:
    """A key that identifies a parameter across refreshes."""
    return name, each.place.id, each.span and (each.span.start, each.span.stop), each.numel


def _initial_lr(group: Mapping[str, Any]) -> Any:
    rate = group.get("initial_lr", group.get("lr"))
    rate = math.nan if rate is None else rate  # Transformers' Adafactor may have lr=None
    return copied(rate)
