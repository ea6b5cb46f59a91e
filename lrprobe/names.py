"""Names of parameters and optimizers."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lrprobe.text import parts_of

_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): "module",
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
}
"""(module, class) of a wrapper to the attribute that holds the wrapped module."""


def parameter_names(model: nn.Module | None) -> dict[int, str]:
    """id of each parameter of a model to its name, without the prefixes of wrappers.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if model is None:
        return {}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None; got {kind(model)}")
    # Not imported here: if the module is not loaded, the class has no instances.
    wrappers = [
        (getattr(sys.modules[module], name), attribute)
        for (module, name), attribute in _WRAPPERS.items()
        if module in sys.modules
    ]
    names: dict[int, str] = {}
    for name, param in _named(model, "", wrappers, set()):
        names.setdefault(id(param), name)
    return names


class Names:
    """The current names of a model's parameters; keeps neither model nor parameters alive.

    Raises:
        TypeError: if ``model`` is not a module.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._first = parameter_names(model)
        self._model = None if model is None else weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._model() if self._model is not None else None

    def now(self, given: Mapping[int, str] | None = None) -> dict[int, str]:
        """id of each parameter to its name; a parameter that left the model keeps its name.

        ``given`` has names used before. The model's names take precedence, because a new parameter
        may reuse the id of an old one.
        """
        model = self._model() if self._model is not None else None
        return self._first | dict(given or {}) | parameter_names(model)

    def forget(self, gone: Iterable[int]) -> None:
        """Forget parameters that left an optimizer, because their ids may be reused."""
        for each in gone:
            self._first.pop(each, None)


class Located(Protocol):
    """A reference to a parameter that does not keep it alive."""

    @property
    def id(self) -> int:
        """The id of the parameter."""

    def __call__(self) -> Tensor | None:
        """The parameter; None if it is not available."""


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a parameter in an optimizer; does not keep the parameter alive.

    A weak reference to the parameter would break ``module.to()``: for tensor subclasses (FSDP2) it
    uses ``torch.utils.swap_tensors``, which refuses tensors that have weak references.

    Attributes:
        optimizer: reference to the optimizer.
        group: index of the parameter group.
        index: index of the parameter in the group.
        id: id of the parameter.
    """

    optimizer: weakref.ref[Optimizer]
    group: int
    index: int
    id: int

    def __call__(self) -> Tensor | None:
        """The parameter; None if the optimizer no longer has it."""
        optimizer = self.optimizer()
        if optimizer is None:
            return None
        groups = optimizer.param_groups
        if self.group < len(groups) and self.index < len(groups[self.group]["params"]):
            param: Tensor = groups[self.group]["params"][self.index]
            if id(param) == self.id:
                return param
        return next((p for group in groups for p in group["params"] if id(p) == self.id), None)


def places(optimizer: Optimizer) -> list[Place]:
    """The places of all parameters of an optimizer, in order, each once."""
    reference = weakref.ref(optimizer)
    return [
        Place(reference, group, index, id(param))
        for group, index, param in _parameters_once(optimizer)
    ]


def _parameters_once(optimizer: Optimizer) -> Iterator[tuple[int, int, Tensor]]:
    """(group, index in it, parameter) of each parameter where the optimizer first has it."""
    seen = set()
    for group, each in enumerate(optimizer.param_groups):
        for index, param in enumerate(each["params"]):
            if id(param) not in seen:
                seen.add(id(param))
                yield group, index, param


def _named(
    module: nn.Module, prefix: str, wrappers: Sequence[tuple[type, str]], seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for cls, attribute in wrappers:
        if isinstance(module, cls):
            inner = getattr(module, attribute)
            yield from _named(inner, prefix, wrappers, seen)
    for name, param in module.named_parameters(prefix.rstrip("."), recurse=False):
        yield name, param
    for name, child in module.named_children():
        yield from _named(child, f"{prefix}{name}.", wrappers, seen)


def name_parameters(
    optimizer: Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[int, str, Tensor]]:
    """(group, name, parameter) of each parameter of an optimizer, once, with unique names.

    A name comes from the model, else from the group's own ``param_names``, else it is
    ``group0.param3``.
    """
    given = []
    for group, index, param in _parameters_once(optimizer):
        own_names = optimizer.param_groups[group].get("param_names")
        default = own_names[index] if own_names else f"group{group}.param{index}"
        given.append((group, names.get(id(param)) or default, param))
    wanted = {name for _, name, _ in given}
    unique: dict[int, str] = {}
    counts: dict[str, Iterator[int]] = {}
    taken: set[str] = set()
    # Parameters named by the model keep their names, wherever they are in the order.
    for at in sorted(range(len(given)), key=lambda at: id(given[at][2]) not in names):
        name = own = given[at][1]
        while name in taken or (name != own and name in wanted):
            name = f"{own}#{next(counts.setdefault(own, itertools.count(1)))}"
        taken.add(name)
        unique[at] = name
    for at, (group, _, param) in enumerate(given):
        yield group, unique[at], param


def module_of(name: str) -> str:
    """The module that holds a parameter: its name without the last part ("" for the root)."""
    return parts_of(name)[0]


def find_optimizers(given: Any) -> dict[str, Optimizer]:
    """Name to optimizer, for everything that ``attach`` takes.

    Raises:
        TypeError: for anything else.
        ValueError: for an empty list or dict, or the same optimizer twice.
    """
    if isinstance(given, Mapping):
        found = [(str(name), _unwrap(each)) for name, each in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        found = [("", _unwrap(each)) for each in given]
    else:
        found = [("", _unwrap(given))]
    if not found:
        raise ValueError(f"nothing to attach to: got an empty {kind(given)}")
    if len({id(optimizer) for _, optimizer in found}) < len(found):
        raise ValueError("the same optimizer was given twice")
    result: dict[str, Optimizer] = {}
    for name, optimizer in found:
        base = name or type(optimizer).__name__
        unique, count = base, 0
        while unique in result:
            count += 1
            unique = f"{base}#{count}"
        result[unique] = optimizer
    return result


def _unwrap(given: Any) -> Optimizer:
    found = _inside(given, [])
    if found is not None:
        return found
    raise TypeError(
        "optimizer must be a torch.optim.Optimizer, a wrapper around one (with .optimizer, "
        ".optim, .base_optimizer or .original_optimizer), a list of them, or a dict of name to "
        "optimizer; got "
        f"{kind(given)}"
    )


def _inside(thing: Any, seen: list[Any]) -> Optimizer | None:
    """The innermost optimizer; a wrapper may subclass ``Optimizer`` without running hooks."""
    if any(thing is each for each in seen):
        return None
    seen.append(thing)
    for attribute in ("optimizer", "optim", "base_optimizer", "original_optimizer"):
        inner = getattr(thing, attribute, None)
        if inner is not None and (found := _inside(inner, seen)) is not None:
            return found
    runs = isinstance(thing, Optimizer) and hasattr(thing, "_optimizer_step_post_hooks")
    return thing if runs else None


def kind(thing: Any) -> str:
    """The class of an object for error messages, with its module unless it is a builtin."""
    cls = type(thing)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
