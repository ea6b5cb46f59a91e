"""What happens in a training with Keras, on the backend of this process."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from hosts import assert_same
from keras_runs import (
    BATCHES,
    PATHS,
    TENSORFLOW,
    arrays,
    assert_bits,
    batches,
    data,
    fit,
    left,
    net,
)

import lrprobe
from lrprobe import report
from lrprobe.foreign import keras as foreign
from lrprobe.integrations.keras import LRProbeCallback

optimizers = keras.optimizers
only_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="a matter of TensorFlow")


def recorded(optimizer, *callbacks, probe=None, epochs=1, compiled=None, **options):
    """The frame of a training, and the model; it must end as it does alone."""
    probe = probe or LRProbeCallback(every=1)
    config = optimizers.serialize(optimizer)
    model = fit(net(optimizer, **(compiled or {})), probe, *callbacks, epochs=epochs, **options)
    alone = net(optimizers.deserialize(config), **(compiled or {}))
    fit(alone, *callbacks, epochs=epochs, **options)
    assert_bits(left(model), left(alone))
    return probe.probe.frame(), model


def test_fit_has_the_frame_of_the_loop_by_hand():
    """Row for row, bit for bit: the callbacks called by hand around train_on_batch."""
    frame, _ = recorded(optimizers.AdamW(0.01))
    model = net(optimizers.AdamW(0.01))
    probe = LRProbeCallback(every=1)
    callbacks = keras.callbacks.CallbackList([probe], model=model)
    callbacks.on_train_begin()
    for number, (x, y) in enumerate(batches()):
        callbacks.on_train_batch_begin(number)
        model.train_on_batch(x, y)
        callbacks.on_train_batch_end(number)
    callbacks.on_train_end()
    assert_same(frame, probe.probe.frame())
    assert frame["parameter"].tolist()[:4] == PATHS
    assert frame["optimizer"].unique().tolist() == ["AdamW"]


@pytest.mark.skipif(TENSORFLOW, reason="a matter of torch")
def test_on_torch_it_is_the_frame_of_torchs_optimizer():
    """Adadelta, whose equations and ε are the same in both, over the same parameters."""
    frame, _ = recorded(optimizers.Adadelta(1.0, rho=0.9, epsilon=1e-6))
    import torch

    model = net("sgd")
    params = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.Adadelta(params, lr=1.0, rho=0.9, eps=1e-6)
    with lrprobe.attach(optimizer, every=1) as probe:
        for x, y in batches():
            optimizer.zero_grad()
            ((model(x) - torch.from_numpy(y)) ** 2).mean().backward()
            optimizer.step()
    right = probe.frame()
    assert frame["step"].tolist() == right["step"].tolist()
    for column in [c for c in right if c.startswith(("effective", "update", "rms", "grad", "eps"))]:
        np.testing.assert_allclose(frame[column], right[column], rtol=2e-3, err_msg=column)


def test_the_rate_is_the_one_of_the_step():
    """Of a schedule, of a callback that changes it in mid-training, and of the first step."""
    schedule = optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.1, 0.01, 0.001])
    frame, _ = recorded(optimizers.SGD(schedule))
    lr = frame[frame["parameter"] == PATHS[0]]["lr"]
    np.testing.assert_allclose(lr, [0.1] * 3 + [0.01] * 3 + [0.001] * 3, rtol=1e-6)
    np.testing.assert_allclose(frame["initial_lr"], 0.1, rtol=1e-6)
    change = keras.callbacks.LearningRateScheduler(lambda epoch, _: 0.1 / 2**epoch)
    frame, _ = recorded(optimizers.SGD(0.5), change, epochs=2)
    lr = frame[frame["parameter"] == PATHS[0]]["lr"]
    np.testing.assert_allclose(lr, [0.1] * BATCHES + [0.05] * BATCHES, rtol=1e-6)
    np.testing.assert_allclose(frame["effective_lr_p50"], frame["lr"])


def test_a_rate_that_is_a_function():
    """Keras calls it for each step; so does the frame."""
    probe = LRProbeCallback(every=1)
    fit(net(optimizers.SGD(lambda: 0.05)), probe)
    frame = probe.probe.frame()
    np.testing.assert_allclose(frame[["lr", "initial_lr", "effective_lr_max"]], 0.05, rtol=1e-6)
    assert frame["reconstruction_error"].max() < 1e-4


def test_a_warm_up_from_0():
    """A first step without a rate moves nothing, and is no error."""
    schedule = optimizers.schedules.CosineDecay(0.0, 20, warmup_target=0.1, warmup_steps=4)
    for optimizer in (
        optimizers.SGD(schedule, momentum=0.9),
        optimizers.RMSprop(schedule, momentum=0.9),
        optimizers.Adam(schedule),
    ):
        frame, _ = recorded(optimizer)
        assert (frame["rule"] != "measured").all()
        assert frame["update_norm"].iloc[0] == 0
        assert not frame["reconstruction_error"].gt(1e-3).any()


def test_the_count_goes_on(tmp_path):
    """From the optimizer's own, in a second fit too; a dataset has each step once."""
    model = net(optimizers.Adam(0.01))
    probe = LRProbeCallback(tmp_path / "run.parquet", every=2)
    fit(model, probe)
    assert probe.probe.step == BATCHES
    fit(model, probe, epochs=3, initial_epoch=2)
    assert probe.probe.frame()["step"].unique().tolist() == list(range(10, 19, 2))
    found = lrprobe.read(tmp_path / "run.parquet")
    assert found["step"].unique().tolist() == [1, *range(2, 19, 2)]


def test_nothing_is_left_on_what_is_the_users():
    """The model has its own train function, the optimizer the attributes that it has alone."""
    frame, model = recorded(optimizers.Adam(0.01, clipnorm=0.1))
    assert len(frame) == 4 * BATCHES
    alone = fit(net(optimizers.Adam(0.01, clipnorm=0.1)))
    assert vars(model.optimizer).keys() == vars(alone.optimizer).keys()
    assert vars(model).keys() == vars(alone).keys()
    assert "lrprobe" not in model.train_function.__module__
    callback = LRProbeCallback(every=1)
    fit(model, callback)
    model.train_on_batch(*batches()[0])
    assert callback.probe.step == 2 * BATCHES


def test_an_error_in_the_training_is_the_users():
    """It comes through, nothing is left behind, and the next training is recorded."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyError("mine")

    model = net(optimizers.Adam(0.01))
    probe = LRProbeCallback(every=1)
    with pytest.raises(KeyError, match="mine"):
        fit(model, probe, Stop())
    assert probe.probe.step == 3
    fit(model, probe)
    assert probe.probe.frame()["step"].unique().tolist() == list(range(4, 13))
    assert "_backend_update_step" not in vars(model.optimizer)


@pytest.mark.parametrize("what", ["show_step", "show_before", "steps", "__init__"])
def test_an_error_of_ours_stops_no_training(what, monkeypatch):
    """It is told once, and the training ends as it does alone."""

    def fails(*_, **__):
        raise OSError("ours")

    monkeypatch.setattr(foreign.KerasOptimizer, what, fails)
    model = net(optimizers.Adam(0.01))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(model, LRProbeCallback(every=1))
    messages = [str(w.message) for w in told if "lrprobe" in str(w.message)]
    assert "OSError: ours" in messages[0]
    assert len(messages) <= 2  # close() says how many
    monkeypatch.undo()
    assert_bits(left(model), left(fit(net(optimizers.Adam(0.01)))))


def test_the_rule_must_explain_the_step():
    """A subclass has its parent's rule, until the check against the real step refutes it."""

    class Same(optimizers.SGD):
        pass

    class Twice(optimizers.SGD):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            super()._backend_update_step(grads, trainable_variables, 2 * 0.01)

    probe = LRProbeCallback(every=1)
    fit(net(Same(0.01)), probe)
    assert probe.probe.frame()["optimizer"].unique().tolist() == ["Same"]
    assert (probe.probe.frame()["rule"] == "sgd").all()
    probe = LRProbeCallback(every=1)
    with pytest.warns(UserWarning, match="does not explain the steps of Twice"):
        fit(net(Twice(0.01)), probe)
    frame = probe.probe.frame()
    assert (frame["rule"].iloc[-4:] == "measured").all()
    np.testing.assert_allclose(frame["effective_lr_p50"].iloc[-4:], 0.02, rtol=1e-2)


def test_an_optimizer_without_a_rule_is_measured():
    """And says so."""
    with pytest.warns(UserWarning, match="Ftrl has no rule"):
        frame, _ = recorded(optimizers.Ftrl(0.01))
    assert (frame["rule"] == "measured").all()
    assert frame["effective_lr_p50"].notna().all()


def skips(scale):
    """With a scale of the loss at which the first gradients are infinite."""
    return optimizers.LossScaleOptimizer(optimizers.Adam(0.01), initial_scale=scale)


def test_steps_that_a_loss_scaler_skips_have_no_row():
    """They are not counted either; the gradient of the others is unscaled."""
    frame, model = recorded(skips(3e38))
    taken = int(model.optimizer.inner_optimizer.iterations.numpy())
    assert 0 < taken < BATCHES
    assert frame["step"].unique().tolist() == list(range(1, taken + 1))
    assert (frame["optimizer"] == "Adam").all()
    assert frame["grad_norm"].max() < 1e4
    assert frame["reconstruction_error"].max() < 1e-4


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_mixed_and_low_precision(policy):
    """The rate is of the variables that are stepped; bfloat16 ones lose updates."""
    keras.config.set_dtype_policy(policy)
    try:
        frame, _ = recorded(optimizers.SGD(0.01, momentum=0.9))
    finally:
        keras.config.set_dtype_policy("float32")
    assert (frame["rule"] == "sgd").all()
    assert not frame["reconstruction_error"].gt(5e-2).any()
    assert (frame["lost_fraction"].max() > 0.1) == (policy == "bfloat16")


def test_accumulated_gradients():
    """A batch that only adds a gradient is no step; passes are counted with batch_size."""
    probe = LRProbeCallback(every=1, batch_size=8)
    frame, _ = recorded(optimizers.Adam(0.01, gradient_accumulation_steps=3), probe=probe)
    assert frame["step"].unique().tolist() == [1, 2, 3]
    assert (frame["samples"] == 24).all()


def test_what_follows_the_step_is_no_part_of_it():
    """A constraint, and the average that ema_overwrite_frequency puts in the parameter's place."""
    frame, _ = recorded(optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2))
    assert frame["reconstruction_error"].max() < 1e-4
    probe = LRProbeCallback(every=1)
    model = keras.Sequential(
        [keras.Input((10,)), keras.layers.Dense(4, kernel_constraint=keras.constraints.UnitNorm())]
    )
    model.compile(optimizers.Adam(0.1), "mse")
    fit(model, probe)
    assert (probe.probe.frame()["rule"] == "adam").all()
    assert probe.probe.frame()["reconstruction_error"].max() < 1e-4


def test_what_is_excluded_from_decay_is_a_group_of_its_own():
    """Each group has its decay."""
    optimizer = optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    probe = LRProbeCallback(every=1)
    fit(net(optimizer), probe)
    frame = probe.probe.frame()
    biases = frame["parameter"].str.endswith("bias")
    np.testing.assert_allclose(frame["decay"], np.where(biases, 0, 0.005), rtol=1e-6)
    assert (frame["group"] == biases).all()
    assert frame["reconstruction_error"].max() < 1e-4


class Idle(keras.layers.Layer):
    """Has a weight that it does not use."""

    def build(self, _):
        self.idle = self.add_weight(shape=(3,), name="idle", initializer="ones")

    def call(self, x):
        return x


def test_a_parameter_without_a_gradient_has_its_row():
    """With stepped=False; what is frozen is not in the optimizer."""
    model = keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(4, trainable=False),
            Idle(name="lazy"),
            keras.layers.Dense(4, name="last"),
        ],
        name="net",
    )
    model.compile(optimizers.Adam(0.01), "mse")
    probe = LRProbeCallback(every=1)
    fit(model, probe)
    frame = probe.probe.frame()
    assert set(frame["parameter"]) == {"net/lazy/idle", "net/last/kernel", "net/last/bias"}
    idle = frame[frame["parameter"] == "net/lazy/idle"]
    assert not idle["stepped"].any()
    np.testing.assert_allclose(idle["param_norm"], np.sqrt(3))
    assert frame[frame["parameter"] != "net/lazy/idle"]["stepped"].all()


def test_several_optimizers():
    """A MultiOptimizer's are told apart."""
    two = {"first": optimizers.SGD(0.1, name="a"), "second": optimizers.Adam(0.01, name="b")}
    optimizer = optimizers.MultiOptimizer(lambda v: two[v.path.split("/")[1]])
    probe = LRProbeCallback(every=1)
    fit(net(optimizer), probe)
    frame = probe.probe.frame()
    assert frame.groupby("optimizer")["parameter"].unique().map(sorted).to_dict() == {
        "Adam": sorted(PATHS[2:]),
        "SGD": sorted(PATHS[:2]),
    }
    assert frame["reconstruction_error"].max() < 1e-4
    assert frame.groupby("optimizer")["step"].max().tolist() == [BATCHES, BATCHES]


def test_options_and_all_that_comes_after(tmp_path):
    """Levels, tracked elements, filters, sinks, findings and the report, as for torch's own."""
    asked = []
    probe = LRProbeCallback(
        [tmp_path / "run.parquet", tmp_path / "logs"],
        every=lambda step: asked.append(step) or step % 3 == 0,
        include="kernel",
        track=2,
    )
    frame, _ = recorded(optimizers.Adam(0.01), probe=probe)
    assert asked == list(range(1, BATCHES + 1))
    assert frame["step"].unique().tolist() == [3, 6, 9]
    assert frame["parameter"].unique().tolist() == [PATHS[0], PATHS[2]]
    assert probe.probe.frame(by="module")["module"].tolist()[:2] == ["net/first", "net/second"]
    assert len(probe.probe.elements()) == 3 * 2 * 2
    pd.testing.assert_frame_equal(lrprobe.read(tmp_path / "run.parquet"), frame)
    assert "effective_lr_p50" in lrprobe.read(tmp_path / "logs")
    lrprobe.diagnose(frame)
    report.write(tmp_path / "report.html", tmp_path / "run.parquet")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_large_parameter_with_an_embedding():
    """Beyond 4,096 elements, with gradients of some rows only."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Embedding(500, 20), keras.layers.Flatten(),
         keras.layers.Dense(4)]
    )  # fmt: skip
    model.compile(optimizers.Adam(0.01), "mse")
    probe = LRProbeCallback(every=1)
    x = np.random.default_rng(0).integers(0, 500, (72, 5))
    model.fit(x, data()[1], batch_size=8, verbose=0, callbacks=[probe], shuffle=False)
    frame = probe.probe.frame()
    assert (frame["rule"] == "adam").all()
    assert frame["reconstruction_error"].max() < 1e-4
    assert frame["zero_grad_fraction"].iloc[0] >= 1 - 40 / 500


class Own(keras.Model):
    """Built by its first step, with a train_step of its own."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)

    def train_step(self, batch):
        return super().train_step(batch)


def test_a_model_that_its_first_step_builds():
    """With TensorFlow Keras makes its variables in that step, which is not recorded."""
    model = Own()
    model.compile(optimizers.Adam(0.01), "mse")
    probe = LRProbeCallback(every=1)
    fit(model, probe)
    steps = probe.probe.frame()["step"].unique().tolist()
    assert steps == list(range(2 if TENSORFLOW else 1, BATCHES + 1))


@pytest.mark.parametrize(
    "compiled",
    [{"run_eagerly": True}, {"jit_compile": True}],
    ids=str,
)
def test_ways_to_run(compiled):
    """Eagerly; compiled, by XLA or by torch.compile."""
    frame, _ = recorded(optimizers.Adam(0.01, global_clipnorm=0.1), compiled=compiled)
    assert len(frame) == 4 * BATCHES
    assert frame["reconstruction_error"].max() < 1e-4


@only_tensorflow
@pytest.mark.parametrize("jit", [False, True])
def test_several_steps_in_one_call(jit):
    """The last of each call can be recorded, and is checked by itself."""
    options = {"steps_per_execution": 4, "jit_compile": jit}
    schedule = optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    frame, _ = recorded(optimizers.Adam(schedule, clipnorm=0.1), compiled=options, epochs=2)
    one, _ = recorded(optimizers.Adam(schedule, clipnorm=0.1), epochs=2)
    assert frame["step"].unique().tolist() == [4, 8, 13, 17]  # 9 batches: the last call has one
    one = one[one["step"].isin([4, 8, 13, 17])].reset_index(drop=True)
    for column in ("lr", "effective_lr_p50", "grad_norm", "update_norm"):
        np.testing.assert_allclose(frame[column], one[column], rtol=1e-4, err_msg=column)
    assert frame["reconstruction_error"].max() < 1e-3


@only_tensorflow
def test_the_state_before_the_last_of_several_steps_is_not_known():
    """So it is not checked; before a step that is a call of its own it is, and is right."""
    together, _ = recorded(optimizers.Nadam(0.01), compiled={"steps_per_execution": 4})
    alone, _ = recorded(optimizers.Nadam(0.01))
    assert together["state_error"].isna().all()
    assert alone["state_error"].max() < 1e-4
    for frame in (together, alone):
        assert "state-unexplained" not in {f.code for f in lrprobe.diagnose(frame).findings}


@only_tensorflow
def test_a_strategy_of_several_replicas_is_not_recorded():
    """It says so, and trains."""
    model = net(optimizers.Adam(0.01))
    two = {"distribute_strategy": SimpleNamespace(num_replicas_in_sync=2)}
    model.__class__ = type("Spread", (type(model),), two)
    callback = LRProbeCallback()
    callback.set_model(model)
    with pytest.warns(UserWarning, match=r"not recorded.*tf\.distribute"):
        callback.on_train_begin()
    callback.on_train_batch_begin(0)
    callback.on_train_end()
    assert callback.probe is None


def test_another_backend_is_refused(monkeypatch):
    """With its name, and those that can do."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(NotImplementedError, match=r"'jax'.*'tensorflow' and 'torch'"):
        LRProbeCallback()


def test_arguments_are_checked_as_attach_checks_them():
    """A wrong one is an error, when the training begins."""
    with pytest.raises(ValueError, match="every="):
        fit(net("adam"), LRProbeCallback(every=0))


def test_the_other_backend_is_not_imported():
    """On torch nothing of ours imports TensorFlow."""
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'torch'\n"
        "import sys, lrprobe.integrations.keras; print('tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_weights_are_views():
    """Nothing of the size of the model is copied to be looked at."""
    model = fit(net(optimizers.Adam(0.01)))
    for variable in model.trainable_variables:
        seen = foreign.tensor(variable)
        assert seen.shape == tuple(variable.shape)
        np.testing.assert_array_equal(seen.numpy(), arrays([variable])[0])
