"""Weights & Biases (offline) and MLflow (local stores), in their current releases."""

import json
import math

import mlflow
import numpy as np
import pytest
import wandb
from hosts import by_hand, net, wandb_history
from torch import nn
from torch.optim import SGD, AdamW

import lrprobe
from lrprobe import sinks


def expected(frame, style="lrprobe"):
    """Step to tag to value: what a function gets as scalars."""
    found = {}
    model = net()
    by_hand(
        model,
        AdamW(model.parameters()),
        to=sinks.Scalars(lambda values, step: found.__setitem__(step, values), tag_style=style),
    )
    assert set(found) == set(frame["step"])
    return found


@pytest.mark.parametrize("style", ["lrprobe", "composer", "olmo"])
def test_wandb_has_every_scalar_of_every_step(tmp_path, style):
    """An offline run's file has them, beside what the user logs, at the optimizer's steps."""
    model = net()
    with wandb.init(dir=tmp_path) as run:
        frame = by_hand(
            model,
            AdamW(model.parameters()),
            to=sinks.WandB(tag_style=style),
            after=lambda: run.log({"mine": 1.0}),
        )
    rows = wandb_history(tmp_path)
    assert sum("mine" in row for row in rows) == 12
    found = {}
    for row in rows:
        if "lrprobe/step" in row:
            values = {tag: float(json.loads(value)) for tag, value in row.items()}
            found[int(values["lrprobe/step"])] = values
    for step, values in expected(frame, style).items():
        assert {tag: found[step][tag] for tag in values} == values


def test_wandb_takes_the_run_that_it_is_given(tmp_path):
    """And refuses to guess where there is none."""
    with pytest.raises(RuntimeError, match=r"wandb\.init"):
        sinks.WandB()
    with wandb.init(dir=tmp_path) as run:
        sink = sinks.WandB(run, prefix="a/")
        assert sink.destination == f"wandb:{run.id}:a/"
        with pytest.raises(ValueError, match="tag_style='mine'"):
            sinks.WandB(run, tag_style="mine")


@pytest.fixture(params=["sqlite", "file"])
def store(request, database, tmp_path, monkeypatch):
    """The address of a database, and of a folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return database if request.param == "sqlite" else f"file://{tmp_path}/mlruns"


@pytest.mark.parametrize("style", ["lrprobe", "composer", "olmo"])
def test_mlflow_has_every_scalar_of_every_step(store, style):
    """Each metric's history has the values, steps and times of the records, in the user's run."""
    mlflow.set_tracking_uri(store)
    model = net()
    with mlflow.start_run() as run:
        frame = by_hand(model, AdamW(model.parameters()), to=sinks.MLflow(tag_style=style))
    client = mlflow.MlflowClient(store)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    wanted = expected(frame, style)
    times = {round(time * 1000) for time in frame["time"]}
    for tag in wanted[12]:
        history = client.get_metric_history(run.info.run_id, tag)
        assert {m.step: m.value for m in history} == {
            s: values[tag] for s, values in wanted.items()
        }
        assert {m.timestamp for m in history} <= times


class Odd(nn.Module):
    """Its parameters have names that MLflow does not take."""

    NAMES = ("a/b", "a", "..", "ü β", "a//b", "a:b", "x" * 300)

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self._parameters[name] = nn.Parameter(net()[0].weight.detach().clone())


def test_mlflow_gets_names_that_it_allows(store):
    """Every parameter has a metric of its own, whatever it is called."""
    client = mlflow.MlflowClient(store)
    run = client.create_run("0").info.run_id
    model = Odd()
    optimizer = SGD(model.parameters(), lr=0.1)
    sink = sinks.MLflow(run, client=client, prefix="probe/")
    with lrprobe.attach(optimizer, model, to=sink, every=1) as probe:
        sum(p.square().sum() * k for k, p in enumerate(model.parameters(), 1)).backward()
        optimizer.step()
    metrics = client.get_run(run).data.metrics
    norms = [value for tag, value in metrics.items() if tag.startswith("probe/grad_norm/")]
    np.testing.assert_allclose(sorted(norms), sorted(probe.frame()["grad_norm"]), rtol=0)


@pytest.mark.parametrize("prefix", ["/a/", "../a/", "..", "a//", "a/../", "./", "a/./b"])
def test_mlflow_refuses_a_prefix_that_it_would_not_take(database, prefix):
    """At once, and not at every step of the training; MLflow itself says no to these names."""
    client = mlflow.MlflowClient(database)
    run = client.create_run("0").info.run_id
    with pytest.raises(mlflow.MlflowException):
        client.log_metric(run, f"{prefix}lr/group0", 1.0)
    with pytest.raises(ValueError, match="prefix="):
        sinks.MLflow(run, client=client, prefix=prefix)


def test_mlflow_takes_more_metrics_than_fit_in_a_batch(database):
    """MLflow refuses more than 1,000 at once; 180 parameters have more than that."""
    client = mlflow.MlflowClient(database)
    run = client.create_run("0").info.run_id
    model = nn.ParameterList(nn.Parameter(net()[0].bias.detach().clone()) for _ in range(180))
    optimizer = SGD(model.parameters(), lr=0.1)
    sink = sinks.MLflow(run, client=client)
    with lrprobe.attach(optimizer, model, to=sink, every=1):
        sum(p.square().sum() for p in model).backward()
        optimizer.step()
    assert len(client.get_run(run).data.metrics) > 1000


def test_mlflow_refuses_to_guess_a_run():
    """Without an active run it says what to do."""
    with pytest.raises(RuntimeError, match=r"mlflow\.start_run"):
        sinks.MLflow()


def test_what_is_nan_is_not_logged():
    """A parameter that never moved has no ratio; both trackers would make something of NaN."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = p.detach() * 0
    found = []
    with lrprobe.attach(optimizer, model, to=sinks.Scalars(lambda v, _: found.append(v))):
        optimizer.step()
    assert found
    assert not any(math.isnan(value) for values in found for value in values.values())
