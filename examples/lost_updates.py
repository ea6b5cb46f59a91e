"""How much of the training bfloat16 rounds away.

A bfloat16 number has 8 significant bits: an update below 1/512 of the parameter changes nothing.
This trains the same network with weights in float32 and in bfloat16, at two rates. The probe shows
the fraction of updates that were lost.

python examples/lost_updates.py
"""

from demo import digits, zeiler_net
from torch import bfloat16, float32, nn
from torch.optim import AdamW

import lrprobe

EPOCHS = 3

print(f"{'dtype':>10} {'lr':>7}   lost   loss")
for lr in (1e-3, 1e-4):
    for dtype in (float32, bfloat16):
        model = zeiler_net().to(dtype)
        optimizer = AdamW(model.parameters(), lr=lr)
        with lrprobe.attach(optimizer, model) as probe:
            for _ in range(EPOCHS):
                for images, labels in digits()[0]:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)
                    loss.backward()
                    optimizer.step()
        lost = probe.frame(by="model")["lost_fraction"].iloc[-1]
        name = str(dtype).removeprefix("torch.")
        print(f"{name:>10} {lr:>7} {lost:>6.1%} {loss.item():>6.3f}")
