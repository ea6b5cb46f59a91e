"""Packages that may be missing: those of an extra, and the metadata of any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version


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


@cache  # the search goes through all that is installed
def version_of(package: str) -> str:
    """Of an installed package; a checkout that is imported from its folder has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
