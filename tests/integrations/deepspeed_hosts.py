"""One of two processes: a host trains with DeepSpeed; the frame is that of one process by hand.

python -m torch.distributed.run --nproc-per-node 2 deepspeed_hosts.py HOST FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from deepspeed_ranks import started
from hosts import BATCHES, loader, net
from torch import nn
from torch.optim import AdamW

import lrprobe

BATCH = 8
cross_entropy = nn.functional.cross_entropy


def alone(model: nn.Module, batches: Any, loss: Any, optimizer: Any, **options: Any) -> Any:
    """The frame of the loop that anyone would write, with both processes' samples."""
    group = torch.distributed.new_group([0])
    if torch.distributed.get_rank():
        return None
    options = {"every": 1, "process_group": group, **options}
    with lrprobe.attach(optimizer, model, **options) as probe:
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        return probe.frame()


def both(batches: list[Any]) -> list[Any]:
    """What the two processes have in each step, as one batch."""
    pairs = zip(batches[::2], batches[1::2], strict=True)
    return [[torch.cat(each) for each in zip(*pair, strict=True)] for pair in pairs]


def accelerate(folder: Path) -> tuple[Any, Any]:
    """Stage 2, through the plugin; ``accelerator.backward`` takes the steps."""
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2},
        }
    )
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model = net()
    made = AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    model, optimizer, batches = accelerator.prepare(model, made, loader())
    with lrprobe.attach(optimizer, model, every=1, batch_size=BATCH) as probe:
        for x, y in batches:
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        frame = probe.frame() if accelerator.is_main_process else None
    twin = net()
    hand = AdamW(twin.parameters(), lr=1e-2, eps=1e-3)
    loss = lambda model, batch: cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return frame, alone(twin, both(list(loader())), loss, hand, batch_size=2 * BATCH)


def transformers(folder: Path) -> tuple[Any, Any]:
    """Stage 3, with accumulation and clipping; Trainer numbers the steps."""
    from test_transformers import trainer

    from lrprobe.integrations.transformers import LRProbeCallback

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    callback = LRProbeCallback(every=1, batch_size=2)
    plain = {"optim": "adamw_torch", "adam_epsilon": 1e-2}
    host = trainer(folder, callback, deepspeed=config, per_device_train_batch_size=2, **plain)
    host.train()
    return callback.probe.frame() if host.is_world_process_zero() else None, None


def lightning(folder: Path) -> tuple[Any, Any]:
    """Stage 2, with a learning-rate scheduler of Lightning's."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from test_lightning import Net
    from torch.utils.data import DataLoader, DistributedSampler

    from lrprobe.integrations.lightning import LRProbeCallback

    class OnCPU(DeepSpeedStrategy):
        """Without what asks for GPUs, and their numbers; nothing else there has need of one."""

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    rows = loader().dataset
    rank = torch.distributed.get_rank()
    mine = DataLoader(rows, batch_size=8, sampler=DistributedSampler(rows, 2, rank, shuffle=False))
    callback = LRProbeCallback(every=1, batch_size=8, to=folder / "run.parquet")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=OnCPU(stage=2),
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(lr=1e-2, eps=1e-3), mine)
    frame = callback.probe.frame() if rank == 0 else None
    assert BATCHES % 2 == 0
    own = [
        list(DataLoader(rows, batch_size=8, sampler=DistributedSampler(rows, 2, r, shuffle=False)))
        for r in range(2)
    ]
    batches = [[torch.cat(t) for t in zip(*pair, strict=True)] for pair in zip(*own, strict=True)]
    twin = Net(lr=1e-2, eps=1e-3)
    loss = lambda model, batch: model.loss(*batch)  # noqa: E731
    return frame, alone(twin, batches, loss, twin.configure_optimizers(), batch_size=16)


def main(host: str, folder: Path) -> None:
    started()
    frame, hand = globals()[host](folder)
    if torch.distributed.get_rank() == 0:
        pd.to_pickle((frame, hand), folder / f"{host}.pkl")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
