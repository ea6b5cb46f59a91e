"""Transformers: one more line in the Trainer, for a tiny Llama with random weights.

python examples/with_transformers.py, after pip install 'lrprobe[transformers]'
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lrprobe.integrations.transformers import LRProbeCallback

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
# Sequences that count upwards: something that can be learnt.
starts = torch.randint(0, 100, (512, 1))
tokens = [{"input_ids": row, "labels": row} for row in starts + torch.arange(16)]

probe = LRProbeCallback()
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/transformers",
        use_cpu=True,
        learning_rate=3e-3,
        warmup_steps=10,
        num_train_epochs=2,
        logging_steps=20,
        save_strategy="no",
        report_to=["tensorboard"],
        disable_tqdm=True,
    ),
    train_dataset=tokens,
    callbacks=[probe],  # the one line
)
trainer.train()

frame = probe.probe.frame(by="model")
columns = ["step", "lr", "effective_lr_p50", "effective_lr_applied", "update_ratio"]
print(frame[columns].to_string(index=False, float_format="{:.3g}".format))
print("TensorBoard: runs/transformers/runs")
