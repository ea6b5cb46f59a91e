"""The experiments of Zeiler (2012), arXiv:1212.5701, repeated: Tables 1 and 2, Figures 1 and 2.

On scikit-learn's digits, or on MNIST if you have its files (digits.py says which). Epochs are the
paper's; a batch has 20 digits, on MNIST 100 as in the paper. A seed draws weights, order, and the
test digits. python examples/zeiler2012.py [--seeds 10] [--mnist FOLDER] [--out FOLDER]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Optimizer
from zeiler2012_inside import Run, look_inside, statements, sudden_gradient
from zeiler2012_show import curves, markdown, spread

import lrprobe
import lrprobe.plot

METHODS = {"SGD": SGD, "MOMENTUM": partial(SGD, momentum=0.9), "ADAGRAD": Adagrad}
TABLE_1 = {  # the paper, too, calls the rate ε here
    (f"ε = 1e-{n}", method): partial(make, lr=10.0**-n)
    for n in range(5)
    for method, make in METHODS.items()
}
TABLE_2 = {
    (f"ε = 1e-{n}", f"ρ = {rho}"): partial(Adadelta, rho=rho, eps=10.0**-n)
    for n in (2, 4, 6, 8)
    for rho in (0.9, 0.95, 0.99)
}
ADADELTA = TABLE_2["ε = 1e-6", "ρ = 0.95"]


def main(seeds: int, mnist: Path | None, out: Path, hurry: int) -> None:
    """Run everything; leave two pictures, the probes' datasets, and the tables in results.md."""
    out.mkdir(parents=True, exist_ok=True)
    long, middle, short = (max(epochs // hurry, 1) for epochs in (50, 25, 6))
    report = [f"Mean ± standard deviation over {seeds} seeds; errors on test images in percent.\n"]

    def errors(make: Callable[..., Optimizer], epochs: int) -> pd.DataFrame:
        """Test errors: a row for each epoch, a column for each seed."""
        runs = [Run(make, seed, mnist) for seed in range(seeds)]
        table = pd.DataFrame({run.seed: [run.epoch(i) for i in range(epochs)] for run in runs})
        return table.set_axis(range(1, epochs + 1))

    best = {}
    for title, makes in (("Table 1", TABLE_1), ("Table 2", TABLE_2)):
        last = {key: errors(make, short).loc[short] for key, make in makes.items()}
        table = pd.DataFrame()
        for (row, column), values in last.items():
            table.loc[row, column] = spread(values)
        report.append(markdown(f"{title}, after {short} epochs", table))
        for method in METHODS if makes is TABLE_1 else ():
            keys = [key for key in makes if key[1] == method]
            key = min(keys, key=lambda key: last[key].mean())
            best[f"{method}, {key[0]}"] = makes[key]
    best["ADADELTA, ε = 1e-6, ρ = 0.95"] = ADADELTA

    found = {name: errors(make, long) for name, make in best.items()}
    table = curves(found, out / "figure1.png").rename(index="after epoch {}".format)
    shown = [f"after epoch {epoch}" for epoch in (1, 5, 10, 25, 50) if epoch <= long]
    report.append(markdown("Figure 1", table.loc[shown]))

    runs = [Run(ADADELTA, seed, mnist, nn.Tanh) for seed in range(seeds)]
    seen = [look_inside(run, middle, out / f"tanh-{run.seed}.parquet") for run in runs]
    elements = lrprobe.read(out / "tanh-0.parquet", table="elements")
    lrprobe.plot.traces(elements)[0, 0].figure.savefig(out / "figure2.png", dpi=110)
    tanh = pd.Series([test_errors[short - 1] for test_errors, _ in seen])
    report.append(f"The tanh network after {short} epochs: {spread(tanh)}.\n")
    layers = [table for _, table in seen]
    table = pd.concat(layers).groupby(level=0, sort=False).agg(spread).T
    report.append(markdown(f"Figure 2, the tanh network over {middle} epochs", table))
    report.append(markdown("In how many runs", statements(layers).to_frame("holds in")))

    runs = [Run(ADADELTA, seed, mnist) for seed in range(seeds)]
    rates = pd.concat([sudden_gradient(run, at=100, factor=100) for run in runs])
    table = rates.groupby(level=0).agg(spread).loc[[-10, -2, -1, 0, 1, 10, 50]]
    title = "Section 3.2, the rate near a gradient times 100 at step 100, relative to step 99"
    report.append(markdown(title, table.rename(index="{:+} steps".format)))

    (out / "results.md").write_text("\n".join(report), encoding="utf-8")
    print(*report, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("runs", "zeiler2012"))
    parser.add_argument("--hurry", type=int, default=1, help="divide the epochs by this")
    main(**vars(parser.parse_args()))
