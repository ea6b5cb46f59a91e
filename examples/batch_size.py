"""Does a larger batch, or accumulation, change the learning rate?

It does not change lr, which stays 0.1. But lr is spread over more samples, so each counts for less.
The mean gradient, and with it the update, shrinks only because its noise averages out. A batch
accumulated from four micro-batches, with each loss divided by four, is the same batch.

python examples/batch_size.py
"""

import pandas as pd
from digits import load, zeiler_net
from torch import nn
from torch.optim import SGD

import lrprobe

digits = load()
rows = []
for batch, pieces in ((20, 1), (80, 1), (80, 4), (320, 1)):
    model = zeiler_net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1, batch_size=batch // pieces) as probe:
        for images, labels in list(digits.batches(batch))[:4]:
            optimizer.zero_grad()
            for part in range(pieces):  # every fourth image, where there are four
                loss = nn.functional.cross_entropy(
                    model(images[part::pieces]), labels[part::pieces]
                )
                (loss / pieces).backward()
            optimizer.step()
    frame = probe.frame(by="model")
    figures = frame[["samples", "lr", "lr_per_sample", "grad_norm", "update_norm"]].mean()
    rows.append({"batch": batch, "in pieces": pieces, **figures})
print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))
