"""Files behind URLs, read and written through fsspec: S3, GCS, HTTP and what else it has a protocol for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, ParamSpec, TypeVar, cast

from fomoe_pl.errors import ConfigError
from fomoe_pl.shipped import how_to_install

_P = ParamSpec("_P")
_R = TypeVar("_R")


def is_url(text: object) -> bool:
    """Whether a text names a file by protocol and address."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def location(text: str | Path | RemotePath) -> Path | RemotePath:
    """A local path, or what is behind a URL."""
    if isinstance(text, str):
        return RemotePath(text) if is_url(text) else Path(text)
    return text


def _reaching(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let whatever a protocol raises be an OSError that names the address."""

    @functools.wraps(call)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except (ConfigError, OSError):
            raise
        except ImportError as error:
            key = getattr(args[0], "key", "source")
            raise ConfigError(key, str(args[0]), f"it needs a library ({error})", _install(str(args[0]))) from None
        except Exception as error:  # each protocol has errors of its own
            raise OSError(f"{args[0]} cannot be reached ({type(error).__name__}: {error})") from error

    return wrapped


def _install(url: str) -> str:
    """How to get what a protocol needs."""
    if url.partition("://")[0].lower() in ("s3", "s3a", "gs", "gcs", "http", "https"):
        return how_to_install("remote")
    return "Install it: the message says which"


class RemotePath:
    """A file or folder behind a URL, with what is needed of `pathlib.Path`.

    Args:
        url: Its address, such as `s3://bucket/folder`.
        key: The setting that names it, for messages.
    """

    def __init__(self, url: str, key: str = "source") -> None:
        self.url, self.key = url.rstrip("/"), key

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except ValueError as error:
            raise self._unknown(error) from None
        return filesystem, path

    def _unknown(self, error: ValueError) -> ConfigError:
        return ConfigError(self.key, self.url, f"is no URL that fsspec knows ({error})",
                           "Use s3://, gs://, https:// or a local path")  # fmt: skip

    def __str__(self) -> str:
        """The URL."""
        return self.url

    def __repr__(self) -> str:
        """The URL."""
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same URL."""
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        """Of the URL."""
        return hash(self.url)

    def __lt__(self, other: RemotePath) -> bool:
        """The order of the URLs."""
        return self.url < other.url

    def __truediv__(self, name: str) -> RemotePath:
        """What lies below."""
        return RemotePath(f"{self.url}/{name}", self.key)

    @property
    def name(self) -> str:
        """The last part of the URL, without a query."""
        return PurePosixPath(self.url.split("?")[0]).name

    @_reaching
    def find_library(self) -> None:
        """Look for what the protocol needs, without reaching for the address.

        Raises:
            ConfigError: It is not installed, or fsspec does not know the protocol.
        """
        import fsspec

        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(self.url))
        except ValueError as error:
            raise self._unknown(error) from None

    @_reaching
    def is_dir(self) -> bool:
        """Whether it is a folder, as far as the protocol knows folders."""
        filesystem, path = self._place
        return bool(filesystem.isdir(path))

    @_reaching
    def is_file(self) -> bool:
        """Whether there is such a file."""
        filesystem, path = self._place
        return bool(filesystem.isfile(path))

    @_reaching
    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        filesystem, path = self._place
        return bool(filesystem.exists(path))

    @_reaching
    def size(self) -> int:
        """Bytes of the file."""
        filesystem, path = self._place
        return int(filesystem.size(path))

    @_reaching
    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file's bytes, read as they are needed."""
        filesystem, path = self._place
        return cast(IO[bytes], filesystem.open(path, mode))

    @_reaching
    def read_bytes(self) -> bytes:
        """The whole file."""
        filesystem, path = self._place
        return bytes(filesystem.cat_file(path))

    def read_text(self, encoding: str) -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    @_reaching
    def files(self) -> list[RemotePath]:
        """All files below a folder, or the file itself, in order."""
        filesystem, path = self._place
        if not filesystem.isdir(path):
            return [self]
        return sorted(RemotePath(filesystem.unstrip_protocol(found)) for found in filesystem.find(path))

    @_reaching
    def sizes(self) -> dict[str, int] | None:
        """Sizes of the files in the folder by name; None where the protocol lists no folders, as HTTP does not."""
        filesystem, path = self._place
        filesystem.invalidate_cache()  # others write there, too
        if "http" in filesystem.protocol:
            return None
        listed = filesystem.ls(path, detail=True)
        return {PurePosixPath(one["name"]).name: int(one["size"]) for one in listed if one["type"] == "file"}

    @_reaching
    def iterdir(self) -> list[RemotePath]:
        """What lies in the folder."""
        filesystem, path = self._place
        filesystem.invalidate_cache()
        return [RemotePath(filesystem.unstrip_protocol(found)) for found in filesystem.ls(path, detail=False)]

    # -- writing --------------------------------------------------------------------------------------------------

    @_reaching
    def write_bytes(self, content: bytes) -> None:
        """Write a small file; object stores have it as a whole or not at all."""
        filesystem, path = self._place
        self._write(lambda: filesystem.pipe_file(path, content))

    @_reaching
    def upload(self, source: Path) -> None:
        """Write a file that is on this disk, of any size."""
        filesystem, path = self._place
        self._write(lambda: filesystem.put_file(str(source), path))

    def _write(self, write: Callable[[], Any]) -> None:
        filesystem, path = self._place
        try:
            write()
        except FileNotFoundError:
            if not path.startswith("/"):  # a bucket is not to be made because its name was mistyped
                raise
            filesystem.makedirs(filesystem._parent(path), exist_ok=True)
            write()

    @_reaching
    def remove(self) -> None:
        """Remove a file, if it is there."""
        filesystem, path = self._place
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)


AnyPath = Path | RemotePath


def file_size(path: AnyPath) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size
