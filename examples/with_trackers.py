"""Trackers: Weights & Biases, MLflow, JSON Lines and your own function, all at once.

WANDB_MODE=offline MLFLOW_TRACKING_URI=sqlite:///mlflow.db python examples/with_trackers.py, after
pip install 'lrprobe[wandb,mlflow]' scikit-learn
"""

import mlflow
import wandb
from digits import load, zeiler_net
from torch import nn
from torch.optim import AdamW

import lrprobe
from lrprobe import sinks

digits, model = load(), zeiler_net()
optimizer = AdamW(model.parameters(), lr=1e-3)
lines = sinks.JSONL("run.jsonl")
steps = []
with wandb.init(project="lrprobe") as run, mlflow.start_run():
    to = [
        sinks.WandB(run, tag_style="composer"),
        sinks.MLflow(tag_style="olmo"),
        lines,
        sinks.Function(lambda record: steps.append(record.step)),
    ]
    with lrprobe.attach(optimizer, model, to=to, every=20):
        for images, labels in digits.batches(20, epochs=1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()})
lines.close()
print("recorded steps:", steps)
