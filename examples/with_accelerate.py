"""Accelerate: pass a prepared optimizer to attach directly, and use its trackers as sinks.

python examples/with_accelerate.py, after pip install 'lrprobe[accelerate]' scikit-learn
"""

import torch
from accelerate import Accelerator
from digits import load, zeiler_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lrprobe
from lrprobe.integrations.accelerate import trackers

accelerator = Accelerator(
    cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir="runs"
)
accelerator.init_trackers("accelerate")
digits, model = load(), zeiler_net()
model, optimizer, batches = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    DataLoader(TensorDataset(digits.images, digits.labels), batch_size=10),
)
with lrprobe.attach(optimizer, model, to=trackers(accelerator)) as probe:  # the one line
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
accelerator.end_training()

frame = probe.frame(by="model")
columns = ["step", "lr", "effective_lr_p50", "effective_lr_applied", "update_ratio"]
print(frame[columns].to_string(index=False, float_format="{:.3g}".format))
print("TensorBoard: runs/accelerate")
