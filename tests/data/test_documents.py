import bz2
import gzip
import io
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fomoe_pl.data import documents
from fomoe_pl.data.documents import ReadOptions, read_documents, read_file
from fomoe_pl.data.sources import Source
from fomoe_pl.errors import ConfigError

TEXTS = ["one\ntwo", "drei", "quatre é", "五"]


def read(path: Path, text_field: str = "text", separator: str | None = None, skip_empty: bool = False) -> list[str]:
    return list(read_documents(Source("d", (path,)), ReadOptions(text_field, separator, skip_empty)))


def json_lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def packers() -> dict[str, Callable[[bytes], bytes]]:
    zstandard = pytest.importorskip("zstandard")
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".ZST": zstandard.compress}


def parquet_bytes(**columns: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSON", ".parquet", ".txt"])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".ZST"])
def test_every_format_in_every_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    content = {".txt": "\x1e".join(TEXTS).encode(), ".parquet": parquet_bytes(text=TEXTS)}.get(suffix, json_lines())
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(packers()[compression](content))
    assert read(path, separator="\\x1e") == TEXTS


def test_joined_compressed_files(tmp_path: Path) -> None:
    for suffix, pack in packers().items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(pack(json_lines("body")) + pack(json_lines("body")))
        assert read(path, "body") == TEXTS * 2


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".ZST"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_a_file_that_is_cut_anywhere_is_named(tmp_path: Path, suffix: str, compression: str) -> None:
    """Also where as much as a whole chunk or frame is left of it, and where nothing is."""
    texts = [random.Random(i).randbytes(300).hex() for i in range(100)]
    content = {".txt": "\n".join(texts).encode(), ".parquet": parquet_bytes(text=texts)}.get(
        suffix, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    )
    whole = packers()[compression](content)
    path = tmp_path / f"a{suffix}{compression}"
    for left in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        for before in (b"", whole) if left else (b"",):
            path.write_bytes(before + whole[:left])
            if compression == ".bz2" and before and left < 4:
                continue  # what follows a stream and is too short for another is not told from padding
            with pytest.raises(ConfigError, match=rf"source = '.*a\{suffix}\{compression}': cannot be read"):
                read(path, separator="\\n")


def test_zstandard_frames_of_any_kind(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    streamed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    frame = streamed.compress(json_lines()) + streamed.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(
        skippable + frame + zstandard.compress(b"") + zstandard.compress(json_lines())
    )
    assert read(tmp_path / "a.jsonl.zst") == TEXTS * 2


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    meta = [{"text": text, "n": 1} for text in [*TEXTS, None]]
    table = pyarrow.table({"n": [1, 2, 3, 4, 5], "text": [*TEXTS, None], "meta": meta, "a.b": [*TEXTS, "x"]})
    parquet.write_table(table, path)
    for field in ("text", "meta.text"):
        assert read(path, field, skip_empty=True) == TEXTS
        with pytest.raises(ConfigError, match=r"row 5 of .*a\.parquet has no such text.*--skip_empty"):
            read(path, field)
    assert read(path, "a.b") == [*TEXTS, "x"]
    for field in ("body", "text.body", "meta.body", "meta.text.body", "", "."):
        with pytest.raises(ConfigError, match=r"no such column.*Columns: n, text, meta, meta\.text, meta\.n, a\.b"):
            read(path, field)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([["a"], ["b"]], "list"),
        ([b"a", b"b"], "binary"),
        ([{"x": "a"}], "struct"),
        ([1, 2], "int64"),
        ([1.5], "double"),
        ([True], "bool"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, values: list[Any], kind: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(text=values))
    with pytest.raises(ConfigError, match=rf"text_field = 'text': that column of .* is of type {kind}.*, not text"):
        read(path, skip_empty=True)


def test_dictionaries_and_large_strings_are_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=pyarrow.array(TEXTS).cast(kind)))
        assert read(tmp_path / "a.parquet") == TEXTS


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = parquet_bytes(text=TEXTS * 100)
    for content in (b"", whole[:50], whole[:-1], b"PAR1" + b"x" * 200 + b"PAR1", whole[:4] + b"\xff" * 60 + whole[64:]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.parquet': cannot be read"):
            read(tmp_path / "a.parquet")


def test_text_file_is_a_document_unless_separated(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\x1e".join(TEXTS) + "\x1e", "utf-8")
    assert read(path) == ["\x1e".join(TEXTS) + "\x1e"]
    assert read(path, separator="\\x1e") == TEXTS


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_separator_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_text("<->".join(["", *TEXTS, "", "end"]), "utf-8")
    assert read(path, separator="<->") == [*TEXTS, "end"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert read(path) == ["a?b"]


@pytest.mark.parametrize(
    "separator", ["¶", "§§", "空", "🙂", "\\u2028", "\\N{PILCROW SIGN}", "\\036", "a\\\\b", "\\t", "é\\n"]
)
def test_separators_are_characters_or_escapes(tmp_path: Path, separator: str) -> None:
    meant = {
        "\\u2028": "\u2028",
        "\\N{PILCROW SIGN}": "¶",
        "\\036": "\x1e",
        "a\\\\b": "a\\b",
        "\\t": "\t",
        "é\\n": "é\n",
    }
    path = tmp_path / "a.txt"
    path.write_text(meant.get(separator, separator).join(TEXTS), "utf-8")
    assert read(path, separator=separator) == TEXTS


@pytest.mark.parametrize(
    "separator", ["", "\\", "\\x", "\\x1", "\\u12", "\\q", "\\¶", "a\\", "\\ud800", "\\U00110000", "\\N{no}"]
)
def test_separators_that_are_none_are_named(tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"^separator = "):
        read(tmp_path / "a.txt", separator=separator)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a"}, {"text": "b, ]"}]', ["a", "b, ]"]),
        (" \n[\n]\n", []),
        ('\ufeff[{"text": "é"}]', ["é"]),
        ('[\n  {"n": {"text": [1, 2]},\n   "text": "a\\n"},\n  {"text": "b"}\n]', ["a\n", "b"]),
    ],
)
def test_an_array_of_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, content: str, texts: list[str]
) -> None:
    (tmp_path / "a.json").write_text(content, "utf-8")
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    assert read(tmp_path / "a.json") == texts


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}',
        '[{"text": "a"},',
        '[{"text": "a"},]',
        '[{"text": "a"} {"text": "b"}]',
        '[{"text": "a"}] [{"text": "b"}]',
        "[",
        '{\n "text": "a"\n}',
        "[" * 100_000,
    ],
)
def test_arrays_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json': (record|line|what follows record) \d .*one array of objects"):
        read(tmp_path / "a.json")


def test_text_in_a_field_of_a_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"meta": {"text": "a", "more": {"body": "x"}}}\n{"meta.text": "b", "meta": {"more": {"body": "y"}}}\n'
    )
    assert read(path, "meta.text") == ["a", "b"]
    assert read(path, "meta.more.body") == ["x", "y"]
    with pytest.raises(ConfigError, match=r"line 1 .*Its fields: meta, meta\.text, meta\.more"):
        read(path, "meta.body")


@pytest.mark.parametrize("line", ["", "  ", "null", '{"text": null}', '{"body": "x"}', "{}", '{"meta": 3}'])
def test_records_without_text_are_refused_or_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": ""}}\n{{"text": "b"}}\n')
    with pytest.raises(ConfigError, match=rf"line 2 of {path} .*--skip_empty"):
        read(path)
    left_out: Counter[str] = Counter()
    assert list(read_file(path, ReadOptions(skip_empty=True), left_out)) == ["a", "b"]
    assert left_out == {"no text": 1, "empty text": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        (b'{"body": "a"}\n', "Its fields: body"),
        (b'{"text": 3}\n', "has no such text but a int"),
        (b'{"text": ["a"]}\n', "has no such text but a list"),
        (b'"text"\n', "is no JSON object"),
        (b'["text"]\n', "record 1 of .* is no JSON object"),
        (b'{"text": "a"}\n{"a":' + b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"a":' * 100_000, "line 1 is nested too deeply"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for skip_empty in (False, message.startswith("Its fields")):
        with pytest.raises(ConfigError, match=message):
            read(path, skip_empty=not skip_empty and not message.startswith("Its fields"))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read(path)


@pytest.mark.parametrize(("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format" * 10)
    with pytest.raises(ConfigError, match=f"source = .*{name}.*: cannot be read"):
        read(tmp_path / name)
