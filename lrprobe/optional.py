"""Packages that come with an extra, and the message where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import a package of the extra ``name`` in the block, or say how to install it.

    Raises:
        ModuleNotFoundError: in one line, with the command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'lrprobe[{name}]'", name=error.name
        ) from None
