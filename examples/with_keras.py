"""Keras 3: one more line in fit, on the torch backend or on TensorFlow.

KERAS_BACKEND=torch python examples/with_keras.py, after pip install 'lrprobe[keras]' scikit-learn
"""

import keras
from digits import load

import lrprobe
from lrprobe.integrations.keras import LRProbeCallback

digits = load()
layers = keras.layers
model = keras.Sequential(
    [
        keras.Input((digits.images.shape[1],)),
        layers.Dense(500, activation="tanh", name="hidden1"),
        layers.Dense(300, activation="tanh", name="hidden2"),
        layers.Dense(10, name="output"),
    ],
    name="digits",
)
model.compile(
    keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, 216)),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
probe = LRProbeCallback("runs/keras", every=36)
model.fit(
    digits.images.numpy(),
    digits.labels.numpy(),
    batch_size=20,
    epochs=3,
    verbose=0,
    callbacks=[probe],  # the one line
)

frame = probe.probe.frame(by="module")
columns = ["step", "module", "lr", "effective_lr_p50", "eps_fraction", "reconstruction_error"]
last = frame[frame["step"] == frame["step"].max()]
print(f"Adam on {keras.backend.backend()}, step {last['step'].iloc[0]}")
print(last[columns].to_string(index=False, float_format="{:.3g}".format))
print("TensorBoard: runs/keras")
print(lrprobe.read("runs/keras")["step"].nunique(), "recorded steps in it")
