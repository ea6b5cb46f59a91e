"""Runs other projects' own test suites twice, bare and with a probe on every optimizer.

    python tests/peers/run.py [SUITE ...]

The suites are those of sdists on the package index. Prints a table; exits with 1 where a test differs
or an error of lrprobe's came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Suite(NamedTuple):
    """An sdist with tests.

    Attributes:
        package: name and version on the index.
        tests: folder or files in it.
        options: more arguments of pytest.
    """

    package: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


SUITES = {
    "pytorch_optimizer": Suite("pytorch_optimizer", ("tests",)),
    "schedulefree": Suite("schedulefree", ("schedulefree",), ("-o", "python_files=test_*.py")),
    "torch_optimizer": Suite("torch-optimizer", ("tests",)),
    "adabelief": Suite("pytorch_ranger", ("tests",)),
    "lion": Suite("lion-pytorch", ("tests",)),
    "torchao": Suite("torchao", ("test",), ("-k", "optim")),
}


def unpacked(suite: Suite, folder: Path) -> Path | None:
    """The sdist's folder; None where the index has none."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:"]
    command += ["--dest", str(folder), suite.package]
    subprocess.run(command, check=False, capture_output=True)
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        return None
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run(suite: Suite, source: Path, found: Path, *, probe: bool) -> dict[str, dict[str, Any]]:
    """Test to what the plugin wrote of it."""
    tests = [test for test in suite.tests if (source / test).exists()]
    if not tests:
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peers", f"--peers={found}"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *suite.options, *tests]
    command += ["--peers-probe"] if probe else []
    path = os.pathsep.join([str(HERE), str(ROOT), str(source)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=source, env=environment, check=False, capture_output=True)
    lines = found.read_text().splitlines() if found.exists() else []
    return {about["test"]: about for about in map(json.loads, lines)}


def row(name: str, suite: Suite) -> tuple[str, bool]:
    """A line of the table, and whether all is well."""
    with tempfile.TemporaryDirectory() as folder:
        source = unpacked(suite, Path(folder))
        if source is None:
            return f"| {name} | no sdist | | | | | | | |", True
        start = time.monotonic()
        bare = run(suite, source, Path(folder) / "bare.jsonl", probe=False)
        middle = time.monotonic()
        with_probe = run(suite, source, Path(folder) / "probe.jsonl", probe=True)
        times = (time.monotonic() - middle) / max(middle - start, 1e-9)
    if not bare:
        return f"| {name} | no tests in the sdist | | | | | | | |", True
    both = bare.keys() & with_probe.keys()
    differing = [
        test
        for test in sorted(both)
        if any(bare[test].get(key) != with_probe[test].get(key) for key in ("digest", "outcome"))
    ]
    errors = [f"{test}: {e}" for test in sorted(both) for e in with_probe[test]["errors"]]
    said = [w for test in both for w in with_probe[test]["warnings"]]
    measured = {name for test in both for name in with_probe[test].get("measured", ())}
    optimizers = sum(with_probe[test].get("optimizers", 0) for test in both)
    rows = sum(with_probe[test].get("rows", 0) for test in both)
    for line in (*differing[:10], *errors[:10], *sorted(set(said))[:20]):
        print("   ", line.replace("\n", " ")[:300], file=sys.stderr)
    missing = len(bare.keys() - with_probe.keys())
    text = f"| {name} | {len(both):,} | {optimizers:,} | {rows:,} | {len(differing) + missing} "
    text += f"| {len(errors)} | {len(said)} | {len(measured)} | {times:.1f} |"
    return text, not differing and not errors and not missing


def main() -> None:
    """Print the table."""
    chosen = sys.argv[1:] or list(SUITES)
    print("| suite | tests | optimizers | rows | differing | errors | warnings | measured | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    well = True
    for name in chosen:
        text, good = row(name, SUITES[name])
        print(text, flush=True)
        well &= good
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
