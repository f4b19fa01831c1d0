"""Reading documents out of text, JSON and Parquet files, one at a time."""

import codecs
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from json import JSONDecodeError
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.data import long_text
from fomoe_pl.data.compression import missing_library, open_plain
from fomoe_pl.data.long_records import is_cut, read_line, read_long, read_long_object
from fomoe_pl.data.long_text import Collected, LongText, Text
from fomoe_pl.data.sources import FileKind, Source, kind_of
from fomoe_pl.data.token_files import TokensDtype, read_token_file
from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, RemotePath

# What is raised for a file that is damaged or barred.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
try:
    from zstandard import ZstdError

    _UNREADABLE += (ZstdError,)
except ImportError:
    pass

_CHUNK = 1 << 20  # bytes or characters read at a time
_ROWS = 64  # rows of a Parquet file read at a time: each may be a long document
_LONGEST_WORD = 16  # characters of what JSON has beside strings and numbers
_SHOWN = 20  # most field names in a message
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]+\}|[0-7]{1,3}|[abfnrtv\\'\"])|\\")

Record = tuple[str, Any]  # where it stands in its file, and what it is; None for a blank line


@dataclass(frozen=True)
class ReadOptions:
    r"""How files become documents.

    Attributes:
        text_field: Field of JSON records or column of Parquet files that holds the text; `meta.text` is the field
            `text` in the field `meta`, unless there is a field of that whole name.
        separator: What stands between the documents of a .txt file, with Python's escapes (`\x1e`, `\n\n`);
            None: a .txt file is one document.
        skip_empty: Leave out, and count, records whose text is null, missing or a blank line.
        tokens_dtype: Type of the ids in token files.
        tokens_end: Id that ends a document in them.
        vocab_size: Ids in them are below it.
    """

    text_field: str = "text"
    separator: str | None = None
    skip_empty: bool = False
    tokens_dtype: TokensDtype = "uint16"
    tokens_end: int = 0
    vocab_size: int = 0


Ids = NDArray[np.uint32]


def read_documents(source: Source, options: ReadOptions) -> Iterator[Text | Ids]:
    """Read every document of a domain that is not empty, in a fixed order; as :func:`documents_of`."""
    for path in source.files:
        yield from documents_of(source, path, options)


def documents_of(
    source: Source, path: AnyPath, options: ReadOptions, left_out: Counter[str] | None = None
) -> Iterator[Text | Ids]:
    """Read a file of a domain: texts, as :func:`read_file`, or ids, as :func:`read_token_file`."""
    if not source.tokens:
        yield from read_file(path, options, left_out)
        return
    try:
        yield from read_token_file(path, options.tokens_dtype, options.tokens_end, options.vocab_size)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_file(path: AnyPath, options: ReadOptions, left_out: Counter[str] | None = None) -> Iterator[Text]:
    """Read every document of a file that is not empty, in a fixed order.

    Args:
        path: The file.
        options: How it is read.
        left_out: Counts records that are left out, by why.

    Raises:
        ConfigError: The file is cut or damaged, is not UTF-8 or not JSON, has a record without text, or needs a
            library that is not installed.
    """
    kind = kind_of(path)
    assert kind is not None, "found as readable"
    left_out = Counter() if left_out is None else left_out
    try:
        with open_plain(path, kind.compression) as file:
            if kind.format == ".txt":
                yield from (text for text in _text_documents(file, path, options.separator) if text)
                return
            records = {".parquet": _parquet_records, ".arrow": _arrow_records}.get(kind.format, _json_records)
            for place, record in records(file, path, options.text_field):
                text = _text(record, options, place, path)
                if text:
                    yield text
                else:
                    left_out["no text" if text is None else "empty text"] += 1
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: Exception) -> ConfigError:
    hint = "It is cut or damaged: copy or compress it again"
    if isinstance(path, RemotePath) and isinstance(error, OSError):
        hint = "Check the address, the network and what the protocol needs to log in"
    return ConfigError("source", str(path), f"cannot be read ({error})", hint)


# -- text -------------------------------------------------------------------------------------------------------------


def separator_bytes(separator: str) -> bytes:
    """What a separator with Python's escapes is in a file.

    Raises:
        ConfigError: It is empty, has an unknown or unfinished escape, or is no UTF-8.
    """

    def character(escape: re.Match[str]) -> str:
        return codecs.decode(escape[0], "unicode_escape")

    try:
        found = _ESCAPE.sub(character, separator).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(
            "separator", separator, f"is not understood ({error.reason})",
            r"Give the characters themselves or Python's escapes, such as '\x1e' or '\n\n'; a backslash is '\\'",
        ) from None  # fmt: skip
    if not found:
        raise ConfigError("separator", separator, "is empty", "Leave it out if each .txt file is one document")
    return found


def _text_documents(file: IO[bytes], path: AnyPath, separator: str | None) -> Iterator[Text]:
    collected = Collected()
    try:
        if separator is None:
            while chunk := file.read(_CHUNK):
                collected.append(chunk)
            yield collected.text()
            return
        boundary = separator_bytes(separator)
        buffer = bytearray()
        searched = 0
        while chunk := file.read(_CHUNK):
            buffer += chunk
            while (end := buffer.find(boundary, searched)) >= 0:
                collected.append(buffer[:end])
                yield collected.text()
                del buffer[: end + len(boundary)]
                searched = 0
            searched = max(0, len(buffer) - len(boundary) + 1)
            if searched > _CHUNK:  # of a long document there is no more here than may be a separator's beginning
                collected.append(buffer[:searched])
                del buffer[:searched]
                searched = 0
        collected.append(buffer)
        yield collected.text()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "source", str(path), f"is not UTF-8 ({error.reason})", "Convert it, e.g. with iconv"
        ) from None


# -- records ----------------------------------------------------------------------------------------------------------


def _text(record: Any, options: ReadOptions, place: str, path: AnyPath) -> Text | None:
    """A record's text; None if it has none and that is allowed."""
    value = _field(record, options.text_field)
    if isinstance(value, LongText):
        return value
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
        return value.encode("utf-8", "replace").decode("utf-8")
    if value is None and (record is None or isinstance(record, dict)):
        if options.skip_empty:
            return None
        what = "is blank" if record is None else "has no such text"
        hint = f"Its fields: {_shown(_paths(record or {}))}; --skip_empty leaves out and counts such records"
        raise ConfigError("text_field", options.text_field, f"{place} of {path} {what}", hint)
    what = "is no JSON object" if value is None else f"has no such text but a {type(value).__name__}"
    raise ConfigError("text_field", options.text_field, f"{place} of {path} {what}", "Name a field that holds a text")


def _field(record: Any, name: str) -> Any:
    """A field, or that of a field; None where there is none."""
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    head, _, rest = name.partition(".")
    return _field(record.get(head), rest) if rest else None


def _paths(record: dict[str, Any], before: str = "") -> Iterator[str]:
    """Names of fields as `text_field` takes them."""
    for name, value in record.items():
        yield before + name
        if isinstance(value, dict) and not before:
            yield from _paths(value, f"{name}.")


def _shown(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (", ..." if len(every) > _SHOWN else "") if every else "none"


def _json_records(file: IO[bytes], path: AnyPath, text_field: str) -> Iterator[Record]:
    """One object a line, or one array of objects."""
    if cast(Any, file).peek(_CHUNK).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        yield from _array(file, path)
        return
    for number in count(1):
        if not (line := read_line(file)):
            return
        try:
            if is_cut(line):
                yield f"line {number}", read_long(line, file)
            else:
                yield f"line {number}", json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise _not_json(path, f"line {number}", error) from None


def _not_json(path: AnyPath, place: str, error: Exception) -> ConfigError:
    what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
    hint = "A JSON file has one object a line, or is one array of objects"
    return ConfigError("source", str(path), f"{place} {what}", hint)


def _array(file: IO[bytes], path: AnyPath) -> Iterator[Record]:
    """The elements of an array, of which about as much is in memory as is read at a time."""
    reader = io.TextIOWrapper(file, "utf-8-sig")
    decoder = json.JSONDecoder()
    text = ""
    while not (text := text.lstrip()):
        text = reader.read(_CHUNK)
    at = number = 1  # behind the bracket
    while True:
        at = _after_blanks(text, at)
        if text[at : at + 1] == "]":
            if (text[at + 1 :] + reader.read(_CHUNK)).strip():
                raise _not_json(path, f"what follows record {number - 1}", ValueError("the array has ended"))
            return
        try:
            # A comma stands before every element but the first.
            start = at if number == 1 else _after_blanks(text, text.index(",", at, at + 1) + 1)
            record, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            more = "" if _is_wrong(error, text, at) else reader.read(max(_CHUNK, len(text)))
            if not more:
                raise _not_json(path, f"record {number}", error) from None
            text, at = text[at:] + more, 0
            before, brace, behind = text.partition("{")
            if len(text) <= long_text.LONGEST or not brace or before.strip(", \t\r\n"):
                continue
            try:
                record, text = read_long_object(brace + behind, reader)
            except (ValueError, RecursionError) as wrong:
                raise _not_json(path, f"record {number}", wrong) from None
            end = 0
        yield f"record {number}", record
        at, number = end, number + 1


def _is_wrong(error: Exception, text: str, at: int) -> bool:
    """Whether it is an error whatever follows, and not that an element has not been read as a whole yet."""
    if isinstance(error, JSONDecodeError):
        # Of a string that does not end the place is where it begins; what is cut else is short.
        return not error.msg.startswith("Unterminated string") and error.pos < len(text) - _LONGEST_WORD
    return isinstance(error, RecursionError) or at < len(text)


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parquet_records(file: IO[bytes], path: AnyPath, text_field: str) -> Iterator[Record]:
    """Rows that have the wanted column alone."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_library(path, "pyarrow") from None
    try:
        with tempfile.TemporaryFile() as unpacked:
            packed = cast(FileKind, kind_of(path)).compression
            if packed:
                shutil.copyfileobj(file, unpacked)  # a Parquet file is read from its end
            opened = file if isinstance(path, RemotePath) else path
            # By default the column of a row group is read as a whole, and some files have one row group.
            streamed: dict[str, Any] = {"buffer_size": _CHUNK, "pre_buffer": False}
            with parquet.ParquetFile(unpacked if packed else opened, **streamed) as table:
                steps = _find_column(table.schema_arrow, path, text_field)
                batches = table.iter_batches(batch_size=_ROWS, columns=[text_field], use_threads=False)
                values = (record for batch in batches for record in _rows(batch, text_field, steps))
                yield from ((f"row {number}", record) for number, record in enumerate(values, 1))
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error


def _arrow_records(file: IO[bytes], path: AnyPath, text_field: str) -> Iterator[Record]:
    """Rows of an Arrow file, as `datasets` saves them (a stream) or with a footer (a file)."""
    try:
        import pyarrow
    except ImportError:
        raise missing_library(path, "pyarrow") from None
    try:
        with_footer = cast(Any, file).peek(6)[:6] == b"ARROW1"
        if with_footer and not file.seekable():
            raise ValueError("an Arrow file with a footer cannot be read compressed")
        table = pyarrow.ipc.open_file(file) if with_footer else pyarrow.ipc.open_stream(file)
        steps = _find_column(table.schema, path, text_field)
        batches = (table.get_batch(i) for i in range(table.num_record_batches)) if with_footer else iter(table)
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                for record in _rows(batch.select(steps[:1]).slice(start, _ROWS), text_field, steps):
                    number += 1
                    yield f"row {number}", record
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error


def _rows(batch: Any, text_field: str, steps: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as records; a long text is put aside without becoming a string first.

    Args:
        batch: Of the column alone.
        text_field: What the text is called.
        steps: The column, and the fields in it, that this means.
    """
    from pyarrow import compute

    if batch.nbytes <= long_text.LONGEST:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        value = batch.slice(number, 1).column(0)
        if len(steps) > 1:
            value = compute.struct_field(value, steps[1:])
        value = value.dictionary_decode() if hasattr(value, "dictionary") else value
        text = value[0].as_buffer() if value[0].is_valid else None
        if text is None or text.size <= long_text.LONGEST:
            yield from batch.slice(number, 1).to_pylist()
            continue
        collected = Collected()
        for start in range(0, text.size, _CHUNK):
            collected.append(memoryview(text)[start : start + _CHUNK].tobytes())
        yield {text_field: collected.text()}


def _find_column(schema: Any, path: AnyPath, name: str) -> list[str]:
    """The column, and the fields in it, that a name means; one that is not there or has no text is refused."""
    from pyarrow import types

    found, rest, steps = schema if name else None, name, []
    while rest and found is not None:
        head, rest = (rest, "") if rest in _names(found) else rest.split(".", 1) if "." in rest else (rest, "")
        steps.append(head)
        found = found.field(head).type if head in _names(found) else None
    if found is None:
        columns = [f"{top.name}{f'.{below}' if below else ''}" for top in schema for below in ("", *_names(top.type))]
        raise ConfigError("text_field", name, f"{path} has no such column", f"Columns: {_shown(columns)}")
    plain = found.value_type if types.is_dictionary(found) else found
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_text(plain) for is_text in texts):
        raise ConfigError(
            "text_field", name, f"that column of {path} is of type {found}, not text",
            "Name a column of type string, or convert it",
        )  # fmt: skip
    return steps


def _names(fields: Any) -> list[str]:
    """Names of a schema's columns or a structure's fields; of any other type none."""
    from pyarrow import Schema, types

    if isinstance(fields, Schema):
        return list(fields.names)
    return [field.name for field in fields] if types.is_struct(fields) else []
