"""The demo: three optimizers on the same network, and the effective rate of each layer.

Needs ``pip install 'lrprobe[demo]'``. ``examples/demo.py`` and ``lrprobe demo`` run it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, random_split

BATCH_SIZE = 100
EPOCHS = 50


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Labelled images of 8 × 8 pixels: 1,438 for training, in batches, and 359 for testing."""
    _check_installed()
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
    return batches, DataLoader(test, len(test))


def zeiler_net() -> nn.Sequential:
    """The network of Zeiler (2012) with rectified linear units: the same weights every time."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers.update(hidden1=nn.Linear(64, 500), relu1=nn.ReLU())
    layers.update(hidden2=nn.Linear(500, 300), relu2=nn.ReLU(), output=nn.Linear(300, 10))
    return nn.Sequential(layers)


def train(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, bar: Any) -> float:
    """Train as usual, without any code for the probe; return the accuracy on the test images."""
    batches, test = digits()
    while bar.n < bar.total:
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    images, labels = next(iter(test))
    return float((model(images).argmax(dim=1) == labels).float().mean())


def main(epochs: int = EPOCHS, out: Path | None = None) -> None:
    """Train the three networks; write what their probes recorded, a picture and a report.

    Args:
        epochs: number of passes over the images.
        out: the output folder; by default a new one in ``runs``.

    Raises:
        ImportError: scikit-learn, Matplotlib, Plotly or tqdm is not installed.
    """
    _check_installed()
    from tqdm import tqdm  # type: ignore[import-untyped]

    import lrprobe.plot
    from lrprobe import report

    out = out or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    steps = epochs * len(digits()[0])
    logdir, datasets = out / "tensorboard", []
    for name in ("adadelta", "adam", "sgd"):
        model = zeiler_net()
        optimizer: Optimizer
        scheduler = None
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
    page = out / "report.html"
    report.write(page, *datasets)

    print(f"TensorBoard logdir: {logdir}  (tensorboard --logdir ...; the tab LRPROBE)")
    print("Parquet datasets:  ", *datasets)
    print(f"Picture:            {picture}")
    print(f"Report:             {page}")


def _check_installed() -> None:
    """Raise an error that names missing packages, before the training starts."""
    missing = []
    for module, package in (
        ("sklearn", "scikit-learn"),
        ("matplotlib", "Matplotlib"),
        ("plotly", "Plotly"),
        ("tqdm", "tqdm"),
    ):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'lrprobe[demo]'")
