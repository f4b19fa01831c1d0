"""Encoded documents on their way to their shards: files in reading order, which a preparation that goes on keeps.

A segment is some consecutive documents of a domain: their tokens one after the other, their lengths, and for those of
the validation split the bytes of text of each token. Its description is written last, so a segment is there as a whole
or not at all.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.files import write_whole

Unsigned = NDArray[np.unsignedinteger]
SEGMENT_BYTES = 64_000_000  # of tokens in a segment: what an interruption costs at most
_MOST_OPEN = 64  # files
LONG_BYTES = 128_000_000  # of a document's tokens that are not held in memory as a whole
_PART_BYTES = 1 << 22
_PARTS = ("tokens", "lengths", "bytes")


class Encoded(NamedTuple):
    """Some documents.

    Attributes:
        tokens: Of all of them, one after the other.
        lengths: Number of tokens of each, int64; without any it is a part of a document of which more comes.
        bytes: Bytes of text of each token of those that are in the validation split, uint32.
    """

    tokens: Unsigned
    lengths: NDArray[np.int64]
    bytes: Unsigned


class LongArray:
    """Numbers on disk that are read part by part.

    Args:
        read: Gives a part of them, from their first and last + 1.
        length: How many there are.
        dtype: Their type.
    """

    def __init__(self, read: Callable[[int, int], Unsigned], length: int, dtype: Any) -> None:
        self._read, self._length = read, length
        self.dtype = np.dtype(dtype)
        self.nbytes = length * self.dtype.itemsize

    def __len__(self) -> int:
        """Number of numbers."""
        return self._length

    def parts(self) -> Iterator[Unsigned]:
        """All of them, in order."""
        step = _PART_BYTES // self.dtype.itemsize
        for start in range(0, self._length, step):
            yield self._read(start, min(start + step, self._length)).astype(self.dtype, copy=False)

    def max(self) -> Any:
        """The largest one."""
        return max(part.max() for part in self.parts())

    def astype(self, dtype: Any) -> "LongArray":
        """The same in another type."""
        return LongArray(self._read, self._length, dtype)


class SegmentWriter:
    """Writes documents into segments.

    Args:
        folder: Folder of the segments of one domain.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        found = list(_complete(folder))
        self._number = len(found)
        self.documents = sum(about["documents"] for about in found)
        """Documents that are in complete segments already."""

    def write(self, parts: Iterable[Encoded]) -> None:
        """Write what comes behind the documents that are there."""
        files: list[IO[bytes]] = []
        documents = 0
        try:
            for part in parts:
                files = files or [self._path(name).open("wb") for name in _PARTS]
                for file, values in zip(files, part, strict=True):
                    values.tofile(file)
                documents += len(part.lengths)
                if len(part.lengths) and files[0].tell() >= SEGMENT_BYTES:
                    self._close(files, documents)
                    files, documents = [], 0
            if files:
                self._close(files, documents)
                files = []
        finally:
            for file in files:
                file.close()

    def _close(self, files: list[IO[bytes]], documents: int) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        about = {"documents": documents, "sizes": {name: self._path(name).stat().st_size for name in _PARTS}}
        write_whole(self._path("json"), json.dumps(about))
        self._number += 1

    def _path(self, ending: str) -> Path:
        return _path(self._folder, self._number, ending)


def _path(folder: Path, number: int, ending: str) -> Path:
    return folder / f"{number:05d}.{ending}"


def _complete(folder: Path) -> Iterator[dict[str, Any]]:
    """What is said of each segment from the first on, up to the first that is not complete."""
    number = 0
    while (described := _path(folder, number, "json")).is_file():
        about = json.loads(described.read_text())
        paths = {name: _path(folder, number, name) for name in _PARTS}
        if not all(path.is_file() and path.stat().st_size == about["sizes"][name] for name, path in paths.items()):
            return
        yield about
        number += 1


class Segments:
    """Reads documents by their number, in any order.

    Args:
        folder: Folder of the segments.
        dtype: Type of the tokens.
        in_val: Whether each document is in the validation split.
    """

    def __init__(self, folder: Path, dtype: type[np.unsignedinteger], in_val: NDArray[np.bool_]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._open: dict[tuple[int, str], int] = {}
        lengths = [
            np.fromfile(_path(folder, number, "lengths"), np.int64) for number, _ in enumerate(_complete(folder))
        ]
        self._first = np.cumsum([0, *map(len, lengths)])
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        """Tokens of each document."""
        self._start = _starts(self.lengths, self._first)
        self._start_of_bytes = _starts(self.lengths * in_val[: len(self.lengths)], self._first)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def tokens(self, document: int) -> Unsigned | LongArray:
        """A document's tokens."""
        return self._part("tokens", self._dtype, self._start, document)

    def bytes(self, document: int) -> Unsigned | LongArray:
        """Bytes of text of each token of a document of the validation split."""
        return self._part("bytes", np.uint32, self._start_of_bytes, document)

    def _part(
        self, name: str, dtype: type[np.unsignedinteger], starts: NDArray[np.int64], document: int
    ) -> Unsigned | LongArray:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        length, offset = int(self.lengths[document]), int(starts[document])

        def read(start: int, stop: int) -> Unsigned:
            return self._read(number, name, np.dtype(dtype), offset + start, stop - start)

        if length * np.dtype(dtype).itemsize > LONG_BYTES:
            return LongArray(read, length, dtype)
        return read(0, length)

    def _read(self, number: int, name: str, dtype: np.dtype[Any], start: int, length: int) -> Unsigned:
        if (number, name) not in self._open:
            if len(self._open) == _MOST_OPEN:
                self.close()
            self._open[number, name] = os.open(_path(self._folder, number, name), os.O_RDONLY)
        # Read, not mapped: mapped pages would count as memory of the process.
        n_bytes = length * dtype.itemsize
        read = os.pread(self._open[number, name], n_bytes, start * dtype.itemsize)
        if len(read) != n_bytes:
            raise OSError(f"{_path(self._folder, number, name)} is cut")
        return np.frombuffer(read, dtype)

    def close(self) -> None:
        """Close the files that are open; they are opened again when they are needed."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _starts(lengths: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each document begins in its segment."""
    starts = np.cumsum(lengths) - lengths
    for begin, end in pairwise(first):
        if begin < end:
            starts[begin:end] -= starts[begin]
    return starts
