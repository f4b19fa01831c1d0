"""Texts that are too long for memory give the corpus that they give in memory, and two preparations do not meet."""

import json
from pathlib import Path
from typing import Any

import pytest

from fomoe_pl.data import long_records, long_text, prepare, segments, windows
from fomoe_pl.data.documents import ReadOptions, read_file
from fomoe_pl.data.long_text import Collected, LongText
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import alone
from tests.conftest import make_documents

TEXT = "a word, ünïcödé, 漢字 and 🙂; " * 20_000


def test_a_long_text_has_the_characters_of_its_bytes() -> None:
    raw, found = TEXT.encode(), LongText()
    for start in range(0, len(raw), 99_991):  # within characters too
        found.append(raw[start : start + 99_991])
    found.append(b"", final=True)
    assert (len(found), found.n_bytes, found[:]) == (len(TEXT), len(raw), TEXT)
    for start, stop in ((0, 1), (7, 7), (262_143, 262_146), (len(TEXT) - 3, len(TEXT) + 9), (300_000, 500_000)):
        assert found[start:stop] == TEXT[start:stop]
    for raw in (b"\xff", b"\xc3"):
        with pytest.raises(UnicodeDecodeError):
            LongText().append(raw, final=True)


def test_short_texts_stay_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "LONGEST", 10)
    collected = Collected()
    for part, kind in ((b"short", str), (b"not so short", LongText), (b"", str)):
        collected.append(part)
        text = collected.text()
        assert isinstance(text, kind)
        assert text[:] == part.decode()


@pytest.mark.parametrize("plain", [True, False], ids=["utf-8", "escapes"])
@pytest.mark.parametrize("size", [7, 64, 4096])
def test_long_lines_of_json_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool, size: int
) -> None:
    texts = [TEXT[: 800 * i] + 'quote " back \\ \\u0041 \n end' + "\\" * (i % 3) for i in range(8)]
    texts.append("漢字" * 800)
    records = [{"id": i, "meta": {"text": text, "n": [1, "x" * 50]}, "text": "short"} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=not plain) for record in records]
    lines[3] = lines[3].replace("quote", "\\ud83d half \\udc00")  # halves that make no character
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:4], "", *lines[4:]]), encoding="utf-8")
    options = ReadOptions("meta.text", skip_empty=True)
    whole = [text[:] for text in read_file(path, options)]
    assert whole[5] == texts[5]
    assert whole[3] == texts[3].replace("quote", "? half ?")
    monkeypatch.setattr(long_text, "LONGEST", 100)
    monkeypatch.setattr(long_records, "_PIECE", size)
    found = list(read_file(path, options))
    assert [text[:] for text in found] == whole
    assert all(isinstance(text, LongText) for text in found[4:])
    for broken in ('{"text": "' + "a" * 300, '{"text": "' + "a" * 300 + '\\x"}', '{"text": "' + "a" * 300 + '"]'):
        path.write_text(broken)
        with pytest.raises(ConfigError, match="line 1 is not JSON"):
            list(read_file(path, ReadOptions()))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("separator", [None, "\\x1e"])
def test_the_corpus_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, separator: str | None
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    texts = [f"{i} {'long ' * (2000 if i % 4 == 0 else 3)}{text}" for i, text in enumerate(make_documents("sea", 24))]
    if separator is None:
        for i, text in enumerate(texts):
            (source / f"{i:02d}.txt").write_text(text)
    else:
        (source / "all.txt").write_text("\x1e".join(texts))
    monkeypatch.setattr(windows, "WINDOW", 4096)
    monkeypatch.setattr(windows, "OVERLAP", 512)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "separator": separator, "shards_per_domain": 2,
                                "val_fraction": 0.3}  # fmt: skip
    whole = prepare.prepare([f"sea={source}"], str(tmp_path / "whole"), **settings)
    monkeypatch.setattr(long_text, "LONGEST", 1000)
    monkeypatch.setattr(segments, "LONG_BYTES", 500)
    monkeypatch.setattr(segments, "_PART_BYTES", 64)
    seen: list[str] = []
    plain = LongText.append
    monkeypatch.setattr(
        LongText, "append", lambda self, raw, final=False: (seen.append("long"), plain(self, raw, final))
    )
    if separator is not None:
        monkeypatch.setattr("fomoe_pl.data.documents._CHUNK", 700)
    parts = prepare.prepare([f"sea={source}"], str(tmp_path / "parts"), **settings)
    assert seen
    assert [shard.sha256 for shard in parts.shards] == [shard.sha256 for shard in whole.shards]
    assert parts.fingerprint == whole.fingerprint


def test_two_preparations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\x1e".join(make_documents("sea", 40)))
    settings: dict[str, Any] = {"separator": "\\x1e", "shards_per_domain": 1}
    with alone("output", tmp_path / "corpus"), pytest.raises(ConfigError, match="another process"):
        prepare.prepare([f"a={tmp_path / 'a.txt'}"], str(tmp_path / "corpus"), **settings)
    with alone("output", tmp_path / "other"):
        prepare.prepare([f"a={tmp_path / 'a.txt'}"], str(tmp_path / "corpus"), **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "corpus"]
