"""Imports generated code from files in a cache folder, where compilers keep their output too."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType


def import_generated(text: str, builds_on: str) -> ModuleType:
    """Import source text as a module; a change of the file ``builds_on`` makes a new module.

    Raises:
        OSError: if there is no writable cache folder.
    """
    name = "lrprobe_" + hashlib.sha256((_text_of(builds_on) + text).encode()).hexdigest()[:20]
    if name in sys.modules:
        return sys.modules[name]
    kept = cache_folder()
    if kept is None:
        raise OSError("there is no writable folder for generated code")
    path = kept / f"{name}.py"
    if not path.exists():  # replaced atomically, because other processes may read it
        with tempfile.NamedTemporaryFile("w", dir=kept, suffix=".tmp", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@cache
def _text_of(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


@cache
def cache_folder() -> Path | None:
    """The folder of generated code: in the user's cache, else in a temporary folder; or None."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    for found in (Path(home) / "lrprobe", Path(tempfile.gettempdir()) / f"lrprobe-{user}"):
        try:
            found.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = found.stat()
            mine = not hasattr(os, "getuid") or about.st_uid == os.getuid()
            if mine and not about.st_mode & stat.S_IWOTH:
                with tempfile.NamedTemporaryFile(dir=found):
                    return found
        except OSError:
            continue
    return None
