"""Ignite: attach to an engine; records are written when its run ends.

python examples/with_ignite.py, after pip install 'lrprobe[ignite]' scikit-learn
"""

import torch
from digits import load, zeiler_net
from ignite.engine import create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lrprobe.integrations.ignite import attach

digits, model = load(), zeiler_net()
optimizer = torch.optim.Adadelta(model.parameters())
engine = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
probe = attach(engine, optimizer, model, to="runs/ignite", every=36)  # the one line
engine.run(
    DataLoader(TensorDataset(digits.images, digits.labels), batch_size=20, shuffle=True),
    max_epochs=3,
)
probe.close()

frame = probe.frame(by="model")
columns = ["step", "lr", "effective_lr_p50", "effective_lr_applied", "update_ratio"]
print(frame[columns].to_string(index=False, float_format="{:.3g}".format))
print("TensorBoard: runs/ignite")
