"""Texts that are too long for memory give the corpus that they give in memory, and two preparations do not meet."""

import json
import random
import tracemalloc
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
    array = tmp_path / "a.json"
    array.write_text(" [ " + " , ".join(lines) + "\n]\n", encoding="utf-8")
    assert [text[:] for text in read_file(array, options)] == whole
    monkeypatch.setattr(long_text, "LONGEST", 100)
    monkeypatch.setattr(long_records, "_PIECE", size)
    found = list(read_file(path, options))
    assert [text[:] for text in found] == whole
    assert all(isinstance(text, LongText) for text in found[4:])
    monkeypatch.setattr("fomoe_pl.data.documents._CHUNK", size)
    found = list(read_file(array, options))
    assert [text[:] for text in found] == whole
    assert any(isinstance(text, LongText) for text in found)
    for broken in ('[{"text": "' + "a" * 300, '[{"text": "' + "a" * 300 + '\\x"}]', '[{"text": "' + "a" * 300 + '"]',
                   '[{"a": {"text": "' + "a" * 300 + '"}, "b": [}]'):  # fmt: skip
        array.write_text(broken)
        with pytest.raises(ConfigError, match="record 1 is not JSON"):
            list(read_file(array, ReadOptions()))
    for broken in ('{"text": "' + "a" * 300, '{"text": "' + "a" * 300 + '\\x"}', '{"text": "' + "a" * 300 + '"]'):
        path.write_text(broken)
        with pytest.raises(ConfigError, match="line 1 is not JSON"):
            list(read_file(path, ReadOptions()))


def test_an_array_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        for i in range(400):
            file.write(("," if i else "[") + json.dumps({"text": str(i % 10) * 40_000}))  # 16 MB
        file.write("]")
    tracemalloc.start()
    assert sum(len(text) for text in read_file(path, ReadOptions())) == 400 * 40_000
    peak = tracemalloc.get_traced_memory()[1]
    path.write_text('[{"text": "a"}, {"text": b' + "c" * 16_000_000)
    tracemalloc.reset_peak()
    with pytest.raises(ConfigError, match="record 2 is not JSON"):
        list(read_file(path, ReadOptions()))
    wrong = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
    assert wrong < 20_000_000  # what is above is the text that was written


def test_a_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [random.Random(i).randbytes(5_000).hex() for i in range(4000)]  # 40 MB in one row group, pages of 1 MB
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=10**6, write_batch_size=9)
    length = sum(map(len, rows))
    del rows
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    found = 0
    for text in read_file(tmp_path / "a.parquet", ReadOptions()):
        found += len(text)
        most = max(most, pool.bytes_allocated() - before)
    assert found == length
    assert most < 20_000_000


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_long_rows_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, nested: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [TEXT[:n] for n in (900, 30, 2000, 99, 4000)]
    texts[1:1] = [None, ""]
    rows = pyarrow.array([{"n": 1, "text": text} for text in texts] if nested else texts)
    table = pyarrow.table({"meta" if nested else "text": rows})
    if not nested:
        table = table.set_column(0, "text", rows.dictionary_encode())
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    options = ReadOptions("meta.text" if nested else "text", skip_empty=True)
    monkeypatch.setattr(long_text, "LONGEST", 500)
    monkeypatch.setattr("fomoe_pl.data.documents._CHUNK", 64)
    found = list(read_file(path, options))
    assert [text[:] for text in found] == [text for text in texts if text]
    assert [isinstance(text, LongText) for text in found] == [True, False, True, False, True]


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
