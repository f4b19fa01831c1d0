import gzip
import json
import lzma
from pathlib import Path

import pytest

from fomoe_pl.data import documents
from fomoe_pl.data.documents import Source, find_sources, read_documents
from fomoe_pl.errors import ConfigError

TEXTS = ["one\ntwo", "drei", "quatre é", "五"]


def read(path: Path, text_field: str = "text", separator: str | None = None) -> list[str]:
    return list(read_documents(Source("d", (path,)), text_field, separator))


def json_lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def test_compressed_json_lines(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(pack(json_lines("body")) + pack(json_lines("body")))  # files may be joined end to end
        assert read(path, "body") == TEXTS * 2


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4, 5], "text": [*TEXTS, None]}), path)
    assert read(path) == TEXTS
    with pytest.raises(ConfigError, match="Columns: n, text"):
        read(path, "body")


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
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"body": "a"}\n', "Its fields: body"),
        (b'{"text": 3}\n', "has no such text"),
        (b'["text"]\n', "has no such text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path)


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
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        read(tmp_path / name)


def test_sources(tmp_path: Path) -> None:
    for name in ("web/b/2.txt", "web/1.jsonl.gz", "web/notes.md", "books.jsonl.xz", "README.md", "empty/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    books = tmp_path / "books.jsonl.xz"
    web = (tmp_path / "web/1.jsonl.gz", tmp_path / "web/b/2.txt")
    assert find_sources([str(tmp_path)]) == [Source("books", (books,)), Source("web", web)]
    assert find_sources([str(books)]) == [Source("books", (books,))]
    assert find_sources([f"all={tmp_path}"]) == [Source("all", (books, *web))]
    assert find_sources([f"z={books}", f"a={tmp_path / 'web'}"]) == [Source("z", (books,)), Source("a", web)]
    assert find_sources([f"a={books}", f"a={tmp_path / 'web/b'}"]) == [Source("a", (books, web[1]))]


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        find_sources([f"a={tmp_path}/none"])
    with pytest.raises(ConfigError, match="no readable file"):
        find_sources([str(tmp_path)])
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="letters, digits"):
        find_sources([f"a b={tmp_path}"])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format" * 10)
    with pytest.raises(ConfigError, match=f"source = .*{name}.*: cannot be read"):
        list(read_documents(Source("a", (tmp_path / name,)), "text", None))
