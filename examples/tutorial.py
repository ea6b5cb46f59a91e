"""A run that goes wrong: from the finding to its cause to the fix. docs/tutorial.md explains it.

Trains the network of Zeiler (2012) on scikit-learn's digits three times and draws two pictures:
python examples/tutorial.py [--out FOLDER]
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd
from digits import load, zeiler_net
from matplotlib import pyplot as plt
from torch import nn
from torch.optim import Adam

import lrprobe

EPOCHS, BATCH_SIZE = 6, 20
WEIGHTS = r"weight$"
COLUMNS = ["parameter", "lr", "effective_lr_p50", "rms_grad_mean", "eps_fraction", "update_ratio"]


def train(to: Path, **options: float) -> list[float]:
    """Train with Adam and these options, and record to a dataset; the test error of each epoch."""
    data, model = load(), zeiler_net()
    optimizer = Adam(model.parameters(), **options)
    errors = []
    with lrprobe.attach(optimizer, model, to=to):
        for epoch in range(EPOCHS):
            for images, labels in data.batches(BATCH_SIZE, seed=epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            errors.append(data.test_error(model))
    return errors


def last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """What the weights got in the last recorded step."""
    rows = frame["parameter"].str.contains(WEIGHTS) & (frame["step"] == frame["step"].max())
    return frame.loc[rows, COLUMNS]


def draw_errors(errors: dict[str, list[float]], path: Path) -> None:
    """The test error of each run, by epoch."""
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for (label, values), marker in zip(errors.items(), itertools.cycle("os^")):
        ax.plot(range(1, EPOCHS + 1), values, marker=marker, label=label)
    ax.set(xlabel="epoch", ylabel="test error in percent", ylim=(0, None))
    ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_rates(frame: pd.DataFrame, path: Path) -> None:
    """The effective rate of each weight matrix: the median in a band from p05 to p95."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    lrprobe.plot.rate(frame, WEIGHTS, axes=axes)
    figure.savefig(path, dpi=100)


def main(out: Path) -> None:
    """Print what went wrong and why, then the runs after the fix."""
    errors, datasets = {}, []
    for name, options in {
        "eps_0.1": {"eps": 0.1},
        "eps_0.1_lr_0.01": {"eps": 0.1, "lr": 0.01},
        "eps_1e-8": {"eps": 1e-8},
    }.items():
        datasets.append(out / f"{name}.parquet")
        errors[name] = train(datasets[-1], **options)
        frame = lrprobe.read(datasets[-1])
        print(f"\n=== {name}: test error", ", ".join(f"{e:.1f} %" for e in errors[name]), "\n")
        print(lrprobe.diagnose(frame), "\n")
        print(last_step(frame).to_string(index=False, float_format="{:.2g}".format))
    draw_errors(errors, out / "tutorial_error.png")
    draw_rates(lrprobe.read(datasets[0], datasets[2]), out / "tutorial_rates.png")
    print("\nPictures in", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs", "tutorial"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    main(arguments.out)
