"""Transformers: a tiny Llama through ``Trainer`` has the frame of the same loop by hand."""

import json

import mlflow
import numpy as np
import pytest
import torch
import trackio
import wandb
from hosts import assert_resumed, assert_same, trackio_history, wandb_history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import WandbCallback

import lrprobe
from lrprobe.integrations.transformers import LRProbeCallback

STEPS = 8


def llama():
    """Two layers of random weights, the same every time."""
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def data():
    """Sequences of random tokens."""
    tokens = torch.randint(0, 64, (16 * STEPS, 12), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in tokens]


class InOrder(Trainer):
    """A ``Trainer`` that takes the data in their order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def trainer(folder, *callbacks, **options):
    """A trainer on the CPU, quiet; eight steps of two batches of four."""
    settings = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        **options,
    }
    arguments = TrainingArguments(str(folder), **settings)
    return InOrder(llama(), arguments, train_dataset=data(), callbacks=list(callbacks))


def by_hand(folder, **options):
    """The loop, with the optimizer, the schedule and the clipping that Trainer has by default."""
    host = trainer(folder, **options)
    host.create_optimizer_and_scheduler(STEPS)
    model, optimizer, schedule = host.model, host.optimizer, host.lr_scheduler
    model.train()
    rows = data()
    with lrprobe.attach(optimizer, model, every=1) as probe:
        for at in range(0, 8 * STEPS, 8):
            for half in (rows[at : at + 4], rows[at + 4 : at + 8]):
                tokens = torch.stack([row["input_ids"] for row in half])
                # The sum over both batches' 88 targets, divided as Trainer does it.
                count = torch.tensor(88)
                model(input_ids=tokens, labels=tokens, num_items_in_batch=count).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return probe.frame()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "rmsprop"])
def test_a_training_has_the_frame_of_the_loop(tmp_path, optim):
    """Row for row, bit for bit, with accumulation, clipping, warmup and two groups."""
    callback = LRProbeCallback(every=1)
    trainer(tmp_path, callback, optim=optim).train()
    frame = callback.probe.frame()
    hand = by_hand(tmp_path, optim=optim)
    assert_same(frame, hand)
    assert list(frame["step"].unique()) == list(range(1, STEPS + 1))
    assert frame["parameter"].iloc[0] == "model.embed_tokens.weight"
    lr = frame[frame["group"] == 0].groupby("step")["lr"].first()
    assert list(lr)[:3] == [0, 5e-3, 1e-2]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_resumed_training_goes_on_with_the_global_step(tmp_path, optim):
    """Cut at step 4 and resumed, a run has the dataset of an uncut one, bit for bit."""
    cut, whole = str(tmp_path / "cut.parquet"), LRProbeCallback(every=1)
    keep = {"save_strategy": "steps", "save_steps": 4, "optim": optim}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    trainer(tmp_path / "a", LRProbeCallback(cut, every=1), Stop(), **keep).train()
    again = trainer(tmp_path / "a", LRProbeCallback(cut, every=1), **keep)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    trainer(tmp_path / "b", whole, optim=optim).train()
    frame = lrprobe.read(cut)
    assert dict(zip(frame["step"], frame["attempt"], strict=True)) == {
        step: int(step > 4) for step in range(1, STEPS + 1)
    }
    assert_resumed(frame, whole.probe.frame(), first=5)


def test_report_to_names_the_sinks(tmp_path, database):
    """TensorBoard, W&B, MLflow and Trackio get the same numbers, at the global step."""
    callback = LRProbeCallback(every=2, tag_style="olmo")
    mlflow.set_tracking_uri(database)
    run = wandb.init(dir=tmp_path)
    report = ["tensorboard", "wandb", "mlflow", "trackio"]
    trainer(tmp_path, callback, report_to=report, logging_steps=1).train()
    run.finish()
    frame = callback.probe.frame()
    tag = "optim/step/lm_head.weight.norm"
    norms = frame[frame["parameter"] == "lm_head.weight"].set_index("step")["update_norm"]
    assert list(norms.index) == [1, 2, 4, 6, 8]

    events = EventAccumulator(str(tmp_path / "runs" / "lrprobe")).Reload().Scalars(tag)
    assert {e.step: np.float32(e.value) for e in events} == norms.astype("float32").to_dict()
    rows = wandb_history(tmp_path)
    ours = {json.loads(r["train/global_step"]): json.loads(r[tag]) for r in rows if tag in r}
    assert ours == norms.to_dict()
    theirs = [json.loads(r["train/global_step"]) for r in rows if "train/loss" in r]
    assert theirs == list(range(1, STEPS + 1))
    last = mlflow.last_active_run().info.run_id
    history = mlflow.MlflowClient().get_metric_history(last, tag)
    assert {m.step: m.value for m in history} == norms.to_dict()
    (local,) = list(trackio.Api().runs("huggingface"))
    logged = trackio_history(local)
    assert {
        step: values[tag] for step, values in logged.items() if tag in values
    } == norms.to_dict()
    while mlflow.active_run():
        mlflow.end_run()


def test_a_tracker_that_is_off_stays_off(tmp_path):
    """With Trainer's own callback taken out no run is active, and the training goes on."""
    callback = LRProbeCallback(every=4)
    host = trainer(tmp_path, callback, report_to=["wandb"])
    host.remove_callback(WandbCallback)
    host.train()
    assert callback.probe.step == STEPS
    assert wandb.run is None


def test_the_training_is_unchanged(tmp_path):
    """The parameters are bit for bit those of a training without the callback."""
    with_probe, without = trainer(tmp_path, LRProbeCallback(every=1)), trainer(tmp_path)
    with_probe.train()
    without.train()
    pairs = zip(with_probe.model.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_training_that_was_broken_off_is_closed_by_the_next(tmp_path):
    """Trainer tells no callback of an exception; the next training starts with a clean slate."""

    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise RuntimeError("broken")

    callback = LRProbeCallback(str(tmp_path / "a.parquet"), every=1)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callback, Broken()).train()
    first = callback.probe
    trainer(tmp_path, callback).train()
    assert "closed" in repr(first)
    assert first.step == 3
    assert callback.probe.step == STEPS
