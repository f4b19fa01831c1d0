"""The documentation site and its notebook, where the extra `docs` is installed: `make test-slow` installs it."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_cli import environment
from tests.tools import load
from tests.training import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning fails it."""
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(built)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return built


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_page_is_there_with_its_search(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert [str(page) for page in pages if page.name != "README.html" and not (site / page).is_file()] == []
    index = (site / "searchindex.js").read_text()
    assert all(word in index for word in ("tutorials/first-run", "metrics", "checkpoint_root"))
    assert "theme-toggle" in (site / "index.html").read_text()  # light and dark


def test_tables_and_reference_are_made_from_docstrings(site: Path) -> None:
    assert "Sites that hold each expert, 1..M; null is M, a full replica." in text_of(site / "configuration.html")
    assert "predict_bytes" in text_of(site / "reference/api.html")
    assert "overlap 2: " in text_of(site / "tutorials/notebook.html")
    assert "{settings}" not in text_of(site / "configuration.html")


def test_links_lead_somewhere(site: Path) -> None:
    broken = []
    ids = {path: {*re.findall(r'\bid="([^"]+)"', path.read_text())} for path in site.rglob("*.html")}
    for page in ids:
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            parts = urlsplit(html.unescape(link))
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists() or (parts.fragment and target in ids and parts.fragment not in ids[target]):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert [line for line in broken if "_modules" not in line and "genindex" not in line] == []


def test_the_notebook_runs(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("CORPUS", root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = shutil.copy(ROOT / "docs/tutorials/notebook.ipynb", tmp_path)
    done = load("run_notebook").run(Path(path), tmp_path)
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert "116,416 parameters" in printed
    assert len(re.findall(r"overlap \d: \d\.\d+ bits per byte, (\d+\.\d) MiB", printed)) == 3
    assert "overlap = 5: must be between 1 and the number of sites (4)" in printed
