"""Lightning: the frame of ``Trainer.fit`` is that of the same loop by hand."""

import warnings
from typing import ClassVar

import lightning.pytorch as pl
import mlflow
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning
import torch
from hosts import (
    BATCHES,
    assert_resumed,
    assert_same,
    by_hand,
    loader,
    net,
    wandb_history,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Adadelta, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import lrprobe
from lrprobe.integrations.lightning import LRProbeCallback


class Module:
    """The network of all tests, as Lightning wants it."""

    def __init__(self, optimizer=AdamW, scheduler=None, **options):
        super().__init__()
        self.model = net()
        self.make = lambda: optimizer(self.parameters(), **options)
        self.scheduler = scheduler

    def training_step(self, batch, _):
        x, y = batch
        return self.loss(x, y)

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        optimizer = self.make()
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class Net(Module, pl.LightningModule):
    """Under the package's present name."""


class OldNet(Module, pytorch_lightning.LightningModule):
    """And under the one before."""


def fit(model, *callbacks, package=pl, ckpt_path=None, **options):
    """Train on the CPU, quietly."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = package.Trainer(callbacks=list(callbacks), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!lrprobe)")
        trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer


def annealed(optimizer):
    """A schedule that moves lr at each step."""
    return CosineAnnealingLR(optimizer, BATCHES)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(AdamW, {"lr": 1e-2}), (Adadelta, {}), (SGD, {"lr": 0.1, "momentum": 0.9})],
)
@pytest.mark.parametrize(("package", "kind"), [(pl, Net), (pytorch_lightning, OldNet)])
def test_a_training_has_the_frame_of_the_loop(package, kind, optimizer, options):
    """Every figure of every step, with a schedule per step, under both of the package's names."""
    callback = LRProbeCallback(every=1)
    fit(kind(optimizer, annealed, **options), callback, package=package)
    hand = Net(optimizer, annealed, **options)
    made = hand.make()
    frame = by_hand(hand, made, loss=hand.loss, after=annealed(made).step)
    assert_same(callback.probe.frame(), frame)


def test_accumulation_counts_the_steps_that_are_taken():
    """Four batches are one step, with the samples of all four."""
    callback = LRProbeCallback(every=1, batch_size=8)
    fit(Net(), callback, accumulate_grad_batches=4)
    hand = Net()
    frame = by_hand(hand, hand.make(), loss=hand.loss, accumulate=4, batch_size=8)
    assert_same(callback.probe.frame(), frame)
    assert set(frame["samples"]) == {32.0}
    assert list(frame["step"].unique()) == [1, 2, 3]


def test_mixed_precision():
    """bf16-mixed is torch's autocast, and the frame of the loop under it."""
    callback = LRProbeCallback(every=1)
    fit(Net(), callback, precision="bf16-mixed")
    hand = Net()

    def loss(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return hand.loss(x, y)

    assert_same(callback.probe.frame(), by_hand(hand, hand.make(), loss=loss))


class Two(Net):
    """Two optimizers, stepped by hand; the second one every other time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return AdamW(self.model[0].parameters()), SGD(self.model[2].parameters(), lr=0.1)

    def training_step(self, batch, number):
        first, second = self.optimizers()
        self.manual_backward(self.loss(*batch))
        first.step()
        if number % 2:
            second.step()
        first.zero_grad()
        second.zero_grad()


def test_several_optimizers_and_manual_optimization():
    """Each optimizer counts its own steps, as in the loop."""
    callback = LRProbeCallback(every=1)
    fit(Two(), callback)
    hand = Two()
    first, second = hand.configure_optimizers()
    with lrprobe.attach([first, second], hand, every=1) as probe:
        for number, (x, y) in enumerate(loader()):
            hand.loss(x, y).backward()
            first.step()
            if number % 2:
                second.step()
            first.zero_grad()
            second.zero_grad()
    frame = callback.probe.frame()
    assert_same(frame, probe.frame())
    assert frame.groupby("optimizer")["step"].max().to_dict() == {"AdamW": 12, "SGD": 6}


@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.1), (AdamW, 1e-2)])
def test_a_training_that_broke_in_mid_epoch_is_resumed(tmp_path, optimizer, lr):
    """The steps after the checkpoint are taken again, and those taken before count no more."""

    class Broken(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 17:
                raise RuntimeError("broken")

    path = str(tmp_path / "a.parquet")
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            Net(optimizer, lr=lr), LRProbeCallback(path, every=1), keep, Broken(),
            max_epochs=2, enable_checkpointing=True,
        )  # fmt: skip
    assert lrprobe.read(path)["step"].max() == 17
    last = str(tmp_path / "step=15.ckpt")
    fit(Net(optimizer, lr=lr), LRProbeCallback(path, every=1), max_epochs=2, ckpt_path=last)
    hand, batches = Net(optimizer, lr=lr), list(loader())
    made = hand.make()
    with lrprobe.attach(made, hand, every=1) as probe:
        for x, y in batches + batches[:3] + batches[:9]:  # Lightning begins with the first again
            hand.loss(x, y).backward()
            made.step()
            made.zero_grad()
    frame = lrprobe.read(path)
    assert list(frame.groupby("attempt")["step"].min()) == [1, 16]
    assert_resumed(frame, probe.frame(), first=16)


def test_a_second_fit_of_one_trainer_goes_on(tmp_path):
    """Its global step does, so the dataset has the steps of both, and hides none of the first."""
    path = str(tmp_path / "a.parquet")
    callback = LRProbeCallback(path, every=1)
    trainer = fit(Net(), callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, loader())
    assert trainer.global_step == callback.probe.step == 2 * BATCHES
    assert list(lrprobe.read(path)["step"].unique()) == list(range(1, 2 * BATCHES + 1))


def test_a_checkpoint_of_another_optimizer_is_told_of(tmp_path):
    """The training that Lightning resumes all the same goes on, and is counted from 0."""

    class Other(SGD):
        pass

    keep = ModelCheckpoint(tmp_path, filename="last")
    fit(Net(SGD, lr=0.1), LRProbeCallback(), keep, enable_checkpointing=True)
    callback = LRProbeCallback(every=1)
    with pytest.warns(UserWarning, match=r"\['SGD'\]; the probe has \['Other'\]"):
        fit(Net(Other, lr=0.1), callback, max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert list(callback.probe.frame()["step"].unique()) == list(range(1, BATCHES + 1))


def test_a_dry_run_has_a_frame_and_leaves_nothing(tmp_path):
    """fast_dev_run puts a logger without a place in the stead of the trainer's own."""
    callback = LRProbeCallback(every=1)
    fit(Net(), callback, fast_dev_run=3, logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path)])
    assert list(callback.probe.frame()["step"].unique()) == [1, 2, 3]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_is_written(tmp_path):
    """Ctrl-C ends the process in Lightning; what was recorded until then is in the dataset."""

    class Interrupted(Net):
        def training_step(self, batch, number):
            if number == 5:
                raise KeyboardInterrupt
            return super().training_step(batch, number)

    path = str(tmp_path / "a.parquet")
    callback = LRProbeCallback(path, every=1)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(Interrupted(), callback)
    assert "closed" in repr(callback.probe)
    assert pd.read_parquet(path)["step"].max() == 5


@pytest.mark.parametrize(("optimizer", "lr"), [(SGD, 0.1), (AdamW, 1e-2)])
def test_a_resumed_training_goes_on(tmp_path, optimizer, lr):
    """Cut after two epochs and resumed, a run has the dataset of an uncut one, step for step."""
    cut = str(tmp_path / "cut.parquet")
    keep = ModelCheckpoint(tmp_path, filename="last")
    fit(
        Net(optimizer, lr=lr), LRProbeCallback(cut, every=1), keep,
        max_epochs=2, enable_checkpointing=True,
    )  # fmt: skip
    again = LRProbeCallback(cut, every=1)
    fit(Net(optimizer, lr=lr), again, max_epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert list(again.probe.frame()["step"].unique()) == list(range(25, 49))
    hand = Net(optimizer, lr=lr)
    whole = by_hand(hand, hand.make(), loss=hand.loss, epochs=4)
    frame = lrprobe.read(cut)
    assert list(frame["attempt"].unique()) == [0, 1]
    assert_resumed(frame, whole, first=25)


def test_the_loggers_own_directory_or_tracker(tmp_path, database):
    """By default each logger gets what the trainer's figures get, in its own place."""

    class Own(Logger):
        name, version = "own", 0
        found: ClassVar = {}

        def log_hyperparams(self, *_):
            pass

        def log_metrics(self, metrics, step):
            self.found.setdefault(step, {}).update(metrics)

    loggers = [
        TensorBoardLogger(tmp_path, name="board"),
        CSVLogger(tmp_path, name="table"),
        WandbLogger(save_dir=tmp_path, offline=True),
        MLFlowLogger(tracking_uri=database),
        Own(),
    ]
    callback = LRProbeCallback(every=1, tag_style="composer")
    fit(Net(), callback, logger=loggers)
    frame = callback.probe.frame()
    tag = "l2_norm/update/model.0.weight"
    norms = frame[frame["parameter"] == "model.0.weight"].set_index("step")["update_norm"]

    events = EventAccumulator(loggers[0].log_dir).Reload().Scalars(tag)
    assert {e.step: np.float32(e.value) for e in events} == norms.astype("float32").to_dict()
    assert_same(lrprobe.read(f"{loggers[1].log_dir}/lrprobe.parquet"), frame)
    loggers[2].experiment.finish()
    rows = [row for row in wandb_history(tmp_path) if tag in row]
    assert {int(r["lrprobe/step"]): float(r[tag]) for r in rows} == norms.to_dict()
    history = mlflow.MlflowClient(database).get_metric_history(loggers[3].run_id, tag)
    assert {m.step: m.value for m in history} == norms.to_dict()
    found = {step: values[tag] for step, values in Own.found.items() if tag in values}
    assert found == norms.to_dict()


def test_without_a_logger_the_frame_is_in_memory():
    """logger=False is no error."""
    callback = LRProbeCallback(every=4)
    fit(Net(), callback)
    assert list(callback.probe.frame()["step"].unique()) == [1, 4, 8, 12]


def test_a_training_that_raises_leaves_no_hooks(tmp_path):
    """The probe is closed, and what was recorded until then is in the dataset."""

    class Broken(Net):
        def training_step(self, batch, number):
            if number == 5:
                raise RuntimeError("broken")
            return super().training_step(batch, number)

    path = str(tmp_path / "a.parquet")
    callback = LRProbeCallback(path, every=1)
    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, callback)
    assert "closed" in repr(callback.probe)
    assert pd.read_parquet(path)["step"].max() == 5


def test_the_training_is_unchanged():
    """The parameters are bit for bit those of a training without the callback."""
    with_probe, without = Net(lr=1e-2), Net(lr=1e-2)
    fit(with_probe, LRProbeCallback(every=1))
    fit(without)
    for a, b in zip(with_probe.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_fit_with_the_same_callback_begins_anew():
    """It has a probe of its own, and no warning says otherwise."""
    callback = LRProbeCallback(every=1)
    fit(Net(), callback)
    first = callback.probe
    fit(Net(), callback)
    assert callback.probe is not first
    assert_same(callback.probe.frame(), first.frame())
