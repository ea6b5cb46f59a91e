"""The table of rules: which equation belongs to which optimizer."""

from __future__ import annotations

from collections.abc import Callable

from torch import optim

from lrprobe.rules import adafactor, adagrad, adam, muon, sgd
from lrprobe.rules.base import Rule, Slice, Update, Whole
from lrprobe.rules.external import external_rule

__all__ = ["Rule", "Slice", "Update", "Whole", "find_rule", "register_rule"]

_RULES: dict[type, Rule] = {
    optim.SGD: sgd.SGD,
    optim.ASGD: sgd.ASGD,
    optim.Rprop: sgd.RPROP,
    optim.Adam: adam.ADAM,
    optim.AdamW: adam.ADAMW,
    optim.NAdam: adam.NADAM,
    optim.RAdam: adam.RADAM,
    optim.Adamax: adam.ADAMAX,
    optim.SparseAdam: adam.SPARSE_ADAM,
    optim.Adagrad: adagrad.ADAGRAD,
    optim.Adadelta: adagrad.ADADELTA,
    optim.RMSprop: adagrad.RMSPROP,
    optim.Adafactor: adafactor.ADAFACTOR,
}
if hasattr(optim, "Muon"):  # from torch 2.9
    _RULES[optim.Muon] = muon.MUON


def find_rule(cls: type) -> Rule | None:
    """The rule of a class, or of its nearest parent that has one.

    The check against the actual step shows whether it also holds for the subclass.
    """
    found = (_RULES.get(c) or external_rule(c) for c in cls.__mro__)
    return next((rule for rule in found if rule is not None), None)


def register_rule(cls: type, rule: Rule | Callable[[Slice], Update]) -> None:
    """Teach lrprobe an optimizer.

    Args:
        cls: the optimizer class; its subclasses use the rule too, unless they have their own.
        rule: a :class:`Rule`, or just its equation, a function of a :class:`Slice` that returns an
            :class:`Update`; the rule's name is then the class's, in lower case.

    Raises:
        TypeError: if ``cls`` is not an optimizer class, or ``rule`` is neither.
    """
    if not (isinstance(cls, type) and issubclass(cls, optim.Optimizer)):
        raise TypeError(f"register_rule takes a torch.optim.Optimizer class first; got {cls!r}")
    if not isinstance(rule, Rule):
        if not callable(rule):
            raise TypeError(f"register_rule takes a Rule or a function; got {rule!r}")
        rule = Rule(cls.__name__.lower(), rule)
    _RULES[cls] = rule
