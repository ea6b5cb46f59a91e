"""Fine-tuning with a rate for each layer: do the lower layers really move less?

A network that knows the digits 0 to 4 learns 5 to 9. Each layer's lr is a fifth of that of the
layer above it. Adam divides by the size of the gradients, so the effective rates may be in a
different order; the update ratio shows how far a layer moves.

python examples/fine_tuning.py
"""

from digits import Digits, load, zeiler_net
from torch import nn
from torch.optim import AdamW, Optimizer

import lrprobe

LR, DECAY = 1e-3, 0.2
digits, model = load(), zeiler_net()
small = digits.labels < 5
first = digits._replace(images=digits.images[small], labels=digits.labels[small])
second = digits._replace(images=digits.images[~small], labels=digits.labels[~small])


def train(data: Digits, optimizer: Optimizer) -> None:
    """Five epochs."""
    for images, labels in data.batches(20, epochs=5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


train(first, AdamW(model.parameters(), lr=LR))

layers = [model.output, model.hidden2, model.hidden1]
optimizer = AdamW(
    [{"params": layer.parameters(), "lr": LR * DECAY**depth} for depth, layer in enumerate(layers)]
)
with lrprobe.attach(optimizer, model, every=50) as probe:
    train(second, optimizer)

frame = probe.frame(by="module")
columns = ["step", "module", "lr", "effective_lr_p50", "effective_lr_applied", "update_ratio"]
print(frame[columns].to_string(index=False, float_format="{:.3g}".format))
