"""Several parameter groups with different rates: what does each of them get?

`param_groups[0]["lr"]` describes the first one only. Here the weights decay and the biases do not,
and the last layer learns ten times faster.

python examples/groups.py
"""

from digits import load, zeiler_net
from torch import nn
from torch.optim import AdamW

import lrprobe

digits, model = load(), zeiler_net()
body = [model.hidden1, model.hidden2]
optimizer = AdamW(
    [
        {"params": [layer.weight for layer in body], "weight_decay": 0.01},
        {"params": [layer.bias for layer in body], "weight_decay": 0.0},
        {"params": model.output.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ],
    lr=1e-3,
)
with lrprobe.attach(optimizer, model, every=100) as probe:
    for images, labels in digits.batches(20, epochs=5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

frame = probe.frame(by="group")
print(frame[["step", "group", "numel", "lr", "decay", "effective_lr_p50", "update_ratio"]]
      .to_string(index=False, float_format="{:.3g}".format))  # fmt: skip
