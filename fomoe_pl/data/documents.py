"""Reading documents out of text, JSON-lines and Parquet files, one at a time."""

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from fomoe_pl.errors import ConfigError

# What is raised for a file that is damaged or barred; pyarrow's errors are among these.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
try:
    from zstandard import ZstdError

    _UNREADABLE += (ZstdError,)
except ImportError:
    pass

_COMPRESSIONS = (".gz", ".xz", ".zst")
_FORMATS = (".txt", ".jsonl", ".parquet")
_READABLE = ".txt and .jsonl (also .gz, .xz, .zst) and .parquet"
_CHUNK = 1 << 20  # bytes read at a time from a text file of many documents


@dataclass(frozen=True)
class Source:
    """One domain and the files that hold its documents.

    Attributes:
        domain: Name of the domain.
        files: Files in the order in which they are read.
    """

    domain: str
    files: tuple[Path, ...]


def find_sources(specs: Sequence[str]) -> list[Source]:
    """Find the domains and files that a list of sources names.

    Args:
        specs: ``NAME=PATH`` is one domain: a file, or all readable files below a folder. A bare ``PATH`` to a folder
            holds one domain per entry (a subfolder with all files below it, or a file), named after the entry; a bare
            ``PATH`` to a file is one domain named after the file. A domain named more than once has all its files.

    Returns:
        The domains in the order in which they are first named, those of one folder by name.

    Raises:
        ConfigError: A path does not exist or holds nothing readable, or a name cannot be part of a file name.
    """
    files: dict[str, list[Path]] = {}
    for spec in specs:
        name, separator, location = spec.rpartition("=")
        path = Path(location)
        if not path.exists():
            raise ConfigError("source", spec, f"{path} does not exist", "Give NAME=PATH or the path of a folder")
        entries = sorted(path.iterdir()) if path.is_dir() and not separator else [path]
        found = False
        for entry in entries:
            below = sorted(p for p in entry.rglob("*") if _is_readable(p)) if entry.is_dir() else [entry]
            readable = [p for p in below if _is_readable(p)]
            if readable:
                found = True
                files.setdefault(name if separator else entry.name.split(".")[0], []).extend(readable)
        if not found:
            raise ConfigError("source", spec, "holds no readable file", f"Readable are {_READABLE}")
    for domain in files:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", domain):
            raise ConfigError(
                "source", domain, "a domain's name has letters, digits, _ and - only", "Name it yourself: NAME=PATH"
            )
    return [Source(domain, tuple(paths)) for domain, paths in files.items()]


def _is_readable(path: Path) -> bool:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        return len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl")
    return bool(suffixes) and suffixes[-1] in _FORMATS


def read_documents(source: Source, text_field: str, separator: str | None) -> Iterator[str]:
    r"""Read every document of a domain that is not empty, in a fixed order.

    Args:
        source: Domain and files.
        text_field: Field (.jsonl) or column (.parquet) that holds the text.
        separator: What stands between the documents of a .txt file, with Python's escapes (``\x1e``, ``\n\n``);
            None: a .txt file is one document.

    Raises:
        ConfigError: A file is not UTF-8 or not JSON, lacks the field, or needs a library that is not installed.
    """
    for path in source.files:
        kind = next(suffix for suffix in reversed(path.suffixes) if suffix in _FORMATS)
        if kind == ".txt":
            documents = _text_documents(path, separator)
        elif kind == ".jsonl":
            documents = _json_documents(path, text_field)
        else:
            documents = _parquet_documents(path, text_field)
        try:
            yield from (text for text in documents if text)
        except ConfigError:
            raise
        except _UNREADABLE as error:
            raise ConfigError("source", str(path), f"cannot be read ({error})", "Copy or compress it again") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise _missing_library(path, "zstandard") from None
        # A .zst file may be several frames, one behind the other; the reader alone has no lines.
        frames = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.BufferedReader(frames)
    return path.open("rb")


def _missing_library(path: Path, library: str) -> ConfigError:
    return ConfigError("source", str(path), f"reading it needs {library}", f"Run: pip install {library}")


def _text_documents(path: Path, separator: str | None) -> Iterator[str]:
    with _open(path) as file:
        if separator is None:
            yield _decode(file.read(), path)
            return
        boundary = codecs.decode(separator, "unicode_escape").encode()
        rest = b""
        while chunk := file.read(_CHUNK):
            *complete, rest = (rest + chunk).split(boundary)
            for raw in complete:
                yield _decode(raw, path)
        yield _decode(rest, path)


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "source", str(path), f"is not UTF-8 ({error.reason})", "Convert it, e.g. with iconv"
        ) from None


def _json_documents(path: Path, text_field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                raise ConfigError(
                    "source", str(path), f"line {number} is not JSON", "A .jsonl file has one JSON object a line"
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                fields = ", ".join(record) if isinstance(record, dict) else "none"
                raise ConfigError(
                    "text_field", text_field, f"line {number} of {path} has no such text", f"Its fields: {fields}"
                )
            # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
            yield record[text_field].encode("utf-8", "replace").decode("utf-8")


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise _missing_library(path, "pyarrow") from None
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise ConfigError("text_field", text_field, f"{path} has no such column", f"Columns: {', '.join(names)}")
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
