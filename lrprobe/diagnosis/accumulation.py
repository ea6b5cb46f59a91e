"""The check for gradients that are not set to 0 between steps."""

from __future__ import annotations

from collections.abc import Iterator

from lrprobe.diagnosis.shared import Hit
from lrprobe.series import Series


def gradients_accumulate(series: Series) -> Iterator[Hit]:
    yield from ()
