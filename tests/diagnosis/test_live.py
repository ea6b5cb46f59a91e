"""Findings while a run goes on: each once, beside the training, at a bounded cost."""

import logging
import threading
import time
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from bugs import LINEAR, clip, only_optimizer, overflow
from healthy import OPTIMIZERS, SCHEDULES, scheduled, usual
from torch import nn, optim
from trainings import X, Y, adamw, net, resume, sgd, train

import lrprobe
from lrprobe import alerts
from lrprobe.diagnosis import live


class Told:
    """A callback that keeps what it is told, and in which thread."""

    def __init__(self) -> None:
        self.findings: list[lrprobe.Finding] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, finding: lrprobe.Finding) -> None:
        self.findings.append(finding)
        self.threads.add(threading.current_thread())

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        return [(each.code, each.optimizer, each.parameter) for each in self.findings]

    @property
    def codes(self) -> set[str]:
        return {each.code for each in self.findings}


def clipped(told: Any, **options: Any) -> pd.DataFrame:
    return train(sgd(), before=clip(1e-3), **{"steps": 300, "on_finding": told, **options})


@pytest.mark.parametrize("every", [1, 10])
def test_a_finding_is_told_once_and_while_the_run_goes_on(every: int) -> None:
    """In a thread that is not the training's, before the probe is closed."""
    told, probes = Told(), []
    clipped(told, every=every, steps=400, probes=probes)
    (probe,) = probes
    probe.flush()
    assert "always-clipped" in told.codes
    assert len(told.keys) == len(set(told.keys))
    assert threading.main_thread() not in told.threads
    before = list(told.keys)
    probe.close()
    assert told.keys[: len(before)] == before
    assert len(told.keys) == len(set(told.keys))


def test_what_is_not_finite_is_told_at_once(tmp_path: Path) -> None:
    """Not only at the next look, however many records lie between two."""
    told = Told()

    def ruin(step: int, model: nn.Module, _: Any) -> None:
        if step == 101:
            model[2].weight.grad[0, 0] = torch.inf
        if step > 105:
            time.sleep(0.05)
            seen.append(bool(told.findings))

    seen: list[bool] = []
    train(sgd(), steps=115, before=ruin, on_finding=told)
    assert any(seen)
    assert told.findings[0].code == "nonfinite"


def test_the_same_is_found_live_and_in_the_frame() -> None:
    """Where nothing was thinned out of the history that is kept."""
    told, probes = Told(), []
    frame = clipped(told, steps=50, probes=probes)
    probes[0].close()
    new = {"state-unexplained", "gradients-accumulate"}  # the columns of the engine to come
    expected = {(f.code, f.parameter) for f in lrprobe.diagnose(frame) if f.code not in new}
    assert {(f.code, f.parameter) for f in told.findings} == expected


def test_nothing_is_told_twice_after_a_resume(tmp_path: Path) -> None:
    """In a dataset that is continued; what the resume did wrong is told."""
    first, second = Told(), Told()
    calls = iter((first, second))

    def both(finding: lrprobe.Finding) -> None:
        current[0](finding)

    current: list[Told] = []

    def make(model: nn.Module) -> Any:
        current[:] = [next(calls)]
        return sgd()(model)

    resume(
        tmp_path / "run.parquet", make, schedule=LINEAR, restore=only_optimizer, before=clip(1e-3),
        on_finding=both,
    )  # fmt: skip
    assert "always-clipped" in first.codes
    assert "always-clipped" not in second.codes
    assert "lr-jumps" in second.codes
    assert not set(first.keys) & set(second.keys)


def test_what_was_told_goes_into_a_checkpoint() -> None:
    """So that a probe with another destination does not tell it again."""
    first, second, probes = Told(), Told(), []
    clipped(first, probes=probes)
    probes[0].flush()
    state = probes[0].state_dict()
    probes[0].close()
    assert first.codes
    probe = lrprobe.attach(optim.SGD(net().parameters(), lr=0.1), every=1, on_finding=second)
    probe.load_state_dict(state)
    probe.close()
    assert not set(first.keys) & set(second.keys)
    assert not lrprobe.attach(optim.SGD(net().parameters())).state_dict().keys() - {"steps"}


def by_hand(on_finding: Any, spoil: Any) -> lrprobe.Probe:
    """Sixty steps over all of the data, outside of what keeps lrprobe's warnings away."""
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1, on_finding=on_finding) as probe:
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            spoil(model, optimizer)
            optimizer.step()
    return probe


def test_a_callback_that_raises_is_told_of_once_and_harms_nothing() -> None:
    """The training goes on, and so does the recording."""

    def bad(finding: lrprobe.Finding) -> None:
        raise RuntimeError("no network")

    with pytest.warns(UserWarning, match="on_finding=.*no network") as caught:
        probe = by_hand(bad, lambda model, _: clip(1e-3)(0, model, None))
    assert probe.frame()["step"].max() == 60
    assert sum("no network" in str(each.message) for each in caught) == 1


def test_a_callback_that_hangs_holds_nothing_up() -> None:
    """Neither the training nor a frame."""
    go = threading.Event()
    probes: list[lrprobe.Probe] = []
    begin = time.monotonic()
    frame = train(
        sgd(), before=clip(1e-3), on_finding=lambda _: go.wait(60), probes=probes, steps=60
    )
    assert time.monotonic() - begin < 30
    assert len(frame) == 240
    go.set()
    probes[0].close()


@pytest.mark.parametrize("name", ["Adam", "momentum", "AdamW of LMs"])
def test_a_healthy_run_is_not_accused_while_it_goes_on(name: str, tmp_path: Path) -> None:
    """Nor under a schedule, whose warmup is not the whole run."""
    told = Told()
    usual(OPTIMIZERS[name], on_finding=told)(1, tmp_path)
    scheduled(SCHEDULES["warmup from 0"], on_finding=told)(1, tmp_path)
    scheduled(SCHEDULES["OneCycleLR"], on_finding=told)(1, tmp_path)
    assert not [str(each) for each in told.findings if each.severity == "finding"]


def test_a_probe_that_saw_no_step_says_so_when_it_is_closed() -> None:
    """Since a run may only not have begun, not before."""
    told = Told()
    probe = lrprobe.attach(optim.SGD(net().parameters()), on_finding=told)
    probe.flush()
    assert told.codes == set()
    assert probe.findings().findings == ()
    probe.close()
    assert told.codes == {"no-steps"}
    assert told.findings[0].optimizer == "SGD"
    assert [each.code for each in probe.findings()] == ["no-steps"]


def test_findings_at_any_time(tmp_path: Path) -> None:
    """As diagnose says them; of a continued dataset with what came before."""
    probes: list[lrprobe.Probe] = []
    frame = train(adamw(eps=10.0), steps=30, probes=probes)
    assert [each.code for each in probes[0].findings().findings] == ["adam-scale"] * 2 + [
        "eps-rules"
    ] * 2
    probes[0].close()
    assert len(frame)

    def last(finding: lrprobe.Finding) -> None: ...

    kept: list[lrprobe.Probe] = []
    resume(
        tmp_path / "run.parquet", sgd(), schedule=LINEAR, restore=only_optimizer, probes=kept,
        on_finding=last,
    )  # fmt: skip
    assert "lr-jumps" not in {each.code for each in kept[0].findings()}
    assert "lr-jumps" in {each.code for each in kept[1].findings()}
    for probe in kept:
        probe.close()


def test_the_cost_of_a_record_does_not_grow() -> None:
    """At most 1 ms of CPU a record in the mean, for 150 parameters; memory is bounded."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(75)))
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    records = []
    with lrprobe.attach(
        optimizer, model, every=1, to=lrprobe.sinks.Function(records.append)
    ) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
        probe.flush()
    watcher = live.LiveDiagnosis(lambda _: None)
    spent = []
    for step in range(1, 801):
        record = records[step % 4]
        columns = dict(record.tables["parameter"])
        columns["step"] = columns["step"] * 0 + step
        made = types.SimpleNamespace(
            **{name: getattr(record, name) for name in ("attempt", "optimizer", "run")},
            step=step, tables={"parameter": columns},
        )  # fmt: skip
        begin = time.thread_time()
        watcher.write(made)  # type: ignore[arg-type]
        spent.append(time.thread_time() - begin)
    assert sum(spent[400:]) / 400 < 2e-3  # 0.6 ms where the machine is not busy
    assert sum(spent[400:600]) < 2 * sum(spent[600:]) + 0.05
    assert len(watcher._kept["SGD"]) <= live.MAX_RECORDS


@pytest.mark.parametrize("given", [1, "warn", []])
def test_what_cannot_be_called_is_refused(given: Any) -> None:
    """With what came and what may."""
    with pytest.raises(TypeError, match="on_finding= takes a function that accepts a Finding"):
        lrprobe.attach(optim.SGD(net().parameters()), on_finding=given)


def finding(**changes: Any) -> lrprobe.Finding:
    frame = overflow(sgd, 1, Path())
    (each,) = lrprobe.diagnose(frame).findings[:1]
    import dataclasses

    return dataclasses.replace(each, **changes)


def test_the_ready_made_callbacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, a log line and W&B's alert: once for each code, notes where they are wanted."""
    one = finding()
    same, note = finding(parameter="other"), finding(severity="note", code="short-warmup")
    warn = alerts.Warn()
    with pytest.warns(UserWarning, match="nonfinite"):
        warn(one)
    warn(same)
    warn(note)  # warnings are errors here
    log = alerts.Log()
    with caplog.at_level(logging.INFO, "lrprobe"):
        for each in (one, same, note):
            log(each)
    assert [each.levelname for each in caplog.records] == ["WARNING", "INFO"]

    sent: list[dict[str, Any]] = []
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(alert=lambda **alert: sent.append(alert))
    monkeypatch.setattr(wandb, "run", None, raising=False)
    level = types.SimpleNamespace(WARN="warn", INFO="info")
    monkeypatch.setattr(wandb, "AlertLevel", level, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    with pytest.raises(RuntimeError, match="no Weights"):
        alerts.WandB()
    send = alerts.WandB(run, notes=True)
    for each in (one, same, note):
        send(each)
    assert [each["level"] for each in sent] == ["warn", "info"]
    assert "nonfinite" in sent[0]["text"]


def test_a_warning_reaches_the_user_from_the_training() -> None:
    """alerts.Warn as on_finding."""

    def climb(_model: nn.Module, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = -0.1

    with pytest.warns(UserWarning, match="negative-rate"):
        by_hand(alerts.Warn(), climb)
