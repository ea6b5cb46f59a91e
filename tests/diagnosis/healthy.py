"""The table of healthy runs: usual settings, and what may look like a fault and is none."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from bugs import LINEAR, MULTISTEP, WARM, cosine, groups, lambda_lr
from torch import nn, optim
from torch.optim import lr_scheduler
from trainings import X, Y, adamw, net, resume, sgd, train
from versions import MUON

import lrprobe


@dataclass(frozen=True)
class Healthy:
    """One row: a name, and the training, given the period of recording and a folder."""

    name: str
    run: Callable[[int, Path], pd.DataFrame]
    every: tuple[int, ...] = (1, 10)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, torch's lr": optim.SGD,
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "Nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": optim.Adam,
    "Adam, L2": lambda p: optim.Adam(p, weight_decay=1e-4),
    "AMSGrad": lambda p: optim.Adam(p, amsgrad=True),
    "Adam of GANs": lambda p: optim.Adam(p, 2e-4, (0.5, 0.999)),
    "Adam of StyleGAN": lambda p: optim.Adam(p, 1e-3, (0.0, 0.99)),
    "fused Adam": lambda p: optim.Adam(p, fused=True),
    "AdamW": optim.AdamW,
    "AdamW of LMs": lambda p: optim.AdamW(p, 3e-4, (0.9, 0.95), weight_decay=0.1),
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adamax": optim.Adamax,
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Zeiler's Adadelta": lambda p: optim.Adadelta(p, rho=0.95, eps=1e-6),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3),
    "RMSprop, centered": lambda p: optim.RMSprop(p, lr=1e-3, centered=True),
    "RMSprop, momentum": lambda p: optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "ASGD": optim.ASGD,
    "Adafactor": optim.Adafactor,
}
if MUON is not None:
    OPTIMIZERS["Muon"] = lambda p: MUON([each for each in p if each.ndim == 2], lr=0.02)


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(images.reshape(-1, 8, 8))[0][:, -1])


class Attention(nn.Module):
    """A transformer's layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.inside(images.reshape(-1, 8, 8))).mean(1))


class Experts(nn.Module):
    """A mixture of experts, of which each step uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 6)
        self.experts = nn.ModuleList(nn.Linear(64, 10) for _ in range(6))
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        used = [(self.calls + at) % 6 for at in range(2)]
        weight = self.gate(images)[:, used].softmax(1)
        return sum(weight[:, [i]] * self.experts[e](images) for i, e in enumerate(used))


class Low(nn.Module):
    """LoRA: a frozen layer, and a small one beside it whose second factor begins at 0."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(64, 48), nn.Linear(48, 10)
        self.base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, 64) / 8)
        self.up = nn.Parameter(torch.zeros(48, rank))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.base(images) + images @ self.down.T @ self.up.T).relu())


def nets() -> dict[str, Callable[[], nn.Module]]:
    def normed() -> nn.Module:
        layers = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64)]
        return nn.Sequential(*layers, nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))

    def convolutional() -> nn.Module:
        layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(288, 10))

    def smooth() -> nn.Module:
        layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(32, 10))

    return {"normed": normed, "conv": convolutional, "tanh": smooth, "LSTM": Recurrent,
            "attention": Attention}  # fmt: skip


def usual(make: Any, model: Callable[[], nn.Module] = net, **options: Any) -> Any:
    def run(every: int, _folder: Path) -> pd.DataFrame:
        torch.manual_seed(0)
        made = model()
        return train(
            lambda m: make([p for p in m.parameters() if p.requires_grad]),
            **{"model": made, "every": every, "steps": 120, **options},
        )

    return run


def gan(every: int, _folder: Path, together: bool = False) -> pd.DataFrame:
    """Two optimizers with a probe each; both get gradients in each backward pass."""
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    both = nn.ModuleDict({"maker": maker, "critic": critic})
    one = optim.Adam(maker.parameters(), 2e-4, (0.5, 0.999))
    two = optim.Adam(critic.parameters(), 2e-4, (0.5, 0.999))
    if together:
        probes = [lrprobe.attach({"maker": one, "critic": two}, both, every=every)]
    else:
        probes = [lrprobe.attach(each, both, every=every) for each in (one, two)]
    bce = nn.functional.binary_cross_entropy_with_logits
    for _ in range(120):
        at = torch.randint(len(X), (100,))
        two.zero_grad()
        false = maker(torch.randn(100, 16))
        real, made = critic(X[at]), critic(false.detach())
        (bce(real, torch.ones_like(real)) + bce(made, torch.zeros_like(made))).backward()
        two.step()
        one.zero_grad()
        made = critic(false)
        bce(made, torch.ones_like(made)).backward()
        one.step()
    for probe in probes:
        probe.close()
    return pd.concat([probe.frame().assign(run=str(i)) for i, probe in enumerate(probes)])


def one_after_the_other(every: int, _folder: Path) -> pd.DataFrame:
    """Two optimizers of the same parameters, the second when the first has done its part."""
    model = net()
    one, two = optim.Adam(model.parameters()), optim.SGD(model.parameters(), lr=0.01)
    with lrprobe.attach([one, two], model, every=every) as probe:
        for step in range(120):
            optimizer = one if step < 60 else two
            optimizer.zero_grad()
            at = torch.randint(len(X), (100,))
            nn.functional.cross_entropy(model(X[at]), Y[at]).backward()
            optimizer.step()
    return probe.frame()


def back_to_a_checkpoint(every: int, _folder: Path) -> pd.DataFrame:
    """A run that goes back to where it was 20 steps ago, with everything."""
    saved: dict[str, Any] = {}

    def act(step: int, model: nn.Module, optimizer: Any) -> None:
        if step == 30:
            saved["model"] = {k: v.clone() for k, v in model.state_dict().items()}
            saved["optimizer"] = optimizer.state_dict()
            saved["optimizer"] = {
                "state": {
                    at: {k: v.clone() for k, v in each.items()}
                    for at, each in saved["optimizer"]["state"].items()
                },
                "param_groups": saved["optimizer"]["param_groups"],
            }
        if step == 50:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])

    return train(adamw(), every=every, steps=100, after=act)


def data_parallel(every: int, folder: Path) -> pd.DataFrame:
    """DistributedDataParallel in a world of one."""
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        return train(adamw(), model=model, every=every, steps=60)
    finally:
        dist.destroy_process_group()


def sparse(every: int, _folder: Path) -> pd.DataFrame:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(64 * 17, 32, sparse=True), nn.Linear(32, 10)
    optimizers = [optim.SparseAdam(bag.parameters()), optim.Adam(head.parameters())]
    words = (X * 16).round().long() + 17 * torch.arange(64)
    with lrprobe.attach(optimizers, nn.Sequential(bag, head), every=every) as probe:
        for _ in range(120):
            at = torch.randint(len(X), (100,))
            nn.functional.cross_entropy(head(bag(words[at])), Y[at]).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    return probe.frame()


def words(make: Any) -> Any:
    """An embedding of which most rows are rare, dense, with the usual small decay."""

    def run(every: int, _folder: Path) -> pd.DataFrame:
        from bugs import Words

        return train(make, model=Words(500), every=every, steps=120)

    return run


def overflow_at_first(step: int, model: nn.Module, _optimizer: Any) -> None:
    if step <= 4:
        for param in model.parameters():
            param.grad.fill_(torch.inf)


def clip(value: float) -> Any:
    def act(_step: int, model: nn.Module, _optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), value)

    return act


def spike(step: int, model: nn.Module, _optimizer: Any) -> None:
    if step == 60:
        for param in model.parameters():
            param.grad.mul_(30)


def resumed(make: Any, schedule: Any = None) -> Any:
    def run(every: int, folder: Path) -> pd.DataFrame:
        return resume(folder / "run.parquet", make, schedule=schedule, every=every)

    return run


def resumed_from_before(every: int, folder: Path) -> pd.DataFrame:
    """The first attempt went on beyond the checkpoint, and was killed."""
    saved: dict[str, Any] = {}
    made: list[Any] = []

    def keep(step: int, model: nn.Module, optimizer: Any) -> None:
        if step == 60:
            import copy

            saved["model"] = copy.deepcopy(model.state_dict())
            saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
            saved["scheduler"] = copy.deepcopy(made[0].state_dict())

    def scheduled(optimizer: Any) -> Any:
        made.append(LINEAR(optimizer))
        return made[-1]

    to = str(folder / "run.parquet")
    train(sgd(momentum=0.9), every=every, steps=75, after=keep, schedule=scheduled, to=to)
    model = net()
    model.load_state_dict(saved["model"])

    def restored(optimizer: Any) -> Any:
        scheduler = LINEAR(optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        scheduler.step()
        return scheduler

    train(
        sgd(momentum=0.9), model=model, every=every, steps=60, first=61, step=60,
        schedule=restored, to=to,
    )  # fmt: skip
    return lrprobe.read(to, attempts="all")


def by_hand(rate: Callable[[int], float]) -> Any:
    """A schedule that the loop sets itself."""

    def act(step: int, _model: nn.Module, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * rate(step)

    return act


def resumed_by_hand(every: int, folder: Path) -> pd.DataFrame:
    act = by_hand(lambda t: 0.5 * (1 + math.cos(math.pi * t / 140)))
    return resume(folder / "run.parquet", sgd(), every=every, before=act)


def scheduled(schedule: Any, make: Any = None, **options: Any) -> Any:
    def run(every: int, _folder: Path) -> pd.DataFrame:
        return train(
            make or adamw(), **{"every": every, "steps": 120, "schedule": schedule, **options}
        )

    return run


def chained(optimizer: Any) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20)
    down = lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return lr_scheduler.SequentialLR(optimizer, [warm, down], [20])


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """Of a loss that never gets better."""

    def step(self, *_: Any) -> None:  # type: ignore[override]
        super().step(1.0)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 50, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [60, 90], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 20),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.01, 120),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.98),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 120, 2.0),
    "CosineAnnealingLR": cosine(120),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, 20, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 3e-3, total_steps=125),
    "LambdaLR": WARM,
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.99),
    "ReduceLROnPlateau": lambda o: Plateau(o, patience=30),
    "SequentialLR": chained,
    "warmup from 0": lambda_lr(lambda t: min(1.0, t / 30)),
}

TUNED = {"Adam": lambda m: optim.Adam(m.parameters()), "SGD": sgd(momentum=0.9, lr=0.05)}

HEALTHY = [
    *(Healthy(name, usual(make)) for name, make in OPTIMIZERS.items()),
    *(Healthy(f"{name} on {kind}", usual(OPTIMIZERS[name], model), every=(5,))
      for kind, model in nets().items()
      for name in ("momentum", "Adam", "AdamW of LMs", "RMSprop", "Zeiler's Adadelta", "Adagrad")),
    *(Healthy(f"{name}, {kind}", scheduled(schedule, make))
      for name, schedule in SCHEDULES.items()
      for kind, make in TUNED.items()),
    Healthy("two groups under one schedule", scheduled(cosine(120), groups(adamw))),
    Healthy("two groups that anneal to one floor",
            scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 120, 1e-5), groups(adamw))),
    Healthy("a group for what does not decay", usual(lambda p: optim.AdamW(
        [{"params": [w for w in p if w.ndim > 1], "weight_decay": 0.1},
         {"params": [w for w in p if w.ndim == 1], "weight_decay": 0.0}]))),
    Healthy("full batch, SGD", usual(OPTIMIZERS["SGD"], batch=10**6)),
    Healthy("full batch, momentum", usual(OPTIMIZERS["momentum"], batch=10**6)),
    Healthy("full batch, AdamW", usual(OPTIMIZERS["AdamW"], batch=10**6)),
    Healthy("full batch, tanh", usual(OPTIMIZERS["Adam"], nets()["tanh"], batch=10**6)),
    Healthy("full batch, RMSprop", usual(OPTIMIZERS["RMSprop"], batch=10**6)),
    Healthy("batches of 4", usual(OPTIMIZERS["SGD, torch's lr"], batch=4)),
    Healthy("batches of 2, AdamW", usual(OPTIMIZERS["AdamW"], batch=2)),
    Healthy("accumulation over 4 passes", usual(OPTIMIZERS["Adam"], accumulate=4, batch=25)),
    Healthy("a clip that is seldom reached", usual(OPTIMIZERS["SGD"], before=clip(1.0))),
    Healthy("a clip at the median norm", usual(OPTIMIZERS["SGD"], before=clip(0.5))),
    Healthy("a GAN's Adam after a spike", usual(OPTIMIZERS["Adam of GANs"], before=spike)),
    Healthy("Adam after a spike", usual(OPTIMIZERS["Adam of StyleGAN"], before=spike)),
    Healthy("a scaler", lambda every, _: train(
        adamw(fused=True), every=every, steps=120, scaler=torch.amp.GradScaler("cpu"))),
    Healthy("a scaler that looks for its scale", lambda every, _: train(
        adamw(fused=True), every=every, steps=120, before=overflow_at_first,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))),
    Healthy("an unfused scaler", lambda every, _: train(
        adamw(), every=every, steps=120, before=overflow_at_first,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))),
    Healthy("LoRA", usual(OPTIMIZERS["AdamW"], Low)),
    Healthy("a mixture of experts", usual(OPTIMIZERS["AdamW"], Experts)),
    Healthy("sparse embeddings", sparse),
    Healthy("rare words, AdamW", words(adamw())),
    Healthy("rare words, SGD", words(sgd(weight_decay=5e-4, momentum=0.9))),
    Healthy("a GAN, a probe for each", gan),
    Healthy("a GAN, one probe", lambda every, folder: gan(every, folder, together=True)),
    Healthy("Adam, then SGD", one_after_the_other),
    Healthy("fine-tuning, the frozen layer left out", lambda every, _: train(
        lambda m: adamw()(m[0].requires_grad_(False) and m[2]), every=every, steps=120)),
    Healthy("back to a checkpoint", back_to_a_checkpoint),
    Healthy("DistributedDataParallel", data_parallel),
    Healthy("bfloat16 at a large rate", lambda every, _: train(
        sgd(lr=0.5), model=net().to(torch.bfloat16), every=every, steps=120)),
    *(Healthy(f"a resume, {name}", resumed(make, schedule))
      for name, make, schedule in (
          ("SGD", sgd(momentum=0.9), None),
          ("AdamW", adamw(), None),
          ("linear", sgd(), LINEAR),
          ("warm cosine", adamw(), WARM),
          ("cosine", adamw(), cosine(140)),
          ("cosine to its end", adamw(), cosine(120)),
          ("steps", sgd(), MULTISTEP),
          ("StepLR at the resume", sgd(), lambda o: lr_scheduler.StepLR(o, 60, 0.1)),
          ("StepLR", adamw(), lambda o: lr_scheduler.StepLR(o, 20, 0.5)),
          ("exponential", sgd(), lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
          ("warmup and constant", adamw(), lambda_lr(lambda t: min(1.0, (t + 1) / 40))),
          ("two groups", groups(adamw), LINEAR),
      )),
    Healthy("a resume from before", resumed_from_before),
    Healthy("a resume, the schedule by hand", resumed_by_hand),
]  # fmt: skip
"""None of them gives a finding; notes are allowed."""
