"""The learning rate that each layer really gets, under three optimizers.

Trains the network of Zeiler (2012), 500-300-10, on scikit-learn's digits with Adadelta, with Adam,
and with SGD and momentum under a scheduler. Leaves a TensorBoard logdir, a Parquet dataset of each
run, and a picture: python examples/demo.py [--epochs 50] [--out FOLDER]
"""

import argparse
import time
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

import lrprobe
import lrprobe.plot

BATCH_SIZE = 100


def digits() -> tuple[DataLoader, DataLoader]:
    """Images of 8 × 8 pixels with their labels: 1,438 to train on, in batches, and 359 to test."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
    return batches, DataLoader(test, len(test))


def zeiler_net() -> nn.Sequential:
    """The network of Zeiler (2012) with rectified linear units: the same weights every time."""
    torch.manual_seed(0)
    layers = OrderedDict(hidden1=nn.Linear(64, 500), relu1=nn.ReLU())
    layers.update(hidden2=nn.Linear(500, 300), relu2=nn.ReLU(), output=nn.Linear(300, 10))
    return nn.Sequential(layers)


def train(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, bar: tqdm
) -> float:
    """Train as ever, without a word about the probe; give back the accuracy on the test images."""
    batches, test = digits()
    while bar.n < bar.total:
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    images, labels = next(iter(test))
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main(epochs: int, out: Path) -> None:
    """Train the three, then read back what their probes left and draw it."""
    steps = epochs * len(digits()[0])
    logdir, datasets = out / "tensorboard", []
    for name in ("adadelta", "adam", "sgd"):
        model, scheduler = zeiler_net(), None
        if name == "adadelta":
            optimizer = Adadelta(model.parameters(), rho=0.95, eps=1e-6)
        elif name == "adam":
            optimizer = Adam(model.parameters())
        else:
            optimizer = SGD(model.parameters(), momentum=0.9)
            scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        datasets.append(out / f"{name}.parquet")
        to = [logdir / name, datasets[-1]]
        with lrprobe.attach(optimizer, model, to=to), tqdm(total=steps, desc=name) as bar:
            accuracy = train(model, optimizer, scheduler, bar)
        print(f"{name}: {accuracy:.1%} of the test images are recognised")

    axes = lrprobe.plot.rate(lrprobe.read(*datasets, by="module"))
    picture = out / "effective_lr.png"
    axes[0].figure.savefig(picture, dpi=120)

    print(f"TensorBoard logdir: {logdir}")
    print("Parquet datasets:  ", *datasets)
    print(f"Picture:            {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument(
        "--out", type=Path, default=Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    )
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.out)
