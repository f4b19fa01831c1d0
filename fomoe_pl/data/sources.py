"""Which files a list of sources names, and which domain each of them belongs to."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from fomoe_pl.errors import ConfigError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
READABLE = f"{', '.join(FORMATS)}, each plain or with {', '.join(COMPRESSIONS)}"
_NAMED = 50  # most files that one message names


@dataclass(frozen=True)
class Source:
    """One domain and the files that hold its documents.

    Attributes:
        domain: Name of the domain.
        files: Files in the order in which they are read.
    """

    domain: str
    files: tuple[Path, ...]


class FileKind(NamedTuple):
    """What a file's name says: its stem, its format and its compression ("" for none), the last two in lower case."""

    stem: str
    format: str
    compression: str


def kind_of(path: Path) -> FileKind | None:
    """What a file's name says of it, in any case of letters; None if nothing can read it."""
    stem, compression = os.path.splitext(path.name)
    if compression.lower() not in COMPRESSIONS:
        stem, compression = path.name, ""
    stem, form = os.path.splitext(stem)
    if form.lower() not in FORMATS:
        return None
    return FileKind(stem, form.lower(), compression.lower())


def find_sources(specs: Sequence[str], *, skip_unreadable: bool = False) -> tuple[list[Source], list[Path]]:
    """Find the domains and files that a list of sources names. Linked files and folders are followed.

    Args:
        specs: ``NAME=PATH`` is one domain: a file, or all files below a folder; a NAME that is given more than once has
            all its files. A bare ``PATH`` to a folder holds one domain per entry (a subfolder with all files below it,
            or a file), named after the entry; a bare ``PATH`` to a file is one domain named after the file.
        skip_unreadable: Leave out files below a folder that nothing here can read.

    Returns:
        The domains in the order in which they are first named, those of one folder by name; and what was left out.

    Raises:
        ConfigError: A path does not exist or holds nothing readable; a file would be left out; two of them would be one
            domain without having been named so; a file is there twice; a name cannot be part of a file name.
    """
    entries: list[tuple[str, Path, list[Path]]] = []  # the NAME given, the path that it or its entry has, its files
    left_out: list[Path] = []
    for spec in specs:
        name, path = _parsed(spec)
        readable = 0
        for entry in [path] if name or not path.is_dir() else _entries(path):
            own, others = _files(entry)
            left_out += others
            readable += len(own)
            if own:
                entries.append((name, entry, own))
        if not readable:
            raise ConfigError("source", spec, "holds no readable file", f"Readable are {READABLE}")
    if left_out and not skip_unreadable:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        raise ConfigError(
            "source", " ".join(specs),
            f"would leave out {', '.join(map(str, left_out[:_NAMED]))}{more}",
            f"Readable are {READABLE}; convert or move the others, or leave them out by --skip_unreadable",
        )  # fmt: skip
    _refuse_doubles(path for _, _, own in entries for path in own)
    return [Source(domain, files) for domain, files in _domains(entries).items()], left_out


def _domains(entries: Sequence[tuple[str, Path, list[Path]]]) -> dict[str, tuple[Path, ...]]:
    """The files of each domain; only a NAME that the user gave may have several entries."""
    files: dict[str, tuple[Path, ...]] = {}
    firsts: dict[str, tuple[str, str, Path]] = {}  # without regard to case, as file systems may be
    for name, entry, own in entries:
        domain = name or _domain_of(entry)
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", domain):
            raise ConfigError(
                "source", domain, "a domain's name has up to 100 letters, digits, _, - and . (not first)",
                f"Name it yourself: NAME={entry}",
            )  # fmt: skip
        first, given, path = firsts.setdefault(domain.casefold(), (domain, name, entry))
        if path is not entry and not (first == domain and given and name):
            raise ConfigError(
                "source", str(entry), f"would be the domain {domain!r}, as {path} is",
                f"Give each a name, or both the same if they are one domain: NAME={path} NAME={entry}",
            )  # fmt: skip
        files[domain] = (*files.get(domain, ()), *own)
    return files


def _parsed(spec: str) -> tuple[str, Path]:
    """Name ("" for none) and path; a path that exists as it stands may have = in it."""
    if os.path.exists(os.path.expanduser(spec)):
        return "", Path(os.path.expanduser(spec))
    name, separator, location = spec.partition("=")
    location = os.path.expanduser(location if separator else spec)
    if (separator and not name) or not location or not os.path.exists(location):
        raise ConfigError("source", spec, f"{location!r} does not exist", "Give NAME=PATH or the path of a folder")
    return name, Path(location)


def _domain_of(entry: Path) -> str:
    kind = None if entry.is_dir() else kind_of(entry)
    return kind.stem if kind else entry.name


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError("source", str(error.filename), f"cannot be read ({error.strerror})", "Check its permissions")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _refuse(error)


def _files(entry: Path) -> tuple[list[Path], list[Path]]:
    """The files at or below an entry in order: those that can be read, and the others."""
    found = []
    if entry.is_dir():
        seen = {os.path.realpath(entry)}
        for folder, subfolders, names in os.walk(entry, onerror=_refuse, followlinks=True):
            # A link to a folder that is read anyway adds nothing, and one to a folder above would never end.
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
            subfolders[:] = [name for name, target in real.items() if target not in seen]
            seen.update(real.values())
            found += [Path(folder, name) for name in names]
    else:
        found.append(entry)
    found.sort()
    kinds = [path.is_file() and kind_of(path) is not None for path in found]
    readable = [path for path, known in zip(found, kinds, strict=True) if known]
    return readable, [path for path, known in zip(found, kinds, strict=True) if not known]


def _refuse_doubles(paths: Iterable[Path]) -> None:
    """Refuse a file that is named twice, and one beside its own compressed form."""
    files: dict[tuple[int, int], Path] = {}
    contents: dict[str, Path] = {}
    for path in paths:
        status, kind = path.stat(), kind_of(path)
        assert kind is not None
        packed = len(kind.compression)
        content = os.path.realpath(path.parent) + "/" + (path.name[:-packed] if packed else path.name)
        twin = files.setdefault((status.st_dev, status.st_ino), path)
        if twin is path:
            twin = contents.setdefault(content, path)
        if twin is not path:
            same = "is named twice" if twin == path else f"seems to be the same as {twin}"
            raise ConfigError(
                "source", str(path), f"{same}: its documents would be in the corpus twice",
                "Name it once; rename the file if it holds other documents",
            )  # fmt: skip
