"""Runs hooks under ``torch.compile``: in Python, between graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo


def call(function: Callable[..., None], *args: Any) -> None:
    """Call a hook; under tracing, cause a graph break so that it runs between two graphs.

    Raises:
        RuntimeError: if the step is compiled with ``fullgraph=True``, which allows one graph only.
    """
    if torch.compiler.is_compiling():
        _refuse_one_graph()
        _outside_graph(function, *args)
    else:
        function(*args)


def _refuse_one_graph() -> bool:
    """Raise if the tracer allows one graph only. The tracer runs this, so it is on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        tracer = frame.f_locals.get("self")
        name = type(tracer).__name__
        if name.endswith("InstructionTranslator") and getattr(tracer, "one_graph", False):
            raise RuntimeError(
                "lrprobe: an optimizer with a probe cannot be compiled with fullgraph=True, "
                "because its hooks run in Python. Omit fullgraph, or call probe.close() first"
            )
        frame = frame.f_back
    return True


# What torch._dynamo.assume_constant_result does, without importing torch._dynamo.
_refuse_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined] # noqa: SLF001


@_disable_dynamo
def _outside_graph(function: Callable[..., None], *args: Any) -> None:
    function(*args)
