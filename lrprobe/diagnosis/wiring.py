"""Checks of which optimizer steps which parameter, and of how optimizers count their steps."""

from __future__ import annotations

from collections.abc import Iterator

from lrprobe.about import IN_TWO_OPTIMIZERS, NOT_IN_OPTIMIZER
from lrprobe.diagnosis.shared import Hit
from lrprobe.series import Series


def not_in_optimizer(series: Series) -> Iterator[Hit]:
    """Parameters that have a gradient but are in no optimizer with a probe."""
    if series.siblings[0] is not series:  # it concerns the whole run, so report it once
        return
    for name in series.about.get(NOT_IN_OPTIMIZER) or ():
        evidence = "it is trainable and has a gradient, but no optimizer with a probe has it"
        yield Hit(name, series.steps, evidence, {})


def in_two_optimizers(series: Series) -> Iterator[Hit]:
    """Parameters that two optimizers step."""
    for name, optimizers in (series.about.get(IN_TWO_OPTIMIZERS) or {}).items():
        having = [each for each in series.siblings if each.optimizer in optimizers]
        if having and series is having[0]:  # report it once
            evidence = f"both {' and '.join(map(_plain, optimizers))} step it"
            yield Hit(name, series.steps, evidence, {"optimizers": len(optimizers)})


def step_stuck(series: Series) -> Iterator[Hit]:
    """An optimizer whose step count does not match the steps that it took."""
    wrong = series.optimizer_about.get("step_count")
    if not wrong:
        return
    seen = series.steps[(series.steps >= wrong["step"]) & (series.steps <= wrong["last"])]
    values = {key: float(wrong[key]) for key in ("was", "is", "expected", "times")}
    evidence = "the optimizer's own step count goes from {was:,.0f} to {is:,.0f} instead of "
    evidence += "{expected:,.0f}; seen in at least {times:,.0f} recorded steps"
    yield Hit(wrong["parameter"], seen, evidence, values, values["times"])


def _plain(name: str) -> str:
    """Escape a name for ``str.format``."""
    return name.replace("{", "{{").replace("}", "}}")
