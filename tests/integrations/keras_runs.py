"""A network in Keras, its training by hand, and the oracle of its steps, in NumPy.

For one process, whose backend ``KERAS_BACKEND`` names.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))  # oracle.py

from oracle import Truth, row

TENSORFLOW = keras.backend.backend() == "tensorflow"
BATCH, BATCHES = 8, 9
PATHS = ["net/first/kernel", "net/first/bias", "net/second/kernel", "net/second/bias"]


def data():
    """9 batches of 8, the same every time, one of them with a spike."""
    random = np.random.default_rng(1)
    x = random.normal(size=(BATCH * BATCHES, 10)).astype(keras.config.floatx())
    x[4 * BATCH : 5 * BATCH] *= 30
    return x, random.normal(size=(BATCH * BATCHES, 4)).astype(keras.config.floatx())


def batches():
    """The same, batch by batch."""
    x, y = data()
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]


def net(optimizer, **options):
    """Two layers, the same every time, and compiled."""
    keras.utils.set_random_seed(2)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(16, activation="tanh", name="first"),
            layers.Dense(4, name="second"),
        ],
        name="net",
    )
    model.compile(optimizer, "mse", **options)
    return model


def fit(model, *callbacks, epochs=1, **options):
    """Train it."""
    x, y = data()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options)
    return model


def arrays(variables):
    """Copies of variables; bfloat16 as float32, which tells all of it."""
    return [np.array(keras.ops.convert_to_numpy(keras.ops.cast(v, _wide(v)))) for v in variables]


def _wide(variable):
    return "float32" if variable.dtype == "bfloat16" else variable.dtype


def left(model):
    """All that a training leaves: weights, and the optimizer's variables."""
    return arrays(model.weights) + arrays(model.optimizer.variables)


def assert_bits(got, right):
    """Every bit of them is the same."""
    assert len(got) == len(right) > 0
    for one, other in zip(got, right, strict=True):
        np.testing.assert_array_equal(one, other)


def gradients(model, x, y):
    """Of the mean squared error, in float64: by the chain rule; on torch by autograd.

    On torch Keras multiplies matrices in float32 whatever the floatx, so that the chain rule comes
    near only.
    """
    w1, b1, w2, b2 = (w.astype(np.float64) for w in arrays(model.trainable_variables))
    hidden = np.tanh(x @ w1 + b1)
    share = 2 * (hidden @ w2 + b2 - y) / y.size
    back = (share @ w2.T) * (1 - hidden**2)
    grads = [x.T @ back, back.sum(axis=0), hidden.T @ share, share.sum(axis=0)]
    if not TENSORFLOW:
        model.zero_grad()
        ((model(x) - torch.from_numpy(y)) ** 2).mean().backward()
        own = [v.value.grad.numpy().astype(np.float64) for v in model.trainable_variables]
        for near, exact in zip(grads, own, strict=True):
            np.testing.assert_allclose(near, exact, rtol=1e-3, atol=1e-4)
        grads = own
    return grads


def clipped(o, grads):
    """What Keras does to gradients before it uses them."""
    if o.clipvalue:
        return [np.clip(g, -o.clipvalue, o.clipvalue) for g in grads]
    if o.clipnorm:
        return [g * o.clipnorm / max(np.linalg.norm(g), o.clipnorm) for g in grads]
    if o.global_clipnorm:
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        return [g * o.global_clipnorm / max(norm, o.global_clipnorm) for g in grads]
    return grads


def adam(o, s, g, lr, t):
    m = o.beta_1 * s._momentums + (1 - o.beta_1) * g
    v = o.beta_2 * s._velocities + (1 - o.beta_2) * g**2
    if o.amsgrad:
        v = np.maximum(v, s._velocity_hats)
    correction = 1 - o.beta_2**t
    return {
        "rate": lr * np.sqrt(correction) / (np.sqrt(v) + o.epsilon),
        "direction": m / (1 - o.beta_1**t),
        "rms_grad": np.sqrt(v / correction),
        "eps": (np.sqrt(v), o.epsilon),
    }


def adamax(o, s, g, lr, t):
    u = np.maximum(o.beta_2 * s._u, np.abs(g))
    m = o.beta_1 * s._m + (1 - o.beta_1) * g
    return {
        "rate": lr / (u + o.epsilon),
        "direction": m / (1 - o.beta_1**t),
        "eps": (u, o.epsilon),
    }


def nadam(o, s, g, lr, t):
    m = o.beta_1 * s._momentums + (1 - o.beta_1) * g
    v = (o.beta_2 * s._velocities + (1 - o.beta_2) * g**2) / (1 - o.beta_2**t)
    mu, mu_next = (o.beta_1 * (1 - 0.5 * 0.96**k) for k in (t, t + 1))
    product = s._u_product * mu
    return {
        "rate": lr / (np.sqrt(v) + o.epsilon),
        "direction": mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product),
        "rms_grad": np.sqrt(v),
        "eps": (np.sqrt(v), o.epsilon),
    }


def adagrad(o, s, g, lr, t):
    total = s._accumulators + g**2
    return {
        "rate": lr / np.sqrt(total + o.epsilon),
        "direction": g,
        "rms_grad": np.sqrt(total / t),
        "eps": (total, o.epsilon),
    }


def adadelta(o, s, g, lr, t):
    square = o.rho * s._accumulated_grads + (1 - o.rho) * g**2
    delta = s._accumulated_delta_vars
    return {
        "rate": lr * np.sqrt(delta + o.epsilon) / np.sqrt(square + o.epsilon),
        "direction": g,
        "rms_grad": np.sqrt(square),
        "rms_update": np.sqrt(delta),
        "eps": (square, o.epsilon),
    }


def rmsprop(o, s, g, lr, t):
    square = o.rho * s._velocities + (1 - o.rho) * g**2
    if o.centered:
        square = square - (o.rho * s._average_gradients + (1 - o.rho) * g) ** 2
    root = np.sqrt(square + o.epsilon)
    moved = lr * g / root
    if o.momentum:
        moved = o.momentum * s._momentums + moved
    return {
        "rate": lr / root,
        "direction": moved * root / lr,
        "rms_grad": np.sqrt(np.maximum(square, 0)),
        "eps": (square, o.epsilon),
    }


def sgd(o, s, g, lr, t):
    direction = g
    if o.momentum:
        velocity = o.momentum * s.momentums - lr * g
        direction = g - o.momentum * velocity / lr if o.nesterov else -velocity / lr
    return {"rate": lr, "direction": direction}


def lion(o, s, g, lr, t):
    return {"rate": lr, "direction": np.sign(o.beta_1 * s._momentums + (1 - o.beta_1) * g)}


EQUATIONS = {
    "Adadelta": adadelta,
    "Adagrad": adagrad,
    "Adam": adam,
    "AdamW": adam,
    "Adamax": adamax,
    "Lion": lion,
    "Nadam": nadam,
    "RMSprop": rmsprop,
    "SGD": sgd,
}

SLOTS = (
    "_accumulated_delta_vars", "_accumulated_grads", "_accumulators", "_average_gradients", "_m",
    "_momentums", "_u", "_velocities", "_velocity_hats", "momentums",
)  # fmt: skip


def by_hand(model, epochs=1):
    """Train it batch by batch without lrprobe; the truth of each step, one of each parameter."""
    o = model.optimizer
    o.build(model.trainable_variables)
    steps, waiting, first, previous = [], [], None, [None] * len(PATHS)
    k = o.gradient_accumulation_steps or 1
    for x, y in batches() * epochs:
        before = arrays(model.trainable_variables)
        slots = {name: arrays(found) for name in SLOTS if (found := getattr(o, name, None))}
        product = float(o._u_product.numpy()) if hasattr(o, "_u_product") else None
        lr = float(keras.ops.convert_to_numpy(o.learning_rate))
        waiting.append(gradients(model, x, y))
        model.train_on_batch(x, y)
        if len(waiting) < k:
            continue
        grads = clipped(o, [sum(g) / k for g in zip(*waiting, strict=True)])
        waiting = []
        first = lr if first is None else first
        after = arrays(model.trainable_variables)
        truths = []
        for i, (old, g, new) in enumerate(zip(before, grads, after, strict=True)):
            state = SimpleNamespace(
                _u_product=product, **{name: found[i] for name, found in slots.items()}
            )
            said = EQUATIONS[type(o).__name__](o, state, g, lr, len(steps) + 1)
            truths.append(
                Truth(
                    name=PATHS[i],
                    group=0,
                    lr=lr,
                    initial_lr=first,
                    dtype=getattr(torch, new.dtype.name),
                    after=new.astype(np.float64).reshape(-1),
                    stepped=True,
                    decay=lr * (o.weight_decay or 0.0),
                    rate=np.broadcast_to(said["rate"], old.shape).astype(np.float64).reshape(-1),
                    direction=said["direction"].astype(np.float64).reshape(-1),
                    grad=g.reshape(-1),
                    previous=previous[i],
                    before=old.astype(np.float64).reshape(-1),
                    same=(old == new).reshape(-1),
                    nonfinite=np.zeros(old.size, dtype=bool),
                    optimizer=type(o).__name__,
                    **{k: said[k].reshape(-1) for k in ("rms_grad", "rms_update") if k in said},
                    eps=(said["eps"][0].reshape(-1), said["eps"][1]) if "eps" in said else None,
                )
            )
        steps.append(truths)
        previous = [g.reshape(-1) for g in grads]
    return steps


def rows(steps):
    """The frame that these steps make: its rows, but for the time of day."""
    return [
        {
            "step": number,
            "attempt": 0,
            "optimizer": truth.optimizer,
            "group": truth.group,
            "parameter": truth.name,
            **row(truth),
        }
        for number, truths in enumerate(steps, start=1)
        for truth in truths
    ]
