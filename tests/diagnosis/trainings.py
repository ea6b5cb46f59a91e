"""Short trainings on the digits, healthy or with a fault that is planted in them."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn, optim

import lrprobe

PIXELS, LABELS = load_digits(return_X_y=True)
X, Y = torch.tensor(PIXELS / 16, dtype=torch.float32), torch.tensor(LABELS)

Make = Callable[[nn.Module], Any]
Act = Callable[[int, nn.Module, Any], None]


def net(seed: int = 0, hidden: int = 48) -> nn.Sequential:
    """A small network for the digits, the same weights every time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def sgd(**options: Any) -> Make:
    return lambda model: optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def adamw(**options: Any) -> Make:
    return lambda model: optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})


def cross_entropy(model: nn.Module, at: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(X[at].to(dtype)).float(), Y[at])


def train(  # noqa: C901, PLR0912 - one loop, with a place for each fault
    make: Make,
    *,
    model: nn.Module | None = None,
    steps: int = 60,
    every: int = 1,
    seed: int = 0,
    batch: int = 100,
    schedule: Callable[[Any], Any] | None = None,
    before: Act | None = None,
    after: Act | None = None,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = cross_entropy,
    zero_grad: Callable[[int, nn.Module, Any], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    first: int = 1,
    read: bool = False,
    probes: list[lrprobe.Probe] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train, and give the frame.

    ``before`` and ``after`` are called around each optimizer step. ``first`` is where a resumed
    training goes on. With ``probes`` the probe is left open and appended there.
    """
    model = model if model is not None else net(seed)
    made = make(model)
    optimizers = list(made.values()) if isinstance(made, dict) else made
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    order = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lrprobe:")  # what the probe itself says of the fault
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # skipped steps
        scheduler = schedule(optimizers[0]) if schedule else None
        probe = lrprobe.attach(made, model, every=every, **options)
        for step in range(1, first + steps):
            for part in range(accumulate):
                size = min(batch, len(X))
                at = (
                    torch.randint(len(X), (size,), generator=order)
                    if batch < len(X)
                    else slice(None)
                )
                if step < first:  # the resumed training goes on in the order of the data
                    continue
                if part == 0:
                    if zero_grad is not None:
                        zero_grad(step, model, made)
                    else:
                        for each in optimizers:
                            each.zero_grad()
                value = loss(model, at) / accumulate
                (scaler.scale(value) if scaler else value).backward()
            if step < first:
                continue
            if before is not None:
                before(step, model, made)
            for each in optimizers:
                scaler.step(each) if scaler else each.step()
            if scaler:
                scaler.update()
            if after is not None:
                after(step, model, made)
            if scheduler is not None:
                scheduler.step()
        if probes is None:
            probe.close()
        else:
            probes.append(probe)
        return probe.frame()


def codes(frame: pd.DataFrame, **options: Any) -> dict[str, list[lrprobe.Finding]]:
    """Findings and notes by code."""
    result: dict[str, list[lrprobe.Finding]] = {}
    for each in lrprobe.diagnose(frame, **options):
        result.setdefault(each.code, []).append(each)
    return result


def resume(
    to: Path,
    make: Make,
    *,
    schedule: Callable[[Any], Any] | None = None,
    restore: Callable[[Any, Any, dict[str, Any]], None] | None = None,
    steps: int = 60,
    more: int = 60,
    every: int = 1,
    **options: Any,
) -> pd.DataFrame:
    """A training and its resume into one dataset, as a new process does it.

    Args:
        to: the dataset.
        make: the optimizer.
        schedule: its scheduler.
        restore: gets the new optimizer and scheduler and the checkpoint; by default all is loaded.
        steps: before the resume.
        more: after it.
        every: recorded steps.
        options: for ``train``.
    """
    model = net()
    saved: dict[str, Any] = {}
    made: list[Any] = []
    act = options.pop("after", None)

    def keep(step: int, model: nn.Module, optimizer: Any) -> None:
        if act is not None:
            act(step, model, optimizer)
        if step == steps:
            saved["optimizer"] = copy.deepcopy(optimizer.state_dict())

    def scheduled(optimizer: Any) -> Any:
        made.append(schedule(optimizer))
        return made[-1]

    options |= {"model": model, "every": every, "to": str(to)}
    train(make, steps=steps, after=keep, schedule=scheduled if schedule else None, **options)
    if schedule:
        saved["scheduler"] = made[-1].state_dict()

    def make_again(model: nn.Module) -> Any:
        optimizer = make(model)
        if schedule is None:
            (restore or _load)(optimizer, None, saved)
        return optimizer

    def schedule_again(optimizer: Any) -> Any:
        scheduler = schedule(optimizer)
        return (restore or _load)(optimizer, scheduler, saved) or scheduler

    train(
        make_again,
        steps=more,
        first=steps + 1,
        step=steps,
        after=act,
        schedule=schedule_again if schedule else None,
        **options,
    )
    return lrprobe.read(to, attempts="all")


def _load(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
        for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
