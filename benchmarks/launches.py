"""Counts the launches of a recorded step on a simulated device.

It runs the real code path, including the pre-hook, with the real shapes, but counts launches
instead of executing them: each torch operation on the device except views, each copy to or from it,
and each generated kernel. The last line has the counts of GPT-2 (124 million) with AdamW and
Adadelta, then those of the model with 1.3 billion parameters. For AdamW, it is the larger count of
the default and ``fused=True``, which keeps its step counts on the device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import far_device

Shapes = list[tuple[int, ...]]


def gpt(layers: int, width: int, context: int) -> Shapes:
    """Parameter shapes of a GPT, as in Hugging Face's implementation."""
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
    """Print the launches of all models and optimizers."""
    far_device.begin()
    counts = []
    for model, shapes in MODELS.items():
        for name, makers in OPTIMIZERS.items():
            found = [far_device.record(make, shapes, small=True)[0] for make in makers]
            for launches in found:
                common = ", ".join(f"{count} {op}" for op, count in launches.most_common(8))
                print(f"{model}, {len(shapes)} tensors, {name}: {launches.total()} ({common})")
            counts.append(max(launches.total() for launches in found))
    print("launches:", *counts)


if __name__ == "__main__":
    main()
