"""The hyperparameters of a parameter group as plain JSON, for the description of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_NOT_PLAIN = ("params", "param_names")


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of a group except its parameters, and the dtypes of these."""
    plain = {key: _plain(value) for key, value in group.items() if key not in _NOT_PLAIN}
    return plain | {"dtypes": _dtypes(group["params"])}


def _dtypes(params: Sequence[Tensor]) -> list[str]:
    """The names of the parameters' dtypes, sorted."""
    return sorted({str(param.dtype).removeprefix("torch.") for param in params})


def _plain(value: Any) -> Any:
    """Convert a hyperparameter to a JSON value."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)
