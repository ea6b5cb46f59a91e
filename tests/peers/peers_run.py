"""Runs other projects' own test suites twice, bare and with a probe on every optimizer.

    python tests/peers/peers_run.py [SUITE ...]        (or: make test-peers)

The suites are those in the sdists of what requirements.txt lists, each in the release that is
installed. Prints a table, writes it to build/peers/ beside what it was made of, and exits with 1
where a test came out otherwise, or lrprobe failed or left something behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "peers"
LIMIT = 2 * 3600
"""Seconds for one run of a suite."""


class Suite(NamedTuple):
    """An sdist with tests.

    Attributes:
        package: its name on the index.
        tests: folders or files in it.
        options: more arguments of pytest.
    """

    package: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


_IGNITE = "tests/ignite"
SUITES = [
    Suite("pytorch_optimizer", ("tests",), ("-o", "addopts=")),
    Suite("torch-optimizer", ("tests",)),
    Suite("timm", tuple(f"tests/test_{of}.py" for of in ("optim", "scheduler", "task"))),
    Suite("schedulefree", ("schedulefree",), ("--peers-cpu",)),  # its tests ask for a GPU
    Suite("pytorch-warmup", ("test",)),
    Suite("accelerate", tuple(f"tests/test_{of}.py" for of in (
        "accelerator", "grad_sync", "kwargs_handlers", "optimizer", "scheduler",
        "state_checkpointing",
    ))),
    Suite("pytorch-ignite", (f"{_IGNITE}/engine", f"{_IGNITE}/handlers", f"{_IGNITE}/contrib"),
          # More processes than one, and a loop until MNIST is downloaded.
          ("-k", "not distrib and not test_lr_finder")),
    Suite("skorch", ("skorch/tests",), ("-o", "addopts=")),
    Suite("gpytorch", ("test/examples", "test/optim")),
    Suite("opacus", tuple(f"opacus/tests/{of}_test.py" for of in (
        "batch_memory_manager", "gradient_accumulation", "privacy_engine",
    )), ("-k", "not (Frozen or Hooks or Functorch)")),  # variants, of half a minute each
]  # fmt: skip


def unpacked(suite: Suite) -> Path:
    """The folder of the sdist, downloaded where it is not there yet."""
    name = f"{suite.package}=={version(suite.package)}"
    folder = BUILD / "sdists" / name
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder]
        subprocess.run([*command, "--no-binary", suite.package, name], check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def environment(*paths: Path, **more: str) -> dict[str, str]:
    """Of a process in which nothing but a probe may differ; ``paths`` can be imported there."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT, *paths))),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def run(suite: Suite, source: Path, kind: str, *options: str) -> dict[str, dict[str, Any]]:
    """Test to what the plugin wrote of it."""
    found = BUILD / f"{suite.package}.{kind}.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peers_plugin", f"--peers={found}"]
    # What cannot be imported, for want of some tracker, does not keep the others from running.
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
    command += ["--timeout=300"]
    command += [*suite.options, *options]
    with (BUILD / f"{suite.package}.{kind}.log").open("w") as log:
        try:
            subprocess.run(
                command,
                cwd=source,
                env=environment(source, TORCH_DEVICE="cpu"),  # timm
                stdout=log,
                stderr=log,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.write(f"\nended after {LIMIT} s\n")
    lines = found.read_text().splitlines() if found.exists() else []
    return {about["test"]: about for about in map(json.loads, lines)}


def compared(suite: Suite) -> dict[str, Any]:
    """What the two runs of a suite say: counts, and lists of what is to be looked at."""
    source = unpacked(suite)
    bare = run(suite, source, "bare", *suite.tests)
    probed = run(suite, source, "probe", *suite.tests, "--peers-probe")
    differing = [test for test in bare if not _same(bare[test], probed.get(test))]
    if differing:  # by the clock, say: without a probe too
        again = run(suite, source, "again", *differing)
        unstable = [test for test in differing if not _same(bare[test], again.get(test))]
    else:
        unstable = []
    both = [(bare[test], probed[test]) for test in bare if test in probed]
    warned = [text for _, about in both for text in about["warnings"]]
    seconds = [sum(about["seconds"] for about in each) for each in zip(*both, strict=True)]
    measured: Counter[str] = Counter()
    for _, about in both:
        measured.update(about["measured"])
    return {
        "suite": f"{suite.package} {version(suite.package)}",
        "tests": len(both),
        "passed": sum(about["outcome"] == "passed" for _, about in both),
        "optimizers": sum(about["optimizers"] for _, about in both),
        "steps": sum(len(about["steps"]) for _, about in both),
        "differing": [test for test in differing if test not in unstable],
        "unstable": unstable,
        "errors": [f"{about['test']}: {text}" for _, about in both for text in about["errors"]],
        **sorted_warnings(warned),
        "measured": dict(measured),
        "leftovers": [text for _, about in both for text in about["leftovers"]],
        "time": seconds[1] / seconds[0] if both else 0.0,
    }


def sorted_warnings(warned: list[str]) -> dict[str, Any]:
    """How many optimizers have no rule, and the other warnings."""
    others = [text for text in warned if "has no rule" not in text]
    return {"unruled": len(warned) - len(others), "warnings": others}


def _same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return other is not None and all(one[key] == other[key] for key in ("steps", "outcome"))


def table(results: list[dict[str, Any]]) -> str:
    """Of Markdown: a suite a line."""
    columns = list(results[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for result in results:
        cells = [_cell(result[name]) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) or "0"
    if isinstance(value, float):
        return f"{value:.1f}"
    return (
        value if isinstance(value, str) else f"{len(value) if isinstance(value, list) else value:,}"
    )


def main() -> None:
    """Run the suites that are named, else all."""
    BUILD.mkdir(parents=True, exist_ok=True)
    # Of suites without one: otherwise pytest would use lrprobe's, where warnings are errors.
    (BUILD / "pytest.ini").write_text("[pytest]\n")
    chosen = [suite for suite in SUITES if suite.package in sys.argv[1:] or not sys.argv[1:]]
    results = []
    for suite in chosen:
        result = compared(suite)
        results.append(result)
        (BUILD / "found.json").write_text(json.dumps(results, indent=1))
        print(table([result]), flush=True)
        for name in ("differing", "errors", "leftovers", "warnings"):
            for text, count in Counter(result[name]).most_common(10):
                print(f"  {name}: {count} × {text[:300]}", flush=True)
    text = table(results)
    (BUILD / "table.md").write_text(text + "\n")
    print(text)
    bad = [r for r in results if r["differing"] or r["errors"] or r["leftovers"] or not r["tests"]]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
