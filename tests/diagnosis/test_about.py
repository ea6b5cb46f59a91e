"""What describes a run goes with its frame, and checks that lack it say so."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from bugs import LINEAR, only_optimizer
from torch import nn, optim
from trainings import adamw, codes, net, sgd, train

import lrprobe


def groups(frame: pd.DataFrame, optimizer: str = "AdamW") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = frame.attrs["lrprobe"]["optimizers"][optimizer]["groups"]
    return found


def test_a_frame_carries_hyperparameters_versions_and_names(tmp_path: Path) -> None:
    """From memory and from disk, at every level; also in mid-run, and before the first step."""
    model = net()
    optimizer = optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    path = tmp_path / "a.parquet"
    with lrprobe.attach(optimizer, model, to=str(path)) as probe:
        assert groups(probe.frame())[0]["betas"] == [0.9, 0.95]
        assert groups(lrprobe.read(path))[0]["betas"] == [0.9, 0.95]
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        for by in ("parameter", "module", "group", "model"):
            about = probe.frame(by).attrs["lrprobe"]
            assert about["optimizers"]["AdamW"]["class"].endswith("AdamW")
            assert about["torch"] == torch.__version__
            assert about["not_in_optimizer"] == []
    assert groups(lrprobe.read(path)) == groups(probe.frame())
    assert groups(lrprobe.read(path))[0]["dtypes"] == ["float32"]


def test_it_survives_read_of_several_paths_and_pandas(tmp_path: Path) -> None:
    """By the name of the run; selections, copies and concatenations of one run keep it."""
    paths = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for path, beta in zip(paths, (0.9, 0.99), strict=True):
        train(adamw(betas=(0.5, beta)), steps=5, to=str(path))
    both = lrprobe.read(*paths)
    runs = both.attrs["lrprobe"]["runs"]
    betas = {name: run["optimizers"]["AdamW"]["groups"][0]["betas"] for name, run in runs.items()}
    assert betas == {"one": [0.5, 0.9], "two": [0.5, 0.99]}
    one = lrprobe.read(paths[0])
    for kept in (one.copy(), one[one["step"] > 2], one.assign(x=1), pd.concat([one, one])):
        assert groups(kept)[0]["betas"] == [0.5, 0.9]


def test_a_check_that_lacks_it_says_so_and_assumes_nothing() -> None:
    """As for a frame that was put together by hand."""

    def spike(step: int, model: nn.Module, _: Any) -> None:
        if step == 30:
            for param in model.parameters():
                param.grad.mul_(100)

    frame = train(adamw(betas=(0.5, 0.999)), before=spike)
    assert "adam-scale" not in codes(frame)
    bare = frame.copy()
    bare.attrs.clear()
    result = lrprobe.diagnose(bare)
    (sentence,) = [each for each in result.left_out if "the description of the run" in each]
    for code in ("adam-scale", "short-warmup", "step-stuck", "not-in-optimizer", "eps-underflows"):
        assert code in sentence
    assert not [each for each in result if each.code in ("adam-scale", "short-warmup")]
    assert not [s for s in lrprobe.diagnose(frame).left_out if "the description of the run" in s]


def test_without_a_model_it_is_said_what_cannot_be_known() -> None:
    """Which of its parameters no optimizer has."""
    model = net()
    optimizer = optim.SGD(model[0].parameters(), lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(12):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    sentences = [s for s in lrprobe.diagnose(probe.frame()).left_out if "not-in-optimizer" in s]
    assert len(sentences) == 1
    assert "step-stuck" not in sentences[0]


def test_hyperparameters_that_change_have_a_history(tmp_path: Path) -> None:
    """From which step on they held."""

    def change(step: int, _model: nn.Module, optimizer: Any) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.1 if step < 6 else 0.2

    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "logdir")]
    frame = train(adamw(), steps=10, before=change, to=paths)
    for each in (frame, *map(lrprobe.read, paths)):
        history = each.attrs["lrprobe"]["optimizers"]["AdamW"]["history"]
        assert [past["groups"][0]["weight_decay"] for past in history][-2:] == [0.1, 0.2]
        assert history[-1]["step"] in (6, 7)  # told by the next recorded step


def test_a_logdir_describes_its_run_as_a_dataset_does(tmp_path: Path) -> None:
    """Of each attempt and of several optimizers, with the history of their groups."""
    model, places = net(), [str(tmp_path / "a.parquet"), str(tmp_path / "logdir")]
    for _ in range(2):
        optimizers = {
            "body": optim.AdamW(model[0].parameters()),
            "head": optim.SGD(model[2].parameters(), lr=0.1),
        }
        with lrprobe.attach(optimizers, model, to=places, every=1):
            for step in range(6):
                optimizers["body"].param_groups[0]["weight_decay"] = 0.1 if step < 3 else 0.2
                model(torch.randn(4, 64)).sum().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
    dataset, logdir = (lrprobe.read(place).attrs["lrprobe"] for place in places)
    assert [past["attempt"] for past in dataset["optimizers"]["body"]["history"]] == [0, 0, 1, 1]
    assert logdir == dataset


@pytest.mark.parametrize("every", [1, 10])
def test_a_resume_in_one_memory_is_seen(every: int) -> None:
    """Two probes that share it have one attempt."""
    memory, model = lrprobe.sinks.Memory(), net()
    options: dict[str, Any] = {"model": model, "to": memory, "every": every}
    train(sgd(), steps=60, schedule=LINEAR, **options)
    train(sgd(), steps=60, first=61, step=60, schedule=LINEAR, **options)
    assert "lr-jumps" in codes(memory.frame())
    assert only_optimizer.__doc__


def test_masters_of_parameters_are_not_taken_for_missing_ones() -> None:
    """An optimizer that has copies of the model's parameters."""
    model = net().to(torch.bfloat16)
    masters = [param.detach().float().requires_grad_() for param in model.parameters()]
    optimizer = optim.SGD(masters, lr=0.1)
    with pytest.warns(UserWarning, match="none of the optimizer's parameters"):
        probe = lrprobe.attach(optimizer, model, every=1)
    for _ in range(5):
        model(torch.randn(4, 64).to(torch.bfloat16)).float().sum().backward()
        for master, param in zip(masters, model.parameters(), strict=True):
            master.grad = param.grad.float()
        optimizer.step()
    probe.close()
    assert probe.frame().attrs["lrprobe"]["not_in_optimizer"] is None
    assert "not-in-optimizer" not in codes(probe.frame())
