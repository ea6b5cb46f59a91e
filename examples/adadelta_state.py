"""Adadelta has no rate to set: what rate does it use, and which of its two averages decides?

Its rate is RMS[Δx] / RMS[g], computed per element at each step. This prints all three over time,
for each layer, and the fraction of elements where ε outweighs the gradients.

python examples/adadelta_state.py
"""

from digits import load, zeiler_net
from torch import nn
from torch.optim import Adadelta

import lrprobe

digits, model = load(), zeiler_net()
optimizer = Adadelta(model.parameters(), rho=0.95, eps=1e-6)
with lrprobe.attach(optimizer, model, every=100, include="weight") as probe:
    for images, labels in digits.batches(20, epochs=10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

frame = probe.frame()
columns = {
    "effective_lr_p50": "rate",
    "rms_update_mean": "RMS[Δx]",  # both without ε; the numerator is that of the step before
    "rms_grad_mean": "RMS[g]",
    "eps_fraction": "ε decides",
}
table = frame.pivot_table(list(columns), "step", "parameter", sort=False)[list(columns)]
for name, column in columns.items():
    print(f"\n{column}\n{table[name].to_string(float_format='{:.2e}'.format)}")
