"""Over many ranks the figures are those of one process, written once, in few messages."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrprobe.summary import shards
from lrprobe.summary.pending import StepInfo
from lrprobe.summary.shards import Region, Row, Share, Table
from lrprobe.summary.snapshot import Watched, tolerance
from torch import nn, optim
from torch.distributed.fsdp import _fully_shard

import lrprobe
from lrprobe import distributed
from lrprobe.distributed import (
    Exchange,
    Holding,
    Kind,
    Layouts,
    Merging,
    Spec,
    _chunks,
    check_alike,
    data_parallel,
    union,
)
from lrprobe.rules import find_rule

ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-12
KEYS = ["step", "optimizer", "group", "parameter", "module", "element"]


def launch(count: int, folder: Path, *cases: str, survives: bool = True) -> dict[str, list[Any]]:
    """Run cases on that many processes; case to what each rank returned."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(count), str(ROOT / "tests" / "ranks.py"), str(folder), *cases,
        ],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) is survives, done.stderr[-4000:]
    result = {}
    for case in cases:
        files = [folder / f"{case}.{rank}.pkl" for rank in range(count)]
        result[case] = [pickle.loads(f.read_bytes()) for f in files if f.exists()]  # noqa: S301
        failed = [told for told in result[case] if isinstance(told, str) and "Error:" in told]
        assert not failed or case in {"differing", "elsewhere", "killed"}, f"{case}: {failed[0]}"
    return result


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    keys = [key for key in KEYS if key in frame]
    return frame.sort_values(keys, ignore_index=True).drop(columns="time")


def differences(want: dict[str, Any], got: dict[str, Any], limit: float) -> list[str]:
    """Where tables are not the same: columns to a relative limit, all else to the bit."""
    found = []
    for table, expected in want.items():
        a, b = in_order(expected), in_order(got[table])
        if len(a) != len(b):
            found.append(f"{table} has {len(b)} rows, not {len(a)}")
            continue
        for name in a.columns:
            x, y = a[name], b[name]
            if name in {"edges", "counts"}:
                same = all(map(np.array_equal, x, y))
                found += [] if same else [f"{table}.{name}: {y.tolist()} instead of {x.tolist()}"]
            elif x.dtype == float:
                least = 1e-10 if name == "reconstruction_error" else 0.0
                close = np.isclose(y, x, rtol=limit, atol=least, equal_nan=True)
                found += [
                    f"{table}.{name}: {y[i]!r} instead of {x[i]!r}" for i in np.flatnonzero(~close)
                ][:3]
            elif not (x == y).all():
                found.append(f"{table}.{name}: {y.tolist()} instead of {x.tolist()}")
    return found


def check(case: str, told: list[Any]) -> None:
    """Rank 0 told what one process tells; the others have no frame."""
    kind = case.partition("-")[2] or "adamw"
    wrong = differences(ranks.alone(kind), told[0], EXACT)
    assert not wrong, f"{case} over {len(told)} ranks: " + "; ".join(wrong[:6])
    assert told[1:] == [None] * (len(told) - 1)


# ---- the figures --------------------------------------------------------------------------------

WHOLE_RULES = ("ddp-adafactor", "ddp-muon", "sequence-sgd", "zero", "stages")


def test_two_ranks_have_the_frame_of_one(tmp_path: Path) -> None:
    """Every wrapper and kind of optimizer, every table and level: to 1e-12, bins to the bit."""
    cases = [
        "ddp-several", "fsdp2-adamw", "fsdp2-adadelta", "fsdp2-sgd", "hsdp-adadelta", "tp-adadelta",
        "sequence-adamw", "fsdp1-adadelta", "fsdp1-several", *WHOLE_RULES,
    ]  # fmt: skip
    for case, told in launch(2, tmp_path, *cases).items():
        check(case, told)


def test_four_ranks_have_the_frame_of_one(tmp_path: Path) -> None:
    """Uneven and empty shards, replicas, two-dimensional meshes, and lists of optimizers."""
    cases = [
        "ddp-adamw", "fsdp2-adamw", "fsdp2-several", "hsdp-several", "tp-several",
        "replicas-several", "fsdp2_tp-sgd", "fsdp2_tp-adadelta", "fsdp2_tp-several",
        "sequence-several", "fsdp1-adamw", "fsdp1_hybrid-several", "zero", "stages",
    ]  # fmt: skip
    for case, told in launch(4, tmp_path, *cases).items():
        check(case, told)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks tell of trainings where something happens."""
    cases = (
        "lagging", "no_gradient", "added", "differing", "elsewhere", "untouched", "skipped",
        "unexplained", "mixed_precision", "flat", "fsdp2-muon", "fsdp1-adafactor", "samples",
        "counted-ddp", "counted-fsdp2", "counted-sequence", "warming",
    )  # fmt: skip
    return launch(2, tmp_path_factory.mktemp("told"), *cases)


def test_mixed_precision_has_the_figures_of_the_gathered_gradients(
    told: dict[str, list[Any]],
) -> None:
    """In float32 to 1e-5, against a twin in one process that is fed what FSDP2 reduced."""
    got, want = told["mixed_precision"][0]
    estimates = r"gmean|p\d\d"
    for by in ("parameter", "module", "group", "model"):
        exact = [c for c in want[by] if not re.search(estimates, c) and c != "reconstruction_error"]
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
    matrices = frame[frame["parameter"].map(ranks.is_matrix)]
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


# ---- ranks that disagree ------------------------------------------------------------------------


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
        assert step == ranks.STEPS, f"rank {rank}"
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
    assert other.startswith("this is rank 1 of the probe's process group, and rank 0 has")
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


# ---- messages -----------------------------------------------------------------------------------


def check_messages(told: list[Any], most: int) -> None:
    """At most so many collectives in recorded steps (1, 2 and 4), none in step 3 nor at the end."""
    for rank in told:
        calls = [len(step) for step in rank["steps"]]
        assert calls == [most, most, 0, most], rank["steps"]
        assert rank["close"] == []
        if most:
            assert [size for _, size in rank["steps"][0][-2:]] == list(rank["expected"])


def test_a_recorded_step_is_two_messages_and_three_under_sequence_parallelism(
    told: dict[str, list[Any]],
) -> None:
    """Of the documented size; where rank 0 has all of it, none."""
    check_messages(told["counted-ddp"], 0)
    check_messages(told["counted-fsdp2"], 2)
    check_messages(told["counted-sequence"], 3)


@pytest.mark.parametrize("count", [4, 8])
def test_messages_do_not_grow_with_ranks(count: int, tmp_path: Path) -> None:
    """As many, and as long, on 4 and 8 ranks as on 2."""
    found = launch(count, tmp_path, "counted-fsdp2", "counted-hsdp")
    for case in found.values():
        check_messages(case, 2)
        assert case[0]["expected"] == (448, 33816)


def test_message_sizes_are_the_documented_formulas() -> None:
    """docs/distributed.md works them out for 100,000 tensors; a tensor's size does not matter."""
    for size in (100, 1000):
        rows = [Row(f"w{i}", 0, (size, 100), "adam", 1e-3) for i in range(1000)]
        assert Table(rows).nbytes == (8 * 1001 * 7, 8 * 1000 * (28 + 1451))
    many = Table([Row(f"w{i}", 0, (4096, 4096), "adam", 1e-3) for i in range(100_000)])
    small, large = many.nbytes
    assert small == 8 * 100_001 * 7
    assert large == 8 * 100_000 * (28 + 256)


# ---- runs that end and go on --------------------------------------------------------------------


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


# ---- without processes --------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adadelta": optim.Adadelta,
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "asgd": optim.ASGD,
    "rmsprop": lambda p: optim.RMSprop(p, centered=True),
}
GENEROUS = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape, and regions that together are all of it, some of them empty."""
    shape = tuple(draw(st.lists(st.integers(1, 90), min_size=1, max_size=3)))
    parts = draw(st.lists(st.integers(1, 5), min_size=len(shape), max_size=len(shape)))
    strided = draw(st.integers(1, 3))
    cuts = []
    for dim, (size, count) in enumerate(zip(shape, parts, strict=True)):
        pieces = _chunks([(0, size)], strided if dim == 0 else 1)
        chunked = [_chunks(piece, count) for piece in pieces]
        cuts.append([[r for piece in chunked for r in piece[i]] for i in range(count)])
    regions = [Region(shape, ())]
    for choices in cuts:
        regions = [Region(shape, (*r.cuts, tuple(c))) for r in regions for c in choices]
    return shape, regions


@GENEROUS
@given(split=splits(), kind=st.sampled_from(sorted(OPTIMIZERS)), seed=st.integers(0, 9))
def test_merging_any_split_gives_the_figures_of_the_whole(
    split: tuple[tuple[int, ...], list[Region]], kind: str, seed: int
) -> None:
    """All tables, to 1e-12 and to the bit, however a tensor is cut and however its rates spread."""
    shape, regions = split
    generator = torch.Generator().manual_seed(seed)
    whole = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = OPTIMIZERS[kind]([whole])
    pieces = [nn.Parameter(part_of(whole.detach(), region)) for region in regions]
    optimizers = [OPTIMIZERS[kind]([piece]) for piece in pieces]
    rule, lr = find_rule(type(optimizer)), optimizer.param_groups[0]["lr"]
    assert rule is not None
    probe = lrprobe.attach(optimizer, every=1, track=3)
    where = probe._recorder.hooks[0].watched[0].tracked
    table = Table([Row("group0.param0", 0, shape, rule.name, tolerance(whole.dtype, rule), where)])
    shares = [
        Share(
            table,
            [(0, Watched("group0.param0", 0, weakref.ref(piece), rule, None, 0, lr), region)],
            torch.device("cpu"),
        )
        for piece, region in zip(pieces, regions, strict=True)
    ]
    records = []
    for step in (1, 2):
        spread = 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        whole.grad = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        for piece, region in zip(pieces, regions, strict=True):
            piece.grad = part_of(whole.grad, region)
        with torch.no_grad():
            kept = [s.before(o) for s, o in zip(shares, optimizers, strict=True)]
            for each in (optimizer, *optimizers):
                each.step()
            merged = [s.after(o, k) for s, o, k in zip(shares, optimizers, kept, strict=True)]
        highest = torch.stack([m.maxima for m in merged]).amax(0).numpy()
        total = torch.stack([m.sums for m in merged]).sum(0).numpy()
        info = StepInfo(step, 0.0, type(optimizer).__name__, np.nan, {})
        records.append(table.arrived(highest, total, [rule.name]).record(info))
        assert not table.judge(highest, total)
    got = {
        name: pd.concat([pd.DataFrame(dict(columns(r))) for r in records], ignore_index=True)
        for name, columns in {
            "parameter": lambda r: r.tables["parameter"],
            "model": lambda r: r.tables["model"],
            "elements": lambda r: r.elements,
            "histograms": lambda r: r.histograms(),
        }.items()
    }
    want = ranks.frames(probe)
    wrong = differences({name: want[name] for name in got}, got, 1e-11)
    assert not wrong, wrong[:5]
    probe.close()


def part_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.reshape(-1)[region.global_positions()].reshape(region.local_shape).clone()


@GENEROUS
@given(split=splits(), data=st.data())
def test_regions_find_what_they_hold(
    split: tuple[tuple[int, ...], list[Region]], data: st.DataObject
) -> None:
    """Each position is in one region, where the element is that of the whole."""
    shape, regions = split
    whole = torch.arange(int(np.prod(shape)))
    wanted = torch.tensor(
        data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=20)),
    )
    seen = []
    for region in regions:
        held = whole[region.global_positions()]
        index, local = region.find(wanted)
        assert held[local].tolist() == wanted[index].tolist()
        seen += index.tolist()
    assert sorted(seen) == list(range(len(wanted)))


@GENEROUS
@given(
    exponents=st.lists(st.floats(-45, 38), min_size=1, max_size=200),
    some=st.lists(st.sampled_from([0.0, np.inf, 1e-40]), max_size=3),
    parts=st.integers(1, 4),
)
def test_folded_histograms_unfold(exponents: list[float], some: list[float], parts: int) -> None:
    """Counts of every fine bin, where no two octaves that hold rates are 64 apart."""
    rates = torch.tensor([10.0**e for e in exponents] + some, dtype=torch.float64)
    table = Table([Row("a", 0, (100, 100), "adam", 1e-3), Row("b", 0, (100, 100), "adam", 1e-3)])
    sums = torch.zeros(table.numbers, dtype=torch.float64)
    for part in rates.chunk(parts):
        mine = torch.zeros_like(sums)
        table.count(mine, torch.ones(len(part), dtype=torch.int64), part, torch.ones(len(part)))
        sums += mine
    assert table.histogram(sums.numpy(), 0) is None
    found = table.histogram(sums.numpy(), 1)
    assert found is not None
    bins, counts = np.unique(shards.fine_bins(rates).numpy(), return_counts=True)
    bins = np.where(bins < 64, 0, bins)  # below what float32 has as normal numbers: one bin
    octaves = np.unique(bins[(bins > 0) & (bins < 255 * 64)] >> 6)
    assert found.counts.sum() == pytest.approx(len(rates), abs=1e-9)
    if len(np.unique(octaves % 64)) == len(octaves):
        merged = {b: counts[bins == b].sum() for b in bins}
        assert dict(zip(found.bins.tolist(), found.counts.tolist(), strict=True)) == merged


def holding(name: str, **changes: Any) -> Holding:
    values = {
        "name": name, "group": 0, "shape": (4, 3), "dtype": "float32", "rule": "adam",
        "key": "", "first": -1, "sharded": False, **changes,
    }  # fmt: skip
    return Holding(**values)


def test_names_decide_what_is_merged() -> None:
    """Not positions: stages in another order; the lowest rank's copy of a tied weight counts."""
    kinds = [
        Kind((0, 2), Spec((("A", (holding("a"), holding("tied"))),))),
        Kind((1, 3), Spec((("A", (holding("tied", group=1), holding("b", group=2))),))),
    ]
    merged = union("A", kinds, range(4), 0)
    assert [(r.name, r.group) for r in merged.rows] == [("a", 0), ("tied", 0), ("b", 2)]
    assert [first for _, first in merged.owners] == [0, 0, 1]
    assert not merged.alone
    assert union("A", kinds[:1], range(4), 0).alone


def test_a_long_list_of_differences_is_cut() -> None:
    """Ten names, and how many more."""
    first = Spec((("A", tuple(holding(f"p{i}") for i in range(30))),))
    second = Spec((("A", tuple(holding(f"p{i}", dtype="bfloat16") for i in range(30))),))
    with pytest.raises(ValueError, match=r"p9 is 4×3 float32 on ranks 0-1, 3.* and 20 more"):
        union("A", [Kind((0, 1, 3), first), Kind((2,), second)], range(4), 0)


def a_probe() -> tuple[lrprobe.Probe, optim.Optimizer]:
    """Of this process alone, and an optimizer with a gradient."""
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = optim.SGD([param], lr=0.1)
    return lrprobe.attach(optimizer, every=1), optimizer


def test_figures_that_fail_on_their_way_are_given_up() -> None:
    """A process group that broke is told once; steps are counted, and the frame is there."""

    class Broken(Merging):
        def __init__(self) -> None:
            pass

        def ready(self) -> bool:
            raise RuntimeError("connection reset by peer")

    probe, optimizer = a_probe()
    optimizer.step()
    with pytest.warns(UserWarning, match="could not be recorded: RuntimeError: connection reset"):
        probe._recorder.add(probe._recorder.hooks[0], Broken())
    probe._recorder.add(probe._recorder.hooks[0], Broken())
    optimizer.step()
    assert probe.frame()["step"].tolist() == [1, 2]
    assert probe.state_dict() == {"steps": {"SGD": 2}}
    with pytest.warns(UserWarning, match="2 steps of SGD could not be recorded"):
        probe.close()


def test_closing_waits_a_minute_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often and for how much the other ranks are waited for, when they never come."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    time = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(distributed, "time", time)
    never = SimpleNamespace(is_completed=lambda: False)
    probe, _ = a_probe()
    (hooks,) = probe._recorder.hooks
    exchange = Exchange.__new__(Exchange)
    exchange._world = SimpleNamespace(rank=0)
    info = StepInfo(step=1, time=0.0, optimizer="SGD", samples=math.nan, run={})
    table, buffers = SimpleNamespace(rows=[], nbytes=(0, 0)), SimpleNamespace()
    waiting = [Merging(exchange, table, buffers, [never], info, still=False) for _ in range(3)]
    exchange._previous = waiting[-1]
    hooks.exchange = exchange
    probe._recorder._waiting.extend((hooks, each) for each in waiting)
    with (
        pytest.warns(UserWarning, match="3 steps of SGD could not be recorded"),
        pytest.warns(UserWarning, match="within 60 s"),
    ):
        probe.close()
    assert 60 <= clock[0] < 61


def test_a_failing_rank_is_named() -> None:
    """By those that did not fail."""
    kinds = [Kind((0, 1), Spec(())), Kind((2,), Spec((), error="OSError: disk full"))]
    with pytest.raises(RuntimeError, match="attach failed on rank 2: OSError: disk full"):
        check_alike(kinds)


def test_a_plain_parameter_is_held_whole() -> None:
    """Complex numbers count twice."""
    layout = Layouts(None).of(nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64)), {})
    assert layout.shape == (3, 2, 2)
    assert layout.region.whole
    assert not layout.sharded


def test_variance_survives_nearly_equal_shards() -> None:
    """A spread of 1e-6 of the mean, over shards with different means, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    rates = 0.3 * (1 + 1e-6 * torch.randn(9000, generator=generator, dtype=torch.float64))
    rates, _ = rates.sort()
    total = dict.fromkeys(shards.SUMS, 0.0)
    high = dict.fromkeys(shards.MAXIMA, np.array([-np.inf]))
    for part in rates.split([1000, 1, 4999, 3000]):
        n = torch.tensor([len(part)], dtype=torch.float64)
        mean = part.mean().reshape(1)
        for name, value in shards._moments(n, mean, (part - mean).square().sum()).items():
            total[name] += value.numpy()
        total["elements"] += n.numpy()
        high["rate_max"] = np.maximum(high["rate_max"], float(part.max()))
        high["rate_min"] = np.maximum(high["rate_min"], -float(part.min()))
    parts = Table([Row("a", 0, (9000,), "adam", 1e-3)])._parts(high, total)
    std = np.sqrt(parts["rate_m2"] / 9000)
    np.testing.assert_allclose(std, rates.numpy().std(), rtol=1e-5)
    np.testing.assert_allclose(parts["rate_mean"], rates.numpy().mean(), rtol=1e-15)


def test_alone_a_process_group_is_no_matter() -> None:
    """Without torch.distributed initialised, attach makes no message and needs no group."""
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = lrprobe.attach(optim.SGD(model.parameters(), lr=0.1), model, process_group=None)
    assert probe._recorder.hooks[0].exchange is None
    probe.close()


_GROUP = SimpleNamespace(mesh_info=SimpleNamespace(shard_mesh_size=2, replicate_mesh_size=3))


@pytest.mark.parametrize(
    ("state", "ranks"),
    [
        ({"_fsdp_param_groups": [_GROUP]}, 6),
        ({"_fsdp_param_groups": []}, None),
        ({"_fsdp_param_group": _GROUP}, 6),
        ({"_fsdp_param_group": None}, None),
    ],
)
def test_data_parallel_ranks_are_told_by_every_torch(monkeypatch, state, ranks):
    """FSDP2 has a list of groups, in torch 2.9 only one; here 2 shards times 3 replicas."""

    class Sharded(nn.Module):
        def _get_fsdp_state(self):
            return SimpleNamespace(**state)

    monkeypatch.setattr(_fully_shard, "FSDPModule", Sharded)
    assert data_parallel(Sharded()) == ranks
