"""Encoded documents on their way to their shards: files in reading order, which a preparation that goes on keeps.

A segment is some consecutive documents of a domain: their tokens one after the other, their lengths, and for those of
the validation split the bytes of text of each token. Its description is written last, so a segment is there as a whole
or not at all.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.files import write_whole

Unsigned = NDArray[np.unsignedinteger]
SEGMENT_BYTES = 64_000_000  # of tokens in a segment: what an interruption costs at most
_MOST_OPEN = 64  # files
_PARTS = ("tokens", "lengths", "bytes")


class Encoded(NamedTuple):
    """Some documents.

    Attributes:
        tokens: Of all of them, one after the other.
        lengths: Number of tokens of each, int64.
        bytes: Bytes of text of each token of those that are in the validation split, uint32.
    """

    tokens: Unsigned
    lengths: NDArray[np.int64]
    bytes: Unsigned


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
                if files[0].tell() >= SEGMENT_BYTES:
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

    def tokens(self, document: int) -> Unsigned:
        """A document's tokens."""
        return self._part("tokens", self._dtype, self._start, document)

    def bytes(self, document: int) -> Unsigned:
        """Bytes of text of each token of a document of the validation split."""
        return self._part("bytes", np.uint32, self._start_of_bytes, document)

    def _part(self, name: str, dtype: type[np.unsignedinteger], starts: NDArray[np.int64], document: int) -> Unsigned:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        if (number, name) not in self._open:
            if len(self._open) == _MOST_OPEN:
                self.close()
            self._open[number, name] = os.open(_path(self._folder, number, name), os.O_RDONLY)
        size = np.dtype(dtype).itemsize
        n_bytes, start = int(self.lengths[document]) * size, int(starts[document]) * size
        # Read, not mapped: mapped pages would count as memory of the process. One read gives at most 2 GB.
        read = bytearray()
        while len(read) < n_bytes:
            part = os.pread(self._open[number, name], n_bytes - len(read), start + len(read))
            if not part:
                raise OSError(f"{_path(self._folder, number, name)} is cut")
            if len(part) == n_bytes:
                return np.frombuffer(part, dtype)
            read += part
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
