"""The table of bugs: each a mistake that people really made, planted in a short training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from trainings import X, Y, adamw, net, resume, sgd, train

import lrprobe

MAKERS: dict[str, Callable[..., Any]] = {"SGD": sgd, "AdamW": adamw}


@dataclass(frozen=True)
class Bug:
    """One row.

    Attributes:
        name: what was done wrong.
        code: what has to be found.
        reported: where such a bug was reported.
        run: the training, given a maker of optimizers, the period of recording, and a folder.
        optimizers: to which it applies.
        every: periods at which it can be seen.
    """

    name: str
    code: str
    reported: str
    run: Callable[[Any, int, Path], pd.DataFrame]
    optimizers: tuple[str, ...] = ("SGD", "AdamW")
    every: tuple[int, ...] = (1, 10)


def groups(make: Any, rates: tuple[float, ...] = (1.0, 0.1), **options: Any) -> Any:
    """The same optimizer with a group for each layer, at these multiples of its rate."""

    def made(model: nn.Module) -> optim.Optimizer:
        optimizer = make(**options)(model)
        lr = optimizer.param_groups[0]["lr"]
        layers = [model[0], model[2]]
        params = [
            {"params": layer.parameters(), "lr": lr * rate}
            for layer, rate in zip(layers, rates, strict=True)
        ]
        return type(optimizer)(params, **{k: v for k, v in options.items() if k != "lr"}, lr=lr)

    return made


def lambda_lr(function: Callable[[int], float]) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, function)


def cosine(length: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, length)


def warm_cosine(t: int) -> float:
    return (t + 1) / 15 if t < 15 else 0.5 * (1 + math.cos(math.pi * (t - 15) / 125))


# --- Gradients --------------------------------------------------------------------------------


def never(_step: int, _model: nn.Module, _optimizer: Any) -> None:
    """No zero_grad."""


def once_an_epoch(step: int, _model: nn.Module, optimizer: Any) -> None:
    if step % 18 == 1:
        optimizer.zero_grad()


def of_the_other(_step: int, model: nn.Module, _optimizer: Any) -> None:
    model[2].zero_grad()


def clip(value: float) -> Any:
    def act(_step: int, model: nn.Module, _optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), value)

    return act


def clip_each(_step: int, model: nn.Module, _optimizer: Any) -> None:
    for param in model.parameters():
        nn.utils.clip_grad_norm_(param, 1e-3)


def freeze(decay: float, at: int = 20) -> Any:
    """A layer frozen in mid-training, whose zeroed gradient is left."""

    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        def zero(step: int, model: nn.Module, optimizer: Any) -> None:
            if step == at:
                model[0].requires_grad_(False)
            optimizer.zero_grad(set_to_none=False)

        return train(make(weight_decay=decay, lr=0.01), every=every, steps=100, zero_grad=zero)

    return run


def momentum_of_frozen(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    def zero(step: int, model: nn.Module, optimizer: Any) -> None:
        if step == 10:
            model[0].requires_grad_(False)
        optimizer.zero_grad(set_to_none=False)

    options = {"momentum": 0.99} if make is sgd else {"weight_decay": 0.0}
    return train(make(**options), every=every, steps=60, zero_grad=zero)


class Words(nn.Module):
    """A bag of words of which few are in a batch."""

    def __init__(self, words: int = 2000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shades = (images[:, ::8] * 16).round().long() + 17 * torch.arange(8)
        return self.head(self.embedding(shades).mean(1))


def embedding_decays(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    return train(make(lr=1e-2, weight_decay=0.1), model=Words(), every=every, steps=100)


def decayed_by_hand(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    """A training loop that decays all parameters itself, also those without a gradient."""
    model = net()
    model[0].requires_grad_(False)

    def shrink(_step: int, model: nn.Module, _optimizer: Any) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.999)

    return train(make(), model=model, every=every, after=shrink)


def scaler_skips(share: int, fused: bool = True) -> Any:
    """Every so many steps a gradient that is not finite, under a scaler."""

    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        def ruin(step: int, model: nn.Module, _optimizer: Any) -> None:
            if (step // every if every > 1 else step) % share != 1 or share == 1:
                for param in model.parameters():
                    param.grad.fill_(torch.nan)

        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        return train(make(fused=fused), every=every, steps=90, before=ruin, scaler=scaler)

    return run


def frozen_in_optimizer(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    model = net()
    model[0].weight.requires_grad_(False)
    return train(make(), model=model, every=every)


def dead(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    return train(make(lr=50.0 if make is sgd else 5.0), every=every, steps=100)


def overflow(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    def ruin(step: int, model: nn.Module, _optimizer: Any) -> None:
        if step == 25:
            model[2].weight.grad[0, 0] = torch.inf

    return train(make(), every=every, before=ruin)


# --- Numbers ----------------------------------------------------------------------------------


def half(**options: Any) -> Any:
    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        return train(make(**options), model=net().half(), every=every, steps=30)

    return run


def half_of(cls: Any) -> Any:
    def run(_make: Any, every: int, _folder: Path) -> pd.DataFrame:
        return train(
            lambda m: cls(m.parameters(), eps=1e-8), model=net().half(), every=every, steps=30
        )

    return run


def brain(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    model = net(hidden=256).to(torch.bfloat16)
    return train(make(lr=1e-4), model=model, every=every, steps=100)


def transposed(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    """Fused Adam on the CPU, a parameter and a gradient of other strides, in older torch."""

    def permuted(_step: int, model: nn.Module, optimizer: Any) -> None:
        # What the implementation does, also in a torch that has mended it: it takes the gradient's
        # elements in another order. Planted after the real gradient is what the frame sees.
        for param in model.parameters():
            state = optimizer.state.get(param)
            if param.ndim == 2 and state:
                moment = state.get("exp_avg", state.get("momentum_buffer"))
                moment.copy_(moment.flatten().flip(0).reshape(moment.shape))

    options = {"momentum": 0.9} if make is sgd else {}
    return train(_inside(make(**options), permuted), every=every, steps=60)


def _inside(make: Any, act: Any) -> Any:
    """An optimizer that does something wrong within its step."""

    def made(model: nn.Module) -> optim.Optimizer:
        optimizer = make(model)
        base = type(optimizer)

        class Wrong(base):  # type: ignore[misc,valid-type]
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                act(0, model, self)
                return result

        Wrong.__name__ = base.__name__
        optimizer.__class__ = Wrong
        optimizer._patch_step_function()
        return optimizer

    return made


def other_step(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    def shrink(_step: int, model: nn.Module, _optimizer: Any) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.99)

    return train(_inside(make(), shrink), every=every)


# --- The step count ---------------------------------------------------------------------------


def count(act: Callable[[int, Any], None], cls: Any = None, steps: int = 60) -> Any:
    """What is done to state["step"] after each step."""

    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        def after(step: int, _model: nn.Module, optimizer: Any) -> None:
            for state in optimizer.state.values():
                act(step, state["step"])

        chosen = make() if cls is None else lambda m: cls(m.parameters())
        return train(chosen, every=every, steps=steps, after=after)

    return run


def stuck_at(number: float) -> Callable[[int, Any], None]:
    return lambda step, count: count.fill_(number) if step >= 5 else None


def back_to_0(step: int, count: Any) -> None:
    if step == 30:
        count.zero_()


def twice(_step: int, count: Any) -> None:
    count.add_(1)


def rounded(_step: int, count: Any) -> None:
    count.copy_(count.to(torch.bfloat16))


# --- Which parameters -------------------------------------------------------------------------


def left_out(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    return train(lambda m: make()(m[0]), every=every)


def added_late(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    """A layer that is unfrozen in mid-training, and that the optimizer does not have."""
    model = net()
    model[0].requires_grad_(False)

    def unfreeze(step: int, model: nn.Module, _optimizer: Any) -> None:
        if step == 20:
            model[0].requires_grad_(True)

    return train(lambda m: make()(m[2]), model=model, every=every, steps=100, after=unfreeze)


def overlap(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    return train(lambda m: {"all": make()(m), "head": make()(m[2])}, every=every)


def overlap_apart(make: Any, every: int, _folder: Path) -> pd.DataFrame:
    """The same, with a probe for each optimizer."""
    model = net()
    other = make()(model[2])
    with lrprobe.attach(other, model, every=every):
        return train(make(), model=model, every=every, after=lambda *_: other.step())


def never_called(make: Any, _every: int, _folder: Path) -> pd.DataFrame:
    """A wrapper whose own step does the update and does not call the optimizer's."""
    model = net()
    optimizer = make()(model)
    with lrprobe.attach(optimizer, model) as probe:
        for _ in range(5):
            nn.functional.cross_entropy(model(X), Y).backward()
    return probe.frame()


def all_skipped(make: Any, _every: int, _folder: Path) -> pd.DataFrame:
    return scaler_skips(1, fused=False)(make, 1, _folder)


# --- Schedules --------------------------------------------------------------------------------


def scheduled(schedule: Callable[[Any], Any], steps: int = 100, grouped: bool = False) -> Any:
    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        chosen = groups(make) if grouped else make()
        return train(chosen, every=every, steps=steps, schedule=schedule)

    return run


def set_rates(rate: Callable[[int, Any], None], steps: int = 60) -> Any:
    """A schedule by hand over two groups."""

    def run(make: Any, every: int, _folder: Path) -> pd.DataFrame:
        def before(step: int, _model: nn.Module, optimizer: Any) -> None:
            rate(step, optimizer.param_groups)

        return train(groups(make), every=every, steps=steps, before=before)

    return run


def one_for_all(step: int, param_groups: Any) -> None:
    for group in param_groups:
        group["lr"] = 1e-3 * (1 - step / 200)


def first_only(step: int, param_groups: Any) -> None:
    param_groups[0]["lr"] = 1e-3 / step


def second_is_0(_step: int, param_groups: Any) -> None:
    param_groups[1]["lr"] = 0.0


# --- Resumes ----------------------------------------------------------------------------------


def resumed(
    schedule: Any = None, restore: Any = None, grouped: bool = False, **options: Any
) -> Any:
    def run(make: Any, every: int, folder: Path) -> pd.DataFrame:
        chosen = groups(make) if grouped else make(**options.get("optimizer", {}))
        rest = {k: v for k, v in options.items() if k != "optimizer"}
        return resume(
            folder / "run.parquet", chosen, schedule=schedule, restore=restore, every=every, **rest
        )

    return run


def only_optimizer(optimizer: Any, _scheduler: Any, saved: dict[str, Any]) -> None:
    """The scheduler is made anew and sets the rate from the start of its schedule."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def nothing(_optimizer: Any, _scheduler: Any, _saved: dict[str, Any]) -> None:
    """Neither is restored."""


def decayed_base(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> Any:
    """The optimizer's decayed rate is taken for the base of a new schedule."""
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:
        del group["initial_lr"]
    return type(scheduler)(optimizer, **_arguments(scheduler))


def decayed_twice(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> Any:
    """The same, and the new schedule is set to where the old one was."""
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return type(scheduler)(optimizer, **_arguments(scheduler), last_epoch=59)


def _arguments(scheduler: Any) -> dict[str, Any]:
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        return {"lr_lambda": scheduler.lr_lambdas[0]}
    return {"T_max": scheduler.T_max}


def first_step_only(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> Any:
    """Making the scheduler resets the rate, which the next step of it sets right."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    return _Closed(scheduler, optimizer)


class _Closed:
    """A schedule in closed form, which does not take the rate from the group."""

    def __init__(self, scheduler: Any, optimizer: Any) -> None:
        self.scheduler, self.optimizer = scheduler, optimizer
        self.t = scheduler.last_epoch

    def step(self) -> None:
        self.t += 1
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.scheduler.lr_lambdas[0](self.t)


def another_optimizers(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> Any:
    """The scheduler holds another optimizer than the one that steps."""
    optimizer.load_state_dict(saved["optimizer"])
    stranger = optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return lr_scheduler.LambdaLR(stranger, lambda t: 1.0)


def without_state(optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> None:
    """The scheduler goes on, the optimizer's state is lost."""


def stale_decay(every_step: bool) -> Any:
    """The first step after the resume has the decay of the constructor."""

    def run(make: Any, every: int, folder: Path) -> pd.DataFrame:
        def restore(optimizer: Any, _scheduler: Any, saved: dict[str, Any]) -> None:
            optimizer.load_state_dict(saved["optimizer"])
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.3

        def scheduled_decay(step: int, _model: nn.Module, optimizer: Any) -> None:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.1 + (1e-5 * step if every_step else 0.0)

        return resume(
            folder / "run.parquet", make(weight_decay=0.1), restore=restore, every=every,
            after=scheduled_decay,
        )  # fmt: skip

    return run


LINEAR = lambda_lr(lambda t: max(0.0, 1 - t / 140))
WARM = lambda_lr(warm_cosine)
MULTISTEP = lambda_lr(lambda t: 0.7 ** (t // 10))

BUGS = [
    Bug("no zero_grad", "gradients-accumulate", "DN-DETR#19, pytorch#47175",
        lambda make, every, _: train(make(), every=every, zero_grad=never)),
    Bug("no zero_grad, small batches", "gradients-accumulate", "HSAN#6",
        lambda make, every, _: train(make(), every=every, zero_grad=never, batch=8)),
    Bug("zero_grad once an epoch", "gradients-accumulate", "pytorch#47175",
        lambda make, every, _: train(make(), every=every, zero_grad=once_an_epoch), every=(1,)),
    Bug("zero_grad of another module", "gradients-accumulate", "accelerate#2341",
        lambda make, every, _: train(make(lr=1e-3), every=every, zero_grad=of_the_other)),
    Bug("a clip value below every norm", "always-clipped", "DN-DETR#19",
        lambda make, every, _: train(make(), every=every, before=clip(1e-3))),
    Bug("each parameter clipped for itself", "always-clipped", "DN-DETR#19",
        lambda make, every, _: train(make(), every=every, before=clip_each)),
    Bug("clipped over two optimizers together", "always-clipped", "DN-DETR#19",
        lambda make, every, _: train(
            lambda m: [make()(m[0]), make()(m[2])], every=every, before=clip(1e-3))),
    Bug("a frozen layer that decays", "moves-without-gradient", "S-Prompts#2, Muon#54",
        freeze(0.5)),
    Bug("a frozen layer's momentum", "moves-without-gradient", "fairseq#4702",
        momentum_of_frozen),
    Bug("rows of an embedding decay", "moves-without-gradient", "pytorch#150610",
        embedding_decays, optimizers=("AdamW",)),
    Bug("decay by hand of what is frozen", "moves-without-gradient", "Muon#54",
        decayed_by_hand, every=(1,)),
    Bug("all steps skipped by the scaler", "skipped-steps", "pytorch#67590", scaler_skips(1)),
    Bug("two thirds of the steps skipped", "skipped-steps", "pytorch#152279", scaler_skips(3)),
    Bug("frozen and in the optimizer", "never-steps", "yolov5#1213", frozen_in_optimizer),
    Bug("a rate that kills the net", "no-gradient", "pytorch forum 1765", dead),
    Bug("an overflow", "nonfinite", "apex#240", overflow),
    Bug("float16 with eps=1e-8", "eps-underflows", "pykoi#69, chainer#6299, glide-finetune#5",
        half(), optimizers=("AdamW",)),
    Bug("float16: the step makes the NaN", "nonfinite", "keras#11860, optax#1754",
        half(), optimizers=("AdamW",)),
    *(Bug(f"float16 with eps=1e-8, {cls.__name__}", "eps-underflows", "optax#1754", half_of(cls),
          optimizers=("AdamW",), every=(1,))
      for cls in (optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad,
                  optim.Adadelta)),
    Bug("bfloat16 parameters", "lost-updates", "torchao#1124, OneTrainer#996", brain,
        optimizers=("AdamW",)),
    Bug("moments paired with other elements", "state-unexplained", "pytorch 2.13, fused Adam",
        transposed),
    Bug("a step that does more than it says", "unexplained", "pytorch#191763", other_step),
    *(Bug(f"step stuck at {number}", "step-stuck", "ao#4915", count(stuck_at(number)),
          optimizers=("AdamW",))
      for number in (1, 10, 100, 256)),
    Bug("step counted twice", "step-stuck", "slime#1547", count(twice), optimizers=("AdamW",)),
    Bug("step back to 0", "step-stuck", "Automodel#3882", count(back_to_0), optimizers=("AdamW",)),
    Bug("step rounded to bfloat16", "step-stuck", "ao#4915", count(rounded, steps=300),
        optimizers=("AdamW",)),
    *(Bug(f"step stuck in {cls.__name__}", "step-stuck", "ao#4915", count(stuck_at(10), cls),
          optimizers=("AdamW",), every=(10,))
      for cls in (optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad,
                  optim.Adadelta, optim.Rprop, optim.ASGD, optim.Adafactor)),
    Bug("a layer left out of the optimizer", "not-in-optimizer", "SiamCAR#18, mmf#104, HVPNeT#5",
        left_out),
    Bug("a layer unfrozen too late", "not-in-optimizer", "adapters#260, mace#525", added_late),
    Bug("a layer in two optimizers", "in-two-optimizers", "mmf#620", overlap),
    Bug("the same, a probe for each", "in-two-optimizers", "mmf#620", overlap_apart),
    Bug("a step that is never called", "no-steps", "accelerate: AcceleratedOptimizer",
        never_called, every=(1,)),
    Bug("an unfused scaler that skips all", "no-steps", "pytorch#67590", all_skipped, every=(1,)),
    Bug("T_max in epochs, stepped per batch", "schedule-cycles", "ivadomed#57, skorch#610",
        scheduled(cosine(15))),
    Bug("the same with two groups", "schedule-cycles", "ivadomed#57",
        scheduled(cosine(12), grouped=True)),
    Bug("StepLR(3) per batch", "schedule-ends-early", "EAGLE#107",
        scheduled(lambda o: lr_scheduler.StepLR(o, 3, 0.1))),
    Bug("ExponentialLR per batch", "schedule-ends-early", "slime#1775",
        scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.8))),
    Bug("MultiStepLR per batch", "schedule-ends-early", "AReaL#1289",
        scheduled(lambda o: lr_scheduler.MultiStepLR(o, [10, 12, 14, 16], 0.1), grouped=True)),
    Bug("PolynomialLR per batch", "schedule-ends-early", "EAGLE#107",
        scheduled(lambda o: lr_scheduler.PolynomialLR(o, 30))),
    Bug("a linear decay that ends too early", "group-rate-zero", "EAGLE#107",
        scheduled(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 40))),
    Bug("a warmup that never ends", "schedule-not-reached", "d2go#19, mmcv#633, mmdetection#7789",
        scheduled(lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 10_000))),
    Bug("the same by LambdaLR, two groups", "schedule-not-reached", "ParlAI#4384",
        scheduled(lambda_lr(lambda t: min(1.0, (t + 1) / 5000)), grouped=True)),
    Bug("the same by ConstantLR", "schedule-not-reached", "ParlAI#4384",
        scheduled(lambda o: lr_scheduler.ConstantLR(o, 0.01, 10_000))),
    Bug("a linear decay that goes on below 0", "negative-rate", "transformers#132",
        scheduled(lambda_lr(lambda t: 1 - t / 70))),
    Bug("one rate written over all groups", "group-rate-overwritten", "hi-ml#611, mae#216",
        set_rates(one_for_all)),
    Bug("one rate for a OneCycleLR of two groups", "group-rate-overwritten",
        "pytorch-cosine-annealing-with-warmup#14", set_rates(one_for_all)),
    Bug("the first group alone is scheduled", "group-off-schedule", "ignite#856",
        set_rates(first_only)),
    Bug("a group whose rate is 0", "group-rate-zero", "pytorch-lightning#11269",
        set_rates(second_is_0)),
    Bug("a resume that begins the schedule anew", "lr-jumps", "mlbench-old#50, gpt-neox#1029",
        resumed(LINEAR, only_optimizer)),
    Bug("the same in a warmup", "lr-jumps", "pytorch-gradual-warmup-lr#27",
        resumed(WARM, only_optimizer)),
    Bug("the same with two groups", "lr-jumps", "torch-points3d#630",
        resumed(LINEAR, only_optimizer, grouped=True)),
    Bug("the same with steps", "lr-jumps", "BasicSR#327", resumed(MULTISTEP, only_optimizer)),
    Bug("a resume that decays twice", "lr-jumps", "ViP#19, miles#1627, slime#1547",
        resumed(LINEAR, decayed_twice)),
    Bug("a resume with the decayed rate as base", "lr-jumps", "pytorch#60265, pytorch#156846",
        resumed(LINEAR, decayed_base)),
    Bug("the same, cosine", "lr-jumps", "pytorch#60265", resumed(cosine(140), decayed_base)),
    Bug("a rate that is reset for one step", "lr-jumps", "yolov5#292",
        resumed(LINEAR, first_step_only)),
    Bug("a scheduler of another optimizer", "schedule-stalled", "BasicSR#327",
        resumed(LINEAR, another_optimizers)),
    Bug("the same, cosine", "schedule-stalled", "BasicSR#327",
        resumed(cosine(140), another_optimizers)),
    Bug("the same, steps", "schedule-stalled", "BasicSR#327",
        resumed(MULTISTEP, another_optimizers)),
    Bug("the first decay after a resume", "decay-jumps", "Megatron-LM#7468, Automodel#3882",
        stale_decay(every_step=False)),
    Bug("the same, of a scheduled decay", "decay-jumps", "Megatron-LM#7468",
        stale_decay(every_step=True), optimizers=("AdamW",)),
    Bug("a resume without the optimizer's state", "state-lost", "fairseq#140",
        resumed(None, without_state, optimizer={}), optimizers=("AdamW",)),
    Bug("a decay that is far too strong", "decayed-away", "moco#14",
        lambda make, every, _: train(
            make(lr=0.01 if make is sgd else 1e-3, weight_decay=5.0 if make is sgd else 100.0),
            every=every, steps=100)),
    Bug("ε of another optimizer", "eps-rules", "optax#1754",
        lambda make, every, _: train(make(eps=0.1), every=every), optimizers=("AdamW",)),
    Bug("a rate that is far too small", "update-ratio", "xuance#135",
        lambda make, every, _: train(make(lr=1e-7 if make is sgd else 1e-9), every=every)),
]  # fmt: skip
"""Most of them with SGD and with AdamW, recorded at every step and at every tenth."""
