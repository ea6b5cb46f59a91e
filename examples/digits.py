"""What the other examples train: handwritten digits, and the network of Zeiler (2012) for them.

The digits are scikit-learn's, 8 × 8 pixels, or MNIST's, 28 × 28, if you have its four IDX files:
train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., plain or with .gz.
"""

import gzip
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Digits(NamedTuple):
    """Images as rows of pixels from 0 to 1, and what they show."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, epochs: int = 1, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training images in a new order every epoch; the order depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.images), generator=generator)
            for batch in order.split(size):
                yield self.images[batch], self.labels[batch]

    @torch.no_grad()
    def test_error(self, model: nn.Module) -> float:
        """Percent of the test images that the model does not recognise."""
        wrong = model(self.test_images).argmax(dim=1) != self.test_labels
        return 100 * wrong.float().mean().item()


def load(seed: int = 0, mnist: Path | None = None) -> Digits:
    """MNIST from the folder with its files; else 1,437 of scikit-learn's digits and 360 to test.

    The seed draws the 360. MNIST's test images are always the same.
    """
    if mnist is not None:
        parts = [read_idx(mnist, f"{of}-{what}") for of in ("train", "t10k") for what in IDX]
        scale = 255
    else:
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        parts = [part[of] for of in (order[360:], order[:360]) for part in (pixels, labels)]
        scale = 16
    images, labels, test_images, test_labels = parts
    pixels, test_pixels = (
        torch.tensor(x.reshape(len(x), -1) / scale, dtype=torch.float32)
        for x in (images, test_images)
    )
    return Digits(
        pixels, torch.tensor(labels).long(), test_pixels, torch.tensor(test_labels).long()
    )


IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of bytes from a file of the IDX format: a header that tells its shape, the data."""
    file = folder / name
    content = file.read_bytes() if file.exists() else gzip.decompress(
        (folder / f"{name}.gz").read_bytes()
    )  # fmt: skip
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def zeiler_net(
    seed: int = 0, pixels: int = 64, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """500 and 300 hidden units and an output for each of the digits; the seed draws the weights."""
    torch.manual_seed(seed)
    layers = OrderedDict(hidden1=nn.Linear(pixels, 500), activation1=activation())
    layers.update(hidden2=nn.Linear(500, 300), activation2=activation())
    layers.update(output=nn.Linear(300, 10))
    return nn.Sequential(layers)
