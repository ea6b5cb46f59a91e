"""Measure, on the demo's network, what common answers print and what is correct.

    python docs/measure_answers.py > docs/answers_table.md

Each function below is one answer. The first line of its docstring says what the answer does, and
the second paragraph what is wrong with it. It returns what the answer prints and what is correct.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam
from torch.optim.lr_scheduler import OneCycleLR

import lrprobe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from demo import digits, zeiler_net

STEP = 100  # a step in the middle of training
EPS, RHO = 1e-6, 0.95


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The demo's first batches, over as many epochs as that takes."""
    return islice(chain.from_iterable(repeat(digits()[0])), count)


def gradients(model: nn.Module, steps: int) -> Iterator[int]:
    """The number of each step, from 1, when the gradients of its batch are there."""
    for step, (images, labels) in enumerate(batches(steps), start=1):
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        yield step


def norm(tensors: list[Tensor]) -> float:
    """Euclidean norm of all of them together."""
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def row(values: Iterable[float]) -> str:
    """Several numbers in one cell."""
    return " · ".join(f"{value:.3g}" for value in values)


def gradient_norm() -> tuple[str, str]:
    """The norm of `p.grad`, printed as the norm of the update.

    Adadelta multiplies each gradient by a rate of its own. (The code as usually posted fails:
    it calls `zero_grad()` first, which sets the gradients to `None`.)
    """
    model = zeiler_net()
    optimizer = Adadelta(model.parameters(), rho=RHO, eps=EPS)
    with lrprobe.attach(optimizer, model, every=STEP) as probe:
        for _ in gradients(model, STEP):
            optimizer.step()
    printed = norm([p.grad for p in model.parameters() if p.grad is not None])
    right = probe.frame(by="model")["update_norm"].iloc[-1]
    return f"{printed:.3g}", f"`update_norm`: {right:.3g} (step {STEP}, whole model)"


def lr_after_scheduler() -> tuple[str, str]:
    """`group["lr"]`, read after `scheduler.step()` as the rate just used.

    It is the rate of the next step.
    """
    model, steps = zeiler_net(), 140
    optimizer = SGD(model.parameters(), momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    printed = []
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for step in gradients(model, steps):
            optimizer.step()
            if step < steps:
                scheduler.step()
            printed.append(optimizer.param_groups[0]["lr"])
    used = probe.frame(by="model")["lr"].tolist()
    off = [max(p / u, u / p) for p, u in zip(printed, used, strict=True)]
    worst = max(range(steps), key=off.__getitem__)
    return (
        f"{printed[worst]:.3g}",
        f"`lr`: {used[worst]:.3g} (SGD under one cycle of {steps} steps, step {worst + 1})",
    )


def stale_moments() -> tuple[str, str]:
    """Adam's update, computed from the moments before the step, without bias correction.

    In the first step, both moments are 0, and so is the result. Later it is too large, as long as
    √(1−β₂ᵗ) is small.
    """
    model = zeiler_net()
    optimizer = Adam(model.parameters())
    printed = {}
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for step in gradients(model, STEP):
            updates = [
                1e-3 * s["exp_avg"] / (s["exp_avg_sq"].sqrt() + 1e-8)
                for s in optimizer.state.values()
            ]
            printed[step] = norm(updates) if updates else 0.0
            optimizer.step()
    right = probe.frame(by="model").set_index("step")["update_norm"]
    shown = (1, 10, STEP)
    steps = ", ".join(map(str, shown))
    return (
        row(printed[s] for s in shown),
        f"`update_norm`: {row(right[s] for s in shown)} (steps {steps}; whole model)",
    )


def mean_square_for_rms() -> tuple[str, str]:
    """The mean of E[g²], printed with four decimals as the RMS of the gradient.

    The root is missing. (The code as usually posted fails: `torch.cat` rejects the means,
    which are 0-dim.)
    """
    model = zeiler_net()
    optimizer = Adadelta(model.parameters(), rho=RHO, eps=EPS)
    with lrprobe.attach(optimizer, model, every=STEP) as probe:
        for _ in gradients(model, STEP):
            optimizer.step()
    means = torch.stack([s["square_avg"].mean() for s in optimizer.state.values()])
    right = probe.frame(by="model")["rms_grad_mean"].iloc[-1]
    return (
        f"{means.mean():.4f}, which is {means.mean():.2g}",
        f"`rms_grad_mean`: {right:.2g} (step {STEP}, whole model)",
    )


def rho_attribute() -> tuple[str, str]:
    """`optimizer.rho` and `optimizer.eps`.

    These attributes do not exist. Hyperparameters belong to the groups, which may differ.
    """
    optimizer = Adadelta(zeiler_net().parameters(), rho=RHO, eps=EPS)
    try:
        printed = str(optimizer.rho)
    except AttributeError as error:
        printed = f"`AttributeError: {error}`"
    return printed, f'`group["rho"]`: {optimizer.param_groups[0]["rho"]}'


def undivided_accumulation() -> tuple[str, str]:
    """For a loop that accumulates gradients undivided: "bigger batches make smaller updates".

    Undivided, the update grows with the batch. Divided, it shrinks a little, as noise averages out;
    the rate is the same, but the rate per sample is not.
    """
    piece = 20
    printed, right, per_sample = [], [], []
    for pieces in (1, 2, 5):
        for divisor, norms in ((1, printed), (pieces, right)):
            model = zeiler_net()
            optimizer = SGD(model.parameters(), lr=0.1)
            with lrprobe.attach(optimizer, model, batch_size=piece) as probe:
                images, labels = next(batches(1))
                for i in range(pieces):
                    part = slice(i * piece, (i + 1) * piece)
                    loss = nn.functional.cross_entropy(model(images[part]), labels[part])
                    (loss / divisor).backward()
                optimizer.step()
            figures = probe.frame(by="model").iloc[0]
            norms.append(figures["update_norm"])
        per_sample.append(figures["lr_per_sample"])
    how = "first step of SGD with `lr` 0.1; batches of 20, 40, 100 in pieces of 20"
    return (
        f"updates of {row(printed)}",
        f"`update_norm`: {row(right)}; `lr_per_sample`: {row(per_sample)} ({how})",
    )


def state_after_step() -> tuple[str, str]:
    """Adadelta's rate, computed from its state after the step.

    The numerator is then already that of the next step.
    """
    model = zeiler_net()
    optimizer = Adadelta(model.parameters(), rho=RHO, eps=EPS)
    printed, right = [], []
    for step in gradients(model, STEP):
        if step not in {1, STEP}:
            optimizer.step()
            continue
        with lrprobe.inspect_step(optimizer, model) as inspected:
            optimizer.step()
        rates = [
            ((s["acc_delta"] + EPS) / (s["square_avg"] + EPS)).sqrt().flatten()
            for s in (optimizer.state[p] for p in model.parameters())
        ]
        after = torch.cat(rates)
        used = torch.cat([view.effective_lr.flatten() for view in inspected.values()])
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        largest = int(grad.abs().argmax())
        printed.append(after[largest].item())
        right.append(used[largest].item())
    where = f"steps 1 and {STEP}, the element with the largest gradient"
    return row(printed), f"`effective_lr`: {row(right)} ({where})"


def group_lr_of_adam() -> tuple[str, str]:
    """`group["lr"]`, printed as the effective rate of Adam.

    Adam divides it by √v̂+ε.
    """
    model = zeiler_net()
    optimizer = Adam(model.parameters())
    with lrprobe.attach(optimizer, model, every=STEP) as probe:
        for _ in gradients(model, STEP):
            optimizer.step()
    last = probe.frame(by="model").iloc[-1]
    low, median, high = (last[f"effective_lr_{q}"] for q in ("p05", "p50", "p95"))
    band = f"from {low:.3g} at p05 to {high:.3g} at p95; step {STEP}, whole model"
    return f"{optimizer.param_groups[0]['lr']:.3g}", f"`effective_lr_p50`: {median:.3g} ({band})"


ANSWERS: tuple[Callable[[], tuple[str, str]], ...] = (
    group_lr_of_adam,
    lr_after_scheduler,
    gradient_norm,
    stale_moments,
    state_after_step,
    mean_square_for_rms,
    rho_attribute,
    undivided_accumulation,
)


def main() -> None:
    """Print the table."""
    print("| the answer | it prints | correct | why |")
    print("|---|---|---|---|")
    for answer in ANSWERS:
        what, why = (" ".join(part.split()) for part in (answer.__doc__ or "").split("\n\n"))
        print("|", " | ".join([what, *answer(), why]), "|")


if __name__ == "__main__":
    main()
