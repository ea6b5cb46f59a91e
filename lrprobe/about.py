"""What describes a run: hyperparameters, versions, names; as a frame carries it.

A frame of one run has it in ``DataFrame.attrs["lrprobe"]``, a frame of several has there
``{"runs": {name: description}}``. All of it is plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

KEY = "lrprobe"
"""Where ``DataFrame.attrs`` has it."""

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
    """What a record says of its run, and since when.

    Attributes:
        attempt, step: of the first record that says so.
        optimizer: whose record it is.
        run: as in ``Record.run``.
    """

    attempt: int
    step: int
    optimizer: str
    run: Mapping[str, Any]


def merged(found: Iterable[Description]) -> dict[str, Any]:
    """One description of a run out of those of its records, in the order of recording.

    Each optimizer has its latest, with a ``history``: its ``groups`` as they were, and from which
    attempt and step on; and with ``begins``: the first attempt and step of each probe.
    """
    result: dict[str, Any] = {}
    latest: dict[str, Mapping[str, Any]] = {}
    history: dict[str, list[dict[str, Any]]] = {}
    begins: dict[str, list[dict[str, Any]]] = {}
    attached: dict[str, Any] = {}
    for attempt, step, optimizer, run in found:
        result.update(run)
        latest[optimizer] = run
        if not optimizer:  # of a probe that has no record yet
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
        for run in latest.values()  # those that have not stepped yet are known to the others
        for name, each in run.get("optimizers", {}).items()
    }
    for name, past in history.items():
        known = latest[name].get("optimizers", {}).get(name, {})
        optimizers[name] = {**known, "history": past, "begins": begins.get(name, [])}
    if not result:
        return {}
    result["optimizers"] = optimizers
    # Several probes may write to one place; each knows of its own model.
    lists = [run[NOT_IN_OPTIMIZER] for run in latest.values() if NOT_IN_OPTIMIZER in run]
    told = [names for names in lists if names is not None]
    if lists:
        result[NOT_IN_OPTIMIZER] = (
            list(dict.fromkeys(name for names in told for name in names)) if told else None
        )
    twice = [run[IN_TWO_OPTIMIZERS] for run in latest.values() if IN_TWO_OPTIMIZERS in run]
    if twice:
        result[IN_TWO_OPTIMIZERS] = {name: both for each in twice for name, both in each.items()}
    return result


def of_rows(
    run: Mapping[str, Any], optimizers: Sequence[str], attempts: Sequence[int], steps: Sequence[int]
) -> Iterator[Description]:
    """What some rows that one description holds for say, once for each optimizer among them."""
    seen = set()
    for optimizer, attempt, step in zip(optimizers, attempts, steps, strict=True):
        if optimizer not in seen:
            seen.add(optimizer)
            yield Description(int(attempt), int(step), str(optimizer), run)


def joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a run out of those of its earlier attempts and of this one."""
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
    """What a frame says of a run in it; empty where it says nothing."""
    about = frame.attrs.get(KEY)
    if isinstance(about, Mapping) and "runs" in about:
        about = about["runs"].get(run)
    return dict(about) if isinstance(about, Mapping) else {}
