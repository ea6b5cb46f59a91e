"""The examples that answer a question print what they promise, and the numbers fit together."""

import gzip
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run an example in an empty folder as `python` does; give back the lines it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    yield run_example
    plt.close("all")


def numbers(line: str) -> list[float]:
    """The numbers in a line of a table."""
    return [float(word) for word in line.split() if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", word)]


def write_mnist(
    folder: Path, *, train: int, test: int, zipped: bool = False
) -> dict[str, np.ndarray]:
    """Files of MNIST's names and format, with random pixels and labels from 0 to 9; the images."""
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 256, (count, 28, 28), np.uint8)
        for part, count in (("train", train), ("t10k", test))
    }
    for part, pixels in images.items():
        labels = np.arange(len(pixels), dtype=np.uint8) % 10
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.tobytes()
            file = folder / f"{part}-{name}-ubyte"
            if zipped:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)
    return images


def test_adadelta_state(run) -> None:
    """Rate, RMS[Δx], RMS[g] and the share of ε: a table each, with the layers at eight steps."""
    lines = run("adadelta_state.py")
    titles = ["rate", "RMS[Δx]", "RMS[g]", "ε decides"]
    assert [line for line in lines if line in titles] == titles
    table = {}
    for title in titles:
        start = lines.index(title) + 3
        table[title] = np.array([numbers(line) for line in lines[start : start + 8]])
        assert table[title].shape == (8, 4)
        assert table[title][:, 0].tolist() == [1, *range(100, 800, 100)]
    assert (table["RMS[Δx]"][0, 1:] == 0).all()  # of the step before the first
    assert (table["rate"][:, 1:] <= 1.05).all()
    assert (table["rate"][-1, 1:] > table["rate"][1, 1:]).all()  # on the way to 1


def test_adam_rates(run) -> None:
    """The rates are the formula's to the rounding of float32, and below lr/ε."""
    lines = run("adam_rates.py")
    first = [line for line in lines if line.startswith("step ")][:4]
    for line in first:
        low, high, off = map(float, re.findall(r"(?:from|to|by) ([\d.e+-]+)", line))
        assert 0 < low < high <= 1.01e5
        assert off < 1e-5


def test_scheduler(run) -> None:
    """The recorded rate and the scheduler's word differ by one step: a tenth of the way up."""
    rows = {int(n[0]): n[1:] for n in map(numbers, run("scheduler.py")) if len(n) == 5}
    assert list(rows) == [1, *range(5, 55, 5)]
    for step in (1, 5, 10):
        lr, *_, said = rows[step]
        assert lr == pytest.approx(0.001 + 0.0009 * (step - 1), abs=1e-4)
        assert said == pytest.approx(0.001 + 0.0009 * step, abs=1e-4)


def test_groups(run) -> None:
    """Three groups at four steps, each with its own lr and decay."""
    rows = [n for n in map(numbers, run("groups.py")) if len(n) == 7]
    assert [row[1] for row in rows] == [0, 1, 2] * 4
    assert {(row[1], row[3], row[4]) for row in rows} == {
        (0, 1e-3, 1e-5),
        (1, 1e-3, 0),
        (2, 0.01, 0),
    }


def test_batch_size(run) -> None:
    """The rate per sample falls with the batch; pieces of a batch change nothing."""
    twenty, whole, pieces, large = (n for n in map(numbers, run("batch_size.py")) if len(n) == 7)
    assert whole[2:5] == pieces[2:5] == [80, 0.1, 0.00125]
    assert whole[5:] == pytest.approx(pieces[5:], rel=1e-3)
    assert [row[4] for row in (twenty, large)] == [0.005, 0.0003125]
    assert twenty[6] > whole[6] > large[6]


def test_fine_tuning(run) -> None:
    """A lower layer has a lower lr, and moves less."""
    rows = [line.split() for line in run("fine_tuning.py")[1:]]
    assert [row[1] for row in rows[:3]] == ["output", "hidden2", "hidden1"]
    for at in range(0, len(rows), 3):
        ratios = [float(row[-1]) for row in rows[at : at + 3]]
        assert ratios == sorted(ratios, reverse=True)


def test_post_hoc(run) -> None:
    """It makes a dataset where none is given, and answers the same of one that is."""
    first = run("post_hoc.py")
    assert first == run("post_hoc.py", "runs/post_hoc.parquet")
    assert sum(line.endswith("?") or "?" in line for line in first) == 4
    error, nonfinite = numbers(first[-1])
    assert error < 1e-5
    assert nonfinite == 0


@pytest.mark.parametrize("mnist", [False, True])
def test_zeiler2012(run, mnist: bool) -> None:
    """In a hurry: both tables, both figures, and every statement about them; made-up MNIST too."""
    arguments = ["--seeds", "1", "--hurry", "50", "--out", "out"]
    if mnist:
        write_mnist(Path(), train=200, test=50)
        arguments += ["--mnist", "."]
    text = "\n".join(run("zeiler2012.py", *arguments))
    out = Path("out")
    assert text.strip() == (out / "results.md").read_text(encoding="utf-8").strip()
    assert len(re.findall(r"^\| ε = ", text, re.MULTILINE)) == 5 + 4
    for word in ("Table 1", "Table 2", "Figure 1", "Figure 2", "tanh network", "Section 3.2"):
        assert word in text
    for picture in ("figure1.png", "figure2.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    at_once = re.search(r"^\| \+0 steps \|(.*)\|$", text, re.MULTILINE)[1]
    # Made-up labels are known by heart by then, so that nothing is left to be sudden.
    assert mnist or all(float(cell.split("±")[0]) < 0.9 for cell in at_once.split("|"))


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """MNIST's four files, as they are or zipped: pixels from 0 to 1, labels, in their order."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits

    images = write_mnist(tmp_path, train=7, test=3, zipped=zipped)
    found = digits.load(mnist=tmp_path)
    assert found.images.numpy() == pytest.approx(images["train"].reshape(7, 784) / 255, abs=1e-6)
    assert found.test_images.shape == (3, 784)
    assert found.labels.tolist() == list(range(7))
    assert found.test_labels.tolist() == [0, 1, 2]
