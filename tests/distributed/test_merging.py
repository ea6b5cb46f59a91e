"""What the ranks' parts merge to, without processes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.distributed.fsdp import _fully_shard

import lrprobe
from lrprobe.distributed.layouts import Layouts, Region, _chunks, data_parallel
from lrprobe.distributed.ranks import Holding, Kind, Spec, check_alike, merge_rows
from lrprobe.engine.buffers import blank, fill
from lrprobe.engine.columns import StepInfo
from lrprobe.engine.flight import StepInFlight

pytestmark = pytest.mark.usefixtures("eager")

SAMPLED = ("time", "grad_persistence", "reconstruction_error", "state_error", "lost_fraction")
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
    """A shape whose rates are all counted, and regions that are all of it, some of them empty."""
    shape = tuple(draw(st.lists(st.integers(1, 50), min_size=1, max_size=3)))
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


def positions(region: Region) -> torch.Tensor:
    """Flat positions, in the whole parameter, of what a region holds."""
    whole = torch.arange(int(np.prod(region.shape))).view(region.shape)
    for dim, ranges in enumerate(region.cuts):
        at = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in ranges)])
        whole = whole.index_select(dim, at)
    return whole.reshape(-1)


@GENEROUS
@given(split=splits(), kind=st.sampled_from(sorted(OPTIMIZERS)), seed=st.integers(0, 9))
def test_merging_any_split_gives_the_figures_of_the_whole(
    split: tuple[tuple[int, ...], list[Region]], kind: str, seed: int
) -> None:
    """To 1e-10, and histograms to the bit, however a tensor is cut and however its rates spread."""
    shape, regions = split
    generator = torch.Generator().manual_seed(seed)
    whole = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    pieces = [nn.Parameter(whole.detach().reshape(-1)[positions(r)].clone()) for r in regions]
    each = [OPTIMIZERS[kind]([param]) for param in (whole, *pieces)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probes = [lrprobe.attach(o, every=1, to=lrprobe.sinks.Memory()) for o in each]
    hooks = [probe._recorder.hooks[0] for probe in probes]
    rows = hooks[0].rows
    for step in (1, 2):
        spread = 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        whole.grad = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        for piece, region in zip(pieces, regions, strict=True):
            piece.grad = whole.grad.reshape(-1)[positions(region)].clone()
        merged = blank(1, 0, torch.device("cpu"))
        folded: Any = 0.0
        each[0].step()
        with torch.no_grad():
            for one, optimizer in zip(hooks[1:], each[1:], strict=True):
                kept = one.engine.before(one.watched, optimizer)
                type(optimizer).step.__wrapped__(optimizer)  # without its hooks
                part = blank(1, 0, torch.device("cpu"))
                fill(part, one.engine.after(one.watched, optimizer, kept), [0], {}, folds=True)
                merged.sums += part.sums
                merged.maxima.copy_(torch.maximum(merged.maxima, part.maxima))
                folded = folded + part.fold_rows([0])
        merged.folded, merged.folded_rows = folded, [0]
        info = StepInfo(step, 0.0, type(each[0]).__name__, np.nan, {})
        got = StepInFlight(rows, merged, info).record()
        want = probes[0].frame()
        want = want[want["step"] == step].iloc[0]
        for name, values in got.tables["parameter"].items():
            if values.dtype == np.float64 and name not in SAMPLED:
                np.testing.assert_allclose(values[0], want[name], rtol=1e-10, err_msg=name)
        histogram = probes[0].histograms().iloc[step - 1]
        np.testing.assert_array_equal(got.counts[0], histogram["counts"])
        np.testing.assert_array_equal(got.edges[0], histogram["edges"])
    for probe in probes:
        probe.close()


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
        held = whole[positions(region)]
        index, local = region.find(wanted)
        assert held[local].tolist() == wanted[index].tolist()
        seen += index.tolist()
    assert sorted(seen) == list(range(len(wanted)))


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
    merged = merge_rows("A", kinds, range(4), 0)
    assert [(r.name, r.group) for r in merged.rows] == [("a", 0), ("tied", 0), ("b", 2)]
    assert [first for _, first in merged.owners] == [0, 0, 1]
    assert not merged.alone
    assert merge_rows("A", kinds[:1], range(4), 0).alone


def test_a_long_list_of_differences_is_cut() -> None:
    """Ten names, and how many more."""
    first = Spec((("A", tuple(holding(f"p{i}") for i in range(30))),))
    second = Spec((("A", tuple(holding(f"p{i}", dtype="bfloat16") for i in range(30))),))
    with pytest.raises(ValueError, match=r"p9 is 4×3 float32 on ranks 0-1, 3.* and 20 more"):
        merge_rows("A", [Kind((0, 1, 3), first), Kind((2,), second)], range(4), 0)


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
