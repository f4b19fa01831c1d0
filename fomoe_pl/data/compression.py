"""Reading compressed files, of which one that is cut is never taken for a whole one."""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from typing import IO, Any, cast

from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, RemotePath, file_size

_CHUNK = 1 << 20  # bytes buffered at a time
_PACKED_CHUNK = 1 << 16  # compressed bytes read at a time: they may become a thousand times as many


def open_plain(path: AnyPath, compression: str) -> IO[bytes]:
    """Open a file's content, uncompressed.

    Args:
        path: The file.
        compression: One of COMPRESSIONS, or "".

    Raises:
        ConfigError: It needs a library that is not installed.
        EOFError: It is empty. Reading raises one where it is cut.
    """
    if compression and not file_size(path):
        raise EOFError("it has no bytes, which no compression makes")  # gzip's own reader takes it for a whole file
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(_opened(path), "rb"))
    if compression == ".bz2":
        return bz2.open(_opened(path), "rb")
    if compression == ".xz":
        return cast(IO[bytes], lzma.open(_opened(path), "rb"))
    if compression == ".zst":
        try:
            import zstandard  # noqa: F401
        except ImportError:
            raise missing_library(path, "zstandard") from None
        return io.BufferedReader(_Chunks(_zstd_chunks(path)), _CHUNK)
    return _peekable(path) if isinstance(path, RemotePath) else path.open("rb")


def _peekable(path: RemotePath) -> IO[bytes]:
    file: Any = path.open("rb")
    return file if hasattr(file, "peek") else cast(IO[bytes], io.BufferedReader(file, _CHUNK))


def _opened(path: AnyPath) -> Any:
    """What the standard library's readers take."""
    return path.open("rb") if isinstance(path, RemotePath) else path


def _zstd_chunks(path: AnyPath) -> Iterator[bytes]:
    """The content of all frames; zstandard's own file reader takes a cut frame for a whole one."""
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
    with path.open("rb") as file:
        packed = file.read(_PACKED_CHUNK)
        while packed:
            frame = reader.decompressobj()
            while not frame.eof:
                if not packed:
                    raise EOFError("it ends within a frame")
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else file.read(_PACKED_CHUNK)
            packed = packed or file.read(_PACKED_CHUNK)


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = next(self._chunks)
            except StopIteration:
                return 0
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def missing_library(path: AnyPath, library: str) -> ConfigError:
    """The error for a file that a library is missing for."""
    return ConfigError("source", str(path), f"reading it needs {library}", f"Run: pip install {library}")
