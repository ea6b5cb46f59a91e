"""The tags of scalars, and one record as pairs of tag and value."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrprobe.record import Record
from lrprobe.sinks.merge import MergedRows, merge_rows
from lrprobe.text import parts_of

MAX_NAMES = 200
"""With more parameters than this, tags are per module: TensorBoard takes minutes to load more."""

_MAX_NAME = 200  # characters of a name in a tag

TagStyle: TypeAlias = Literal["lrprobe", "composer", "olmo"]
"""The system whose tag names are used."""


@dataclass(frozen=True, slots=True)
class Style:
    """The tags of one system.

    Attributes:
        figures: maps a column to its tag; ``{name}`` stands for the parameter or module.
        whole: maps a column of the model table to its tag, with ``{owner}``.
        lr: the tag of a group's ``lr``, with ``{owner}``, ``{optimizer}``, ``{group}`` (its number)
            and ``{group_name}``.

    ``{owner}`` is ``<optimizer>.`` where there are several optimizers, else empty.
    """

    figures: Mapping[str, str]
    whole: Mapping[str, str]
    lr: str


_RATE = {
    "effective_lr_p50": "effective_lr/{name}",
    "effective_lr_p05": "effective_lr_p05/{name}",
    "effective_lr_p95": "effective_lr_p95/{name}",
}

STYLES: Mapping[str, Style] = {
    "lrprobe": Style(
        {
            **_RATE,
            "update_ratio": "update_ratio/{name}",
            "update_norm": "update_norm/{name}",
            "grad_norm": "grad_norm/{name}",
        },
        {},
        "lr/{owner}{group_name}",
    ),
    # OptimizerMonitor and LRMonitor; the ratio and the cosine as they were until August 2023.
    "composer": Style(
        {
            **_RATE,
            "update_ratio": "l2_norm_ratio/update_param/{name}",
            "update_norm": "l2_norm/update/{name}",
            "grad_norm": "l2_norm/grad/{name}",
            "param_norm": "l2_norm/param/{name}",
            "update_grad_cosine": "cosine/update_grad/{name}",
        },
        {"grad_norm": "l2_norm/grad/{owner}global"},
        "lr-{optimizer}/group{group}",
    ),
    # Optimizer.clip_grads_and_collect_metrics, AdamW.get_post_step_metrics and LRMonitor.
    "olmo": Style(
        {
            **_RATE,
            "update_ratio": "update_ratio/{name}",
            "update_norm": "optim/step/{name}.norm",
            "grad_norm": "optim/grad/{name}.norm",
            "param_norm": "optim/param/{name}.norm",
        },
        {"grad_norm": "optim/{owner}total_grad_norm"},
        "optim/{owner}learning_rate_group{group}",
    ),
}
"""If a system has no name for a figure, the tag is lrprobe's own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The tags of one optimizer's records.

    Attributes:
        optimizer: its name.
        parameters: names of the rows of its parameter table.
        level: what each tag describes, a ``"parameter"`` or a ``"module"``.
        names: the values of ``{name}`` in the tags.
        rows: for each name, its rows of the parameter table.
        modules: for each name, the row of the module table with exactly these parameters, or None.
        groups: maps the number of a parameter group to its name in tags.
        owner: ``""``, or ``"<optimizer>."``.
        prefix, style: as given to ``Tags``.
    """

    optimizer: str
    parameters: tuple[str, ...]
    level: str
    names: tuple[str, ...]
    rows: tuple[list[int], ...]
    modules: tuple[int | None, ...]
    groups: Mapping[int, str]
    owner: str
    prefix: str
    style: Style

    def figure(self, column: str, name: str) -> str:
        """The tag of a figure of a parameter or module."""
        return self.prefix + self.style.figures[column].format(name=name)

    def whole(self, column: str) -> str:
        """The tag of a figure of all parameters together."""
        return self.prefix + self.style.whole[column].format(owner=self.owner)

    def lr(self, group: int) -> str:
        """The tag of a group's learning rate."""
        return self.prefix + self.style.lr.format(
            owner=self.owner,
            optimizer=self.owner.removesuffix(".") or clean(self.optimizer),
            group=group,
            group_name=self.groups.get(group, f"group{group}"),
        )

    def log10(self, at: str, name: str) -> str:
        """The tag of the logarithm of a quantile of the rate."""
        return f"{self.prefix}effective_lr_log10_{at}/{name}"

    @property
    def error(self) -> str:
        """The tag of the largest reconstruction error."""
        return f"{self.prefix}reconstruction_error/{self.owner}_max"

    def merged(self, record: Record) -> list[MergedRows] | None:
        """Merge the parameters of a record by tag; None if each parameter has its own tag."""
        if self.level == "parameter":
            return None
        return [
            merge_rows(record, rows, module)
            for rows, module in zip(self.rows, self.modules, strict=True)
        ]

    def scalars(
        self, record: Record, merged: Sequence[MergedRows] | None
    ) -> Iterator[tuple[str, float]]:
        """Yield the tag and value of each scalar of a record.

        The value is NaN if a parameter stepped but lacks the figure. A parameter that did not step
        has only the scalars that are known without a step.
        """
        table = record.tables["parameter"]
        if merged is None:
            stepped = table["stepped"][[rows[0] for rows in self.rows]]
        else:
            stepped = np.array([m.stepped for m in merged])
        for column in self.style.figures:
            values = self._values(column, record, merged)
            shown = stepped | ~np.isnan(values)
            for name, value, show in zip(self.names, values.tolist(), shown.tolist(), strict=True):
                if show:
                    yield self.figure(column, name), value
        groups = record.tables["group"]
        for group, lr in zip(groups["group"].tolist(), groups["lr"].tolist(), strict=True):
            if not np.isnan(lr):  # NaN: the rates are mixed
                yield self.lr(group), lr
        for column in self.style.whole:
            value = float(record.tables["model"][column][0])
            if stepped.any() or not np.isnan(value):
                yield self.whole(column), value
        errors = table["reconstruction_error"]
        errors = errors[~np.isnan(errors)]
        if len(errors):
            yield self.error, float(errors.max())

    def logarithms(
        self, record: Record, merged: Sequence[MergedRows] | None
    ) -> Iterator[tuple[str, float]]:
        """Yield the tag and log10 of each quantile of the rate, if finite, for linear axes."""
        for at in ("p05", "p50", "p95"):
            values = self._values(f"effective_lr_{at}", record, merged)
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log10(values)
            for name, value in zip(self.names, logs.tolist(), strict=True):
                if np.isfinite(value):
                    yield self.log10(at, name), value

    def _values(
        self, column: str, record: Record, merged: Sequence[MergedRows] | None
    ) -> NDArray[np.float64]:
        """Return a column, one value per name."""
        if merged is not None:
            return np.array([m.figures[column] for m in merged], dtype=np.float64)
        values: NDArray[np.float64] = record.tables["parameter"][column]
        return values[[rows[0] for rows in self.rows]]


class Tags:
    """Assigns tags, each unique in the run.

    Args:
        prefix: prepended to each tag.
        tag_style: the system whose tag names are used.
        clean_name: replaces the characters that a tag may not have; ``clean`` by default.

    Raises:
        ValueError: the prefix has characters that a tag may not have, or the style is unknown.
    """

    def __init__(
        self, prefix: str, tag_style: str, clean_name: Callable[[str], str] | None = None
    ) -> None:
        """Start without names."""
        if clean(prefix, "") != prefix:
            raise ValueError(f"prefix={prefix!r}; allowed are the characters A-Za-z0-9_./-")
        if tag_style not in STYLES:
            allowed = ", ".join(map(repr, STYLES))
            raise ValueError(f"tag_style={tag_style!r}; allowed are {allowed}")
        self.prefix = prefix
        self.style = STYLES[tag_style]
        self.plans: dict[str, Plan] = {}
        self.names: dict[tuple[str, str, str], str] = {}
        """Maps (optimizer, level, key) to a name."""
        self.groups: dict[str, tuple[str, int, str]] = {}
        """Maps the tag of an ``lr`` to (optimizer, group, the group's name)."""
        self.group_of: dict[str, int] = {}
        """Maps a name to its group."""
        self._owners: dict[str, str] = {}
        self._clean = clean_name or clean

    def plan(self, record: Record) -> Plan:
        """Return the tags for a record: the same plan while its parameters stay the same."""
        parameters = tuple(record.tables["parameter"]["parameter"].tolist())
        plan = self.plans.get(record.optimizer)
        if plan is not None and plan.parameters == parameters:
            return plan
        several = max(len(record.run.get("optimizers", ())), len({*self.plans, record.optimizer}))
        owner = self._owner(record.optimizer) if several > 1 else ""
        others = sum(len(p.names) for name, p in self.plans.items() if name != record.optimizer)
        level, keys = roll_up(parameters, max(MAX_NAMES // several, MAX_NAMES - others))
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        if level == "parameter":  # parameters with equal names get separate tags
            pairs = [
                (f"{key}#{i}" if i else key, row) for key in rows for i, row in enumerate(rows[key])
            ]
            rows = {key: [row] for key, row in pairs}
        whole: dict[str, list[int]] = {}
        for row, name in enumerate(parameters):
            whole.setdefault(parts_of(name)[0], []).append(row)
        modules = {tuple(members): at for at, members in enumerate(whole.values())}
        plan = Plan(
            optimizer=record.optimizer,
            parameters=parameters,
            level=level,
            names=tuple(self._name(record.optimizer, level, key, several > 1) for key in rows),
            rows=tuple(rows.values()),
            modules=tuple(modules.get(tuple(members)) for members in rows.values()),
            groups=self._groups(record),
            owner=owner,
            prefix=self.prefix,
            style=self.style,
        )
        groups = record.tables["parameter"]["group"].tolist()
        for name, members in zip(plan.names, plan.rows, strict=True):
            if len({groups[row] for row in members}) == 1:
                self.group_of[name] = groups[members[0]]
        for group, name in group_names(record).items():
            self.groups[plan.lr(group)] = (record.optimizer, group, name)
        self.plans[record.optimizer] = plan
        return plan

    def values(self, record: Record) -> dict[str, float]:
        """Map tags to values, without NaN, which trackers treat differently."""
        plan = self.plan(record)
        pairs = plan.scalars(record, plan.merged(record))
        return {tag: value for tag, value in pairs if not np.isnan(value)}

    def _owner(self, optimizer: str) -> str:
        if optimizer not in self._owners:
            taken = set(self._owners.values())
            self._owners[optimizer] = _unique(f"{self._clean(optimizer)}.", taken)
        return self._owners[optimizer]

    def _groups(self, record: Record) -> dict[int, str]:
        """Map the number of each parameter group to a unique name that a tag may have."""
        names: dict[int, str] = {}
        for group, name in group_names(record).items():
            names[group] = _unique(self._clean(name), set(names.values()))
        return names

    def _name(self, optimizer: str, level: str, key: str, several: bool) -> str:
        entry = (optimizer, level, key)
        if entry not in self.names:
            taken = set(self.names.values())
            name = self._clean(key)
            if several and name in taken:
                name = f"{self._clean(optimizer)}.{name}"
            self.names[entry] = _unique(name, taken)
        return self.names[entry]


def group_names(record: Record) -> dict[int, str]:
    """Map the number of each parameter group to its ``group_name``."""
    table = record.tables["parameter"]
    return dict(zip(table["group"].tolist(), table["group_name"].tolist(), strict=True))


def roll_up(parameters: Sequence[str], limit: int) -> tuple[str, list[str]]:
    """Choose what each tag describes, and the key of each parameter's tag.

    Args:
        parameters: names, with parts separated by dots or slashes.
        limit: maximum number of tags.

    Returns:
        ``"parameter"`` and the names themselves if they fit; else ``"module"`` and the names of
        the modules at the greatest depth that fits (``""``, the whole network, always fits).
    """
    if len(parameters) <= limit:
        return "parameter", list(parameters)
    # Keep the separators, so that a shortened name has the original ones.
    modules = [re.split(r"([./])", parts_of(name)[0]) for name in parameters]
    for depth in range(max(map(len, modules)), 0, -2):
        keys = ["".join(module[:depth]) for module in modules]
        if len(set(keys)) <= limit:
            return "module", keys
    return "module", [""] * len(parameters)


def clean(name: str, empty: str = "_") -> str:
    """Replace characters other than ``A-Za-z0-9_./-``, and shorten a long name."""
    result = re.sub(r"[^A-Za-z0-9_./-]", "_", name) or empty
    if len(result) > _MAX_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        result = f"{result[: _MAX_NAME - 60]}-{digest}-{result[-50:]}"
    return result


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    stem, dot = (name[:-1], ".") if name.endswith(".") else (name, "")
    candidates = (f"{stem}_{number}{dot}" for number in itertools.count(2))
    return next(candidate for candidate in candidates if candidate not in taken)
