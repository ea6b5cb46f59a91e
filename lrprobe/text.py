"""Formats names and messages for the user."""

from __future__ import annotations

import hashlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(number: int, what: str) -> str:
    """A number with its noun: ``1 step``, ``2 steps``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def shown(name: str, limit: int = 120) -> str:
    """A name for the terminal: shortened, and without control characters."""
    if len(name) > limit:
        name = f"{name[: limit // 2]}…{name[1 - limit // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in name)


_redirected = threading.local()


@contextmanager
def redirected(report: Callable[[str], None]) -> Iterator[None]:
    """Pass the warnings of this thread to ``report``, because it is not the user's."""
    _redirected.report = report
    try:
        yield
    finally:
        del _redirected.report


def warn(message: str) -> None:
    """Warn, at the first stack frame that belongs to neither lrprobe nor torch."""
    report = getattr(_redirected, "report", None)
    if report is not None:
        report(message)
        return
    level, frame = 2, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("lrprobe.", "torch.", "contextlib")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"lrprobe: {message}", stacklevel=level)


def parts_of(name: str) -> tuple[str, str, str]:
    """Split a parameter's name into its module, the separator and its own name.

    The separator is a dot, or a slash in Keras.
    """
    separator = "/" if name.rfind("/") > name.rfind(".") else "."
    return name.rpartition(separator)


def shorter(name: str, limit: int = 200) -> str:
    """Shorten a long name to its two ends with a checksum between, so that it stays unique."""
    name = name.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be encoded
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: limit // 2]}…{digest}…{name[12 - limit // 2 :]}"
