"""Which files a list of sources names, and which domain each of them belongs to."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, RemotePath, is_url, location

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
READABLE = f"{', '.join(FORMATS)}, each plain or with {', '.join(COMPRESSIONS)}"
_TOKENS, _HF = "tokens:", "hf:"
_NAMED = 50  # most files that one message names


@dataclass(frozen=True)
class Source:
    """One domain and the files that hold its documents.

    Attributes:
        domain: Name of the domain.
        files: Files in the order in which they are read.
        tokens: Whether they hold token ids instead of text.
    """

    domain: str
    files: tuple[AnyPath, ...]
    tokens: bool = False


class FileKind(NamedTuple):
    """What a file's name says: its stem, its format and its compression ("" for none), the last two in lower case."""

    stem: str
    format: str
    compression: str


def kind_of(path: AnyPath) -> FileKind | None:
    """What a file's name says of it, in any case of letters; None if nothing can read it."""
    stem, compression = os.path.splitext(path.name)
    if compression.lower() not in COMPRESSIONS:
        stem, compression = path.name, ""
    stem, form = os.path.splitext(stem)
    if form.lower() not in FORMATS:
        return None
    return FileKind(stem, form.lower(), compression.lower())


def find_sources(specs: Sequence[str], *, skip_unreadable: bool = False) -> tuple[list[Source], list[AnyPath]]:
    """Find the domains and files that a list of sources names. Linked files and folders are followed.

    Args:
        specs: PATH may be a URL; `tokens:PATH` has token ids, and `hf:PATH` is a Hugging Face data set folder.
            `NAME=PATH` is one domain: a file, or all files below a folder; a NAME that is given more than once has
            all its files. A bare `PATH` to a folder holds one domain per entry (a subfolder with all files below it,
            or a file), named after the entry; a bare `PATH` to a file is one domain named after the file.
        skip_unreadable: Leave out files below a folder that nothing here can read.

    Returns:
        The domains in the order in which they are first named, those of one folder by name; and what was left out.

    Raises:
        ConfigError: A path does not exist or holds nothing readable; a file would be left out; two of them would be one
            domain without having been named so; a file is there twice; a name cannot be part of a file name.
    """
    entries: list[_Entry] = []
    left_out: list[AnyPath] = []
    for spec in specs:
        name, kind, path = _parsed(spec)
        readable = 0
        for entry in [path] if name or kind or not path.is_dir() else _entries(path):
            own, others = _of_kind(kind, entry)
            left_out += others
            readable += len(own)
            if own:
                entries.append(_Entry(name, entry, own, kind == _TOKENS))
        if not readable:
            raise ConfigError("source", spec, "holds no readable file", f"Readable are {READABLE}")
    if left_out and not skip_unreadable:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        raise ConfigError(
            "source", " ".join(specs),
            f"would leave out {', '.join(map(str, left_out[:_NAMED]))}{more}",
            f"Readable are {READABLE}; convert or move the others, or leave them out by --skip_unreadable",
        )  # fmt: skip
    _refuse_doubles(path for entry in entries for path in entry.files)
    return _domains(entries), left_out


class _Entry(NamedTuple):
    """The NAME that was given ("" for none), the path that it or its entry has, and its files."""

    name: str
    path: AnyPath
    files: list[AnyPath]
    tokens: bool


def _domains(entries: Sequence[_Entry]) -> list[Source]:
    """The files of each domain; only a NAME that the user gave may have several entries."""
    found: dict[str, Source] = {}
    firsts: dict[str, tuple[str, _Entry]] = {}  # without regard to case, as file systems may be
    for entry in entries:
        domain = entry.name or _domain_of(entry.path)
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", domain):
            raise ConfigError(
                "source", domain, "a domain's name has up to 100 letters, digits, _, - and . (not first)",
                f"Name it yourself: NAME={entry.path}",
            )  # fmt: skip
        first, other = firsts.setdefault(domain.casefold(), (domain, entry))
        if other is not entry and not (first == domain and other.name and entry.name):
            raise ConfigError(
                "source", str(entry.path), f"would be the domain {domain!r}, as {other.path} is",
                f"Give each a name, or both the same if they are one domain: NAME={other.path} NAME={entry.path}",
            )  # fmt: skip
        if other.tokens != entry.tokens:
            raise ConfigError("source", str(entry.path), f"{domain!r} would have text and token files",
                              "Give each a name of its own")  # fmt: skip
        before = found[domain].files if domain in found else ()
        found[domain] = Source(domain, (*before, *entry.files), entry.tokens)
    return list(found.values())


def _parsed(spec: str) -> tuple[str, str, AnyPath]:
    """Name ("" for none), kind ("" for text files) and path; a path that exists as it stands may have = in it."""
    if os.path.exists(os.path.expanduser(spec)):
        return "", "", Path(os.path.expanduser(spec))
    name, separator, rest = spec.partition("=")
    if not separator or is_url(spec) or spec.startswith((_TOKENS, _HF)):  # a URL may have = in it, too
        name, rest = "", spec
    kind = next((kind for kind in (_TOKENS, _HF) if rest.startswith(kind)), "")
    rest = rest.removeprefix(kind)
    path = location(rest if is_url(rest) else os.path.expanduser(rest))
    bare = rest.rpartition("#")[0] if kind == _HF and "#" in rest else rest
    try:
        there = bool(bare) and location(bare if is_url(bare) else os.path.expanduser(bare)).exists()
    except OSError as error:
        raise ConfigError("source", spec, f"cannot be read ({error})",
                          "Check the address, the network and what the protocol needs to log in") from None  # fmt: skip
    if (separator and not name and not is_url(spec) and not kind) or not there:
        raise ConfigError("source", spec, f"{rest!r} does not exist", "Give NAME=PATH or the path of a folder")
    return name, kind, path


def _of_kind(kind: str, entry: AnyPath) -> tuple[list[AnyPath], list[AnyPath]]:
    """The files of an entry that are read, and those that are not."""
    if kind == _HF:
        return list(data_set_files(entry)), []
    if kind != _TOKENS:
        return _files(entry)
    if isinstance(entry, RemotePath):
        return list(entry.files()), []
    found = [path for path in sorted(entry.rglob("*")) if path.is_file()] if entry.is_dir() else [entry]
    return list(found), []


def data_set_files(place: AnyPath) -> list[Path]:
    """The Arrow or Parquet files of one split of a Hugging Face data set folder.

    Args:
        place: The folder, with `#SPLIT` behind it if it has several splits.

    Raises:
        ConfigError: It is no such folder, or which split is meant is not said.
    """
    if isinstance(place, RemotePath):
        raise ConfigError("source", f"hf:{place}", "is a URL, and hf: reads a folder on disk",
                          "Name its .parquet files without hf:")  # fmt: skip
    folder, _, split = (str(place), "", "") if place.is_dir() else str(place).rpartition("#")
    splits = _splits(Path(folder))
    if not splits:
        raise ConfigError("source", f"hf:{place}", "is no data set folder: it has no .arrow and no .parquet file",
                          "Save it by datasets' save_to_disk, or download its Parquet files")  # fmt: skip
    if split not in splits and (split or len(splits) > 1):
        choices = ", ".join(f"hf:{folder}#{name}" for name in splits)
        raise ConfigError("source", f"hf:{place}", "has several splits" if not split else "has no such split",
                          f"Name one: {choices}")  # fmt: skip
    return splits[split or next(iter(splits))]


def _splits(folder: Path) -> dict[str, list[Path]]:
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return {name: _saved(folder / name) for name in names}
        if (folder / "state.json").is_file():
            return {"train": _saved(folder)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("source", f"hf:{folder}", f"is damaged ({type(error).__name__}: {error})",
                          "Copy it again") from None  # fmt: skip
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        part = re.fullmatch(r"(.+?)-\d+-of-\d+.*", path.stem)
        name = (
            part[1] if part else path.parent.name if path.parent != folder and path.parent.name != "data" else "train"
        )
        found.setdefault(name, []).append(path)
    return found


def _saved(folder: Path) -> list[Path]:
    """Files of what save_to_disk has written, as it says itself."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ConfigError("source", f"hf:{folder}", "has an index over its rows",
                          "Save it again after flatten_indices()")  # fmt: skip
    return [folder / part["filename"] for part in state["_data_files"]]


def _domain_of(entry: AnyPath) -> str:
    kind = None if entry.is_dir() else kind_of(entry)
    return kind.stem if kind else entry.name.partition("#")[0].removesuffix(".bin")


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError("source", str(error.filename), f"cannot be read ({error.strerror})", "Check its permissions")


def _entries(folder: AnyPath) -> list[AnyPath]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _refuse(error)


def _files(entry: AnyPath) -> tuple[list[AnyPath], list[AnyPath]]:
    """The files at or below an entry in order: those that can be read, and the others."""
    if isinstance(entry, RemotePath):
        below = entry.files()
        return [path for path in below if kind_of(path)], [path for path in below if not kind_of(path)]
    found: list[AnyPath] = []
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


def _refuse_doubles(paths: Iterable[AnyPath]) -> None:
    """Refuse a file that is named twice, and one beside its own compressed form."""
    files: dict[object, AnyPath] = {}
    contents: dict[str, AnyPath] = {}
    for path in paths:
        kind = kind_of(path)  # None of a token file
        if isinstance(path, RemotePath):
            key: object = path.url
            whole = path.url
        else:
            status = path.stat()
            key, whole = (status.st_dev, status.st_ino), os.path.realpath(path.parent) + "/" + path.name
        content = whole[: len(whole) - len(kind.compression)] if kind else whole
        twin = files.setdefault(key, path)
        if twin is path:
            twin = contents.setdefault(content, path)
        if twin is not path:
            same = "is named twice" if twin == path else f"seems to be the same as {twin}"
            raise ConfigError(
                "source", str(path), f"{same}: its documents would be in the corpus twice",
                "Name it once; rename the file if it holds other documents",
            )  # fmt: skip
