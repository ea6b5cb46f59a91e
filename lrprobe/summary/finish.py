"""Figures to columns, on the host: merge what the parameters have, then finish each row.

The parameter's own row is a merge of one, so that every level goes through the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrprobe.record import QUANTILES
from lrprobe.summary.distribution import Binned, Rates, binned, quantiles
from lrprobe.summary.figures import CHECKS, PARTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True)
class Summary:
    """Figures of the parameters in one step, on the host.

    Attributes:
        numel: elements of each parameter: (parameters,).
        stepped: whether it took the step: (parameters,).
        measured: whether its rate was measured for want of a rule: (parameters,).
        parts, checks: as ``figures.PARTS`` and ``figures.CHECKS``: (parameters, ·).
        rates: distribution of each parameter's rates; None where one number tells it, or nothing.
        counted: elements that the figures are of, where not all of them took the step.
    """

    numel: Ints
    stepped: NDArray[np.bool_]
    measured: NDArray[np.bool_]
    parts: Floats
    checks: Floats
    rates: Sequence[Rates | None]
    counted: Floats | None = None
    _binned: Binned | None = None

    def binned(self) -> Binned:
        """Fine bins of all parameters' rates, computed once."""
        if self._binned is None:
            self._binned = binned(self.rates, self.part("rate_mean"), self.numel)
        return self._binned

    def part(self, name: str) -> Floats:
        """One column of ``parts``."""
        return self.parts[:, PARTS.index(name)]

    def check(self, name: str) -> Floats:
        """One column of ``checks``."""
        return self.checks[:, CHECKS.index(name)]


def columns(summary: Summary, label: Ints, rows: int) -> dict[str, Floats]:
    """The figures of each row, merged from the parameters with its label.

    Args:
        summary: the parameters' figures.
        label: row of each parameter: (parameters,), from 0 to ``rows`` − 1.
        rows: number of rows.

    Returns:
        Column name to (rows,): all figures but the learning rate, decay and samples.
    """
    # Parameters that stepped, those of one row side by side.
    order = np.flatnonzero(summary.stepped)
    order = order[np.argsort(label[order], kind="stable")]
    found, starts = np.unique(label[order], return_index=True)
    with np.errstate(all="ignore"):
        terms = _terms(summary, order)
        mean = terms.pop("mean")
        low, high = terms.pop("low"), terms.pop("high")
        if len(order):
            low = np.minimum.reduceat(low, starts)
            high = np.maximum.reduceat(high, starts)
            summed = np.add.reduceat(np.stack(list(terms.values())), starts, axis=1)
            total = dict(zip(terms, summed, strict=True))
            n = total["n"]
            constant = low == high
            center = np.where(constant, low, total["n_mean"] / n)
            members = np.diff(starts, append=len(order))
            away = terms["n"] * (mean - np.repeat(center, members)) ** 2
            total["m2"] += np.add.reduceat(away, starts)
            figures = _finished(total, n, constant, low, high, center)
        else:
            figures = dict.fromkeys(_MERGED, low)
        result = {name: _spread(figures[name], found, rows) for name in _MERGED}
        # The norm of a parameter is known, whether it stepped or not.
        squares = np.zeros(rows)
        np.add.at(squares, label, summary.part("pp"))
        result["param_norm"] = np.sqrt(squares)
        result["update_ratio"] = result["update_norm"] / result["param_norm"]
    inside = np.split(order, starts[1:])[: len(starts)]
    lows, highs = result["effective_lr_min"][found], result["effective_lr_max"][found]
    constants = summary.part("rate_mean")
    rates, numel = summary.rates, summary.numel
    measured = np.array([summary.measured[some].any() for some in inside], dtype=np.bool_)
    each = summary.binned()
    shares = quantiles(rates, constants, numel, each, inside, measured, lows, highs)
    for at, suffix in enumerate(QUANTILES):
        result[f"effective_lr_{suffix}"] = _spread(shares[:, at], found, rows)
    return result


def _terms(summary: Summary, order: Ints) -> dict[str, Floats]:
    """What adds up, for the chosen parameters; a measured one from its sample."""
    part = dict(zip(PARTS, summary.parts[order].T, strict=True))
    check = dict(zip(CHECKS, summary.checks[order].T, strict=True))
    measured = summary.measured[order]
    n = (summary.numel if summary.counted is None else summary.counted)[order].astype(np.float64)
    scale = n / check["checked"]
    observed = check["observed"] * scale
    sampled = check["sample_gg"] * scale
    return {
        "mean": part["rate_mean"],
        "low": part["rate_min"],
        "high": part["rate_max"],
        "n": n,
        "n_mean": n * part["rate_mean"],
        "m2": part["rate_m2"],
        "log": part["rate_log"],
        "ee": np.where(measured, observed, part["ee"]),
        "dd": np.where(measured, sampled, part["dd"]),
        "update": np.where(measured, observed, part["uu"]),
        "descent": np.where(measured, -check["sample_og"] * scale, part["ug"]),
        "gg": part["gg"],
        "seen_gg": np.where(measured, sampled, part["gg"]),
        "zeros": part["zeros"],
        "rms_grad": part["rms_grad"],
        "rms_update": part["rms_update"],
        "below_eps": part["below_eps"],
        "nonfinite": part["nonfinite"],
        "lost": check["lost"] * scale,
        "residual": check["residual"] * scale,
        "intended": check["intended"] * scale,
        "observed": observed,
    }


def _finished(
    total: dict[str, Floats],
    n: Floats,
    constant: NDArray[np.bool_],
    low: Floats,
    high: Floats,
    mean: Floats,
) -> dict[str, Floats]:
    update = np.sqrt(total["update"])
    moved = np.sqrt(np.maximum(total["intended"], total["observed"]))
    applied = np.sqrt(total["ee"] / total["dd"])
    return {
        "effective_lr_mean": mean,
        "effective_lr_gmean": np.where(constant, low, np.exp(total["log"] / n)),
        "effective_lr_std": np.where(constant, 0.0, np.sqrt(total["m2"] / n)),
        "effective_lr_min": low,
        "effective_lr_max": high,
        "effective_lr_applied": np.where(constant & ~np.isnan(applied), low, applied),
        "update_norm": update,
        "update_grad_cosine": total["descent"] / (update * np.sqrt(total["seen_gg"])),
        "grad_norm": np.sqrt(total["gg"]),
        "zero_grad_fraction": total["zeros"] / n,
        "rms_grad_mean": total["rms_grad"] / n,
        "rms_update_mean": total["rms_update"] / n,
        "eps_fraction": total["below_eps"] / n,
        "nonfinite": total["nonfinite"],
        "lost_fraction": total["lost"] / n,
        "reconstruction_error": np.sqrt(total["residual"]) / moved,
    }


_MERGED = (
    "effective_lr_mean",
    "effective_lr_gmean",
    "effective_lr_std",
    "effective_lr_min",
    "effective_lr_max",
    "effective_lr_applied",
    "update_norm",
    "update_grad_cosine",
    "grad_norm",
    "zero_grad_fraction",
    "rms_grad_mean",
    "rms_update_mean",
    "eps_fraction",
    "nonfinite",
    "lost_fraction",
    "reconstruction_error",
)


def _spread(values: Floats, found: Ints, rows: int) -> Floats:
    result = np.full(rows, np.nan)
    result[found] = values
    return result


def merged_numbers(values: Floats, label: Ints, rows: int) -> Floats:
    """A hyperparameter of each row: NaN where its parameters differ: (rows,).

    Parameters that have none (NaN) do not count.
    """
    has = ~np.isnan(values)
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(low, label[has], values[has])
    np.maximum.at(high, label[has], values[has])
    return np.where(low == high, low, np.nan)


def labels(keys: Sequence[str | int]) -> tuple[Ints, list[str | int]]:
    """Row of each parameter, and the key of each row, in order of first appearance."""
    order: dict[str | int, int] = {}
    label = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    return label, list(order)
