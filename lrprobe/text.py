"""How lrprobe speaks to its user."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, what: str) -> str:
    """So many of something, in words."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def shown(name: str, most: int = 120) -> str:
    """A name for a screen: shortened, and without what would move a terminal's cursor."""
    if len(name) > most:
        name = f"{name[: most // 2]}…{name[1 - most // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in name)


def warn(message: str) -> None:
    """Warn, pointing at the first line up the stack that is neither lrprobe's nor torch's."""
    level, frame = 2, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("lrprobe.", "torch.", "contextlib")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"lrprobe: {message}", stacklevel=level)


def parts_of(name: str) -> tuple[str, str, str]:
    """The module that holds a parameter, what separates, and its own name.

    Parts are separated by dots, in Keras by slashes.
    """
    separator = "/" if name.rfind("/") > name.rfind(".") else "."
    return name.rpartition(separator)


def shorter(name: str, most: int = 200) -> str:
    """A name as text, or of a long one its two ends with a checksum between: it stays its own."""
    name = name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
    if len(name) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: most // 2]}…{digest}…{name[12 - most // 2 :]}"
