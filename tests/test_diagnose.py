"""lrprobe.diagnose finds each fault in a run that has it, and nothing in runs that are healthy."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import versions
from sklearn.datasets import load_digits
from torch import nn, optim

import lrprobe
from lrprobe.diagnosis import CHECKS, Steps
from lrprobe.series import quantile, series_of

ROOT = Path(__file__).resolve().parent.parent
PIXELS, LABELS = load_digits(return_X_y=True)
X, Y = torch.tensor(PIXELS / 16, dtype=torch.float32), torch.tensor(LABELS)

Make = Callable[[nn.Module], optim.Optimizer]
Tamper = Callable[[int, nn.Module, optim.Optimizer], None]


def net(seed: int = 0, hidden: int = 48) -> nn.Sequential:
    """A small network for the digits, the same weights every time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(
    make: Make,
    *,
    steps: int = 120,
    every: int = 1,
    seed: int = 0,
    model: nn.Module | None = None,
    tamper: Tamper | None = None,
    schedule: Callable[[optim.Optimizer], Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Train on digits; ``tamper`` is called between backward and step. Gives the frame."""
    model = model or net(seed)
    optimizer = make(model)
    scheduler = schedule(optimizer) if schedule else None
    dtype = next(model.parameters()).dtype
    order = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lrprobe:")  # what the probe itself says of the fault
        with lrprobe.attach(optimizer, model, every=every, **options) as probe:
            for step in range(1, steps + 1):
                at = torch.randint(len(X), (100,), generator=order)
                images, labels = X[at].to(dtype), Y[at]

                def closure(images: Any = images, labels: Any = labels) -> Any:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(images).float(), labels)
                    (scaler.scale(loss) if scaler else loss).backward()
                    return loss

                if isinstance(optimizer, optim.LBFGS):
                    optimizer.step(closure)
                    continue
                closure()
                if tamper:
                    tamper(step, model, optimizer)
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                if scheduler:
                    scheduler.step()
            return probe.frame()


def adam(**options: Any) -> Make:
    return lambda model: optim.Adam(model.parameters(), **options)


def whole(_step: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """The gradient over all images in the place of the batch's."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()


def found(frame: pd.DataFrame, **options: Any) -> dict[str, list[lrprobe.Finding]]:
    """Findings and notes by code, in the order in which they were given."""
    result: dict[str, list[lrprobe.Finding]] = {}
    for each in lrprobe.diagnose(frame, **options):
        result.setdefault(each.code, []).append(each)
    return result


def only(code: str, frame: pd.DataFrame, parameter: str | None = None) -> lrprobe.Finding:
    """The gravest finding of a code, which is the first in the result, and of that parameter."""
    result = lrprobe.diagnose(frame)
    codes = [each.code for each in result]
    assert code in codes, codes
    best = next(each for each in result if each.code == code)
    if parameter is not None:
        assert best.parameter == parameter
    return best


@pytest.fixture(scope="module")
def healthy() -> pd.DataFrame:
    """A usual run of Adam."""
    return train(adam())


# --- Healthy runs ----------------------------------------------------------------------------

USUAL: dict[str, Make] = {
    "SGD": lambda m: optim.SGD(m.parameters(), lr=0.1),
    "SGD-default": lambda m: optim.SGD(m.parameters()),
    "momentum": lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
    "Nesterov": lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "Adam": adam(),
    "Adam-L2": adam(weight_decay=1e-4),
    "AMSGrad": adam(amsgrad=True),
    "AdamW": lambda m: optim.AdamW(m.parameters()),
    "AdamW-LM": lambda m: optim.AdamW(m.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1),
    "NAdam": lambda m: optim.NAdam(m.parameters()),
    "RAdam": lambda m: optim.RAdam(m.parameters()),
    "Adamax": lambda m: optim.Adamax(m.parameters()),
    "Adagrad": lambda m: optim.Adagrad(m.parameters()),
    "Adadelta": lambda m: optim.Adadelta(m.parameters()),
    "Zeiler": lambda m: optim.Adadelta(m.parameters(), rho=0.95, eps=1e-6),
    "RMSprop": lambda m: optim.RMSprop(m.parameters()),
    "RMSprop-centered": lambda m: optim.RMSprop(m.parameters(), centered=True),
    "RMSprop-momentum": lambda m: optim.RMSprop(
        m.parameters(), lr=1e-3, centered=True, momentum=0.9
    ),
    "ASGD": lambda m: optim.ASGD(m.parameters()),
    "Adafactor": lambda m: optim.Adafactor(m.parameters()),
    **dict.fromkeys(
        ["Muon"] * (versions.MUON is not None),
        lambda m: versions.MUON([p for p in m.parameters() if p.ndim == 2], lr=0.02),
    ),
    "Rprop": lambda m: optim.Rprop(m.parameters()),
    "LBFGS": lambda m: optim.LBFGS(m.parameters(), line_search_fn="strong_wolfe"),
}


def warm_cosine(optimizer: optim.Optimizer) -> Any:
    warm = optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20)
    down = optim.lr_scheduler.CosineAnnealingLR(optimizer, 180)
    return optim.lr_scheduler.SequentialLR(optimizer, [warm, down], [20])


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any] | None] = {
    "constant": None,
    "warm-cosine": warm_cosine,
    "steps": lambda o: optim.lr_scheduler.StepLR(o, 70, 0.1),
    "linear-from-0": lambda o: optim.lr_scheduler.LambdaLR(o, lambda t: min(1, t / 30)),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.sampled
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", USUAL)
def test_each_optimizer_at_its_usual_settings_is_healthy(name: str, seed: int) -> None:
    """No finding; notes are allowed."""
    steps = 20 if name == "LBFGS" else 200
    frame = train(USUAL[name], steps=steps, every=5, seed=seed)
    assert lrprobe.diagnose(frame).findings == ()


def test_sparse_gradients_are_healthy() -> None:
    """SparseAdam on an embedding of the pixels' shades; Adam on the rest."""
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(64 * 17, 32, sparse=True), nn.Linear(32, 10)
    optimizers = [optim.SparseAdam(bag.parameters()), optim.Adam(head.parameters())]
    words = (X * 16).round().long() + 17 * torch.arange(64)
    with lrprobe.attach(optimizers, nn.Sequential(bag, head), every=5) as probe:
        for _ in range(200):
            at = torch.randint(len(X), (100,))
            nn.functional.cross_entropy(head(bag(words[at])), Y[at]).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert set(probe.frame()["rule"]) == {"sparse_adam", "adam"}
    assert lrprobe.diagnose(probe.frame()).findings == ()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("schedule", ["warm-cosine", "steps", "linear-from-0"])
@pytest.mark.parametrize("name", ["momentum", "Adam", "AdamW-LM", "Zeiler", "RMSprop"])
def test_schedules_are_healthy(name: str, schedule: str) -> None:
    """The small updates of a warmup's beginning and an annealing's end are meant."""
    frame = train(USUAL[name], steps=200, every=2, schedule=SCHEDULES[schedule])
    assert lrprobe.diagnose(frame).findings == ()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_healthy(fused: bool) -> None:
    """Its first skipped steps, while it looks for its scale, are no fault."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def overflow(step: int, model: nn.Module, _: Any) -> None:
        if step <= 4:
            model[0].weight.grad[0, 0] = torch.inf

    frame = train(adam(fused=fused), scaler=scaler, tamper=overflow)
    assert not frame["stepped"].all() or not fused
    assert lrprobe.diagnose(frame).findings == ()


def test_norms_and_biases_without_gradient_are_healthy() -> None:
    """A bias before a batch norm has rounding noise for a gradient; nothing of it is a fault."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64)]
    model = nn.Sequential(*layers, nn.GELU(), nn.Linear(64, 10))
    frame = train(lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9), model=model)
    assert lrprobe.diagnose(frame).findings == ()


# --- Each finding ----------------------------------------------------------------------------


def test_nonfinite_names_the_first_layer() -> None:
    """Not those to which it spread afterwards; the steps go on to the end."""

    def overflow(step: int, model: nn.Module, _: Any) -> None:
        if step == 30:
            model[2].weight.grad[0, :3] = torch.inf

    finding = only("nonfinite", train(adam(), tamper=overflow, steps=40), "2.weight")
    assert finding.steps == Steps(30, 40, 11)
    assert finding.numbers["elements"] == 3
    assert finding.severity == "finding"


class _Scaled(optim.SGD):
    """Moves by nine tenths of what SGD says."""

    def step(self, closure: Any = None) -> None:
        before = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        super().step(closure)
        with torch.no_grad():
            after = [p for g in self.param_groups for p in g["params"]]
            for p, old in zip(after, before, strict=True):
                p.lerp_(old, 0.1)


def test_a_subclass_that_steps_otherwise_is_unexplained() -> None:
    """Every parameter is, since its first steps."""
    frame = train(lambda m: _Scaled(m.parameters(), lr=0.1), steps=20)
    findings = found(frame)["unexplained"]
    assert {each.parameter for each in findings} == set(frame["parameter"])
    assert findings[0].numbers["error"] == pytest.approx(0.1, rel=0.05)


@pytest.mark.usefixtures("eager")
def test_torchs_own_bug_is_found() -> None:
    """torch 2.13's fused bfloat16 SGD leaves parameters unmoved (pytorch#191763)."""
    model = net().to(torch.bfloat16)
    frame = train(lambda m: optim.SGD(m.parameters(), lr=0.1, fused=True), model=model, steps=20)
    if frame["reconstruction_error"].max() < 0.05:
        pytest.skip("this torch has mended it")
    assert lrprobe.diagnose(frame)[0].code == "unexplained"
    sound = train(
        lambda m: optim.SGD(m.parameters(), lr=0.1, fused=False),
        model=net().to(torch.bfloat16),
        steps=20,
    )
    assert "unexplained" not in found(sound)


def resumed(to: Path, make: Make, *, keep: bool, every: int, step: int | None) -> pd.DataFrame:
    """Sixty steps, and sixty more with a new optimizer, with or without the state of the old."""
    model = net()
    states = []

    def load(optimizer: optim.Optimizer) -> optim.Optimizer:
        if keep and states:
            optimizer.load_state_dict(states[0])
        return optimizer

    def save(_step: int, _model: nn.Module, optimizer: optim.Optimizer) -> None:
        states[:] = [optimizer.state_dict()]

    train(make, model=model, steps=60, every=every, to=str(to), tamper=save)
    train(lambda m: load(make(m)), model=model, steps=60, every=every, to=str(to), step=step)
    return lrprobe.read(to, attempts="all")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("name", ["Adam", "AMSGrad", "Adagrad", "RMSprop", "Adamax"])
def test_state_lost_at_a_resume(tmp_path: Path, name: str, every: int) -> None:
    """Where the count goes on, the first rates after the resume tell."""
    lost = resumed(tmp_path / "a.parquet", USUAL[name], keep=False, every=every, step=60)
    assert 60 < only("state-lost", lost).steps.first <= 60 + every
    kept = resumed(tmp_path / "b.parquet", USUAL[name], keep=True, every=every, step=60)
    assert "state-lost" not in found(kept)


def test_checks_without_their_columns_are_left_out() -> None:
    """Of a frame with rates and no `lr` nothing is said, also where it was resumed."""
    rates = {f"effective_lr_{q}": np.linspace(1, 2, 8) for q in ("p05", "p50", "p95")}
    attempt = np.repeat([0, 1], 4)
    frame = pd.DataFrame({"step": range(8), "attempt": attempt, "parameter": "w", **rates})
    assert not list(lrprobe.diagnose(frame.assign(rule="adam")))


def test_state_lost_by_adadelta(tmp_path: Path) -> None:
    """Its mean of past updates is exactly 0 again."""
    lost = resumed(tmp_path / "a.parquet", USUAL["Zeiler"], keep=False, every=1, step=60)
    assert only("state-lost", lost).steps == Steps(61, 61, 1)
    kept = resumed(tmp_path / "b.parquet", USUAL["Zeiler"], keep=True, every=1, step=60)
    assert "state-lost" not in found(kept)


def test_state_lost_where_the_count_began_again(tmp_path: Path) -> None:
    """Without its state the optimizer counts from 1; the parameters tell that it went on."""
    to = tmp_path / "a.parquet"
    lost = resumed(to, adam(), keep=False, every=10, step=None)
    assert only("state-lost", lost).numbers["reached"] == 60
    again = tmp_path / "b.parquet"
    for _ in range(2):
        train(adam(), steps=60, every=10, to=str(again))
    assert "state-lost" not in found(lrprobe.read(again, attempts="all"))


def test_skipped_steps_piling_up() -> None:
    """The layer whose gradient overflows, and how often."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=1)

    def overflow(step: int, model: nn.Module, _: Any) -> None:
        if step > 20 and step % 3 == 0:
            model[2].bias.grad[0] = torch.inf

    frame = train(adam(fused=True), scaler=scaler, tamper=overflow, steps=80)
    finding = only("skipped-steps", frame, "2.bias")
    assert finding.numbers["share"] == pytest.approx(1 / 3, abs=0.02)
    assert "nonfinite" not in found(frame)  # they were skipped


def test_a_parameter_that_never_steps(healthy: pd.DataFrame) -> None:
    """Without a gradient, or with one that is always 0."""
    model = net()
    model[0].bias.requires_grad_(False)
    finding = only("never-steps", train(adam(), model=model, steps=20), "0.bias")
    assert finding.steps == Steps(1, 20, 20)

    def dead(_step: int, model: nn.Module, _: Any) -> None:
        model[0].weight.grad.zero_()

    assert "exactly 0" in only("never-steps", train(adam(), tamper=dead), "0.weight").evidence
    assert "never-steps" not in found(healthy)


def test_a_layer_that_dies() -> None:
    """Its gradient is exactly 0 from some step on, though weight decay still moves it."""

    def die(step: int, model: nn.Module, _: Any) -> None:
        if step > 30:
            model[0].weight.grad.zero_()

    def decayed(m: nn.Module) -> optim.Optimizer:
        return optim.AdamW(m.parameters(), lr=1e-3)

    finding = only("no-gradient", train(decayed, steps=50, tamper=die), "0.weight")
    assert finding.steps == Steps(31, 50, 20)
    assert "in the last 20 of 50 recorded steps" in finding.evidence

    def sometimes(step: int, model: nn.Module, _: Any) -> None:
        if step % 2:
            model[0].weight.grad.zero_()

    assert "no-gradient" not in found(train(decayed, steps=50, tamper=sometimes))


def test_a_rate_that_kills_a_net_is_found_without_a_nan() -> None:
    """Too large a rate leaves every unit dead, and every figure finite."""
    codes = found(train(lambda m: optim.SGD(m.parameters(), lr=50.0, momentum=0.9), steps=100))
    assert "no-gradient" in codes


def test_weights_that_decay_away(healthy: pd.DataFrame) -> None:
    """A decay that outweighs every gradient leaves nothing of a matrix."""
    strong = train(lambda m: optim.AdamW(m.parameters(), lr=1e-3, weight_decay=100.0), steps=60)
    assert only("decayed-away", strong).numbers["share"] < 0.07
    assert not {"decayed-away", "no-gradient"} & set(found(healthy))
    without = strong.assign(decay=0.0)  # they were drawn to 0 otherwise
    without.attrs.clear()
    assert "decayed-away" not in found(without)


def test_a_schedule_that_ends_too_early() -> None:
    """The rate is 0 in a tail of the run; in the last step alone it may be."""

    def ends(after: int) -> Any:
        return lambda o: optim.lr_scheduler.LambdaLR(o, lambda t: max(0.0, 1 - t / after))

    finding = only("group-rate-zero", train(adam(), steps=40, schedule=ends(20)), "group 0")
    assert finding.steps.last == 40
    assert "in the last 20 of 40" in finding.evidence
    assert "group-rate-zero" not in found(train(adam(), steps=40, schedule=ends(40)))


def test_what_cannot_be_looked_for_is_said(tmp_path: Path) -> None:
    """A logdir has few figures, and a short run few steps; a NaN is found all the same."""

    def ruin(step: int, model: nn.Module, _: Any) -> None:
        if step == 12:
            model[0].weight.grad[0, 0] = torch.nan

    train(adam(), steps=20, tamper=ruin, to=tmp_path / "logdir")
    frame = lrprobe.read(tmp_path / "logdir")
    result = lrprobe.diagnose(frame)
    assert [each.code for each in result.findings] == ["nonfinite"]
    assert result[0].parameter == "0.weight"
    assert result[0].steps.first == 12
    (sentence,) = result.left_out
    assert "because these columns are missing: decay, eps_fraction" in sentence
    assert "never-steps" in sentence
    assert sentence in repr(result)
    assert sentence in result._repr_html_().replace("&#x27;", "'")
    frame.attrs = {}  # as where a frame went through a CSV file
    assert "attrs['lrprobe']" in lrprobe.diagnose(frame).left_out[1]
    few = lrprobe.diagnose(train(adam(), steps=2))
    assert few.left_out[0] == "Only 2 steps recorded: most checks need 3 steps"
    assert list(lrprobe.diagnose(train(adam(), steps=10)).left_out) == []


def two_groups(rate: float = 1e-3) -> Make:
    return lambda m: optim.Adam([{"params": m[0].parameters()}, {"params": m[2].parameters(),
                                                                 "lr": rate}])  # fmt: skip


def test_a_group_whose_rate_is_always_zero() -> None:
    """The group is named, not its parameters."""
    only("group-rate-zero", train(two_groups(0.0), steps=20), "group 1")
    assert "group-rate-zero" not in found(train(two_groups(), steps=20))


def test_a_group_that_does_not_follow_the_schedule() -> None:
    """It stays while another changes; groups that change in proportion are fine."""

    def first_only(step: int, _: nn.Module, optimizer: optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 / step

    finding = only("group-off-schedule", train(two_groups(), steps=20, tamper=first_only))
    assert finding.parameter == "group 1"
    assert finding.numbers["high"] == 1e-3
    halves = train(two_groups(5e-4), steps=20, schedule=SCHEDULES["steps"])
    assert "group-off-schedule" not in found(halves)


def test_updates_lost_to_rounding() -> None:
    """Most of AdamW's updates at 1e-4 in bfloat16; none to speak of in float32."""
    bf16 = train(
        lambda m: optim.AdamW(m.parameters(), lr=1e-4), model=net(hidden=256).to(torch.bfloat16)
    )
    assert only("lost-updates", bf16).numbers["share"] > 0.5
    fp32 = train(lambda m: optim.AdamW(m.parameters(), lr=1e-4), model=net(hidden=256))
    assert "lost-updates" not in found(fp32)


class ToyAdam(optim.Optimizer):
    """Adam as a trainer wrote it: the step count of the bias correction may not advance."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], *, advance: bool
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self.advance = advance

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": 0}
                state["step"] = state["step"] + 1 if self.advance else 1
                m = state["m"].lerp_(p.grad, 1 - one)
                v = state["v"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                t = state["step"]
                root = (v / (1 - two**t)).sqrt() + 1e-8
                p.sub_(group["lr"] * m / (1 - one**t) / root)


@pytest.mark.parametrize("every", [1, 5])
def test_a_bias_correction_that_does_not_advance(every: int) -> None:
    """A real bug of a real trainer: with β=(0.9, 0.95) the first steps reach 2.2·lr."""
    bug, right = (
        train(
            lambda m, a=advance: ToyAdam(m.parameters(), 1e-4, (0.9, 0.95), advance=a),
            every=every,
            steps=60,
            tamper=whole,
        )
        for advance in (False, True)
    )
    finding = only("adam-scale", bug)
    assert finding.numbers["scale"] == pytest.approx(2.3, abs=0.1)
    assert finding.steps.first <= 10
    assert "adam-scale" not in found(right)


def test_adam_with_a_stuck_step_in_its_state() -> None:
    """The same where torch's own Adam is given an old step again and again: its rule holds."""

    def stuck(step: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
        whole(step, model, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()

    frame = train(adam(lr=1e-4, betas=(0.9, 0.95)), tamper=stuck, steps=40)
    assert only("adam-scale", frame).numbers["scale"] > 2
    assert "unexplained" not in found(frame)


def test_adam_whose_steps_are_far_too_small() -> None:
    """As after a gradient that was huge once, or with an ε that is far too large."""
    assert only("adam-scale", train(adam(eps=10.0))).numbers["scale"] < 0.01


def test_eps_rules_the_denominator(healthy: pd.DataFrame) -> None:
    """With a large ε; elements without any gradient do not count."""
    finding = only("eps-rules", train(adam(eps=0.1)))
    assert finding.numbers["share"] > 0.9
    assert "eps-rules" not in found(healthy)
    assert healthy["idle_fraction"].max() > 0.1  # the pixels that are always black


def test_a_rate_that_collapses(healthy: pd.DataFrame) -> None:
    """One huge gradient in one layer; the other layers are not reported."""

    def burst(step: int, model: nn.Module, _: Any) -> None:
        if step == 80:
            model[2].weight.grad.mul_(1e5)

    findings = found(train(adam(), tamper=burst))["rate-collapsed"]
    assert [each.parameter for each in findings] == ["2.weight"]
    assert findings[0].steps.first == 80
    assert findings[0].numbers["factor"] > 10
    assert not {"rate-collapsed", "rate-exploded"} & set(found(healthy))


def test_a_rate_that_explodes() -> None:
    """A layer whose gradient dies away, while the others' goes on."""

    def vanish(step: int, model: nn.Module, _: Any) -> None:
        if step > 60:
            model[0].weight.grad.mul_(1e-6)

    frame = train(adam(betas=(0.9, 0.9)), tamper=vanish, steps=200)
    assert only("rate-exploded", frame, "0.weight").numbers["factor"] > 30


@pytest.mark.parametrize(
    ("options", "above"), [({"lr": 0.1, "weight_decay": 1.0}, True), ({"lr": 1e-9}, False)]
)
def test_an_update_ratio_far_off(
    healthy: pd.DataFrame, options: dict[str, float], above: bool
) -> None:
    """Above and below the band."""
    ratio = only("update-ratio", train(adam(**options))).numbers["ratio"]
    assert (ratio > 1e-3) is above
    assert "update-ratio" not in found(healthy)


def test_a_short_warmup_is_a_note(healthy: pd.DataFrame) -> None:
    """Beside the second moment's memory, which is β₂'s; no warmup is no short one."""
    warm = train(adam(), schedule=SCHEDULES["linear-from-0"])
    (note,) = found(warm)["short-warmup"]
    assert note.severity == "note"
    assert note.numbers == pytest.approx({"warmup": 31, "memory": 1000, "beta": 0.999})
    assert "short-warmup" not in found(warm, hyperparameters={"Adam": {"betas": (0.9, 0.95)}})
    assert "short-warmup" not in found(healthy)


def test_adagrads_decay_is_a_note(healthy: pd.DataFrame) -> None:
    """Where its rate has fallen to a tenth."""
    frame = train(lambda m: optim.Adagrad(m.parameters()), steps=400, every=10)
    assert {each.severity for each in found(frame)["adagrad-decay"]} == {"note"}
    assert "adagrad-decay" not in found(healthy)


def test_adadeltas_eps_is_a_note() -> None:
    """The largest of Zeiler's Table 2; at his own 1e-6, this small network has larger gradients."""
    large = train(lambda m: optim.Adadelta(m.parameters(), eps=1e-2))
    assert {each.severity for each in found(large)["adadelta-eps"]} == {"note"}
    assert "adadelta-eps" not in found(train(USUAL["Zeiler"]))


# --- The result ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> pd.DataFrame:
    """A run with several faults."""
    model = net()
    model[0].bias.requires_grad_(False)
    return train(adam(eps=10.0), model=model, steps=30)


def test_the_most_severe_come_first_and_notes_last(faulty: pd.DataFrame) -> None:
    """In the order of the table of checks."""
    result = lrprobe.diagnose(faulty)
    order = [check.code for check in CHECKS]
    ranks = [order.index(each.code) for each in result]
    assert ranks == sorted(ranks)
    assert {"never-steps", "eps-rules"} <= {each.code for each in result}
    severities = [check.severity for check in CHECKS]
    assert severities == sorted(severities)  # findings, then notes
    assert result.findings + result.notes == tuple(result)


def test_the_result_prints_in_a_terminal_and_a_notebook(faulty: pd.DataFrame) -> None:
    """What, where, evidence, meaning, advice, link; HTML has names escaped."""
    result = lrprobe.diagnose(faulty.assign(parameter=faulty["parameter"] + "<b>"))
    text = repr(result)
    for each in result[:1]:
        for part in (each.title, each.parameter, each.meaning, each.advice, each.link):
            assert part in text
    page = result._repr_html_()
    assert "0.bias&lt;b&gt;" in page
    assert "<b>," not in page
    empty = lrprobe.diagnose(faulty.iloc[:0])
    assert [each.code for each in empty] == ["no-steps"]
    assert "Nothing was recorded: most checks need 3 steps" in repr(empty)


def test_the_result_as_a_frame(faulty: pd.DataFrame) -> None:
    """One row for each, also where there is none."""
    result = lrprobe.diagnose(faulty)
    table = result.to_frame()
    assert table["code"].tolist() == [each.code for each in result]
    assert table["first"].tolist() == [each.steps.first for each in result]
    assert list(lrprobe.diagnose(faulty.iloc[:0]).to_frame()) == list(table)


def test_many_layers_with_one_fault_are_printed_as_one() -> None:
    """The gravest of them, and how many more there are."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 16), *layers, nn.Linear(16, 10))
    text = repr(lrprobe.diagnose(train(adam(eps=1e3), model=model, steps=20)))
    assert text.count("[eps-rules]") == 1
    assert re.search(r"and \d more", text)


def test_every_finding_has_its_section() -> None:
    """The link of each leads to a heading of docs/findings.md."""
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "findings.md").read_text(), re.MULTILINE)
    assert headings == [check.code for check in CHECKS]


def test_runs_are_told_apart(healthy: pd.DataFrame, faulty: pd.DataFrame) -> None:
    """In a frame of several, each is looked at by itself."""
    both = pd.concat([healthy.assign(run="good"), faulty.assign(run="bad")])
    assert {each.run for each in lrprobe.diagnose(both).findings} == {"bad"}


def test_missing_columns_leave_checks_out(faulty: pd.DataFrame, healthy: pd.DataFrame) -> None:
    """As in what TensorBoard has: no error, and what can be said is."""
    few = ["step", "optimizer", "parameter", "lr", "update_ratio", "update_norm"]
    assert lrprobe.diagnose(healthy[few]).findings == ()
    slow = train(adam(lr=1e-9))
    assert {each.code for each in lrprobe.diagnose(slow[few]).findings} <= {"update-ratio"}
    for column in faulty.columns.drop("step"):
        lrprobe.diagnose(faulty.drop(columns=column))


def test_the_frame_stays_as_it_was(faulty: pd.DataFrame) -> None:
    """Looking changes nothing of it."""
    before = faulty.copy()
    lrprobe.diagnose(faulty)
    pd.testing.assert_frame_equal(faulty, before)


def test_rows_in_any_order_and_with_gaps(faulty: pd.DataFrame) -> None:
    """The findings are the same; a missing row is no fault."""
    mixed = faulty.sample(frac=1, random_state=0)
    codes = {(each.code, each.parameter) for each in lrprobe.diagnose(faulty)}
    assert {(each.code, each.parameter) for each in lrprobe.diagnose(mixed)} == codes
    lrprobe.diagnose(faulty.drop(index=faulty.index[::7]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1], TypeError, "must be a DataFrame.*got a list"),
        (pd.DataFrame({"a": [1]}), ValueError, "no column 'step'"),
    ],
)
def test_what_is_no_frame_is_refused(given: Any, error: type[Exception], message: str) -> None:
    """With what came and what may."""
    with pytest.raises(error, match=message):
        lrprobe.diagnose(given)


def test_what_was_looked_at_is_said_once(healthy: pd.DataFrame) -> None:
    """Runs of one size are counted, not listed."""
    runs = [healthy.assign(run=run) for run in "abc"] + [healthy.iloc[:40].assign(run="d")]
    looked_at = lrprobe.diagnose(pd.concat(runs)).looked_at
    assert looked_at == "3 times 120 steps × 4 parameters; 10 steps × 4 parameters"


def test_a_large_frame_takes_seconds(healthy: pd.DataFrame) -> None:
    """A quarter of a million rows: 500 recorded steps of 500 parameters."""
    one = healthy[healthy["parameter"] == "0.weight"].iloc[10:60]
    steps = pd.concat([one] * 10, ignore_index=True).assign(step=np.arange(1, 501))
    large = pd.concat([steps] * 500, ignore_index=True)
    large["parameter"] = np.repeat([f"layer{i}.weight" for i in range(500)], 500)
    result = lrprobe.diagnose(large)
    assert result.looked_at == "500 steps × 500 parameters"
    assert len(result.findings) < 500


def test_quantiles_are_numpys() -> None:
    """Of what is not NaN, by column."""
    matrix = np.random.default_rng(0).normal(size=(17, 4))
    matrix[3:9, 1] = np.nan
    matrix[:, 2] = np.nan
    expected = [np.nanquantile(matrix[:, c], 0.3) if c != 2 else np.nan for c in range(4)]
    assert quantile(matrix, 0.3) == pytest.approx(expected, nan_ok=True)


def test_a_series_has_no_row_where_the_frame_has_none(healthy: pd.DataFrame) -> None:
    """NaN there, and not present."""
    (series,) = series_of(healthy.drop(index=healthy.index[5]))
    assert series.present.sum() == series.present.size - 1
    assert np.isnan(series["grad_norm"][~series.present]).all()
