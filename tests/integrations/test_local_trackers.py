"""Trackio, Comet and ClearML, each in the mode that needs no account, against what was recorded."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hosts import by_hand, net, trackio_history
from torch.optim import AdamW

from lrprobe import sinks

STYLES = ("lrprobe", "composer", "olmo")


def expected(style):
    """Step to tag to value: what a function gets as scalars."""
    found = {}
    model = net()
    to = sinks.Scalars(lambda values, step: found.__setitem__(step, values), tag_style=style)
    by_hand(model, AdamW(model.parameters()), to=to)
    return found


def train(sink, after=lambda: None):
    """Twelve steps of the same network, recorded to a sink."""
    model = net()
    by_hand(model, AdamW(model.parameters()), to=sink, after=after)


@pytest.mark.parametrize("style", STYLES)
def test_trackio_has_every_scalar_of_every_step(style):
    """Its local database has them at the optimizer's steps, beside what the user logs."""
    import trackio

    run = trackio.init(project="digits", name=style, auto_log_cpu=False)
    train(sinks.Trackio(tag_style=style), after=lambda: trackio.log({"mine": 1.0}))
    trackio.finish()
    found = trackio_history(run)
    assert sum(values.pop("mine", 0) for values in found.values()) == 12
    assert {step: values for step, values in found.items() if values} == expected(style)


def test_trackio_takes_the_run_that_it_is_given():
    """And refuses to guess where there is none."""
    import trackio

    with pytest.raises(RuntimeError, match=r"trackio\.init"):
        sinks.Trackio()
    run = trackio.init(project="digits", name="given", auto_log_cpu=False)
    assert sinks.Trackio(run, prefix="a/").destination == "trackio:digits/given:a/"
    trackio.finish()


def offline_experiment(folder):
    """A Comet experiment that ends in an archive in the folder."""
    import comet_ml  # here, so that it does not patch torch for the tests of other packages

    return comet_ml.OfflineExperiment(
        project_name="digits", offline_directory=str(folder), log_code=False, log_graph=False,
        log_env_details=False, auto_output_logging=False, display_summary_level=0,
        auto_metric_logging=False,
    )  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_comet_has_every_scalar_of_every_step(tmp_path, style):
    """The archive of an offline experiment has them, at the optimizer's steps."""
    experiment = offline_experiment(tmp_path)
    train(sinks.Comet(tag_style=style))
    experiment.end()
    with zipfile.ZipFile(tmp_path / f"{experiment.id}.zip") as archive:
        lines = archive.read("messages.json").decode().splitlines()
    found = {}
    for line in lines:
        message = json.loads(line)
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            found.setdefault(metric["step"], {})[metric["metricName"]] = metric["metricValue"]
    for values in found.values():
        values.pop("process duration", None)  # which Comet adds
    assert {step: values for step, values in found.items() if values} == expected(style)


def test_comet_takes_the_experiment_that_it_is_given(tmp_path):
    """And refuses to guess where there is none."""
    with pytest.raises(RuntimeError, match=r"comet_ml\.start"):
        sinks.Comet()
    experiment = offline_experiment(tmp_path)
    assert sinks.Comet(experiment, prefix="a/").destination == f"comet:{experiment.id}:a/"
    experiment.end()


def test_clearml_has_every_scalar_of_every_step(tmp_path):
    """The session of an offline task has them: a figure is a plot, a parameter a series."""
    script = Path(__file__).with_name("clearml_run.py")
    # Else a forked process writes the session: a race with who reads it, and 20 s until it ends.
    settings = tmp_path / "clearml.conf"
    settings.write_text("sdk.development.report_use_subprocess: false\n")
    environment = {
        **os.environ,
        "CLEARML_CACHE_DIR": str(tmp_path),
        "CLEARML_CONFIG_FILE": str(settings),
        "CLEARML_OFFLINE_MODE": "1",
    }
    done = subprocess.run(
        [sys.executable, script, tmp_path / "found.json"],
        env=environment, cwd=tmp_path, timeout=200, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for event in json.loads((tmp_path / "found.json").read_text()):
        if event["type"] == "training_stats_scalar":
            style, _, tag = f"{event['metric']}/{event['variant']}".partition("/")
            found.setdefault(style, {}).setdefault(event["iter"], {})[tag] = event["value"]
    assert found == {style: expected(style) for style in STYLES}
