"""JSON that is too long for memory: its long strings become texts of their own."""

import json
import re
import uuid
from typing import IO, Any, TextIO

from fomoe_pl.data import long_text
from fomoe_pl.data.long_text import Collected, Text

_PIECE = 1 << 20
_HIGH = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"  # half of a character that two escapes spell
_CHARACTERS = re.compile(rb"%b\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^u]|[^\\]+" % _HIGH)
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # as far as it goes
_QUOTE, _MARK = re.compile(rb'"'), re.compile(rb'["{}\[\]]')
_LONGEST_ESCAPES = 12  # bytes in which a character is spelled
_NEAR = 4096


def read_line(file: IO[bytes]) -> bytes:
    """A line, or the beginning of one that is too long to be held as a whole; empty at the end."""
    return file.readline(long_text.LONGEST)


def is_cut(line: bytes) -> bool:
    """Whether there is more of a line than `read_line` gave."""
    return len(line) == long_text.LONGEST and not line.endswith(b"\n")


def read_long(start: bytes, file: IO[bytes]) -> Any:
    """The JSON value of a long line; its long strings are texts on disk.

    Args:
        start: What `read_line` gave.
        file: Where the rest of the line is read from.

    Raises:
        ValueError: It is no JSON.
    """
    value = _Value()
    value.append(start, line=True)
    while piece := file.readline(_PIECE):
        value.append(piece, line=True)
        if piece.endswith(b"\n"):
            break
    return value.read()


def read_long_object(start: str, file: TextIO) -> tuple[Any, str]:
    """A long object, and what has been read behind it; its long strings are texts on disk.

    Args:
        start: Begins with it.
        file: Where more is read from.

    Raises:
        ValueError: It is no JSON.
    """
    value = _Value()
    for at in range(0, len(start), _PIECE):
        piece = start[at : at + _PIECE].encode()
        if end := value.append(piece):
            return value.read(), piece[end:].decode() + start[at + _PIECE :]
    while piece := file.read(_PIECE).encode():
        if end := value.append(piece):
            return value.read(), piece[end:].decode()
    return value.read(), ""


class _Value:
    """JSON of which long strings are put aside, so that the rest is short."""

    def __init__(self) -> None:
        self._depth = 0  # brackets that are open
        self._rest = bytearray()
        self._texts: dict[str, Text] = {}
        self._string: bytearray | None = None  # where one has begun and not ended
        self._long: Collected | None = None
        self._escaped = False

    def append(self, piece: bytes, line: bool = False) -> int:
        """Add a piece, of a line or of what goes on behind the value; where the value has ended in it, else 0."""
        at = 0
        while at < len(piece):
            if self._string is None:
                start = at
                at, ended = self._next_string(piece, at, line)
                self._rest += piece[start:at]
                if ended:
                    return at
                continue
            if self._escaped:
                self._string += piece[at : at + 1]
                self._escaped, at = False, at + 1
                continue
            found = _STRING.match(piece, at)
            assert found is not None
            self._string += found[0]
            at = found.end() + 1
            if found.end() < len(piece) and piece[found.end()] == ord("\\"):  # the piece's last byte
                self._string += b"\\"
                self._escaped = True
            elif found.end() < len(piece):
                self._close()
        if self._string is not None and len(self._string) > _PIECE:
            self._put_aside(whole=False)
        return 0

    def _next_string(self, piece: bytes, at: int, line: bool) -> tuple[int, bool]:
        """Go to behind the next quote, or to the value's end; whether it is that."""
        for mark in (_QUOTE if line else _MARK).finditer(piece, at):
            if mark[0] == b'"':
                self._string = bytearray()
                return mark.end(), False
            self._depth += 1 if mark[0] in b"{[" else -1
            if not self._depth:
                return mark.end(), True
        return len(piece), False

    def _put_aside(self, whole: bool) -> None:
        assert self._string is not None
        self._long = self._long or Collected()
        cut = len(self._string)
        if not whole:  # not within a character
            cut = self._safe_cut()
        text = json.loads(b'"' + self._string[:cut] + b'"')
        self._long.append(text.encode("utf-8", "replace"))
        del self._string[:cut]

    def _safe_cut(self) -> int:
        """A place in the string, near its end, that is between two characters."""
        assert self._string is not None
        n = len(self._string)
        for cut in range(n, max(_LONGEST_ESCAPES, n - _NEAR), -1):
            if self._string[cut - 1] < 0x80 and b"\\" not in self._string[cut - _LONGEST_ESCAPES : cut]:
                return cut
        cut, last = 0, b""
        for found in _CHARACTERS.finditer(self._string):
            if found.start() != cut:  # an escape of which the rest is to come
                break
            cut, last = found.end(), found[0]
        if re.fullmatch(_HIGH, last):  # its other half may be to come
            cut -= len(last)
        while cut and self._string[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        return cut - 1 if cut and self._string[cut - 1] >= 0xC0 else cut

    def _close(self) -> None:
        assert self._string is not None
        if self._long is None:
            self._rest += self._string
        else:
            self._put_aside(whole=True)
            name = uuid.uuid4().hex
            self._texts[name] = self._long.text()
            self._rest += name.encode()
        self._rest += b'"'
        self._string = self._long = None

    def read(self) -> Any:
        if self._string is not None:
            raise ValueError("a string does not end")
        return self._restored(json.loads(self._rest))

    def _restored(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._texts.get(value, value)
        if isinstance(value, dict):
            return {key: self._restored(inner) for key, inner in value.items()}
        return [self._restored(inner) for inner in value] if isinstance(value, list) else value
