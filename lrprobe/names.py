"""Which parameter is called what, and which optimizer."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lrprobe.text import parts_of

_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
}
"""(module, class) of a wrapper to the attribute that holds what it wraps."""


def parameter_names(model: nn.Module | None) -> dict[int, str]:
    """id of each parameter of a model to its name; wrappers leave no trace in it.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if model is None:
        return {}
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module or None, since it gives the names; got {_kind(model)}"
        )
    # Looked up among what is imported: a class that is not loaded has no instances.
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
    """The names of a model's parameters as it is now; keeps neither alive.

    Raises:
        TypeError: if ``model`` is not a module.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._first = _weakly(model)
        self._model = None if model is None else weakref.ref(model)

    def now(self) -> dict[int, str]:
        """id of each parameter that is alive to its name; a name once given stays."""
        model = self._model() if self._model is not None else None
        known = ((ref(), name) for ref, name in self._first)
        return parameter_names(model) | {id(p): name for p, name in known if p is not None}


def _weakly(model: nn.Module | None) -> list[tuple[weakref.ref[Tensor], str]]:
    names = parameter_names(model)
    params = {} if model is None else {id(p): p for p in model.parameters()}
    return [(weakref.ref(params[at]), name) for at, name in names.items() if at in params]


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
    """(group, name, parameter) of an optimizer, each name once.

    A name is the model's, else the group's own ``param_names``, else ``group0.param3``.
    """
    taken: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        own = group.get("param_names")
        for at, param in enumerate(group["params"]):
            name = names.get(id(param)) or (own[at] if own else f"group{index}.param{at}")
            taken[name] = taken.get(name, 0) + 1
            yield index, name if taken[name] == 1 else f"{name}#{taken[name] - 1}", param


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
        raise ValueError(f"nothing to attach to: got an empty {_kind(given)}")
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
    found, seen = given, set()
    while id(found) not in seen:
        seen.add(id(found))
        for attribute in ("optimizer", "optim"):
            inner = getattr(found, attribute, None)
            # A wrapper may itself subclass Optimizer without ever running its hooks.
            if isinstance(inner, Optimizer) or (
                inner is not None and not isinstance(found, Optimizer)
            ):
                found = inner
                break
    if isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_post_hooks"):
        return found
    raise TypeError(
        "optimizer must be a torch.optim.Optimizer, a wrapper around one (with .optimizer or "
        f".optim), a list of them, or a dict of name to optimizer; got {_kind(given)}"
    )


def _kind(thing: Any) -> str:
    cls = type(thing)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
