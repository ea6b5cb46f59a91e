"""Accelerate: a prepared optimizer passes straight to attach, and its trackers are sinks."""

import json

import mlflow
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from hosts import assert_same, by_hand, loader, net, trackio_history, wandb_history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Adadelta, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import lrprobe
from lrprobe.integrations.accelerate import trackers


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(accelerator, optimizer, scheduler=None, **options):
    """The loop of Accelerate's documentation; the frame."""
    model = net()
    made = optimizer(model.parameters())
    prepared = accelerator.prepare(model, made, loader(), *([scheduler(made)] if scheduler else []))
    model, made, data = prepared[:3]
    with lrprobe.attach(made, model, **{"every": 1, **options}) as probe:
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                made.step()
                if scheduler:
                    prepared[3].step()
                made.zero_grad()
    return probe.frame()


@pytest.mark.parametrize("kind", [AdamW, Adadelta, SGD])
def test_a_prepared_optimizer_has_the_frame_of_the_loop(kind):
    """Every figure of every step, with a schedule."""
    frame = train(Accelerator(cpu=True), kind, lambda o: CosineAnnealingLR(o, 12))
    model = net()
    optimizer = kind(model.parameters())
    assert_same(frame, by_hand(model, optimizer, after=CosineAnnealingLR(optimizer, 12).step))


def test_accumulation_counts_the_steps_that_are_taken():
    """A prepared optimizer's step that accumulates only is none."""
    frame = train(Accelerator(cpu=True, gradient_accumulation_steps=4), AdamW, batch_size=8)
    model = net()
    hand = by_hand(model, AdamW(model.parameters()), accumulate=4, batch_size=8)
    assert_same(frame, hand)


def test_mixed_precision():
    """mixed_precision="bf16" is torch's autocast, and the frame of the loop under it."""
    frame = train(Accelerator(cpu=True, mixed_precision="bf16"), AdamW)
    model = net()

    def loss(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        return nn.functional.cross_entropy(output.float(), y)

    assert_same(frame, by_hand(model, AdamW(model.parameters()), loss=loss))


class Own(GeneralTracker):
    """A tracker of a user's."""

    name = "own"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.found = {}

    def log(self, values, step=None, **_):
        self.found[step] = values

    def store_init_configuration(self, values):
        pass


@pytest.mark.usefixtures("database")
def test_its_trackers_are_sinks(tmp_path):
    """TensorBoard, Weights & Biases, MLflow, Trackio and a user's own get the same numbers."""
    own = Own()
    accelerator = Accelerator(
        cpu=True,
        log_with=["tensorboard", "wandb", "mlflow", "trackio", own],
        project_dir=tmp_path,
    )
    accelerator.init_trackers("run", init_kwargs={"wandb": {"dir": tmp_path}})
    run = accelerator.get_tracker("mlflow").tracker
    local = accelerator.get_tracker("trackio").tracker
    frame = train(accelerator, AdamW, to=trackers(accelerator, prefix="probe/", tag_style="olmo"))
    accelerator.end_training()
    tag = "probe/optim/step/0.weight.norm"
    norms = frame[frame["parameter"] == "0.weight"].set_index("step")["update_norm"]
    events = EventAccumulator(str(tmp_path / "run")).Reload().Scalars(tag)
    assert {e.step: np.float32(e.value) for e in events} == norms.astype("float32").to_dict()
    rows = [row for row in wandb_history(tmp_path) if tag in row]
    assert {json.loads(r["lrprobe/step"]): json.loads(r[tag]) for r in rows} == norms.to_dict()
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, tag)
    assert {m.step: m.value for m in history} == norms.to_dict()
    logged = trackio_history(local)
    assert {step: values[tag] for step, values in logged.items()} == norms.to_dict()
    assert {step: values[tag] for step, values in own.found.items()} == norms.to_dict()
    assert len(mlflow.MlflowClient().search_runs([run.info.experiment_id])) == 1


def test_another_process_writes_nothing():
    """Only the main process has sinks."""

    class Second:
        is_main_process = False

    assert trackers(Second()) == []
