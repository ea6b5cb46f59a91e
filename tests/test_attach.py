"""`attach`: names, when to record, what to leave out, bad input."""

from __future__ import annotations

import copy
import re
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import lrprobe
from lrprobe import optional
from lrprobe.recorder import open_recorders

pytestmark = pytest.mark.usefixtures("seeded", "eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile itself
def test_names() -> None:
    """Names are the model's, else the group's param_names, else group0.param3."""
    model = nn.Sequential(nn.Linear(2, 2))

    def names(optimizer: Optimizer, model: nn.Module | None) -> list[str]:
        with lrprobe.attach(optimizer, model, every=1) as probe:
            optimizer.step()
        return probe.frame()["parameter"].tolist()

    plain = torch.optim.SGD(model.parameters())
    assert names(plain, model) == ["0.weight", "0.bias"]
    assert names(plain, None) == ["group0.param0", "group0.param1"]
    named = torch.optim.SGD(model.named_parameters(prefix="net"))
    assert names(named, None) == ["net.0.weight", "net.0.bias"]
    compiled = torch.compile(model)
    assert names(plain, compiled) == ["0.weight", "0.bias"]
    awkward = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    assert names(torch.optim.SGD(awkward.parameters()), awkward) == ["module.weight"]


def steps_recorded(options: dict[str, Any], steps: int = 12) -> list[int]:
    """Which steps are in the frame."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, **options) as probe:
        for _ in range(steps):
            param.grad = torch.ones(2)
            optimizer.step()
    return probe.frame()["step"].tolist()


def test_every() -> None:
    """`every` is the first step and every multiple, or a predicate; 10 unless said otherwise."""
    assert steps_recorded({}) == [1, 10]
    assert steps_recorded({"every": 1}, 3) == [1, 2, 3]
    assert steps_recorded({"every": 4}) == [1, 4, 8, 12]
    assert steps_recorded({"every": lambda step: step in (2, 7)}) == [2, 7]
    assert steps_recorded({"every": lambda step: False}) == []


def test_step() -> None:
    """`step` is where to start counting, or the trainer's own step; the first step is recorded."""
    assert steps_recorded({"every": 5, "step": 8}) == [9, 10, 15, 20]
    trainer = iter([3, 4, 5, 9, 10])
    assert steps_recorded({"every": 1, "step": lambda: next(trainer)}, 5) == [3, 4, 5, 9, 10]


def test_the_count_goes_on_from_the_optimizers_own() -> None:
    """Attached to an optimizer that has stepped, the count goes on from its state."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param])
    for _ in range(7):
        param.grad = torch.ones(2)
        optimizer.step()
    with lrprobe.attach(optimizer, every=1) as probe:
        assert probe.step == 7
        optimizer.step()
        assert probe.step == 8
    assert probe.frame()["step"].tolist() == [8]


def test_include_and_exclude() -> None:
    """`include` and `exclude` choose by re.search on names."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())

    def names(**options: Any) -> list[str]:
        with lrprobe.attach(optimizer, model, every=1, **options) as probe:
            optimizer.step()
        return probe.frame()["parameter"].tolist()

    assert names(include="weight") == ["0.weight", "1.weight"]
    assert names(include=["^0", r"1\.bias$"]) == ["0.weight", "0.bias", "1.bias"]
    assert names(exclude="bias") == ["0.weight", "1.weight"]
    assert names(include="^1", exclude=["bias"]) == ["1.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_warns(option: str) -> None:
    """`include` or `exclude` that matches no name warns, and shows the pattern."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.warns(UserWarning, match="encoder"):
        lrprobe.attach(optimizer, **{option: "encoder"}).close()


def test_frame_in_mid_run_and_after_close() -> None:
    """`frame()` waits for what is in flight, in mid-run too, and works after `close()`."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    probe = lrprobe.attach(optimizer, every=1)
    for step in range(1, 4):
        param.grad = torch.ones(2)
        optimizer.step()
        assert probe.frame()["step"].tolist() == list(range(1, step + 1))
    probe.close()
    probe.close()
    optimizer.step()
    assert probe.frame()["step"].tolist() == [1, 2, 3]


def test_state_dict_carries_the_count() -> None:
    """A probe goes on counting where another stood, for optimizers that keep no step."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(3):
            optimizer.step()
        state = copy.deepcopy(probe.state_dict())
    with lrprobe.attach(optimizer, every=1) as probe:
        probe.load_state_dict(state)
        optimizer.step()
    assert probe.frame()["step"].tolist() == [4]


def sgd() -> torch.optim.SGD:
    """Some optimizer."""
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


BAD: list[tuple[str, Any, dict[str, Any], type[Exception], list[str]]] = [
    ("int", 3, {}, TypeError, ["int", "Optimizer"]),
    ("none", None, {}, TypeError, ["None", "Optimizer"]),
    ("model-first", nn.Linear(2, 2), {}, TypeError, ["Linear", "Optimizer", "dict"]),
    ("empty", [], {}, ValueError, ["empty"]),
    ("in-a-list", "[sgd, 3]", {}, TypeError, ["int", "Optimizer"]),
    ("model", None, {"model": 3}, TypeError, ["int", "Module"]),
    ("to-int", None, {"to": 3}, TypeError, ["int", "SummaryWriter", ".parquet"]),
    ("to-csv", None, {"to": "run.csv"}, ValueError, [".csv", ".parquet", "TensorBoard"]),
    ("to-url", None, {"to": "s3://bucket/x.parquet"}, ValueError, ["s3://"]),
    ("to-in-list", None, {"to": ["tb", 3]}, TypeError, ["int", ".parquet"]),
    ("every-0", None, {"every": 0}, ValueError, ["every", "0", "at least 1"]),
    ("every-negative", None, {"every": -3}, ValueError, ["every", "-3"]),
    ("every-float", None, {"every": 1.5}, TypeError, ["every", "1.5"]),
    ("every-text", None, {"every": "epoch"}, TypeError, ["every", "epoch"]),
    ("include", None, {"include": "("}, ValueError, ["include", "(", "regular expression"]),
    ("exclude", None, {"exclude": ["a", "["]}, ValueError, ["exclude", "[", "regular"]),
    ("include-int", None, {"include": 3}, TypeError, ["include", "3"]),
    ("track", None, {"track": -1}, ValueError, ["track", "-1"]),
    ("track-float", None, {"track": 1.5}, TypeError, ["track", "1.5"]),
    ("batch-size", None, {"batch_size": 0}, ValueError, ["batch_size", "0"]),
    ("batch-size-float", None, {"batch_size": 2.5}, TypeError, ["batch_size", "2.5"]),
    ("step", None, {"step": -1}, ValueError, ["step", "-1"]),
    ("step-text", None, {"step": "now"}, TypeError, ["step", "now"]),
]


@pytest.mark.parametrize(("given", "options", "error", "words"), [b[1:] for b in BAD],
                         ids=[b[0] for b in BAD])  # fmt: skip
def test_bad_input_gets_a_clear_error_at_the_call(
    given: Any,
    options: dict[str, Any],
    error: type[Exception],
    words: list[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says what came and what is allowed, and nothing was left behind."""
    monkeypatch.chdir(tmp_path)
    optimizer = sgd()
    target = [optimizer, 3] if given == "[sgd, 3]" else given
    if given is None and options:
        target = optimizer
    with pytest.raises(error) as caught:
        lrprobe.attach(target, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not list(tmp_path.iterdir()), f"left behind: {list(tmp_path.iterdir())}"


@pytest.mark.parametrize("name", ["run.parquet", "logdir"])
def test_a_destination_that_cannot_be_written(name: str, tmp_path: Any) -> None:
    """A destination that cannot be written is an OSError at the call, which names it."""
    (tmp_path / "file").write_text("in the way")
    optimizer = sgd()
    path = tmp_path / "file" / name
    with pytest.raises(OSError, match=re.escape(name)):
        lrprobe.attach(optimizer, to=path)
    assert not optimizer._optimizer_step_post_hooks


def test_an_attach_that_fails_leaves_nothing_behind() -> None:
    """Not even where it fails late: on a second optimizer, or by a warning that is an error."""

    class Odd(torch.optim.SGD):
        def register_step_post_hook(self, hook: Any) -> Any:
            raise RuntimeError("no hooks here")

    first = sgd()
    with pytest.raises(RuntimeError, match="no hooks here"):
        lrprobe.attach([first, Odd([nn.Parameter(torch.ones(2))])])
    strange = nn.Linear(2, 2)
    with pytest.raises(UserWarning, match="none of the optimizer's parameters"):
        lrprobe.attach(first, strange)
    assert not first._optimizer_step_pre_hooks
    assert not first._optimizer_step_post_hooks
    assert not [each for each in open_recorders if first in [h.optimizer for h in each.hooks]]


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout without metadata, imported from its folder, attaches and records."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(optional, "version", missing)
    optional.version_of.cache_clear()
    optimizer = sgd()
    with lrprobe.attach(optimizer, every=1) as probe:
        optimizer.step()
    optional.version_of.cache_clear()
    assert probe.frame().attrs["lrprobe"]["lrprobe"] == "not installed"


def test_no_memory_no_frame() -> None:
    """`frame()` after max_bytes=0 says why there is none."""
    probe = lrprobe.attach(sgd(), to=lrprobe.sinks.Memory(max_bytes=0))
    for table in (probe.frame, probe.elements, probe.histograms):
        with pytest.raises(RuntimeError, match="max_bytes"):
            table()
    probe.close()


def test_frame_by_something_else() -> None:
    """Another `by` is refused with those that are allowed."""
    with lrprobe.attach(sgd()) as probe, pytest.raises(ValueError, match="layer") as caught:
        probe.frame(by="layer")
    for word in ("parameter", "module", "group", "model"):
        assert word in str(caught.value)


def test_a_cell_run_twice_records_once(tmp_path: Any) -> None:
    """A probe with the same destination replaces the old one, with a warning."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    old = lrprobe.attach(optimizer, to=tmp_path / "run.parquet", every=1)
    with pytest.warns(UserWarning, match=r"run\.parquet"):
        new = lrprobe.attach(optimizer, to=tmp_path / "run.parquet", every=1)
    param.grad = torch.ones(2)
    optimizer.step()
    new.close()
    assert len(old.frame()) == 0
    assert len(new.frame()) == 1


def test_a_wrapper_is_looked_through() -> None:
    """An object that holds the optimizer is looked through, also one that is an Optimizer."""

    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    class Posing(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:  # like AcceleratedOptimizer
            self.optimizer = optimizer

    class Short:
        def __init__(self, optim: Any) -> None:
            self.optim = optim

    class Private(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:  # like Opacus's DPOptimizer
            self.original_optimizer = optimizer

    for wrap in (Wrapper, Posing, Short, Private):
        optimizer = sgd()
        with lrprobe.attach(wrap(optimizer), every=1) as probe:
            optimizer.step()
        assert probe.frame()["optimizer"].tolist() == ["SGD"]


def test_the_first_step_after_a_resume_is_recorded() -> None:
    """The first step after `attach` is recorded, also where the count goes on from the state."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param])
    for _ in range(7):
        param.grad = torch.ones(2)
        optimizer.step()
    with lrprobe.attach(optimizer, every=10) as probe:
        for _ in range(15):
            optimizer.step()
    assert probe.frame()["step"].tolist() == [8, 10, 20]
