"""The page of `fomoe compare`, and TensorBoard, on real runs; in headless Chromium where there is one."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image, ImageChops

from fomoe_pl.compare import main
from fomoe_pl.compare.page import _png
from fomoe_pl.compare.runs import read_run
from tests.watched import RUNS

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def page(watched_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "runs.html"
    main([*(str(watched_runs / name) for name in RUNS), "--html", str(path)])
    return path


class Links(HTMLParser):
    """Every address that a browser would load, and what is in the headings."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_needs_no_network(page: Path) -> None:
    links = Links()
    links.feed(page.read_text())
    assert len(links.loaded) > 10
    assert all(link.startswith("data:image/") for link in links.loaded)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "url(" not in page.read_text()
    assert links.tags.count("table") == 4
    assert list(page.parent.iterdir()) == [page]  # nothing unfinished stays


def test_a_picture_of_many_panels_has_a_row_of_its_own() -> None:
    for width, wide in ((726, False), (1400, True)):
        content = io.BytesIO()
        Image.new("RGB", (width, 10)).save(content, "png")
        assert ('class="wide"' in _png(content.getvalue(), "load")) == wide


def test_curves_are_read_with_steps_tokens_and_bytes(watched_runs: Path) -> None:
    run = read_run(watched_runs / "ghost_1")
    quality = run.quality()
    assert quality.steps.tolist() == [0, 8, 16]
    assert quality.values[0] == pytest.approx(run.report["validation_before_training"]["val/bits_per_byte"])
    assert quality.values[-1] == pytest.approx(run.report["validation"]["val/bits_per_byte"])
    tokens = run.at("tokens/global", quality.steps)
    assert tokens is not None
    assert tokens.tolist() == [0, 8 * 2 * 3 * 16, 16 * 2 * 3 * 16]
    sent = run.at("comm/training_wire_MiB", quality.steps)
    assert sent is not None
    wire = run.report["bytes"]["wire"]
    assert sent[-1] * 2**20 == pytest.approx(wire["total"] - wire["evaluation"], rel=1e-3)
    assert run.at("no/such tag", quality.steps) is None


def colours(picture: Path) -> int:
    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(maxcolors=10**7) or [])


def screenshot(url: str, picture: Path, height: int = 1200) -> Path:
    assert CHROMIUM is not None
    size, out = f"--window-size=1600,{height}", f"--screenshot={picture}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    profile = f"--user-data-dir={picture.parent / 'profile'}"
    subprocess.run([CHROMIUM, *options, profile, size, out, url], check=True, capture_output=True, timeout=100)
    kept = os.environ.get("SCREENSHOTS")  # a folder, to look at them
    if kept:
        shutil.copy(picture, kept)
    return picture


@needs_chromium
def test_the_page_is_drawn(page: Path, tmp_path: Path) -> None:
    assert colours(screenshot(page.as_uri(), tmp_path / "page.png", height=3000)) > 500


@pytest.fixture(scope="module")
def board(watched_runs: Path) -> Iterator[str]:
    """Address of a TensorBoard over the runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(watched_runs), "--port", "0", "--bind_all"]
    command[-1:] = ["--host", "127.0.0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                found = re.search(r"http://\S+", line)
                if found:
                    break
            assert found, "TensorBoard did not start"
            address = found[0].rstrip("/")
            for _ in range(100):
                with urlopen(f"{address}/data/runs") as answer:
                    if len(answer.read()) > 10:
                        break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("tab", ["custom_scalars", "images", "text", "hparams", "distributions"])
def test_tensorboard_shows_it(board: str, tmp_path: Path, tab: str) -> None:
    empty = screenshot(f"{board}/#mesh", tmp_path / "mesh.png")  # a tab without data
    shown = screenshot(f"{board}/#{tab}", tmp_path / f"{tab}.png")
    with Image.open(empty) as first, Image.open(shown) as second:
        changed = ImageChops.difference(first.convert("L"), second.convert("L"))
        assert sum(changed.point(lambda grey: 255 if grey else 0).histogram()[1:]) > 0.02 * 1600 * 1200
