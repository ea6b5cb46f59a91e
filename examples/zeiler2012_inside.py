"""What zeiler2012.py trains, and what a probe sees in it."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from digits import load, zeiler_net
from torch import Tensor, nn
from torch.optim import Optimizer

import lrprobe


class Run:
    """A network, its optimizer and its digits, all drawn from one seed."""

    def __init__(
        self,
        make: Callable[..., Optimizer],
        seed: int,
        mnist: Path | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        """Draw them; the batches are the paper's on MNIST, smaller on the fewer digits."""
        self.data, self.seed, self.batch = load(seed, mnist), seed, 100 if mnist else 20
        self.model = zeiler_net(seed, self.data.images.shape[1], activation)
        self.optimizer = make(self.model.parameters())

    def step(self, images: Tensor, labels: Tensor, factor: float = 1.0) -> None:
        """Take a step with the gradient of a batch, times a factor."""
        self.optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(self.model(images), labels)).backward()
        self.optimizer.step()

    def epoch(self, number: int) -> float:
        """Train for an epoch; the error on the test images, in percent."""
        for images, labels in self.data.batches(self.batch, seed=1000 * self.seed + number):
            self.step(images, labels)
        return self.data.test_error(self.model)


def look_inside(run: Run, epochs: int, dataset: Path) -> tuple[list[float], pd.DataFrame]:
    """Train with a probe on the weight matrices; the errors, and a row of figures for each."""
    with lrprobe.attach(
        run.optimizer, run.model, to=dataset, every=10, include="weight", track=10
    ) as probe:
        errors = [run.epoch(number) for number in range(epochs)]
    frame, rates = probe.frame(), lrprobe.effective_lr(run.optimizer, run.model)
    length = frame["step"].max() / epochs
    first = frame[frame["step"] <= length].groupby("parameter").median(True)
    last = frame[frame["step"] > length * (epochs - 1)].groupby("parameter").median(True)
    eps, rows = run.optimizer.param_groups[0]["eps"], {}
    for name in frame["parameter"].unique():
        state, rate = run.optimizer.state[run.model.get_parameter(name)], rates[name]
        rows[name.removesuffix(".weight")] = {
            "rate, first epoch": first["effective_lr_p50"][name],
            "rate, last epoch": last["effective_lr_p50"][name],
            "elements between 1/2 and 2 at the end": share((rate > 0.5) & (rate < 2)),
            "E[g²] ≤ ε, first epoch": first["eps_fraction"][name],
            "E[g²] ≤ ε at the end": share(state["square_avg"] <= eps),
            "E[Δx²] ≤ ε at the end": share(state["acc_delta"] <= eps),
            "norm of the update, first epoch": first["update_norm"][name],
            "norm of the update, last epoch": last["update_norm"][name],
        }
    return errors, pd.DataFrame(rows).T


def statements(tables: list[pd.DataFrame]) -> pd.Series:
    """What the paper says of Fig. 2, and in how many of the runs it is so."""
    found = []
    for table in tables:
        first, last = table["rate, first epoch"], table["rate, last epoch"]
        shrunk = table["norm of the update, last epoch"] / table["norm of the update, first epoch"]
        found.append({
            "first epoch: a larger rate in hidden1 than in output": first.hidden1 > first.output,
            "first epoch: a larger rate in hidden2 than in output": first.hidden2 > first.output,
            "first epoch: a larger rate in hidden1 than in hidden2": first.hidden1 > first.hidden2,
            "last epoch: in each layer, a rate within 5 % of 1": (last - 1).abs().max() < 0.05,
            "last epoch: in each layer, updates below 1/10 of the first's": shrunk.max() < 0.1,
        })  # fmt: skip
    return pd.DataFrame(found).sum().map(f"{{}} of {len(tables)}".format)


def sudden_gradient(run: Run, at: int, factor: float) -> pd.DataFrame:
    """The median rates near a step with a multiplied gradient, relative to the step before it."""
    now = range(at - 10, at + 51)
    with lrprobe.attach(
        run.optimizer, run.model, every=now.__contains__, include="weight"
    ) as probe:
        for number, batch in enumerate(run.data.batches(run.batch, epochs=99, seed=run.seed), 1):
            run.step(*batch, factor if number == at else 1)
            if number == now[-1]:
                break
    rate = probe.frame().pivot_table("effective_lr_p50", "step", "parameter", sort=False)
    return (rate / rate.loc[at - 1]).rename(index=lambda step: step - at)


def share(which: Tensor) -> float:
    """The share of elements that are true."""
    return which.float().mean().item()
