"""The documentation builds without a warning; its examples run as doctests, by conftest.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrprobe.record import LEVELS, frame_columns

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("docs")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*build, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


def checked(site: Path) -> str:
    """What docs/check_site.py has to say."""
    command = [sys.executable, str(ROOT / "docs" / "check_site.py"), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_documentation_builds_without_a_warning(site: Path) -> None:
    """Sphinx finds every name it documents, every page and every reference."""
    assert (site / "api.html").read_text().count("lrprobe.attach")


def test_mathematics_is_drawn_by_the_browser_itself(site: Path) -> None:
    """It is MathML, and no raw TeX is left in a page."""
    page = (site / "definitions.html").read_text()
    assert page.count("<math") > 50
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script).*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\\(frac|theta|mathrm|\(|\[)", text), path.name


def test_links_lead_somewhere_and_pages_need_no_network(site: Path) -> None:
    """No inner link or anchor is dead, and nothing is fetched from elsewhere."""
    assert checked(site) == ""


def test_dead_links_are_found(tmp_path: Path) -> None:
    """A missing page, a missing anchor, and a script from elsewhere are each named."""
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here"></a><a href="b.html"></a><a href="#there"></a>'
        '<script src="https://example.org/x.js"></script>'
    )
    assert checked(tmp_path).splitlines() == [
        "a.html: loads https://example.org/x.js",
        "a.html: #there is no anchor",
        "a.html: b.html is no file",
    ]


def test_every_column_has_its_section() -> None:
    """A sentence, a formula where there is one, and when to look at it: docs/columns.md."""
    page = (ROOT / "docs" / "columns.md").read_text()
    heads = " ".join(re.findall(r"^### (.*)$", page, re.MULTILINE))
    quantiles = {f"effective_lr_p{q}" for q in ("05", "25", "75", "95")}  # p01 to p99
    columns = {name for level in LEVELS for name in frame_columns(level)} - quantiles - {"module"}
    assert not [name for name in columns if not re.search(rf"\b{name}\b", heads)]
