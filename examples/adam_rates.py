"""What lr=1e-3 becomes in Adam: α/(√v̂+ε) for each element, and how far the parameters move.

First it compares the tensor of rates of single steps with the formula; then a probe shows each
layer over the steps.

python examples/adam_rates.py
"""

from digits import load, zeiler_net
from torch import nn
from torch.optim import Adam

import lrprobe

digits, model = load(), zeiler_net()
optimizer = Adam(model.parameters(), lr=1e-3)
with lrprobe.attach(optimizer, model, every=50, include="weight") as probe:
    for number, (images, labels) in enumerate(digits.batches(20, epochs=5), start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if number in (1, 10, 100, 300):
            with lrprobe.inspect_step(optimizer, model) as step:
                optimizer.step()
            rate = step["hidden2.weight"].effective_lr  # a tensor of the shape of the weight
            state = optimizer.state[model.hidden2.weight]
            v_hat = state["exp_avg_sq"] / (1 - 0.999 ** state["step"])
            formula = 1e-3 / (v_hat.sqrt() + 1e-8)
            print(
                f"step {number}: rates in hidden2.weight from {rate.min():.3g} to {rate.max():.3g};"
                f" off the formula by {((rate - formula) / formula).abs().max():.0e} at most"
            )
        else:
            optimizer.step()

frame = probe.frame()
print("\nα/(√v̂+ε): the median element, and the one where 5 % are above")
print(frame.pivot_table(["effective_lr_p50", "effective_lr_p95"], "step", "parameter", sort=False)
      .to_string(float_format="{:.3g}".format))  # fmt: skip
print("\nSize of the update, relative to the weights: about 1e-3 is usual")
print(frame.pivot_table("update_ratio", "step", "parameter", sort=False)
      .to_string(float_format="{:.1e}".format))  # fmt: skip
