"""Tables and a picture for zeiler2012.py."""

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))


def spread(values: pd.Series) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.3g} ± {values.std(ddof=len(values) > 1):.2g}"


def markdown(title: str, table: pd.DataFrame) -> str:
    """A table under its title."""
    rows = [("", *table.columns), ["---"] * (table.shape[1] + 1), *table.itertuples()]
    return f"**{title}**\n\n" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def curves(errors: dict[str, pd.DataFrame], picture: Path) -> pd.DataFrame:
    """Draw errors over epochs (the rows; the columns are seeds), and give back their spreads."""
    _, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, table), (colour, dash) in zip(errors.items(), STYLES, strict=True):
        ax.plot(table.mean(axis=1), color=colour, linestyle=dash, label=name)
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.15)
    ax.set(xlabel="epoch", ylabel="test error (%): mean, best and worst seed", yscale="log")
    ax.grid(visible=True, alpha=0.3)
    ax.legend()
    ax.figure.savefig(picture, dpi=110)
    return pd.DataFrame({name: table.agg(spread, axis=1) for name, table in errors.items()})
