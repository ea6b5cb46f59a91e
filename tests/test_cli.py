"""The command lrprobe: what it prints, and with which code it ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
from short_runs import record
from torch import nn

import lrprobe
from lrprobe.cli import main
from lrprobe.sinks import Parquet

ROOT = Path(__file__).resolve().parent.parent
CALL = [sys.executable, "-m", "lrprobe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a fault, one without, and a logdir."""
    folder = tmp_path_factory.mktemp("runs")
    record(folder / "faulty.parquet", every=10, eps=1e3)
    record(folder / "sound.parquet", every=10)
    record(folder / "logdir", every=10)
    return folder


def test_diagnose_tells_by_its_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 without findings, 1 with."""
    assert main(["diagnose", str(folder / "sound.parquet")]) == 0
    assert "No findings" in capsys.readouterr().out
    assert main(["diagnose", str(folder / "faulty.parquet")]) == 1
    printed = capsys.readouterr().out
    assert "FINDING ε dominates the denominator" in printed
    assert "docs/findings.md#eps-rules" in printed
    assert main(["diagnose", str(folder / "logdir")]) == 0


def test_a_dataset_whose_writer_was_killed_at_once_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds half a temporary file and no record."""
    path = tmp_path / "run.parquet"
    path.mkdir()
    (path / ".lrprobe-part-0.parquet").write_bytes(b"PAR1 half")
    assert main(["diagnose", str(path)]) == 1
    assert "No step was recorded" in capsys.readouterr().out
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_without_a_step_is_no_run_without_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimizer that was never stepped is named."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    lrprobe.attach(optimizer, to=str(tmp_path / "run.parquet")).close()
    assert main(["diagnose", str(tmp_path / "run.parquet")]) == 1
    printed = capsys.readouterr().out
    assert "[no-steps]  SGD" in printed
    assert "Nothing was recorded" in printed


def test_diagnose_follows_a_run(tmp_path: Path) -> None:
    """What is found is printed once, what is new when it comes; Ctrl-C ends it with the code."""
    path = record(tmp_path / "run.parquet", every=1)
    call = [*CALL, "diagnose", str(path), "--follow", "--interval", "0.1"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    assert "No findings" in lines[0]
    record(path, every=1, eps=1e3)
    while "eps-rules" not in lines[-1]:
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "eps-rules]" not in rest


def test_only_text_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of what is new would be one of many heads."""
    record(tmp_path / "run.parquet")
    assert main(["diagnose", str(tmp_path / "run.parquet"), "--follow", "--format", "csv"]) == 2
    assert "--follow prints text, not csv" in capsys.readouterr().err


def test_a_folder_says_which_runs_it_leaves_out(tmp_path: Path) -> None:
    """Of both kinds the datasets are read; a logdir that one of them has too is no other run."""
    record(tmp_path / "a.parquet", every=10)
    record(tmp_path / "a", every=10)
    assert main(["diagnose", str(tmp_path)]) == 0
    record(tmp_path / "b", every=10)
    with pytest.warns(UserWarning, match="which are not: b"):
        main(["diagnose", str(tmp_path)])


def test_diagnose_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV and JSON have what to_frame has."""
    path = folder / "faulty.parquet"
    expected = lrprobe.diagnose(lrprobe.read(path)).to_frame()
    assert main(["diagnose", str(path), "--format", "json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["code"] for row in rows] == expected["code"].tolist()
    assert main(["diagnose", str(path), "--format", "csv"]) == 1
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table["evidence"].tolist() == expected["evidence"].tolist()


@pytest.mark.parametrize("command", ["diagnose", "report", "show"])
@pytest.mark.parametrize(
    ("path", "message"),
    [("missing.parquet", "does not exist"), ("empty", "holds nothing"), ("text", "is a file"),
     ("/", "holds")],
)  # fmt: skip
def test_a_wrong_path_is_a_clear_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    path: str,
    message: str,
) -> None:
    """Code 2, and one line that names the path and what is allowed; no traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").touch()
    assert main([command, path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lrprobe {command}: '{path}' {message}")
    assert "Parquet dataset" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["show"], ["show", "x", "--interval", "0"],
                  ["show", "x", "--include", "("], ["demo", "--epochs", "0"]],
)  # fmt: skip
def test_a_wrong_command_has_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And says how it goes."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: lrprobe" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "report", "show", "diagnose", "demo"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Examples that parse, what a RUN is, and the exit codes."""
    with pytest.raises(SystemExit) as end:
        main([*filter(None, [command]), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"^    lrprobe {command or 'show'}\b", text, re.MULTILINE)
    assert "exit code: 0" in text
    assert "lrprobe.attach" in text or command == "demo"


def test_report_writes_the_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several runs, and says where it is; findings do not make it fail."""
    out = tmp_path / "page.html"
    runs = [str(folder / "faulty.parquet"), str(folder / "sound.parquet")]
    assert main(["report", *runs, "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert "faulty, sound" in out.read_text(encoding="utf-8")
    assert main(["report", *runs, "-o", str(tmp_path)]) == 2
    assert main(["report", *runs, "-o", str(tmp_path / "no" / "page.html")]) == 2


@pytest.mark.parametrize(
    ("by", "names"),
    [("module", ["0", "2"]), ("parameter", ["0.weight", "0.bias", "2.weight", "2.bias"]),
     ("group", ["0"]), ("model", ["model"])],
)  # fmt: skip
def test_show_prints_one_line_a_layer(
    folder: Path, capsys: pytest.CaptureFixture[str], by: str, names: list[str]
) -> None:
    """The newest step, with the figures of the frame."""
    assert main(["show", str(folder / "sound.parquet"), "--by", by]) == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert "step 30" in head
    assert "lr 0.001" in head
    assert columns.split()[0] == by
    assert [line.split()[0] for line in lines] == names
    frame = lrprobe.read(folder / "sound.parquet", by=by).iloc[-1]
    assert lines[-1].split()[-5:-2] == [f"{frame[f'effective_lr_{q}']:.3g}" for q in
                                      ("p50", "p05", "p95")]  # fmt: skip


def test_show_chooses_names_and_reads_logdirs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A logdir has no modules here: its parameters are shown."""
    assert main(["show", str(folder / "logdir"), "--include", "^2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["2.weight", "2.bias"]


@pytest.mark.parametrize(("by", "column"), [("group", "lr"), ("model", "check error")])
def test_show_has_what_a_logdir_has(
    folder: Path, capsys: pytest.CaptureFixture[str], by: str, column: str
) -> None:
    """By group the rates, by model the error of the check."""
    assert main(["show", str(folder / "logdir"), "--by", by]) == 0
    _, head, line = capsys.readouterr().out.splitlines()
    assert head.split(maxsplit=1) == [by, column]
    assert len(head) == len(line)


def test_show_aligns_its_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure ends where its heading does, though the names here are shorter than theirs."""
    assert main(["show", str(folder / "sound.parquet")]) == 0
    _, head, *lines = capsys.readouterr().out.splitlines()
    for line in lines:
        assert [match.end() for match in re.finditer(r"\S+(?= |$)", line)][1:3] == [
            head.index(name) + len(name) for name in ("rate p50", "p05")
        ]


def test_show_tells_the_rates_of_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside each layer, where they differ."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": layer.parameters(), "lr": 0.1 * (1 + i)} for i, layer in enumerate(model)]
    sgd = torch.optim.SGD(groups)
    with lrprobe.attach(sgd, model, to=tmp_path / "a.parquet"):
        model(torch.ones(1, 2)).sum().backward()
        sgd.step()
    assert main(["show", str(tmp_path / "a.parquet")]) == 0
    top, _, *lines = capsys.readouterr().out.splitlines()
    assert top.endswith("lr 0.1, 0.2")
    assert [line.split()[:2] for line in lines] == [["0", "0.1"], ["1", "0.2"]]


def test_show_has_the_newest_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the last step of one that was given up, and every optimizer, also in other parts."""
    model = nn.Linear(2, 2)
    one, two = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    sink = Parquet(tmp_path / "a.parquet")
    with lrprobe.attach({"one": one, "two": two}, model, every=1, to=sink) as probe:
        state = probe.state_dict()
        model(torch.ones(1, 2)).sum().backward()
        for _ in range(5):
            one.step()
        two.step()
        probe.load_state_dict(state)
        one.step()
        two.step()
        probe.flush()
        two.param_groups[0]["weight_decay"] = 0.5  # a new part
        two.step()
    sink.close()
    assert main(["show", str(tmp_path / "a.parquet")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"one  step 1\b", printed)
    assert re.search(r"two  step 2\b", printed)


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    """As `head` does, also while a run is followed."""
    call = [*CALL, "show", str(folder / "sound.parquet"), "--follow", "--interval", "0.1"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        os.utime(next((folder / "sound.parquet").glob("*.parquet")))  # something to print
        assert run.wait(timeout=60) == 0
        assert run.stderr is not None
        assert run.stderr.read() == ""


def test_any_terminal_will_do(folder: Path) -> None:
    """What its alphabet does not have is a question mark."""
    done = subprocess.run(
        [*CALL, "diagnose", str(folder / "faulty.parquet")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "FINDING ? dominates the denominator" in done.stdout


class _Escape(nn.Module):
    """A network whose parameters' names would clear the screen, or fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("\033[2J\a", nn.Parameter(torch.ones(4, 2)))
        self.register_parameter("x" * 10**6, nn.Parameter(torch.ones(4, 2), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ next(self.parameters())


@pytest.mark.parametrize("command", ["show", "diagnose", "report"])
def test_names_do_nothing_to_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """No control character is printed, and no megabyte."""
    path = record(tmp_path / "a.parquet", _Escape(), eps=1e3)
    out = ["-o", str(tmp_path / "a.html")] if command == "report" else []
    by = ["--by", "parameter"] if command == "show" else []
    assert main([command, str(path), *by, *out]) in {0, 1}
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert command == "report" or "[2J" in printed
    assert len(printed) < 10_000
    if out:
        assert (tmp_path / "a.html").stat().st_size < 3 * 10**6  # of which Plotly has 2


def test_an_interrupted_report_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is success for what goes on until then, and not for what was to be made."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrprobe.report.write", interrupted)
    assert main(["report", str(folder / "sound.parquet")]) == 130


def test_show_follows_a_run(tmp_path: Path) -> None:
    """New steps appear while it runs; Ctrl-C ends it with code 0."""
    path = record(tmp_path / "live.parquet", every=10)
    call = [*CALL, "show", str(path), "--follow", "--interval", "0.1"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "step 30" in process.stdout.readline()
        record(path, every=10, steps=70)
        for line in process.stdout:
            if "step 70" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(("missing", "command"), [("sklearn", "demo"), ("matplotlib", "report")])
def test_a_missing_package_is_named(folder: Path, missing: str, command: str) -> None:
    """With the extra that installs it."""
    arguments = [] if command == "demo" else [str(folder / "sound.parquet"), "-o", "x.html"]
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from lrprobe.cli import main; sys.exit(main({[command, *arguments]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 2
    extra = "demo" if command == "demo" else "plot"
    assert f"pip install 'lrprobe[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_is_run_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lrprobe demo` is what examples/demo.py runs, with its epochs and folder."""
    calls = []
    monkeypatch.setattr("lrprobe.demo.main", lambda *given: calls.append(given))
    assert main(["demo", "--epochs", "20", "--out", "out"]) == 0
    assert calls == [(20, Path("out"))]


def test_importing_lrprobe_imports_no_optional_package() -> None:
    """Nor does the command, nor looking for findings; that tqdm is imported is torch's doing."""
    program = (
        "import sys, lrprobe, lrprobe.cli, lrprobe.diagnosis, lrprobe.report, lrprobe.demo\n"
        "print({'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_entry_point_is_declared() -> None:
    """pip makes the command from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lrprobe": "lrprobe.cli:main"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "x"], "takes a whole number of at least 1"),
        (["demo", "--epochs", "0"], "takes a whole number of at least 1"),
        (["show", "run", "--interval", "abc"], "takes a positive number of seconds"),
        (["show", "run", "--interval", "-1"], "takes a positive number of seconds"),
    ],
)
def test_a_wrong_number_is_a_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is allowed."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
