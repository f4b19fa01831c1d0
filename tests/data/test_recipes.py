"""The pure parts of the recipes in data/: cleaning and selecting text."""

import struct
import sys
import zlib
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(autouse=True, scope="module")
def recipes():
    """The scripts of data/ import each other as they do when they are run from there."""
    sys.path.insert(0, str(DATA))
    yield
    sys.path.remove(str(DATA))


def test_html_becomes_lines_and_keeps_code() -> None:
    from eight_sites import clean

    page = """<html><head><title>x</title></head><nav>menu</nav><main><h1>Head</h1><!-- no -->
    <p>One &amp; <b>two</b>
    three.</p><pre>  a &lt; b
    c</pre><table><tr><td>1</td><td>2</td></tr></table><script>x()</script></main></html>"""
    assert clean.html_text(page, "<main") == "Head\n\nOne & two three.\n  a < b\n    c\n\n1 2"


def test_licence_headers_go_and_other_comments_stay() -> None:
    from eight_sites import clean

    assert clean.without_licence_header("/* Copyright X\n * GPL */\nint a;") == "int a;"
    assert clean.without_licence_header("// SPDX-License-Identifier: MIT\n// b\nint a;") == "int a;"
    assert clean.without_licence_header("#!/usr/bin/python\n# Licence: MIT\nimport os\n") == "import os\n"
    assert clean.without_licence_header("/* adds */\nint a;") == "/* adds */\nint a;"


def test_plays() -> None:
    from eight_sites import clean

    play = (
        "# Title\n\n## ACT I\n\n### SCENE I. Rome.\n\n_Enter A_\n\n**A**  \nline  \n\n## ACT II\n\n"
        "### Prologue\n\nsnake_case\n"
    )
    scenes = ["SCENE I. Rome.\n\nEnter A\n\nA\nline", "Prologue\n\nsnake_case"]
    assert list(clean.play_scenes(play)) == scenes
    assert clean.play_text(play).startswith("Title\n\nACT I\n\nSCENE I. Rome.\n\nEnter A\n\nA\nline\n")


def test_chapters() -> None:
    from eight_sites import clean

    novel = "TITLE\n\nCHAPTER I\n\nOne.\nChapter the first\n\n\nVOLUME II\n\n\nChapter 2\n\nTwo.\n\nFINIS\n"
    assert list(clean.chapters(novel)) == ["CHAPTER I\n\nOne.\nChapter the first", "Chapter 2\n\nTwo."]


def test_parts_are_cut_between_paragraphs() -> None:
    from eight_sites import clean

    text = "\n\n".join(f"paragraph {i}" for i in range(10))
    parts = list(clean.parts_of(text, 30))
    assert "\n\n".join(parts) == text
    assert [len(part.split("\n\n")) for part in parts] == [3, 3, 3, 1]


def test_texts_of_an_r_database() -> None:
    from eight_sites import clean

    def string(line: str) -> bytes:
        return b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line.encode()

    def chunk(lines: list[str]) -> bytes:
        body = zlib.compress(b"X\n\x00\x00" + b"".join(map(string, lines)))
        return struct.pack(">i", 4 * len(lines)) + body

    rdb = chunk(["few"]) + chunk(["first", "", "", "", "last"])
    assert list(clean.r_texts(rdb, min_lines=3)) == ["first\n\nlast"]


def test_bible_chapters() -> None:
    from eight_sites import clean

    imp = (
        "$$$Genesis 1:0\n<title>Heading</title>\n$$$Genesis 1:1\nIn <w>the</w><note>x</note>\nbeginning\n"
        "$$$Genesis 1:2\nAnd\n$$$[ Module Heading ]\nno\n$$$Genesis 2:1\nThus"
    )
    assert list(clean.bible_chapters(imp)) == ["Genesis 1\n1 In the beginning\n2 And", "Genesis 2\n1 Thus"]


def test_dictionary_articles_are_cut_between_entries() -> None:
    from eight_sites import clean

    text = "\n".join(f"word{i}\n   meaning\n   [1913 Webster]" for i in range(6))
    articles = list(clean.dictionary_articles(text, size=40))
    assert "\n".join(articles) == "\n".join(f"word{i}\n   meaning" for i in range(6))
    assert all(article.startswith("word") for article in articles)
    assert len(articles) == 2


def test_manual_pages_lose_overstrikes() -> None:
    from eight_sites import clean

    assert clean.man_page("N\x08NA\x08A  \n\n\n\n_\x08x y") == "NA\n\nx y"


def test_selection() -> None:
    import make_eight_sites

    texts = [f"{i:03d}" + "x" * 297 for i in range(20)] + ["000" + "x" * 297, "short", "a\x1eb" * 100]
    kept = make_eight_sites.select(texts, 301 * 7 + 10, seed=0)
    assert len(kept) == len(set(kept)) == 7
    assert all(b"\x1e" not in document for document in kept)
    assert kept == make_eight_sites.select(texts, 301 * 7 + 10, seed=0)
    assert kept != make_eight_sites.select(texts, 301 * 7 + 10, seed=1)
    assert len(make_eight_sites.select(texts, float("inf"), seed=0)) == 21
