"""Counts what a recorded step launches, on a device that is not there.

The real code path, pre-hook included, with the real shapes; only what it launches is counted
instead of done: each operation of torch on the device that is no view, each copy to or from it, and
each generated program. The last line has GPT-2 (124 million) under AdamW and Adadelta, then the
model of 1.3 billion under both; of AdamW the larger of the default and ``fused=True``, which counts
its steps on the device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import far_device

Shapes = list[tuple[int, ...]]


def gpt(layers: int, width: int, context: int) -> Shapes:
    """Parameters of a GPT, as Hugging Face's has them."""
    norm: Shapes = [(width,), (width,)]
    block = [
        *norm,
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *norm,
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    return [(50257, width), (context, width), *(layers * block), *norm]


MODELS = {
    "GPT-2, 124 million": gpt(12, 768, 1024),
    "GPT, 1.3 billion": gpt(24, 2048, 2048),
}
OPTIMIZERS = {
    "AdamW": [torch.optim.AdamW, lambda p: torch.optim.AdamW(p, fused=True)],
    "Adadelta": [torch.optim.Adadelta],
}


def main() -> None:
    """All of them."""
    far_device.begin()
    counts = []
    for model, shapes in MODELS.items():
        for name, makers in OPTIMIZERS.items():
            found = [far_device.record(make, shapes, small=True)[0] for make in makers]
            for launches in found:
                most = ", ".join(f"{count} {op}" for op, count in launches.most_common(8))
                print(f"{model}, {len(shapes)} tensors, {name}: {launches.total()} ({most})")
            counts.append(max(launches.total() for launches in found))
    print("launches:", *counts)


if __name__ == "__main__":
    main()
