"""Sharded parameters, one record: torchrun --nproc-per-node 2 examples/fsdp2.py [FOLDER].

FSDP2 shards the parameters and Adam's state, so no process has a whole parameter. lrprobe needs
only the import and the line with `attach`, the same on every rank; rank 0 writes.
"""

import sys
from pathlib import Path

import pandas as pd
import torch.distributed as dist
from digits import load, zeiler_net
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

import lrprobe

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
dist.init_process_group("gloo")  # on a CPU; "nccl" on GPUs, and nothing else changes
rank, ranks = dist.get_rank(), dist.get_world_size()

digits, model = load(), zeiler_net()
for layer in (model.hidden1, model.hidden2):
    fully_shard(layer)
fully_shard(model)
optimizer = AdamW(model.parameters(), lr=1e-3)

batch = 40
with lrprobe.attach(optimizer, model, to=folder / "fsdp2.parquet", batch_size=batch // ranks):
    for images, labels in digits.batches(batch, epochs=2):
        optimizer.zero_grad()
        mine = slice(rank, None, ranks)  # each rank has samples of its own
        nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()

held = sum(p.to_local().numel() for p in model.parameters())
print(f"rank {rank} of {ranks} held {held:,} of {sum(p.numel() for p in model.parameters()):,}")
dist.barrier()
if rank == 0:
    frame = pd.read_parquet(folder / "fsdp2.parquet")
    last = frame[frame["step"] == frame["step"].max()].set_index("parameter")
    columns = ["numel", "samples", "effective_lr_p50", "update_ratio", "reconstruction_error"]
    print(f"\nAdamW at step {frame['step'].max()}, each parameter as a whole:")
    print(last[columns].to_string(float_format="{:.3g}".format))
dist.destroy_process_group()
