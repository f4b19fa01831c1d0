"""Writing files of which a reader never meets half, and to streams that may be on a full disk."""

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from fomoe_pl.errors import ConfigError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class ForgivingStream:
    """A text stream that loses what a full disk does not take: a message is not worth a run.

    Args:
        stream: Standard output or error, perhaps redirected into a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def of(cls, stream: TextIO) -> TextIO:
        """A stream that takes the place of another."""
        return cast(TextIO, cls(stream))

    def write(self, text: str) -> int:
        """Write, unless the disk is full."""
        try:
            return self._stream.write(text)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return len(text)

    def flush(self) -> None:
        """Flush, unless the disk is full."""
        try:
            self._stream.flush()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)


def check_local(key: str, path: object) -> None:
    """Refuse a URL where a folder or file of this machine is meant: it would become a local folder of that name.

    Raises:
        ConfigError: For what begins as `s3://` does.
    """
    if isinstance(path, (str, Path)) and re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise ConfigError(key, str(path), "is a URL, and only local paths are served",
                          "name a folder of a mounted file system, and copy it from there")  # fmt: skip


SITE = "{site}"
"""What stands for a site's number in the name of a folder."""
OfSites = str | dict[int, str]
"""A folder, with `SITE` in its name one for each site; or a mapping from sites to folders."""


def of_site(key: str, folders: OfSites, site: int, example: str) -> str:
    """The folder of a site.

    Args:
        key: The setting.
        folders: Its value.
        site: 0..M-1.
        example: Of a folder, for the message.

    Raises:
        ConfigError: If a mapping does not name the site.
    """
    if isinstance(folders, str):
        return folders.replace(SITE, str(site))
    if site not in folders:
        raise ConfigError(key, folders, f"names no folder for site {site}", f"add a line: {site}: {example}")
    return folders[site]


def prepare(key: str, path: Path) -> None:
    """Make a file's folder, before the work is done that goes into it.

    Raises:
        ConfigError: If it cannot be made, or the path is a URL or a folder itself.
    """
    check_local(key, path)
    _make_parent(key, path)
    if path.is_dir():
        raise ConfigError(key, str(path), "is a folder", "name a file in it")


def prepare_folder(key: str, path: Path) -> None:
    """Make the folder that a new folder will lie in, before the work is done that goes into it.

    Raises:
        ConfigError: If the new one is there already, the one around it cannot be made, or the path is a URL.
    """
    check_local(key, path)
    if path.exists():
        raise ConfigError(key, str(path), "is there already", "give a new folder, or remove it")
    _make_parent(key, path)


def _make_parent(key: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"its folder cannot be made: {error.strerror}"
        raise ConfigError(key, str(path), rule, "name another place") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone(key: str, folder: Path) -> Iterator[None]:
    """Keep other processes of this kind from writing to a folder as long as the context lasts, however this one ends.

    Args:
        key: The setting that names the folder.
        folder: It need not be there, but the one around it.

    Raises:
        ConfigError: If another process is within the context for the same folder.
    """
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                rule = "is being written by another process"
                raise ConfigError(key, str(folder), rule, "wait until it has ended, or name another folder") from None
            try:
                same = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if not same:  # its last owner has removed it since
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def write_whole(path: Path, text: str) -> None:
    """Write a text under a temporary name in the same folder, and rename it when it is complete."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)
