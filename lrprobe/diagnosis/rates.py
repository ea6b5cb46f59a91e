"""Checks of the effective rates and the sizes of steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrprobe.diagnosis.shared import FEW, MANY, Hit, adam_family, matrices, medians
from lrprobe.series import Floats, Ints, Series, first, last, quantile

EPS_SHARE = 0.5
RATIO_BAND = (2e-6, 0.1)
ADAM_SMALL, ADAM_MARGIN = 0.01, 1.2
RATE_DRIFT, RATE_JUMP = 2.0, 1.0
ADAGRAD_DECAY = 0.1


def adam_scale(series: Series) -> Iterator[Hit]:
    """Parameters whose steps are longer than Adam allows, or far shorter than usual."""
    family = adam_family(series)
    if not family.any():
        return
    lr, root = series["lr"], np.sqrt(series.numel)
    scale = np.where(family & (lr > 0), series["update_norm"] / (lr * root), np.nan)
    own = scale
    if "decay" in series and "param_norm" in series:  # subtract the part due to weight decay
        decay = np.nan_to_num(series["decay"])
        own = np.where(decay > 0, scale - decay * series["param_norm"] / (lr * root), scale)
    longest = _longest(series)
    high = own > ADAM_MARGIN * longest
    for column in np.flatnonzero(high.sum(axis=0) >= 2):
        row = int(np.where(high[:, column], own[:, column], -np.inf).argmax())
        values = {"scale": own[row, column], "most": longest[row, column]}
        evidence = "update_norm/(lr·√numel) reaches {scale:.2g}; with these betas "
        evidence += "Adam cannot exceed {most:.2g}"
        steps = series.steps[high[:, column]]
        yield Hit(series.names[column], steps, evidence, values, values["scale"])
    if "zero_grad_fraction" not in series:
        return
    live = scale / np.sqrt(1 - series["zero_grad_fraction"])
    live = np.where(series.near_peak & matrices(series), live, np.nan)
    enough = (~np.isnan(live)).sum(axis=0) >= FEW
    mostly = quantile(live, 0.9)
    for column in np.flatnonzero(enough & (mostly > 0) & (mostly < ADAM_SMALL)):
        evidence = "update_norm/(lr·√numel) is below {scale:.2g} in nine of ten steps"
        steps = series.steps[live[:, column] < ADAM_SMALL]
        small = float(mostly[column])
        yield Hit(series.names[column], steps, evidence, {"scale": small}, 1 / small)


def _longest(series: Series) -> Floats:
    """The longest step possible with Adam, in units of lr: (steps, parameters); NaN if unknown.

    |m̂|/√v̂ is at most √(Σ a²/b), where a and b are the weights of past gradients in m̂ and v̂
    (Cauchy and Schwarz): 1 in the first step; after a spike, about (1−β₁)/√(1−β₂).
    """
    result = np.full(series.shape, np.nan)
    maximum, nesterov = series.ruled_by("adamax"), series.ruled_by("nadam")
    given = series.option("betas")
    for betas in {tuple(each[:2]) for each in given if isinstance(each, list | tuple)}:
        if len(betas) < 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            continue
        one, two = float(betas[0]), float(betas[1])
        usual = longest_step(series.steps, one, two)[:, None]
        # Adamax's max(β₂·u, |g|) gives the bound Σ a·β₂⁻ᵏ.
        largest = _sum(
            np.asarray((1 - one) / (1 - one**series.steps), np.float64),
            one / max(two, 1e-9),
            series.steps,
        )
        # NAdam weights the newest gradient more, as if with one factor β₁ fewer.
        nadam = usual + longest_step(series.steps, 0.0, two)[:, None]
        longest = np.where(maximum, largest[:, None], np.where(nesterov, nadam, usual))
        its = [isinstance(e, list | tuple) and tuple(e[:2]) == betas for e in given]
        result[:, its] = longest[:, its]
    return result


def longest_step(steps: Ints, one: float, two: float) -> Floats:
    """√(Σ a²/b) for Adam's betas, after each of these numbers of steps."""
    scale = ((1 - one) / (1 - one**steps)) ** 2 * (1 - two**steps) / (1 - two)
    return np.sqrt(_sum(scale, one**2 / max(two, 1e-9), steps))


def _sum(scale: Floats, ratio: float, steps: Ints) -> Floats:
    """scale · Σ ratioᵏ, for k below the step."""
    with np.errstate(over="ignore"):
        if abs(ratio - 1) < 1e-12:
            return scale * steps
        return np.asarray(scale * (1 - ratio**steps) / (1 - ratio), dtype=np.float64)


def eps_rules(series: Series) -> Iterator[Hit]:
    """Matrices in which ε exceeds the statistic that it is added to, for most elements."""
    where = series.near_peak & matrices(series) & ~series.ruled_by("adadelta")
    live = np.where(where, series["eps_fraction"], np.nan)  # a share of the moving elements
    early = quantile(live[: (len(live) + 1) // 2], 0.5) > EPS_SHARE
    for column, share in medians(live, above=EPS_SHARE):
        if early[column]:
            yield Hit(
                series.names[column],
                series.steps[live[:, column] > EPS_SHARE],
                "in the median step, ε is at least as large as the statistic it is added to in "
                "{share:.0%} of the elements with a gradient",
                {"share": share},
                share,
            )


def second_moment_rate(series: Series) -> Floats:
    """log₁₀ of median effective rate over lr, NaN for rules without a second moment: (s, p)."""
    rate = np.log10(series["effective_lr_p50"] / series["lr"])
    codes, _ = series.rules
    fixed = series.ruled_by("sgd", "asgd", "rprop", "muon", "measured") | (codes < 0)
    plain = abs(rate) < 1e-6  # RAdam before its rectification
    return np.where(fixed | plain | ~np.isfinite(rate), np.nan, rate)


def _rate_changes(series: Series, sign: int) -> Iterator[Hit]:
    rate = second_moment_rate(series)
    count = len(rate)
    if count < MANY:
        return
    settled, base = max(2, count // 10), max(4, count // 4)
    change = rate - quantile(rate[settled:base], 0.5)
    ordered = np.sort(np.where(np.isnan(change), np.inf, abs(change)), axis=1)
    known = np.maximum(np.isfinite(ordered).sum(axis=1), 1)
    others = ordered[np.arange(count), (known - 1) // 2]  # the lower median
    own = abs(change) - others[:, None]
    far = (own > RATE_DRIFT) & (np.sign(change) == sign)
    far[:base] = False
    jump = np.full_like(rate, np.nan)
    jump[1:] = np.diff(rate, axis=0)
    sudden = sign * jump > RATE_JUMP
    sudden[:base] = False
    far[2:] &= far[1:-1] & far[:-2]
    wrong = (far | sudden) & matrices(series)
    for column in np.flatnonzero(wrong.any(axis=0)):
        row = int(np.where(wrong[:, column], sign * change[:, column], -np.inf).argmax())
        factor = float(10 ** abs(change[row, column]))
        yield Hit(
            series.names[column],
            series.steps[wrong[:, column]],
            f"the median rate, relative to lr, {'rose' if sign > 0 else 'fell'} by a factor of "
            "{factor:,.3g} from its level in steps {start:,.0f} to {end:,.0f}, to {rate:.2g}",
            {
                "factor": factor,
                "start": series.steps[settled],
                "end": series.steps[base - 1],
                "rate": series["effective_lr_p50"][row, column],
            },
            factor,
        )


def rate_collapses(series: Series) -> Iterator[Hit]:
    """Matrices whose rate falls while that of others does not."""
    return _rate_changes(series, -1)


def rate_explodes(series: Series) -> Iterator[Hit]:
    """Matrices whose rate rises while that of others does not."""
    return _rate_changes(series, 1)


def update_ratio(series: Series) -> Iterator[Hit]:
    """Matrices whose update ratio is far outside the usual range."""
    where = series.near_peak & matrices(series) & ~series.ruled_by("measured")
    ratio = np.where(where & np.isfinite(series["update_ratio"]), series["update_ratio"], np.nan)
    low, high = RATIO_BAND
    enough = (~np.isnan(ratio)).sum(axis=0) >= FEW
    median, mostly = quantile(ratio, 0.5), quantile(ratio, 0.9)
    for column in np.flatnonzero(enough & ((median > high) | ((mostly > 0) & (mostly < low)))):
        middle = float(median[column])
        seen = ratio[:, column] > high if middle > high else ratio[:, column] < low
        yield Hit(
            series.names[column],
            series.steps[seen],
            "its update is {ratio:.2g} of its norm in the median step near the peak of lr; about "
            "1e-3 is typical",
            {"ratio": middle},
            abs(float(np.log10(max(middle, 1e-30) / 1e-3))),
        )


def adagrad_decay(series: Series) -> Iterator[Hit]:
    """Matrices whose rate has fallen far, which is Adagrad's design."""
    adagrad = series.ruled_by("adagrad")
    if not adagrad.any() or len(series.steps) < FEW:
        return
    rate = np.where(adagrad & matrices(series), second_moment_rate(series), np.nan)
    for column in np.flatnonzero(~np.isnan(rate).all(axis=0)):
        share = float(10 ** (last(rate) - first(rate))[column])
        if share < ADAGRAD_DECAY:
            evidence = "the median rate, relative to lr, is {share:.1%} of its first value"
            values = {"share": share}
            yield Hit(series.names[column], series.steps, evidence, values, 1 / share)


def adadelta_eps(series: Series) -> Iterator[Hit]:
    """Matrices in which ε determines Adadelta's rate."""
    where = series.ruled_by("adadelta") & matrices(series) & series.near_peak
    share = np.where(where, series["eps_fraction"], np.nan)
    for column, median in medians(share, above=EPS_SHARE):
        evidence = "in the median step, ε is at least E[g²] in {share:.0%} of the elements"
        steps = series.steps[share[:, column] > EPS_SHARE]
        yield Hit(series.names[column], steps, evidence, {"share": median}, median)
