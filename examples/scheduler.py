"""Which rate did the step use: the one before scheduler.step(), or the one after it?

A probe records the rate that the step used. At the end of the loop body, `scheduler.get_last_lr()`
returns the rate of the next step.

python examples/scheduler.py
"""

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import lrprobe

torch.manual_seed(0)
model = nn.Linear(10, 1)
optimizer = AdamW(model.parameters(), lr=1e-2)
warmup = LinearLR(optimizer, start_factor=0.1, total_iters=10)
decay = CosineAnnealingLR(optimizer, T_max=40)
scheduler = SequentialLR(optimizer, [warmup, decay], milestones=[10])

said = {}
with lrprobe.attach(optimizer, model, every=5) as probe:
    for step in range(1, 51):
        x = torch.randn(32, 10)
        optimizer.zero_grad()
        (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        (said[step],) = scheduler.get_last_lr()

frame = probe.frame(by="model").set_index("step")
table = frame[["lr", "effective_lr_p50", "update_ratio"]].assign(get_last_lr=said)
print(table.to_string(float_format="{:.4f}".format))
