"""The description of a run: hyperparameters, versions and names, stored with its frame.

A frame of one run has it in ``DataFrame.attrs["lrprobe"]``; a frame of several runs has
``{"runs": {name: description}}`` there. All values are plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

KEY = "lrprobe"
"""Key of the description in ``DataFrame.attrs``."""

NOT_IN_OPTIMIZER = "not_in_optimizer"
IN_TWO_OPTIMIZERS = "in_two_optimizers"


def to_json(value: object) -> str:
    """A description, or a part of one, as it is stored beside the figures."""
    return json.dumps(value, default=str)


def from_json(text: str | bytes) -> dict[str, Any]:
    """Read a description that ``to_json`` stored.

    Raises:
        ValueError: the text is not JSON, or does not have the form of a description.
    """
    try:
        run = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the description of the run is not JSON: {error}") from error
    if not _is_description(run):
        raise ValueError("the description of the run has an unexpected form")
    result: dict[str, Any] = run
    return result


def _is_description(run: Any) -> bool:
    if not isinstance(run, dict):
        return False
    optimizers = run.get("optimizers", {})
    return (
        isinstance(optimizers, dict)
        and _are(dict, list(optimizers.values()))
        and all(_are(dict, each.get("groups", [])) for each in optimizers.values())
        and _are(str, run.get(NOT_IN_OPTIMIZER) or [])
        and isinstance(run.get(IN_TWO_OPTIMIZERS) or {}, dict)
    )


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


class Description(NamedTuple):
    """The description in some records of an optimizer.

    Attributes:
        attempt, step: those of the first of these records.
        optimizer: name of the optimizer; empty before its first record.
        run: as in ``Record.run``.
    """

    attempt: int
    step: int
    optimizer: str
    run: Mapping[str, Any]


def merged(found: Iterable[Description]) -> dict[str, Any]:
    """Merge the descriptions in a run's records, in the order of recording.

    Each optimizer has its latest description, and two lists: ``history``, its earlier ``groups``
    with the attempt and step from which they applied, and ``begins``, the first attempt and step of
    each probe.
    """
    result: dict[str, Any] = {}
    latest: dict[str, Mapping[str, Any]] = {}
    history: dict[str, list[dict[str, Any]]] = {}
    begins: dict[str, list[dict[str, Any]]] = {}
    attached: dict[str, Any] = {}
    for attempt, step, optimizer, run in found:
        result.update(run)
        latest[optimizer] = run
        if not optimizer:  # the probe has no record yet
            continue
        if attached.get(optimizer) != run.get("attached"):
            attached[optimizer] = run.get("attached")
            begins.setdefault(optimizer, []).append({"attempt": attempt, "step": step})
        groups = run.get("optimizers", {}).get(optimizer, {}).get("groups")
        past = history.setdefault(optimizer, [])
        if groups is not None and not (past and past[-1]["groups"] == groups):
            past.append({"attempt": attempt, "step": step, "groups": groups})
    optimizers = {
        name: dict(each)
        for run in latest.values()  # optimizers without a record are in the descriptions of others
        for name, each in run.get("optimizers", {}).items()
    }
    for name, past in history.items():
        known = latest[name].get("optimizers", {}).get(name, {})
        optimizers[name] = {**known, "history": past, "begins": begins.get(name, [])}
    if not result:
        return {}
    result["optimizers"] = optimizers
    # Several probes may write to one destination, each with its own model.
    lists = [run[NOT_IN_OPTIMIZER] for run in latest.values() if NOT_IN_OPTIMIZER in run]
    known_lists = [names for names in lists if names is not None]
    if lists:
        unique = dict.fromkeys(name for names in known_lists for name in names)
        result[NOT_IN_OPTIMIZER] = list(unique) if known_lists else None
    twice = [run[IN_TWO_OPTIMIZERS] for run in latest.values() if IN_TWO_OPTIMIZERS in run]
    if twice:
        result[IN_TWO_OPTIMIZERS] = {name: both for each in twice for name, both in each.items()}
    return result


def of_rows(
    run: Mapping[str, Any], optimizers: Sequence[str], attempts: Sequence[int], steps: Sequence[int]
) -> Iterator[Description]:
    """The ``Description`` of each optimizer in some rows that share one run description."""
    seen = set()
    for optimizer, attempt, step in zip(optimizers, attempts, steps, strict=True):
        if optimizer not in seen:
            seen.add(optimizer)
            yield Description(int(attempt), int(step), str(optimizer), run)


def joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Join the descriptions of a run's earlier attempts and of the current one."""
    result = {**before, **after}
    optimizers = dict(before.get("optimizers", {}))
    for name, each in after.get("optimizers", {}).items():
        earlier = optimizers.get(name, {})
        lists = {key: [*earlier.get(key, []), *each.get(key, [])] for key in ("history", "begins")}
        optimizers[name] = {**each, **lists}
    if optimizers:
        result["optimizers"] = optimizers
    return result


def of_several(descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The description of a frame of several runs."""
    return {"runs": {name: dict(each) for name, each in descriptions.items()}}


def description(frame: pd.DataFrame, run: str = "") -> dict[str, Any]:
    """The description of a run in a frame; empty if there is none."""
    about = frame.attrs.get(KEY)
    if isinstance(about, Mapping) and "runs" in about:
        about = about["runs"].get(run)
    return dict(about) if isinstance(about, Mapping) else {}
