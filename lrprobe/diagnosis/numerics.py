"""Checks of numerics: non-finite values, unexplained steps, updates lost to rounding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrprobe.diagnosis.shared import Hit, medians
from lrprobe.series import Series, quantile

LOST_SHARE = 0.5
ALIVE = 1e-5
UNEXPLAINED, TURNED = 5e-2, 1e-2
STATE_UNEXPLAINED = 0.2
HALF_SMALLEST = {"float16": 2.0**-25}
"""Dtype to half of its smallest positive number, which rounds to 0.

bfloat16 has the exponent range of float32, so it is not listed.
"""


def nonfinite(series: Series) -> Iterator[Hit]:
    """The first parameter with non-finite elements, and their cause as far as it is visible."""
    if "nonfinite" in series:
        bad = np.logical_and(series["nonfinite"] > 0, series.stepped)
    elif "update_norm" in series:  # in a logdir; once present, every step has it
        norm = series["update_norm"]
        known = np.maximum.accumulate(np.isfinite(norm), axis=0)
        bad = series.stepped & known & ~np.isfinite(norm)
    else:
        return
    if not bad.any():
        return
    row = int(bad.any(axis=1).argmax())
    column = int(bad[row].argmax())
    beside = int(bad[row].sum()) - 1
    values = {"beside": beside, "parameters": len(series.names), "all": bad.any(axis=0).sum()}
    if "nonfinite" in series:
        evidence = "{elements:,.0f} of {numel:,.0f} elements are NaN or infinite"
        values |= {"elements": series["nonfinite"][row, column], "numel": series.numel[column]}
    else:
        evidence = "the norm of its update is NaN or infinite"
    if beside:
        evidence += ". {beside:,.0f} of the other parameters (of {parameters:,.0f} in all) have "
        evidence += "such values at this recorded step too, so which came first is unknown"
    else:
        evidence += "; it is the first of {parameters:,.0f} parameters"
    evidence += "; by the end {all:,.0f} have them"
    meaning = advice = ""
    if "grad_norm" in series and "nonfinite" in series:
        values["gradient"] = series["grad_norm"][row, column]
        finite = np.isfinite(values["gradient"])
        if finite:
            evidence += ". The gradient was finite, with a norm of {gradient:.3g}, so the step "
            evidence += "itself produced them"
        if finite or any(eps_underflows(series)):
            meaning = (
                "The gradient was finite, and the step itself produced the NaN: a division by 0 "
                "because ε is missing or is 0 in the parameter's dtype, a state that overflowed, "
                "or a rate that is NaN."
            )
            advice = (
                "Look at eps, lr and the optimizer's state in this step. In float16, eps=1e-8 is "
                "0: use 1e-4, or keep parameters and state in float32. A GradScaler does not help."
            )
    steps = series.steps[bad.any(axis=1)]
    yield Hit(series.names[column], steps, evidence, values, meaning=meaning, advice=advice)


def unexplained(series: Series) -> Iterator[Hit]:
    """Parameters whose actual steps differ from those of their rule."""
    measured = series.ruled_by("measured")
    error = series["reconstruction_error"]
    ruled = series.present & ~measured
    large = np.logical_and(ruled, error > UNEXPLAINED)
    turned = np.logical_and(ruled.any(axis=0), measured.any(axis=0))
    largest = np.fmax.reduce(np.where(ruled, error, np.nan), axis=0)
    for column in np.flatnonzero((turned & ~(largest < TURNED)) | (large.sum(axis=0) >= 2)):
        wrong = large[:, column] if large[:, column].any() else measured[:, column]
        worst = float(largest[column])
        evidence = "the reconstructed and the actual step differ by up to {error:.2g} of the step"
        if turned[column]:
            evidence += "; its rate has been measured since"
        yield Hit(series.names[column], series.steps[wrong], evidence, {"error": worst}, worst)


def lost(series: Series) -> Iterator[Hit]:
    """Parameters most of whose updates are lost to rounding."""
    spread = series["grad_norm"] / np.sqrt(series.numel)
    alive = spread >= ALIVE * np.fmax.reduce(spread, axis=1)[:, None]
    # Elements without a gradient move by what is left of the momentum, which is negligible.
    zero = series["zero_grad_fraction"]
    lost = (series["lost_fraction"] - zero) / (1 - zero)
    lost = np.where(series.near_peak & alive, lost, np.nan)
    early = quantile(lost[: (len(lost) + 1) // 2], 0.5) > LOST_SHARE  # not just when converged
    dtypes = dtypes_of(series)
    for column, share in medians(lost, above=LOST_SHARE):
        if not early[column]:
            continue
        seen = lost[:, column] > LOST_SHARE
        evidence = "in the median step, {share:.0%} of the elements with a gradient did not change "
        evidence += "by a single bit"
        meaning = advice = ""
        if dtypes[column] and dtypes[column] <= {"float32", "float64", "complex64"}:
            evidence += f"; the parameters are {' and '.join(sorted(dtypes[column]))}"
            meaning = (
                "The update is smaller than half a unit in the last place of the parameter, in "
                "float32 below 6e-8 of it: lr is far too small, or the weights are far too large."
            )
            advice = "Raise lr; check that no scheduler, decay or division has made it vanish."
        yield Hit(
            series.names[column],
            series.steps[seen],
            evidence,
            {"share": share},
            share,
            meaning=meaning,
            advice=advice,
        )


def dtypes_of(series: Series) -> list[set[str]]:
    """The dtypes in each parameter's group: (parameters,); empty if unknown."""
    return [set(found or ()) for found in series.option("dtypes")]


def eps_underflows(series: Series) -> Iterator[Hit]:
    """Groups whose ε rounds to 0 in the dtype in which it is added."""
    dtypes, fused = dtypes_of(series), series.option("fused")
    reported = set()
    for column, eps in enumerate(series.option("eps")):
        group = float(series.group[column])
        if not isinstance(eps, int | float) or not eps > 0 or group in reported or fused[column]:
            continue  # fused kernels add it in float32
        for dtype in sorted(dtypes[column] & HALF_SMALLEST.keys()):
            if eps <= HALF_SMALLEST[dtype]:
                reported.add(group)
                values = {"eps": eps, "smallest": 2 * HALF_SMALLEST[dtype]}
                evidence = f"ε = {{eps:.2g}} rounds to 0 in {dtype}, whose smallest positive "
                evidence += "number is {smallest:.2g}"
                yield Hit(series.names[column], series.steps, evidence, values)


def state_unexplained(series: Series) -> Iterator[Hit]:
    """Parameters whose state does not follow from the gradient by their rule."""
    error = np.where(series.stepped, series["state_error"], np.nan)
    large = error > STATE_UNEXPLAINED
    for column in np.flatnonzero(large.sum(axis=0) >= 2):
        worst = float(np.nanmax(error[:, column]))
        evidence = "the actual state and the one that the optimizer's equations give differ by up "
        evidence += "to {error:.2g} of the change, in {count:,.0f} steps"
        values = {"error": worst, "count": large[:, column].sum()}
        yield Hit(series.names[column], series.steps[large[:, column]], evidence, values, worst)
