"""Files of unpacked packages."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path


def below(root: Path, *suffixes: str) -> Iterator[Path]:
    """Files below a folder whose path ends so, without symbolic links, in a fixed order; none if there is no folder."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if str(path).endswith(suffixes) and not path.is_symlink():
                yield path


def content(path: Path) -> bytes:
    """A file's bytes, unpacked where it is gzip, whatever its name says."""
    raw = path.read_bytes()
    return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
