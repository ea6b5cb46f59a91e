"""The table of rules for optimizers of other packages.

Classes are identified by name, so none of these packages is imported. A new optimizer takes one
function and one name in the table. For Keras, the names are those of the stand-ins in
``lrprobe.foreign``.
"""

from __future__ import annotations

from collections.abc import Iterator

from lrprobe.rules import adagrad, adam, sgd
from lrprobe.rules.base import Rule
from lrprobe.rules.external import (
    adafactor,
    adapted,
    adaptive,
    layerwise,
    lion,
    lowbit,
    schedulefree,
)

_TABLE: dict[str, dict[Rule, tuple[str, ...]]] = {
    "bitsandbytes": {
        lowbit.BNB_ADAM: (
            "Adam",
            "Adam8bit",
            "Adam32bit",
            "PagedAdam",
            "PagedAdam8bit",
            "PagedAdam32bit",
            "AdamW",
            "AdamW8bit",
            "AdamW32bit",
            "PagedAdamW",
            "PagedAdamW8bit",
            "PagedAdamW32bit",
        ),
        lowbit.BNB_ADEMAMIX: ("AdEMAMix", "AdEMAMix32bit"),
        lowbit.BNB_LAMB: ("LAMB", "LAMB8bit", "LAMB32bit"),
        lowbit.BNB_LARS: ("LARS", "LARS8bit", "LARS32bit", "PytorchLARS"),
        lowbit.BNB_LION: (
            "Lion",
            "Lion8bit",
            "Lion32bit",
            "PagedLion",
            "PagedLion8bit",
            "PagedLion32bit",
        ),
    },
    "dadaptation": {adapted.DADAPT_ADAM: ("DAdaptAdam",)},
    "keras": {
        adagrad.ADADELTA: ("Adadelta",),
        adagrad.ADAGRAD_INSIDE: ("Adagrad",),
        adagrad.RMSPROP_INSIDE: ("RMSprop",),
        adam.ADAM_OUTSIDE: ("Adam", "AdamW"),
        adam.ADAMAX_OUTSIDE: ("Adamax",),
        adam.NADAM: ("Nadam",),
        lion.LION: ("Lion",),
        sgd.SGD: ("SGD",),
    },
    "lion_pytorch": {lion.LION: ("Lion",)},
    "prodigyopt": {adapted.PRODIGY: ("Prodigy",)},
    "pytorch_optimizer": {
        adaptive.ADAN: ("Adan",),
        adaptive.ADEMAMIX: ("AdEMAMix",),
        adapted.DADAPT_ADAM: ("DAdaptAdam",),
        adapted.PRODIGY: ("Prodigy",),
        layerwise.LAMB_STORED_TRUST: ("Lamb",),
        lion.LION: ("Lion",),
        schedulefree.ADAMW: ("ScheduleFreeAdamW",),
        schedulefree.RADAM: ("ScheduleFreeRAdam",),
        schedulefree.SGD: ("ScheduleFreeSGD",),
    },
    "schedulefree": {
        schedulefree.ADAMW: ("AdamWScheduleFree",),
        schedulefree.RADAM: ("RAdamScheduleFree",),
        schedulefree.SGD: ("SGDScheduleFree",),
    },
    "timm": {
        adaptive.ADAN: ("Adan",),
        layerwise.LAMB: ("Lamb",),
        layerwise.LARS: ("Lars",),
        lion.LION: ("Lion",),
    },
    "torchao": {
        lowbit.AO_ADAM: ("Adam8bit", "Adam4bit", "AdamFp8"),
        lowbit.AO_ADAMW: ("AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW"),
    },
    "transformers": {adafactor.ADAFACTOR: ("Adafactor",)},
}
"""Package to rule to the names of its classes."""

_RULES = {
    (package, name): rule
    for package, rules in _TABLE.items()
    for rule, names in rules.items()
    for name in names
}


def external_rule(cls: type) -> Rule | None:
    """The rule of a class of another package; None if there is none."""
    return _RULES.get((cls.__module__.partition(".")[0], cls.__name__))


def known() -> Iterator[tuple[str, str, Rule]]:
    """(package, class, rule) of every entry in the table."""
    for (package, name), rule in _RULES.items():
        yield package, name, rule
