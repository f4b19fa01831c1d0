"""Texts that are too long for memory: in a temporary file, of which slices are read."""

import codecs
import tempfile
from array import array
from bisect import bisect_right

LONGEST = 32_000_000
"""Bytes of a text from which on it is not held in memory as a whole."""
_BLOCK = 1 << 18


class LongText:
    """Characters that are read when they are needed; the file ends with the object.

    Attributes:
        n_bytes: Size of the text in UTF-8.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  as long as the object
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._first = array("q")  # of each block its first character, and where it begins in the file
        self._offset = array("q")
        self._length = 0
        self.n_bytes = 0

    def append(self, raw: bytes | bytearray, final: bool = False) -> None:
        """Add bytes at the end, which may end within a character.

        Raises:
            UnicodeDecodeError: They are no UTF-8.
        """
        for start in range(0, max(1, len(raw)), _BLOCK):
            part = bytes(raw[start : start + _BLOCK])
            text = self._decoder.decode(part, final and start + _BLOCK >= len(raw))
            if text:
                self._first.append(self._length)
                self._offset.append(self.n_bytes)
                self._length += len(text)
                self.n_bytes += self._file.write(text.encode())

    def __len__(self) -> int:
        """Number of characters."""
        return self._length

    def __getitem__(self, place: slice) -> str:
        """Consecutive characters."""
        start, stop, step = place.indices(self._length)
        if step != 1:
            raise ValueError("a long text is read in order")
        if start >= stop:
            return ""
        first = bisect_right(self._first, start) - 1
        last = bisect_right(self._first, stop - 1)
        end = self._offset[last] if last < len(self._offset) else self.n_bytes
        self._file.seek(self._offset[first])
        text = self._file.read(end - self._offset[first]).decode()
        return text[start - self._first[first] : stop - self._first[first]]


Text = str | LongText


class Collected:
    """Bytes that become a text: a string, or a long one where there are many."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._long: LongText | None = None

    def append(self, raw: bytes | bytearray) -> None:
        """Add bytes.

        Raises:
            UnicodeDecodeError: They are no UTF-8, as far as that shows yet.
        """
        if self._long is None and len(self._raw) + len(raw) <= LONGEST:
            self._raw += raw
            return
        if self._long is None:
            self._long = LongText()
            self._long.append(self._raw)
            self._raw.clear()
        self._long.append(raw)

    def text(self) -> Text:
        """The text of what was added since the last call.

        Raises:
            UnicodeDecodeError: It is no UTF-8.
        """
        raw, found = self._raw, self._long
        self._raw, self._long = bytearray(), None
        if found is None:
            return raw.decode("utf-8")
        found.append(b"", final=True)
        return found
