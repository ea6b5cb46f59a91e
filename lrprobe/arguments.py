"""The arguments of ``attach``, checked at the call; an error says what came and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from lrprobe.engine.backends import EngineName
from lrprobe.names import Names
from lrprobe.text import warn

Every: TypeAlias = int | Callable[[int], bool]
Step: TypeAlias = int | Callable[[], int] | None


@dataclass(frozen=True, slots=True)
class Options:
    """What one probe does with each of its optimizers.

    Attributes:
        names: the names of the model's parameters.
        chosen: which parameters are recorded.
        every, step, track, batch_size: as given to ``attach``.
        engine: how figures are computed; see ``LRPROBE_ENGINE``.
    """

    names: Names
    chosen: Filter
    every: Every
    step: Step
    track: int
    batch_size: int | None
    engine: EngineName = "auto"


def check_counts(every: Any, track: Any, batch_size: Any, step: Any) -> None:
    """Check the whole numbers among the arguments of ``attach``.

    Raises:
        TypeError: if one is neither a whole number nor another allowed value.
        ValueError: if one is too small.
    """
    _check("every", every, 1, ", or a function of the step", callable(every))
    _check("track", track, 0)
    _check("batch_size", batch_size, 1, ", or None", batch_size is None)
    allowed = ", a function that returns it, or None"
    _check("step", step, 0, allowed, step is None or callable(step))


def check_callback(on_finding: Any) -> None:
    """Check that ``on_finding`` is callable or None.

    Raises:
        TypeError: if it is neither.
    """
    if on_finding is not None and not callable(on_finding):
        raise TypeError(
            f"on_finding= takes a function that accepts a Finding, or None; got {on_finding!r}"
        )


def _check(name: str, value: Any, minimum: int, also: str = "", fine: bool = False) -> None:
    if fine:
        return
    message = f"{name}= takes a whole number of at least {minimum}{also}; got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message)
    if value < minimum:
        raise ValueError(message)


class Filter:
    """Selects parameters by the patterns in ``include`` and ``exclude``."""

    def __init__(
        self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
    ) -> None:
        self._include = _patterns("include", include)
        self._exclude = _patterns("exclude", exclude)
        self._unused = {*(self._include or ()), *(self._exclude or ())}

    def takes(self, name: str) -> bool:
        """Whether a parameter with this name is recorded."""
        included = self._include is None or any(p.search(name) for p in self._include)
        return included and not any(p.search(name) for p in self._exclude or ())

    def see(self, names: Iterable[str]) -> None:
        """Note which patterns match a name."""
        for name in names:
            self._unused = {p for p in self._unused if not p.search(name)}

    @property
    def unused(self) -> tuple[str, ...]:
        """Patterns that have matched no name so far."""
        return tuple(sorted(p.pattern for p in self._unused))

    def warn_unused(self, of: Iterable[str] | None = None) -> None:
        """Warn about unused patterns, or about those in ``of``, which no rank has used."""
        for pattern in sorted(self.unused if of is None else of):
            warn(f"the pattern {pattern!r} matches no parameter's name")


def _patterns(argument: str, given: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if given is None:
        return None
    patterns = []
    if isinstance(given, str | re.Pattern) or not isinstance(given, Iterable):
        given = [given]
    for text in given:
        if not isinstance(text, str | re.Pattern):
            raise TypeError(f"{argument}= takes regular expressions; got {text!r}")
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise ValueError(f"{argument}={text!r} is not a regular expression: {error}") from error
    return patterns
