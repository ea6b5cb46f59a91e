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
