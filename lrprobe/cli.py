"""The command ``lrprobe``: look at runs that a probe has recorded."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrprobe.optional import version_of
from lrprobe.record import LEVELS
from lrprobe.text import shown

if TYPE_CHECKING:
    import pandas as pd

NONE, FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

_RUN = """
A RUN is what `lrprobe.attach(..., to=RUN)` writes: a Parquet dataset (a folder whose name ends in
.parquet) or a TensorBoard logdir, also during the training. A folder with several runs stands for
all of them.
"""

_ABOUT = """\
Show the learning rate that each parameter of a PyTorch model really gets.

In the training script, one line records it:

    probe = lrprobe.attach(optimizer, model, to="runs/mlp.parquet")

Then:

    lrprobe show runs/mlp.parquet --follow         one line per layer, while it trains
    lrprobe diagnose runs/mlp.parquet              what is wrong, in plain words
    lrprobe report runs/*.parquet -o report.html   findings, charts and a table, on one page
    lrprobe demo                                   three small training runs, to try it out
"""

_EXIT = "exit code: 0 no findings (or nothing to find), 1 findings, 2 a wrong command or path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: the arguments after ``lrprobe``; by default those of the command line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    # Pictures are written to files, so no window system is needed.
    os.environ.setdefault("MPLBACKEND", "agg")
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot encode ε shows "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as "| head" does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NONE
    except (OSError, ValueError, ImportError) as error:
        text = str(error) or type(error).__name__
        print(f"lrprobe {options.command}: {text}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return NONE if options.command == "show" else INTERRUPTED  # the normal end of --follow
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrprobe",
        description=_ABOUT,
        epilog=f"{_RUN}\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lrprobe {version_of('lrprobe')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    report = _command(
        commands,
        "report",
        _report,
        "write one HTML page: findings, heatmaps and charts to explore, table",
        "Write one self-contained HTML page about one run or several, which are overlaid by "
        "parameter name. Reading it needs no network. Creating it needs Matplotlib and Plotly: "
        "pip install 'lrprobe[plot]'.",
        "lrprobe report runs/mlp.parquet -o mlp.html",
        "lrprobe report runs/*.parquet -o compare.html",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a dataset, a logdir, or a folder")
    report.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="default: %(default)s"
    )

    show = _command(
        commands,
        "show",
        _show,
        "show the current state of a run, one line per layer",
        "Print the newest recorded step: for each layer the effective learning rate (median and "
        "p05 to p95 over its elements), the update ratio, and the gradient norm.",
        "lrprobe show runs/mlp.parquet",
        "lrprobe show runs/mlp.parquet --follow --by parameter --include weight",
    )
    show.add_argument("runs", nargs=1, metavar="RUN", help="a dataset or a logdir")
    show.add_argument("--follow", action="store_true", help="keep updating until Ctrl-C")
    show.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS",
        help="how often to look for new steps with --follow; default: %(default)s",
    )  # fmt: skip
    show.add_argument(
        "--by",
        choices=LEVELS,
        default="module",
        help="what each line describes; default: %(default)s",
    )
    show.add_argument(
        "--include",
        type=_pattern,
        metavar="REGEX",
        help="only names that match this regular expression",
    )

    diagnose = _command(
        commands,
        "diagnose",
        _diagnose,
        "find out what is wrong",
        "Print findings, most severe first: the layer, the steps, the evidence in numbers, what "
        "it usually means and what to try. docs/findings.md has a section for each. Notes are not "
        "faults, and do not affect the exit code.",
        "lrprobe diagnose runs/mlp.parquet",
        "lrprobe diagnose runs/mlp.parquet --follow",
        "lrprobe diagnose runs/mlp.parquet --format csv > findings.csv",
    )
    diagnose.add_argument("runs", nargs="+", metavar="RUN", help="a dataset, a logdir, or a folder")
    diagnose.add_argument(
        "--format", choices=("text", "csv", "json"), default="text", help="default: %(default)s"
    )
    diagnose.add_argument(
        "--follow", action="store_true", help="keep checking until Ctrl-C, and print new findings"
    )
    diagnose.add_argument(
        "--interval", type=_seconds, default=5.0, metavar="SECONDS",
        help="how often to look for new steps with --follow; default: %(default)s",
    )  # fmt: skip

    demo = _command(
        commands,
        "demo",
        _demo,
        "train three small networks and look at them",
        "Train the network of Zeiler (2012) on scikit-learn's digits with Adadelta, Adam, and SGD "
        "under a schedule, in under a minute; write datasets, a TensorBoard logdir, a picture and "
        "a report. Needs pip install 'lrprobe[demo]'.",
        "lrprobe demo",
        "lrprobe demo --epochs 5 --out runs/quick",
    )
    demo.add_argument("--epochs", type=_positive, default=50, help="default: %(default)s")
    demo.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: a new folder runs/demo-<time>"
    )
    return parser


def _command(
    commands: Any, name: str, run: Any, summary: str, about: str, *examples: str
) -> argparse.ArgumentParser:
    shown = "\n".join(f"    {example}" for example in examples)
    what = "" if name == "demo" else f"{_RUN}\n"
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=_wrapped(about),
        epilog=f"examples:\n{shown}\n{what}\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _report(options: argparse.Namespace) -> int:
    from lrprobe import report

    output = Path(options.output)
    if output.is_dir():
        raise ValueError(f"-o {options.output}: is a folder; name a file, for example report.html")
    found = report.write(output, *options.runs)
    print(found.summary())
    print(f"Report: {output}")
    return NONE


def _diagnose(options: argparse.Namespace) -> int:
    from lrprobe.diagnosis import diagnose
    from lrprobe.runs import load

    if options.follow:
        return _follow(options)
    runs = load(*options.runs)
    found = diagnose(runs.frame)
    if options.format == "csv":
        found.to_frame().to_csv(sys.stdout, index=False)
    elif options.format == "json":
        found.to_frame().to_json(sys.stdout, orient="records", force_ascii=False, indent=1)
        print()
    else:
        print(found)
    return FOUND if found.findings else NONE


def _follow(options: argparse.Namespace) -> int:
    """Print each new finding once, until Ctrl-C."""
    from lrprobe.diagnosis import Finding, Findings, diagnose
    from lrprobe.runs import find, load, stamp

    if options.format != "text":
        raise ValueError(f"--follow prints text, not {options.format}")
    _end_with_ctrl_c()
    seen: Any = None
    reported: dict[tuple[str, str, str, str], Finding] = {}
    began = False
    try:
        while True:
            now = [stamp(run) for path in options.runs for run in find(Path(path))]
            if now != seen:
                seen = now
                found = diagnose(load(*options.runs).frame, ongoing=True)
                keys = {(f.code, f.run, f.optimizer, f.parameter): f for f in found}
                new = [finding for key, finding in keys.items() if key not in reported]
                reported |= keys
                if new or not began:
                    print(Findings(new, found.looked_at, () if began else found.left_out))
                    print(flush=True)
                began = True
            time.sleep(options.interval)
    except KeyboardInterrupt:
        return FOUND if any(each.severity == "finding" for each in reported.values()) else NONE


def _end_with_ctrl_c() -> None:
    """Let ``kill -INT`` end the command even in the background, where a shell ignores SIGINT."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _demo(options: argparse.Namespace) -> int:
    from lrprobe import demo

    demo.main(options.epochs, options.out)
    return NONE


def _show(options: argparse.Namespace) -> int:
    from lrprobe.runs import find, newest, stamp

    (path,) = options.runs
    runs = find(Path(path))
    if options.follow:
        _end_with_ctrl_c()
    seen: Any = None
    while True:
        now = [stamp(run) for run in runs]
        if now != seen:
            seen = now
            screen = "\n\n".join(
                _screen(run.name, newest(run, options.by), options.include) for run in runs
            )
            _print_screen(screen, options.follow)
        if not options.follow:
            return NONE
        time.sleep(options.interval)


def _print_screen(text: str, follow: bool) -> None:
    """Replace the last screen on a terminal; append elsewhere."""
    if follow and sys.stdout.isatty():
        lines = text.splitlines()
        room = shutil.get_terminal_size().lines - 1
        if len(lines) > room:
            lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more lines: --include"]
        print("\033[H\033[J" + "\n".join(lines), flush=True)
    else:
        print(text + ("\n" if follow else ""), flush=True)


_COLUMNS = {
    "lr": "lr",
    "effective_lr_p50": "rate p50",
    "effective_lr_p05": "p05",
    "effective_lr_p95": "p95",
    "update_ratio": "update ratio",
    "grad_norm": "‖gradient‖",
    "reconstruction_error": "check error",
}
"""Columns of the frame to their headings on the screen."""


def _screen(run: str, frame: pd.DataFrame, include: re.Pattern[str] | None) -> str:
    """The newest step of each optimizer, one line per layer."""
    if not len(frame):
        return f"{run}: no step was recorded yet"
    blocks = []
    for optimizer, recorded in frame.groupby("optimizer", sort=False, observed=True):
        step = int(recorded["step"].max())
        rows = recorded[recorded["step"] == step]
        ago = f", {_ago(time.time() - float(rows['time'].max()))}" if "time" in rows else ""
        key = next((k for k in ("parameter", "module", "group") if k in rows), "model")
        columns = [column for column in _COLUMNS if column in rows]
        if columns != ["reconstruction_error"]:  # a logdir has only that by model
            columns = [column for column in columns if column != "reconstruction_error"]
        if "lr" in columns:
            rates = sorted({f"{lr:.3g}" for lr in rows["lr"].dropna().tolist()}, key=float)
            ago += f"  lr {', '.join(rates[:4]) or 'mixed'}"
            if len(rates) == 1 and key != "group":  # equal in every line, so the headline has it
                columns.remove("lr")
        names = rows[key].astype(str).tolist() if key in rows else ["model"]
        chosen = [include is None or bool(include.search(name)) for name in names]
        names = [name for name, keep in zip(names, chosen, strict=True) if keep]
        width = min(max(map(len, (key, *names))), 48)
        lines = [f"{run}  {optimizer}  step {step:,}{ago}"]
        lines.append(f"{key:{width}}" + "".join(f"{_COLUMNS[column]:>13}" for column in columns))
        table = rows.loc[chosen, columns].to_numpy(dtype=float)
        for name, values in zip(names, table, strict=True):
            label = name if len(name) <= width else "…" + name[1 - width :]
            cells = "".join(f"{'-' if v != v else f'{v:.3g}':>13}" for v in values)  # noqa: PLR0124
            lines.append(f"{shown(label):{width}}{cells}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:,.0f} min ago" if seconds < 5400 else f"{seconds / 3600:,.0f} h ago"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 80)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError("takes a whole number of at least 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("takes a positive number of seconds")
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is not a regular expression: {error}") from error
