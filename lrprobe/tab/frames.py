"""The tab's records as a frame, for ``diagnose``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrprobe.about import KEY, Description, merged, of_several
from lrprobe.tab.store import Block, attempts

if TYPE_CHECKING:
    import pandas as pd


def frame_of(
    run: str, blocks: Sequence[Block], max_rows: int, descriptions: Sequence[Description] = ()
) -> pd.DataFrame:
    """Make the frame that ``diagnose`` needs.

    Args:
        run: name of the run.
        blocks: the records of its optimizers.
        max_rows: of the frame. If there are more, it has records evenly spread over time.
        descriptions: of the run, in the order of recording.
    """
    import pandas as pd

    pieces = list(_pieces(run, blocks, max_rows))
    for name in ("run", "optimizer", "parameter", "module", "rule", "group_name"):
        having = [piece for piece in pieces if name in piece]
        if having:  # shared categories, so that the frame does not repeat the text in each row
            every = pd.unique(np.concatenate([p[name].cat.categories for p in having]))
            for piece in having:
                piece[name] = piece[name].cat.set_categories(every)
    frame = pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame()
    frame.attrs[KEY] = of_several({run: merged(descriptions)})
    return frame


def _pieces(run: str, blocks: Sequence[Block], max_rows: int) -> Iterator[pd.DataFrame]:
    import pandas as pd

    total = sum(len(block.steps) * len(block.about["names"]) for block in blocks)
    share = min(1.0, max_rows / max(total, 1))
    levels = {block.about["level"] for block in blocks}
    # Where only some optimizers are by module, all share one column.
    key = levels.pop() if len(levels) == 1 else "parameter"
    for block, attempt in zip(blocks, attempts(blocks), strict=True):
        about, count = block.about, len(block.steps)
        at = np.unique(np.linspace(0, count - 1, max(int(count * share), 2)).round().astype(int))
        rows = len(about["names"])

        def text(values: Sequence[Any], times: int = len(at)) -> pd.Categorical:
            codes, names = pd.factorize(np.array([str(v) for v in values], dtype=object))
            return pd.Categorical.from_codes(np.tile(codes, times), categories=pd.Index(names))

        columns: dict[str, Any] = {
            "run": text([run] * rows),
            "step": np.repeat(block.steps[at], rows),
            "time": np.repeat(block.times[at], rows),
            "attempt": np.full(len(at) * rows, attempt),
            "optimizer": text([about["optimizer"]] * rows),
            key: text(about["names"]),
        }
        if about.get("groups"):
            groups = [str(group) for group in about["groups"]]
            columns["group"] = np.tile(np.array(about["groups"], dtype=np.int64), len(at))
            columns["group_name"] = text([about["group_names"].get(g, g) for g in groups])
        if about.get("numel"):
            columns["numel"] = np.tile(np.array(about["numel"], dtype=np.int64), len(at))
        if about.get("rules"):
            columns["rule"] = text(about["rules"])
        for place, column in enumerate(about["columns"]):
            if column not in columns:
                columns[column] = block.cells[at, place, :].astype(np.float64).ravel()
        if "update_norm" in columns:  # a parameter that did not step has a gradient at most
            columns["stepped"] = ~np.isnan(columns["update_norm"])
        yield pd.DataFrame(columns, copy=False)
