"""The table of Keras's optimizers and their options, on the backend of this process."""

import math

import keras
import pytest
from keras_runs import (
    EQUATIONS,
    TENSORFLOW,
    arrays,
    assert_bits,
    by_hand,
    fit,
    left,
    net,
    rows,
)
from oracle import QUANTILES, assert_close

from lrprobe.integrations.keras import LRProbeCallback

schedules = keras.optimizers.schedules

CASES = [
    ("Adam", {}),
    ("Adam", {"epsilon": 1e-2}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"weight_decay": 0.1, "clipnorm": 0.3}),
    ("Adam", {"global_clipnorm": 0.5}),
    ("Adam", {"clipvalue": 0.02}),
    ("Adam", {"loss_scale_factor": 8.0}),
    ("Adam", {"gradient_accumulation_steps": 3}),
    ("Adam", {"gradient_accumulation_steps": 2, "global_clipnorm": 0.2, "loss_scale_factor": 3.0}),
    ("Adam", {"use_ema": True}),
    ("Adam", {"learning_rate": schedules.CosineDecay(0.01, 9)}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True, "global_clipnorm": 0.5}),
    ("AdamW", {"learning_rate": schedules.ExponentialDecay(0.01, 2, 0.5), "weight_decay": 0.1}),
    ("Adadelta", {}),
    ("Adadelta", {"learning_rate": 1.0, "rho": 0.9, "epsilon": 1e-3}),
    ("Adadelta", {"learning_rate": 1.0, "weight_decay": 0.1, "clipnorm": 0.3}),
    ("Adadelta", {"gradient_accumulation_steps": 3}),
    ("Adagrad", {}),
    ("Adagrad", {"initial_accumulator_value": 0.0, "epsilon": 1e-3}),
    ("Adagrad", {"weight_decay": 0.1, "global_clipnorm": 0.2}),
    ("Adamax", {}),
    ("Adamax", {"epsilon": 0.02, "weight_decay": 0.1}),
    ("Adamax", {"learning_rate": schedules.PiecewiseConstantDecay([3, 6], [0.1, 0.01, 0.001])}),
    ("Lion", {}),
    ("Lion", {"weight_decay": 0.1, "clipvalue": 0.05}),
    ("Nadam", {}),
    ("Nadam", {"weight_decay": 0.1, "clipnorm": 0.3, "epsilon": 1e-3}),
    ("Nadam", {"gradient_accumulation_steps": 3}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"momentum": 0.9, "epsilon": 1e-3}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "clipnorm": 0.3}),
    ("RMSprop", {"momentum": 0.9, "learning_rate": schedules.InverseTimeDecay(0.01, 2, 0.5)}),
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "global_clipnorm": 0.2}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "clipnorm": 0.3}),
    ("SGD", {"momentum": 0.9, "learning_rate": schedules.CosineDecay(0.1, 30), "nesterov": True}),
    ("SGD", {"loss_scale_factor": 7.0, "gradient_accumulation_steps": 3}),
]

ROUNDED = {"clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps"}
"""Where Keras computes in float32 whatever the floatx: on torch, gradients before their use; on
TensorFlow, hyperparameters."""
if TENSORFLOW:
    ROUNDED = {"clipnorm", "clipvalue", "global_clipnorm", "weight_decay", "momentum", "Nadam"}

CHECKED = {"Adadelta", "Nadam"}
"""Those whose rule says what becomes of the state."""

COARSE = {f"effective_lr_{name}": (0.01, 0.0) for name in (*QUANTILES, "gmean")}
"""What is read off logarithmic bins."""


def named(case):
    """Name of a case."""
    name, options = case
    return name + "".join(f"-{k}={getattr(v, 'name', v)}" for k, v in options.items())


def made(case):
    """The optimizer of a case."""
    name, options = case
    return getattr(keras.optimizers, name)(**{"learning_rate": 0.01, **options})


@pytest.fixture
def _float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def test_the_table_has_all_that_have_a_rule():
    """Every optimizer that is reconstructed is in the table, plain and with options."""
    assert {name for name, _ in CASES} == set(EQUATIONS)
    for name in EQUATIONS:
        assert sum(name == other for other, _ in CASES) > 1


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_figure_is_that_of_the_equations(case):
    """Row for row, what Keras's text says of the steps of the same loop by hand, in float64."""
    callback = LRProbeCallback(every=1)
    model = fit(net(made(case)), callback, epochs=2)
    hand = net(made(case))
    steps = by_hand(hand, epochs=2)
    if case[1].get("use_ema"):
        hand.optimizer.finalize_variable_values(hand.trainable_variables)
    frame = callback.probe.frame().drop(columns=["time", "rule"])
    right = rows(steps)
    rtol, least = (1e-4, 1e-5) if ROUNDED & {case[0], *case[1]} else (1e-7, 1e-9)
    looser = {**COARSE, "reconstruction_error": (0, least), "zero_grad_fraction": (0, 0.1)}
    assert len(frame) == len(right) > 0
    for got, expected in zip(frame.to_dict("records"), right, strict=True):
        where = f"{named(case)}, step {expected['step']} of {expected['parameter']}"
        del expected["state_error"]
        assert math.isnan(got["state_error"]) == (case[0] not in CHECKED), where
        assert not got["state_error"] > rtol, where
        assert_close(got, expected, where, rtol=rtol, atol=1e-15, looser=looser)
    assert_bits(arrays(model.weights), arrays(hand.weights))


JIT = [False, True] if TENSORFLOW else [False]


SOME = CASES[1::2] if TENSORFLOW else CASES
"""TensorFlow traces each training anew, which takes long; every second has each optimizer."""


def test_some_have_each_optimizer():
    """None trains without being compared."""
    assert {name for name, _ in SOME} == set(EQUATIONS)


@pytest.mark.parametrize("jit", JIT, ids=lambda jit: "xla" if jit else "plain")
@pytest.mark.parametrize("case", SOME, ids=named)
def test_training_is_the_same_bit_for_bit(case, jit):
    """Weights and the optimizer's variables; and in float32 too each step is explained."""
    if jit and SOME.index(case) % 3:
        pytest.skip("compiling takes longer still: one in three of these")
    callback = LRProbeCallback(every=2)
    probed = fit(net(made(case), jit_compile=jit), callback, epochs=2)
    alone = fit(net(made(case), jit_compile=jit), epochs=2)
    assert_bits(left(probed), left(alone))
    frame = callback.probe.frame()
    assert (frame["rule"] == type(made(case)).__name__.lower().replace("adamw", "adam")).all()
    assert frame["reconstruction_error"].max() < 1e-3
