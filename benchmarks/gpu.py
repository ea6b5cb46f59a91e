"""Measures the overhead of a recorded step on a CUDA device, its synchronizations and its error.

A unit is one ``AdamW(fused=True)`` step on the same parameters, those of GPT-2 (124 million
elements). The last line is ``units: N``, for AdamW.
"""

from __future__ import annotations

import statistics
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from launches import gpt
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lrprobe.engine import Engine
from lrprobe.engine.backends import EngineName
from lrprobe.engine.buffers import blank, column, fill
from lrprobe.engine.figures import CHECKS, FIGURES
from lrprobe.engine.pieces import WatchedParameter
from lrprobe.rules import find_rule

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW": torch.optim.AdamW,
    "Adadelta": torch.optim.Adadelta,
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


def milliseconds(function: Callable[[], Any], times: int = 20) -> float:
    """Median time of a call on the device."""
    function()
    found = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def watched(optimizer: torch.optim.Optimizer) -> list[WatchedParameter]:
    """The optimizer's parameters, as the engine takes them."""
    rule = find_rule(type(optimizer))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        WatchedParameter(str(i), 0, weakref.ref(p), rule, None, p.numel())
        for i, p in enumerate(params)
    ]


def recorded(engine: Engine, optimizer: torch.optim.Optimizer, *, step: bool = True) -> Any:
    """Take one recorded step; return its figures, and the merged buffers."""
    found = watched(optimizer)
    with torch.no_grad():
        pre = engine.before(found, optimizer)
        if step:
            optimizer.step()
        figures = engine.after(found, optimizer, pre)
        device = found[0].place().device
        buffers = blank(len(found), 0, device)
        fill(buffers, figures, range(len(found)), {}, folds=False)
    return figures, buffers


def model(shapes: Any, device: str) -> list[nn.Parameter]:
    """Create parameters with gradients."""
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def agreement() -> float:
    """Largest relative difference from the same step on the CPU, computed eagerly in float64."""
    torch.manual_seed(0)
    near = model([(300, 1000), (77,), (5, 3), ()], "cpu")
    far = [nn.Parameter(p.detach().cuda()) for p in near]
    tables = []
    engines: list[tuple[Any, EngineName]] = [(near, "eager"), (far, "cuda")]
    for param, other in zip(near, far, strict=True):
        other.grad = param.grad.cuda()
    for params, name in engines:
        optimizer = torch.optim.AdamW(params, foreach=False)
        figures, _ = recorded(Engine(name), optimizer)
        tables.append(torch.cat([v.table.cpu() for v in figures.vectors]))
    names = [f.name for f in (*FIGURES, *CHECKS) if "residual" not in f.name]
    x, y = (table[:, [column(name) for name in names]] for table in tables)
    apart = ((x - y).abs() / y.abs().clamp(min=1e-30)).nan_to_num(0.0, 0.0, 0.0)
    for name, value in zip(names, apart.amax(0).tolist(), strict=True):
        if value > 1e-5:
            print(f"  {name}: {value:.1e}")
    return float(apart.max())


def syncs(engine: Engine, optimizer: torch.optim.Optimizer) -> int:
    """The number of synchronizations that recording a step adds."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded(engine, optimizer, step=False)
    torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def main() -> None:
    """Run all measurements."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    print(torch.cuda.get_device_name())
    print(f"largest difference from the CPU: {agreement():.1e}")
    shapes = gpt(12, 768, 1024)
    engine = Engine("cuda")
    units = {}
    base = torch.optim.AdamW(model(shapes, "cuda"), fused=True)
    unit = milliseconds(base.step)
    for name, make in OPTIMIZERS.items():
        optimizer = make(model(shapes, "cuda"))
        optimizer.step()
        recorded(engine, optimizer)
        whole = milliseconds(lambda o=optimizer: recorded(engine, o))
        step = milliseconds(optimizer.step)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            recorded(engine, optimizer, step=False)
            torch.cuda.synchronize()
        launches = sum(event.count for event in traced.key_averages())
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        units[name] = (whole - step) / unit
        print(
            f"{name}: {units[name]:.2f} units ({whole - step:.2f} ms; unit {unit:.2f} ms), "
            f"{launches} launches, {memory:.0f} MiB, {syncs(engine, optimizer)} syncs"
        )
    print(f"units: {units['AdamW, fused']:.2f}")


if __name__ == "__main__":
    main()
