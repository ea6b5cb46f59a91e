"""Ranks among which something happens: nothing hangs, and all come to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_net
from launching import launch

import lrprobe


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks tell of trainings where something happens."""
    cases = (
        "lagging", "no_gradient", "added", "differing", "elsewhere", "untouched", "skipped",
        "unexplained", "warming",
    )  # fmt: skip
    return launch(2, tmp_path_factory.mktemp("told"), *cases)


def test_a_rank_without_a_gradient_leaves_a_row_without_a_step(told: dict[str, list[Any]]) -> None:
    """Only that parameter, only in that step."""
    frame = told["no_gradient"][0]
    assert len(frame) == 3 * 7
    not_stepped = frame[~frame["stepped"]]
    assert not_stepped[["step", "parameter"]].to_numpy().tolist() == [[2, "down.bias"]]
    assert not_stepped["param_norm"].notna().all()
    assert not_stepped["lr"].tolist() == [0.01]


def test_a_rank_that_skips_a_step_lags_and_nothing_hangs(told: dict[str, list[Any]]) -> None:
    """Its steps count one later; the last record, which it has no part of, is given up."""
    frame, messages = told["lagging"][0]
    assert frame["step"].unique().tolist() == [1, 2, 3]
    assert frame["stepped"].all()
    assert any("have not recorded their part of step 4" in message for message in messages)


def test_ranks_agree_on_what_was_a_step(told: dict[str, list[Any]]) -> None:
    """One without rates is, where some rank has a gradient; else it is a checkpoint library's."""
    for rank, (saved, step, _) in enumerate(told["warming"]):
        assert saved == {"SGD": 0}, f"rank {rank}"
        assert step == rank_net.STEPS, f"rank {rank}"
    frame = told["warming"][0][2]
    steps = frame.pivot_table(index="step", columns="parameter", values="param_norm") / 2
    assert steps.to_numpy().tolist() == [[0, 0], [1, 1], [3, 3]], frame
    assert steps.index.tolist() == [1, 2, 4]


def test_a_parameter_added_on_one_rank_appears_one_recorded_step_late(
    told: dict[str, list[Any]],
) -> None:
    """With its own learning rate and group; the others go on."""
    frame = told["added"][0]
    assert frame.groupby("step").size().tolist() == [6, 6, 7, 7]
    late = frame[frame["parameter"] == "down.bias"]
    assert late[["step", "group", "lr"]].to_numpy().tolist() == [[3, 1, 0.5], [4, 1, 0.5]]
    assert late["stepped"].all()
    assert (late["reconstruction_error"] < 1e-12).all()


def test_what_cannot_be_merged_is_an_error_on_every_rank(told: dict[str, list[Any]]) -> None:
    """It says which names differ on which ranks; a rank's own failure reaches the others."""
    for rank, messages in enumerate(told["differing"]):
        shapes, every, names, failure, model = messages
        assert shapes.startswith("ValueError: the parameters of SGD differ between ranks")
        assert "weight is 2×4 float32 on rank 0, 3×4 float32 on rank 1" in shapes
        assert "every=3 on rank 0, every=2 on rank 1" in every
        assert "the optimizers b on rank 0, a on rank 1" in names
        assert "no sink writes .csv files" in failure
        assert failure.startswith("RuntimeError: attach failed on rank 0" if rank else "ValueError")
        assert "model must be a torch.nn.Module or None" in model
        assert model.startswith("TypeError" if rank else "RuntimeError: attach failed on rank 1")


def test_only_rank_0_has_the_frame(told: dict[str, list[Any]]) -> None:
    """The others say so; the counts, which go into checkpoints, are the same on all."""
    first, other = told["elsewhere"]
    assert first == "28 rows, {'steps': {'AdamW': 4}}"
    assert other.startswith("this is rank 1 of the probe's process group, and only rank 0")
    assert other.endswith("{'steps': {'AdamW': 4}}")


def test_training_is_the_same_bits_with_a_probe(told: dict[str, list[Any]]) -> None:
    """Shards after some steps, on every rank."""
    assert told["untouched"] == [True, True]


def test_steps_that_a_scaler_skips(told: dict[str, list[Any]]) -> None:
    """Skipped everywhere: the gradient's norm stays, unscaled. By one rank: figures of the rest."""
    frame = told["skipped"][0].set_index("step")
    assert not frame.loc[2, "stepped"].any()
    assert frame.loc[2, "effective_lr_p50"].isna().all()
    assert frame.loc[2, "decay"].isna().all()
    assert (frame.loc[2, "grad_norm"].to_numpy() > 0).all()
    ratio = frame.loc[2, "grad_norm"].to_numpy() / frame.loc[1, "grad_norm"].to_numpy()
    assert ((ratio > 0.2) & (ratio < 5)).all()  # and not four times as much
    assert (frame.loc[3, "stepped"]).all()
    assert (frame.loc[3, "reconstruction_error"] < 1e-6).all()
    sizes = frame.loc[3, "param_norm"].to_numpy() / frame.loc[2, "param_norm"].to_numpy()
    np.testing.assert_allclose(sizes, 1, atol=0.5)


def test_rules_that_do_not_hold_are_measured_on_all_ranks_at_once(
    told: dict[str, list[Any]],
) -> None:
    """After two steps where the rule is wrong, at once where it raises or is not there."""
    result = told["unexplained"][0]
    for name, rules in {
        "Twice": ["sgd", "sgd", "measured", "measured"],
        "Odd": ["measured"] * 4,
        "Unknown": ["measured"] * 4,
    }.items():
        frame = result[name]["parameter"]
        assert frame.groupby("step")["rule"].unique().map(list).tolist() == [[r] for r in rules]
    sign = result["Unknown"]["parameter"]
    np.testing.assert_allclose(sign["update_norm"], 0.1 * np.sqrt(sign["numel"]), rtol=1e-9)
    twice = result["Twice"]["parameter"].set_index("step").loc[4]
    np.testing.assert_allclose(twice["effective_lr_p50"], 0.2, rtol=0.01)
    odd = result["Odd"]["parameter"].set_index("step").loc[3]
    np.testing.assert_allclose(odd["effective_lr_p50"], 0.1, rtol=0.01)


@pytest.mark.slow
def test_another_world_size_goes_on_in_the_same_dataset(tmp_path: Path) -> None:
    """Steps of 2 ranks, then of 1, then of 4, in one frame, each an attempt."""
    for count in (2, 4):
        assert launch(count, tmp_path, "resumed")["resumed"] == [3 if count == 2 else 6] * count
    frame = lrprobe.read(tmp_path / "run.parquet")
    steps = frame.groupby(["attempt", "step"]).size()
    assert steps.to_dict() == dict.fromkeys(((0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)), 7)


def test_a_killed_rank_leaves_a_dataset_that_opens(tmp_path: Path) -> None:
    """With all that was recorded before it died."""
    launch(2, tmp_path, "killed", survives=False)
    frame = lrprobe.read(tmp_path / "killed.parquet")
    steps = sorted(frame["step"].unique().tolist())
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert (frame.groupby("step").size() == 7).all()
