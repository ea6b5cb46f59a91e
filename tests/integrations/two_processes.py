"""One of two processes: trains in a host, then by hand in DDP, and compares the frames.

python -m torch.distributed.run --nproc-per-node 2 two_processes.py HOST FOLDER
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
from hosts import BATCHES, assert_same, loader, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, DistributedSampler

import lrprobe

cross_entropy = nn.functional.cross_entropy


def by_hand(
    model: nn.Module,
    batches: Iterable,
    loss: Callable | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The frame of the loop that anyone would write; of the first process, which alone has it."""
    optimizer = optimizer or AdamW(model.parameters(), lr=1e-2)
    wrapped = DistributedDataParallel(model)
    loss = loss or (lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
    with lrprobe.attach(optimizer, wrapped, every=1, batch_size=batch_size) as probe:
        for batch in batches:
            optimizer.zero_grad()
            loss(wrapped, batch).backward()
            optimizer.step()
    return probe.frame() if RANK == 0 else pd.DataFrame()


def sampled() -> DataLoader:
    """Every other sample."""
    data = loader().dataset
    return DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False))


def lightning(folder: Path) -> None:
    """With the loggers that have files, and shells in the place of these in the second process."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
    from test_lightning import Net

    from lrprobe.integrations.lightning import LRProbeCallback

    loggers = [
        TensorBoardLogger(folder, name="board"),
        CSVLogger(folder, name="table"),
        WandbLogger(save_dir=folder, offline=True),
        MLFlowLogger(tracking_uri=f"file://{folder}/mlruns"),  # two cannot make one database
    ]
    hand = Net(lr=1e-2)

    class Whole(nn.Module):
        """The names that the parameters have in the LightningModule."""

        def __init__(self) -> None:
            super().__init__()
            self.model = hand.model

        def forward(self, x):
            return self.model(x)

    torch.distributed.init_process_group("gloo")  # the host leaves none behind
    frame = by_hand(Whole(), sampled())
    callback = LRProbeCallback(every=1, batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,  # which would shuffle
        max_epochs=1,
        logger=loggers,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(lr=1e-2), sampled())
    if RANK == 0:
        assert_same(callback.probe.frame(), frame)
        assert set(frame["samples"]) == {16.0}
        assert_same(lrprobe.read(f"{loggers[1].log_dir}/lrprobe.parquet"), frame)
        assert list(lrprobe.read(loggers[0].log_dir)["step"].unique()) == list(
            range(1, BATCHES // 2 + 1)
        )


def transformers(folder: Path) -> None:
    """A tiny Llama; steps are numbered as Trainer numbers them."""
    from test_transformers import STEPS, data, trainer

    from lrprobe.integrations.transformers import LRProbeCallback

    callback = LRProbeCallback(every=1, batch_size=4)
    plain = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.01}
    plain |= {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "optim": "adamw_torch"}
    host = trainer(folder, callback, report_to=["tensorboard"], **plain)
    host.train()
    assert host.args.world_size == 2
    if RANK == 0:
        frame = callback.probe.frame()
        assert list(frame["step"].unique()) == list(range(1, STEPS + 1))
        assert set(frame["samples"]) == {8.0}
        assert list(lrprobe.read(folder / "runs" / "lrprobe")["step"].unique()) == [*range(1, 9)]
    again = trainer(folder, **plain)
    again.create_optimizer()  # with its two groups
    batches = [
        torch.stack([row["input_ids"] for row in data()[at : at + 4]])
        for at in range(4 * RANK, 8 * STEPS, 8)
    ]
    again.model.train()
    hand = by_hand(
        again.model,
        batches,
        lambda model, x: model(input_ids=x, labels=x).loss,
        again.optimizer,
        batch_size=4,
    )
    if RANK == 0:
        assert_same(frame, hand)


def accelerate(folder: Path) -> None:
    """Batches go to the processes in turn; the tracker is the first one's."""
    from accelerate import Accelerator

    from lrprobe.integrations.accelerate import trackers

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("run")
    model = net()
    made = AdamW(model.parameters(), lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, made, loader())
    to = trackers(accelerator)
    with lrprobe.attach(optimizer, model, to=to, every=1, batch_size=8) as probe:
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()
    hand = by_hand(net(), list(loader())[RANK::2])
    accelerator.end_training()  # and with it the process group
    if RANK == 0:
        assert_same(probe.frame(), hand)
        assert list(lrprobe.read(folder / "run")["step"].unique()) == [*range(1, BATCHES // 2 + 1)]


def ignite(folder: Path) -> None:
    """An engine in each process; only the first writes."""
    import ignite.distributed as idist
    from test_ignite import engine

    from lrprobe.integrations.ignite import attach

    idist.initialize("gloo")
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    wrapped = idist.auto_model(model)
    trainer = engine(wrapped, idist.auto_optim(optimizer))
    path = folder / "run.parquet"
    with attach(trainer, optimizer, wrapped, to=path, every=1, batch_size=8) as probe:
        trainer.run(sampled())
    hand = by_hand(net(), sampled())
    if RANK == 0:
        assert_same(probe.frame(), hand)
        assert_same(lrprobe.read(path), hand)


if __name__ == "__main__":
    RANK = int(os.environ["RANK"])
    torch.set_num_threads(1)
    {f.__name__: f for f in (lightning, transformers, accelerate, ignite)}[sys.argv[1]](
        Path(sys.argv[2])
    )
    print(f"rank {RANK} is done", flush=True)  # noqa: T201 - what the test looks for
