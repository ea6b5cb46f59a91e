"""Over many ranks the figures are those of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_net
from launching import ROUNDING, check, differences, launch

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks tell of trainings that have no twin in one process."""
    cases = ("mixed_precision", "flat", "fsdp2-muon", "fsdp1-adafactor", "samples", "strangers")
    return launch(2, tmp_path_factory.mktemp("told"), *cases)


WHOLE_RULES = ("ddp-adafactor", "ddp-muon", "sequence-sgd", "zero", "stages")


def test_two_ranks_have_the_frame_of_one(tmp_path: Path) -> None:
    """Every wrapper and kind of optimizer, every table and level: to 1e-12, bins to the bit."""
    cases = [
        "ddp-several", "fsdp2-adamw", "fsdp2-adadelta", "fsdp2-sgd", "hsdp-adadelta", "tp-adadelta",
        "sequence-adamw", "fsdp1-adadelta", "fsdp1-several", *WHOLE_RULES,
    ]  # fmt: skip
    for case, told in launch(2, tmp_path, *cases).items():
        check(case, told)


@pytest.mark.slow
def test_generated_code_has_the_same_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loops are compiled, too."""
    monkeypatch.setenv("LRPROBE_ENGINE", "auto")
    (told,) = launch(2, tmp_path, "fsdp2-adamw", engine="auto").values()
    check("fsdp2-adamw", told)


@pytest.mark.slow
def test_four_ranks_have_the_frame_of_one(tmp_path: Path) -> None:
    """Uneven and empty shards, replicas, two-dimensional meshes, and lists of optimizers."""
    cases = [
        "ddp-adamw", "fsdp2-adamw", "fsdp2-several", "hsdp-several", "tp-several",
        "replicas-several", "fsdp2_tp-sgd", "fsdp2_tp-adadelta", "fsdp2_tp-several",
        "sequence-several", "fsdp1-adamw", "fsdp1_hybrid-several", "zero", "stages",
    ]  # fmt: skip
    for case, told in launch(4, tmp_path, *cases).items():
        check(case, told)


def test_mixed_precision_has_the_figures_of_the_gathered_gradients(
    told: dict[str, list[Any]],
) -> None:
    """In float32 to 1e-5, against a twin in one process that is fed what FSDP2 reduced."""
    got, want = told["mixed_precision"][0]
    estimates = r"gmean|p\d\d"
    for by in ("parameter", "module", "group", "model"):
        exact = [c for c in want[by] if not re.search(estimates, c) and c not in ROUNDING]
        wrong = differences({by: want[by][exact]}, {by: got[by][exact]}, 1e-5)
        assert not wrong, wrong
        for name in want[by].filter(regex=estimates):
            np.testing.assert_allclose(got[by][name], want[by][name], rtol=0.01, err_msg=name)
    assert not differences(
        {"histograms": want["histograms"]}, {"histograms": got["histograms"]}, 0.0
    )
    assert not differences({"elements": want["elements"]}, {"elements": got["elements"]}, 1e-5)


@pytest.mark.parametrize("case", ["fsdp2-muon", "fsdp1-adafactor"])
def test_rules_of_whole_parameters_are_measured_on_shards(
    told: dict[str, list[Any]], case: str
) -> None:
    """The share of |Δθ|/|g| is that of the whole parameter; what is not sharded keeps its rule."""
    frame = told[case][0]["parameter"]
    matrices = frame[frame["parameter"].map(rank_net.is_matrix)]
    assert set(matrices["rule"]) == {"measured"}
    if case == "fsdp2-muon":
        assert set(frame["rule"]) == {"measured", "adam"}
    assert matrices["effective_lr_p50"].notna().all()
    assert matrices["effective_lr_mean"].isna().all()
    applied = frame["effective_lr_applied"] * frame["grad_norm"]
    small = (frame["numel"] <= 4096) & (frame["rule"] == "measured")
    np.testing.assert_allclose(applied[small], frame["update_norm"][small], rtol=1e-9)


def test_flat_parameters_of_fsdp1_are_merged(told: dict[str, list[Any]]) -> None:
    """The one flat parameter has the elements and the norm of all ranks' parts."""
    frame, numel, norm = told["flat"][0]
    assert frame["numel"].tolist() == [numel] * 4
    assert frame["rule"].tolist() == ["adam"] * 4
    assert frame["param_norm"].iloc[-1] == pytest.approx(norm, rel=1e-12)


def test_samples_count_all_passes_of_all_ranks(told: dict[str, list[Any]]) -> None:
    """Two passes of 4 samples on each of 2 ranks are 16, under each wrapper."""
    assert told["samples"][0] == dict.fromkeys(("ddp", "fsdp2", "hsdp", "fsdp1"), 16.0)


def test_flat_buffers_of_nobody_are_not_merged(told: dict[str, list[Any]]) -> None:
    """Each rank's part has a row of its own, named by rank; what is the same on all has one."""
    (frame, said, first, beside), (_, quiet, second, _) = told["strangers"]
    assert len(said) == 1
    assert quiet == []
    last = frame[frame["step"] == 2].set_index("parameter")
    norms = {"rank0.group0.param0": first, "rank1.group0.param0": second, "group0.param1": beside}
    assert last["param_norm"].to_dict() == pytest.approx(norms, rel=1e-12)
    assert last["stepped"].all()
