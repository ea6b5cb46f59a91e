"""What users do around an optimizer: groups that change, hooks of their own, odd optimizers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.two_tensor import TwoTensor

import lrprobe
from lrprobe import rules
from lrprobe.names import Names
from lrprobe.rules import Rule, Slice, Update, sgd
from lrprobe.testing import check_rule


def net() -> nn.Sequential:
    """Two layers, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    """A few steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()


def two_groups() -> tuple[nn.Sequential, Optimizer]:
    """A net whose layers have rates of their own."""
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    return model, torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("change", ["pop", "reverse", "move"])
def test_groups_that_change_are_followed(change: str) -> None:
    """A removed, reordered or refilled group: group, lr and reconstruction stay right."""
    model, optimizer = two_groups()
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 1)
        if change == "pop":
            optimizer.param_groups.pop(0)
        elif change == "reverse":
            optimizer.param_groups.reverse()
        else:
            moved = optimizer.param_groups[1]["params"].pop(0)
            optimizer.param_groups[0]["params"].append(moved)
        train(model, optimizer, 2)
        frame = probe.frame()
    frame = frame[frame["step"] > 1]
    assert set(frame["rule"]) == {"sgd"}
    assert frame["reconstruction_error"].max() < 1e-6
    right = {
        name: (index, group["lr"])
        for index, group in enumerate(optimizer.param_groups)
        for name, param in model.named_parameters()
        if any(param is p for p in group["params"])
    }
    for row in frame.itertuples():
        assert (row.group, row.lr) == right[row.parameter], row.parameter


def test_the_users_own_post_hooks_come_after_ours() -> None:
    """A scheduler stepped, or gradients dropped, in a post-hook made before `attach`: no matter."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 3)
        frame = probe.frame(by="model")
    assert frame["lr"].tolist() == [0.1, 0.05, 0.025]
    assert frame["stepped"].all()
    assert frame["reconstruction_error"].max() < 1e-6


class NoRate(Optimizer):
    """An optimizer whose groups have no `lr`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"size": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.add_(param.grad, alpha=-group["size"])


def test_an_optimizer_without_lr_is_measured() -> None:
    """Its `lr` is NaN, its rate measured, and training goes on."""
    model = net()
    optimizer = NoRate(model.parameters())
    with pytest.warns(UserWarning, match="register_rule"):
        probe = lrprobe.attach(optimizer, model, every=1)
    with probe:
        train(model, optimizer, 2)
        frame = probe.frame()
    assert frame["lr"].isna().all()
    assert set(frame["rule"]) == {"measured"}
    np.testing.assert_allclose(frame["effective_lr_p50"], 0.1, rtol=1e-3)


def test_a_rule_that_says_nan_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rule cannot tell of a step that was taken becomes measured."""

    def undecided(s: Slice) -> Update:
        return Update(s.lr * torch.nan, s.grad)

    monkeypatch.setitem(rules._RULES, Stubborn, Rule("undecided", undecided))
    model = net()
    optimizer = Stubborn(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        with pytest.warns(UserWarning, match="does not explain the steps of Stubborn"):
            train(model, optimizer, 3)
        frame = probe.frame()
    assert set(frame.loc[frame["step"] == 3, "rule"]) == {"measured"}


class Stubborn(torch.optim.SGD):
    """SGD under another name."""


@pytest.mark.parametrize("numel", [50, 9000])
def test_a_parameter_that_forgets_itself(numel: int) -> None:
    """With lr·λ = 1 nothing of θ is left: how far it moved is NaN."""
    param = nn.Parameter(torch.randn(numel))
    optimizer = torch.optim.SGD([param], lr=0.1, weight_decay=10.0)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(3):
            param.grad = torch.randn(numel)
            optimizer.step()
        frame = probe.frame()
    assert set(frame["rule"]) == {"sgd"}
    assert frame["reconstruction_error"].max() < 1e-6
    assert frame["update_norm"].isna().all()


def test_radam_without_any_rectification() -> None:
    """With β₂ = 0.6 the rectification is 0/0 and never used: the rate is lr."""
    model = net()
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.01, betas=(0.9, 0.6))
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 3)
        frame = probe.frame()
    np.testing.assert_allclose(frame["effective_lr_p50"], 0.01)
    assert frame["reconstruction_error"].max() < 1e-6


def test_a_scheduler_made_after_the_probe() -> None:
    """`initial_lr` is the group's, also where the scheduler that sets it comes later."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
        train(model, optimizer, 1)
        frame = probe.frame()
    np.testing.assert_allclose(frame["initial_lr"], optimizer.param_groups[0]["initial_lr"])


def test_the_same_sink_for_the_same_optimizer_does_not_record_twice() -> None:
    """A cell run twice with one sink replaces the probe, with a warning."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = lrprobe.sinks.Memory()
    lrprobe.attach(optimizer, model, every=1, to=sink)
    with pytest.warns(UserWarning, match="replaces it"):
        probe = lrprobe.attach(optimizer, model, every=1, to=sink)
    with probe:
        train(model, optimizer, 2)
        assert probe.frame(by="model")["step"].tolist() == [1, 2]


def test_a_probe_stays_where_another_cannot_take_its_place(tmp_path: Any) -> None:
    """It goes on recording where one of the other's new destinations cannot be written."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "run.parquet"
    with lrprobe.attach(optimizer, model, every=1, to=path) as probe:
        with pytest.raises(OSError, match="cannot write a TensorBoard logdir"):
            lrprobe.attach(optimizer, model, to=[path, tmp_path / "file" / "logdir"])
        train(model, optimizer, 2)
    assert probe.frame(by="model")["step"].tolist() == [1, 2]
    assert lrprobe.read(path, by="model")["step"].tolist() == [1, 2]


def test_a_frozen_parameter_that_still_moves_has_stepped() -> None:
    """`requires_grad_(False)` does not stop torch where an old gradient is left."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 1)
        optimizer.zero_grad(set_to_none=False)
        model[0].requires_grad_(requires_grad=False)
        before = model[0].weight.clone()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        row = probe.frame().query("step == 2 and parameter == '0.weight'").iloc[0]
    assert not torch.equal(before, model[0].weight)
    assert row["stepped"]
    assert row["update_norm"] == pytest.approx(float((model[0].weight - before).norm()), rel=1e-4)


def test_check_rule_with_groups_of_its_own() -> None:
    """The groups may be in another order than the parameters, and need not hold all of them."""

    def by_shape(params: list[Tensor]) -> Optimizer:
        flat = {"params": [p for p in params if p.dim() < 2]}
        return torch.optim.Adam([flat, {"params": [p for p in params if p.dim() > 1], "lr": 0.01}])

    assert check_rule(by_shape) < 1e-12
    assert check_rule(lambda params: torch.optim.Adam(params[:2])) < 1e-12


def test_check_rule_fails_where_nothing_moves() -> None:
    """A rule that tells of steps which are never taken is wrong."""

    class Idle(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            pass

    with pytest.raises(AssertionError, match="does not explain"):
        check_rule(lambda params: Idle(params, lr=0.1))


@pytest.mark.parametrize("given", [3, lambda _: 3])
def test_check_rule_says_what_it_takes(given: Any) -> None:
    """Something else than a function that makes an optimizer is a TypeError."""
    with pytest.raises(TypeError, match="got"):
        check_rule(given)


def test_numpy_integers_are_whole_numbers() -> None:
    """`every` and `batch_size` may come from NumPy."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": np.int64(2), "batch_size": np.int64(4)}
    with lrprobe.attach(optimizer, model, **options) as probe:
        train(model, optimizer, 4)
        frame = probe.frame(by="model")
    assert frame["step"].tolist() == [1, 2, 4]
    assert frame["samples"].tolist() == [4.0, 4.0, 4.0]


def test_a_step_function_is_asked_once_a_step() -> None:
    """A counter that moves whenever it is read counts right."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter = itertools.count(1)
    with lrprobe.attach(optimizer, model, every=2, step=lambda: next(counter)) as probe:
        train(model, optimizer, 6)
        assert probe.frame(by="model")["step"].tolist() == [1, 2, 4, 6]
        assert probe.step == 6


class Keep:
    """A sink that keeps the records themselves."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def test_a_hyperparameter_that_keeps_changing_is_not_described_each_time() -> None:
    """Or a dataset had a part for each record; one that changes seldom still is."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep = Keep()
    with lrprobe.attach(optimizer, model, every=1, to=keep):
        for step in range(20):
            optimizer.param_groups[0]["k"] = step
            train(model, optimizer, 1)
        optimizer.param_groups[0]["weight_decay"] = 0.3
        train(model, optimizer, 1)
    runs = [record.run for record in keep.records]
    assert len({id(run) for run in runs[:20]}) <= 6
    assert runs[-2] is not runs[-1]
    assert runs[-1]["optimizers"]["SGD"]["groups"][0]["weight_decay"] == 0.3


def test_a_hyperparameter_changed_in_mid_run_travels_with_the_records() -> None:
    """`Record.run` is a new object where weight decay changed, the same where only lr did."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep = Keep()
    with lrprobe.attach(optimizer, model, every=1, to=keep):
        train(model, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.05
        train(model, optimizer, 1)
        optimizer.param_groups[0]["weight_decay"] = 0.3
        train(model, optimizer, 1)
    runs = [record.run for record in keep.records]
    assert runs[0] is runs[1]
    decays = [run["optimizers"]["SGD"]["groups"][0]["weight_decay"] for run in runs]
    assert decays == [0, 0, 0.3]


def test_a_module_that_is_moved_by_swapping_its_tensors_can_be_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`Module.to` refuses to swap tensors that are weakly referenced (FSDP2's always are)."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1, batch_size=8, track=2) as probe:
        train(model, optimizer, 2)
        model.to(torch.float64)
        x = torch.randn(8, 4, dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        model.float()
    frame = probe.frame()
    assert frame["step"].unique().tolist() == [1, 2, 3]
    assert (frame["reconstruction_error"] < 1e-6).all()


def test_a_parameter_that_is_resized_is_counted_anew() -> None:
    """`param.data` may get another size, as when an embedding grows."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups)
    with lrprobe.attach(optimizer, every=1, track=3) as probe:
        for size in (100, 10_000, 5):
            params[0].data = torch.ones(size)
            for param in params:
                param.grad = torch.zeros_like(param)
                param.grad[0] = 1
            optimizer.step()
    frame = probe.frame()
    resized = frame[frame["parameter"] == "group0.param0"]
    assert resized["numel"].tolist() == [100, 10_000, 5]
    assert resized["zero_grad_fraction"].tolist() == [0.99, 0.9999, 0.8]
    means = probe.frame(by="model")["effective_lr_mean"].tolist()
    assert means == pytest.approx([0.2] * 3)  # one element of each moves
    elements = probe.elements()
    assert elements.loc[elements["step"] == 3, "element"].max() < 100


def test_pre_hooks_that_come_later_run_before_the_probes() -> None:
    """What they do is no part of the step, from the second on: then the probe's come last."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    probe = lrprobe.attach(optimizer, model, every=1)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.05, 0.05)

    optimizer.register_step_pre_hook(clip)
    train(model, optimizer, 3)
    frame = probe.frame()
    assert (frame["rule"] == "adam").all()
    assert (frame.loc[frame["step"] > 1, "reconstruction_error"] < 1e-6).all()
    norms = np.sqrt(np.square(frame["grad_norm"]).groupby(frame["step"]).sum())
    np.testing.assert_allclose(norms, 0.01, rtol=1e-4)
    probe.close()


class PerElement(Optimizer):
    """Its group's rate has a value for each element."""

    def __init__(self, params: Any, lr: Tensor) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


@pytest.mark.filterwarnings("ignore:lrprobe")
def test_a_rate_of_many_values_stops_no_training() -> None:
    """Whether it is 0 is asked at every step, recorded or not."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = PerElement([param], torch.tensor([0.1, 0.2, 0.3]))
    with lrprobe.attach(optimizer) as probe:
        for _ in range(3):
            optimizer.step()
        assert probe.step == 3


def test_whatever_fails_between_recorded_steps_stops_no_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told once, and the step counts."""

    def fail(_: Optimizer) -> bool:
        raise RuntimeError("not to be asked")

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = lrprobe.attach(optimizer, model)
    train(model, optimizer, 1)
    monkeypatch.setattr(lrprobe.hooks, "all_rates_zero", fail)
    with pytest.warns(UserWarning, match="not to be asked"):
        train(model, optimizer, 2)
    assert probe.step == 3
    with pytest.warns(UserWarning, match="2 steps of SGD could not be recorded"):
        probe.close()


def test_names_that_are_numbered_already_stay_unique() -> None:
    """Parameters of one name are numbered past those that are called so."""
    params = [(name, nn.Parameter(torch.ones(2))) for name in ("a#1", "a", "a")]
    optimizer = torch.optim.SGD(params, lr=0.1)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _, param in params:
            param.grad = torch.ones(2)
        optimizer.step()
    assert probe.frame()["parameter"].tolist() == ["a#1", "a", "a#2"]


def test_a_name_stays_where_an_earlier_parameter_leaves() -> None:
    """Without a model parameters are numbered, and go on with their numbers."""
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    optimizer = torch.optim.SGD(params, lr=0.0)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(2):
            for param in params:
                param.grad = torch.ones(2)
            optimizer.step()
            optimizer.param_groups[0]["params"] = params[1:]
    frame = probe.frame()
    second = frame[frame["step"] == 2]
    assert second["parameter"].tolist() == ["group0.param1", "group0.param2"]
    np.testing.assert_allclose(second["param_norm"], [2**0.5, 8**0.5])


def test_lazy_parameters_are_recorded_when_they_have_elements() -> None:
    """Before, they have no size."""
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lrprobe.attach(optimizer, model, every=1) as probe:
        train(model, optimizer, 2)
    assert len(probe.frame()) == 2 * 4


@pytest.mark.parametrize("count", [torch.tensor(torch.nan), torch.ones(3)], ids=str)
def test_a_step_that_is_no_number_is_not_gone_on_from(count: Tensor) -> None:
    """The count begins at 0 then."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["step"] = count
    with lrprobe.attach(optimizer, model) as probe:
        assert probe.step == 0


def test_counting_passes_does_not_show_in_a_checkpoint(tmp_path: Any) -> None:
    """torch.save warns of hooks on a tensor that is no parameter, which it does not save."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with lrprobe.attach(optimizer, batch_size=4):
        weight.sum().backward()
        torch.save(weight, tmp_path / "weight.pt")


def test_a_parameter_that_cannot_be_read_loses_no_other() -> None:
    """One of a subclass of its own may tell its norm; of one without values nothing is known."""
    odd = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)), requires_grad=False)
    params = [odd, nn.Parameter(torch.ones(4, device="meta")), nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False)
    params[2].grad = torch.ones(4)
    with lrprobe.attach(optimizer, every=1) as probe:
        optimizer.step()
    frame = probe.frame()
    assert frame["stepped"].tolist() == [False, False, True]
    assert frame["param_norm"].notna().tolist() == [True, False, True]


def test_the_models_name_goes_before_that_of_one_with_the_same_id() -> None:
    """A parameter that is gone may leave its id to another, which is not called after it."""
    model = net()
    names = Names(model)
    weight = model[0].weight
    assert names.now({id(weight): "gone.weight"})[id(weight)] == "0.weight"
    names.forget([id(weight)])
    assert names.now()[id(weight)] == "0.weight"


def test_a_new_parameter_takes_no_name_that_is_in_use() -> None:
    """Put before the others of its group, it is numbered past them."""
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    optimizer = torch.optim.SGD(params[:2], lr=0.0)
    with lrprobe.attach(optimizer, every=1) as probe:
        for _ in range(2):
            for param in params:
                param.grad = torch.ones(2)
            optimizer.step()
            optimizer.param_groups[0]["params"].insert(0, params[2])
    second = probe.frame().query("step == 2").set_index("parameter")["param_norm"]
    right = {"group0.param0#1": 8**0.5, "group0.param0": 0.0, "group0.param1": 2**0.5}
    assert second.to_dict() == pytest.approx(right)


def test_a_hyperparameter_of_many_groups_changes_once_at_a_time() -> None:
    """However many groups have it, its first changes are described."""
    model = net()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    keep = Keep()
    with lrprobe.attach(optimizer, model, every=1, to=keep):
        for decay in (0.1, 0.2, 0.3):
            for group in optimizer.param_groups:
                group["weight_decay"] = decay
            train(model, optimizer, 1)
    runs = [record.run["optimizers"]["SGD"]["groups"] for record in keep.records]
    assert [[group["weight_decay"] for group in run] for run in runs] == [
        [decay] * 4 for decay in (0.1, 0.2, 0.3)
    ]


def test_passes_are_counted_on_where_a_group_leaves() -> None:
    """Parameters that stay have another place then."""
    model = net()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.01)
    with lrprobe.attach(optimizer, model, every=2, batch_size=8) as probe:
        for step in range(1, 9):
            if step == 5:
                del optimizer.param_groups[0]
            for _ in range(3):
                model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert probe.frame(by="model")["samples"].tolist() == [24.0] * 5


def test_torch_chooses_foreach_only_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fused=False` its step is the loop, also where foreach is the default."""
    group = {"nesterov": True, "foreach": None, "fused": None, "weight_decay": 0.0}
    elsewhere = torch.ones(2, device="meta", requires_grad=True)
    elsewhere.grad = torch.ones(2, device="meta")
    monkeypatch.setattr(sgd, "_default_to_fused_or_foreach", lambda *_: (False, True))
    assert sgd._overwrites({**group, "params": [elsewhere]})
    assert not sgd._overwrites({**group, "params": [elsewhere], "fused": False})
    assert not sgd._overwrites({**group, "params": [elsewhere], "weight_decay": 0.1})
    here = nn.Parameter(torch.ones(2))
    here.grad = torch.ones(2)
    assert not sgd._overwrites({**group, "params": [here]})
