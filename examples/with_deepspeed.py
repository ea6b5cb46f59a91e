"""DeepSpeed's ZeRO: torchrun --nproc-per-node 2 examples/with_deepspeed.py [STAGE].

The processes share the optimizer's state (stage 1), the gradients too (2), and the parameters too
(3, the default). Only the import and the line with `attach` are for lrprobe; they are the same on
every rank and for every stage. Rank 0 writes.

pip install lrprobe; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
"""

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # on GPUs, remove this line and use "nccl" below

import deepspeed
import pandas as pd
import torch.distributed as dist
from digits import load, zeiler_net
from torch import nn
from torch.optim import AdamW

import lrprobe

stage = int(sys.argv[1]) if len(sys.argv) > 1 else 3
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for CPUs
deepspeed.init_distributed("gloo", verbose=False)
rank, ranks = dist.get_rank(), dist.get_world_size()

digits, model = load(), zeiler_net()
batch = 40
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=AdamW(model.parameters(), lr=1e-3),
    config={
        "train_micro_batch_size_per_gpu": batch // ranks,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000,
    },
)

with lrprobe.attach(engine, model, to="runs/deepspeed.parquet", batch_size=batch // ranks) as probe:
    for images, labels in digits.batches(batch, epochs=2):
        mine = slice(rank, None, ranks)  # each rank has its own samples
        engine.backward(nn.functional.cross_entropy(engine(images[mine]), labels[mine]))
        engine.step()

if rank == 0:
    frame = pd.read_parquet("runs/deepspeed.parquet")
    last = frame[frame["step"] == frame["step"].max()].set_index("parameter")
    columns = ["numel", "samples", "effective_lr_p50", "update_ratio", "reconstruction_error"]
    print(f"\nAdamW at step {frame['step'].max()} under ZeRO {stage}, each parameter as a whole:")
    print(last[columns].to_string(float_format="{:.3g}".format))
    print(probe.findings())
dist.barrier()
dist.destroy_process_group()
