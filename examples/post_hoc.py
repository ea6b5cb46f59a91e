"""After the training: analyse a Parquet dataset with pandas alone.

python examples/post_hoc.py [RUN.parquet]: without one, it trains a network first.
"""

import sys

import pandas as pd


def train(dataset: str) -> None:
    """Record a run to analyse: Adam, on digits."""
    from digits import load, zeiler_net
    from torch import nn
    from torch.optim import Adam

    import lrprobe

    digits, model = load(), zeiler_net()
    optimizer = Adam(model.parameters())
    with lrprobe.attach(optimizer, model, to=dataset):
        for images, labels in digits.batches(20, epochs=5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


if len(sys.argv) == 1:
    sys.argv.append("runs/post_hoc.parquet")
    train(sys.argv[1])
frame = pd.read_parquet(sys.argv[1])  # a row for each recorded step and parameter

print("Which parameters move most, relative to their size, in the second half?")
late = frame[frame["step"] > frame["step"].max() / 2]
print(late.groupby("parameter")["update_ratio"].median().sort_values(ascending=False), "\n")

print("By what factor has each median rate changed since step 10?")
rate = frame.pivot_table("effective_lr_p50", "step", "parameter")
print((rate.iloc[-1] / rate.loc[10]).sort_values(), "\n")

print("How wide is the spread of rates inside a parameter? (p95 / p05, at the end)")
last = frame[frame["step"] == frame["step"].max()].set_index("parameter")
print((last["effective_lr_p95"] / last["effective_lr_p05"]).sort_values(), "\n")

print("Can the numbers be trusted? Largest reconstruction error, number of non-finite elements:")
print(frame["reconstruction_error"].max(), int(frame["nonfinite"].sum()))
