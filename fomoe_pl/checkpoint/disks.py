"""Where a site without a common file system keeps its parts of checkpoints: a folder of its own, or a URL.

Behind a URL nothing can be renamed. There a checkpoint is

    last.ckpt/3f9a01c2b4d5e6f7-dense.safetensors   a file, with the beginning of its SHA-256 before its name
    last.ckpt/manifest.json                        written when all sites have the one below
    last.ckpt/manifest.new.json                    the same, written when all sites have written their parts

Files of another content have another name, so the checkpoint of this name that is replaced stays whole until the
manifest is another; what no manifest lists is removed then.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint import parts
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import SITE, OfSites
from fomoe_pl.remote import AnyPath, RemotePath, is_url

NEW = "manifest.new.json"
"""The manifest behind a URL until all sites have it."""
_CHUNK = 2**20


def stored_name(name: str, about: Mapping[str, Any]) -> str:
    """What a file of a checkpoint is called behind a URL.

    Args:
        name: Its own name.
        about: What the manifest says of it.
    """
    return f"{about['sha256'][:16]}-{name}"


def check_roots(roots: OfSites) -> None:
    """Refuse URLs at which no checkpoints can be kept; of folders nothing is known before the sites are there.

    Args:
        roots: The setting `checkpoint_root`.

    Raises:
        ConfigError: If two sites would write to one URL, it has an unknown protocol or one of which the library is not
            installed, or it is one of HTTP.
    """
    if isinstance(roots, str):
        urls = [roots] if is_url(roots) else []
        shared = [url for url in urls if SITE not in url]
    else:
        urls = [url.rstrip("/") for url in roots.values() if is_url(url)]
        shared = [url for url in urls if urls.count(url) > 1]
    if shared:
        raise ConfigError("checkpoint_root", shared[0], "is one place for several sites",
                          f"put {SITE} into it: {shared[0].rstrip('/')}/{SITE}")  # fmt: skip
    for url in urls:
        if url.lower().startswith(("http:", "https:")):
            raise ConfigError("checkpoint_root", url, "HTTP only reads, and lists no folders",
                              f"name a bucket, such as s3://bucket/run/{SITE}")  # fmt: skip
        RemotePath(url, "checkpoint_root").find_library()


def download(source: AnyPath, target: Path, sha256: str) -> bool:
    """Copy a file, under a temporary name until its hash is right.

    Args:
        source: Where it is read.
        target: The file that is made.
        sha256: Of its content.

    Returns:
        Whether its hash is right; if not there is no copy.

    Raises:
        OSError: It cannot be read, or not written.
    """
    unfinished, digest = target.with_name(f"{target.name}.fetched"), hashlib.sha256()
    try:
        with source.open("rb") as file, unfinished.open("wb") as copy:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        if digest.hexdigest() != sha256:
            return False
        unfinished.rename(target)
        files.remember(target, sha256)
        return True
    finally:
        unfinished.unlink(missing_ok=True)


class Disk:
    """A folder of this site's own.

    Args:
        folder: In which its checkpoints lie, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> Path:
        """Where a checkpoint is written and read on this machine."""
        return self.folder / name

    def called(self, name: str) -> AnyPath:
        """What a checkpoint is called in messages."""
        return self.folder / name

    def trouble(self) -> str:
        """Why nothing can be written here; empty if something can be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return ""
        except OSError as error:
            return f"{self.folder} cannot be written ({error.strerror or error})"

    def found(self, name: str | None) -> tuple[list[parts.Found], list[str]]:
        """As `parts.on_disk`."""
        return parts.on_disk(self.folder, name)

    def held(self, name: str, manifest: Mapping[str, Any]) -> parts.Held:
        """As `parts.held`."""
        return parts.held(self.place(name), manifest)

    def upload(self, name: str, sealed: Mapping[str, Any]) -> None:
        """Bring what is written in the partial folder where it stays.

        Args:
            name: Of the checkpoint.
            sealed: Sizes and hashes of the files.

        Raises:
            OSError: It cannot be written; as of the methods below.
        """

    def write_manifest(self, name: str) -> None:
        """The same with the manifest, which does not make the checkpoint complete yet."""

    def complete(self, name: str) -> None:
        """Make a checkpoint complete whose folder has its name here."""

    def give_up(self, name: str) -> None:
        """Remove what was written of a checkpoint that will not be completed."""

    def adopt(self, name: str, fetched: Collection[str]) -> None:
        """Keep a checkpoint from which the run goes on, and whose folder has its name here.

        Args:
            name: Of the checkpoint.
            fetched: Files that other sites have sent.
        """

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        if self.place(name).is_dir():
            shutil.rmtree(self.place(name))

    def clear(self) -> None:
        """Remove what lies on this machine for a while; no checkpoint is being read or written."""


class UrlDisk(Disk):
    """Behind a URL; what is written and read lies in a temporary folder of this machine in between.

    Args:
        url: Below which its checkpoints lie, by name.
    """

    def __init__(self, url: str) -> None:
        self.url = RemotePath(url, "checkpoint_root")
        self._owed: dict[str, bytes] = {}  # manifests of complete checkpoints that could not be put in place

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        """In `TMPDIR`."""
        return Path(tempfile.mkdtemp(prefix="fomoe-checkpoints-"))

    def called(self, name: str) -> RemotePath:
        """Its URL."""
        return self.url / name

    def trouble(self) -> str:
        """Write and remove a small file."""
        probe = self.url / f"fomoe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"may be written\n")
            probe.remove()
        except (OSError, ConfigError) as error:
            return f"{self.url} cannot be written ({error})"
        return ""

    def found(self, name: str | None) -> tuple[list[parts.Found], list[str]]:
        """Those of which there is a manifest, complete or not."""
        found, wrong = [], []
        try:
            names = [name] if name is not None else self._names()
        except OSError as error:
            return [], [str(error)]
        for one in names:
            for file in (files.MANIFEST, NEW):
                path = self.url / one / file
                try:
                    manifest = files.parse_manifest(path.read_text("utf-8"), Path(one))
                except FileNotFoundError:
                    continue
                except (ConfigError, OSError, UnicodeDecodeError) as error:
                    wrong.append(f"{path}: {error}")
                    continue
                if files.is_part(manifest):
                    found.append(parts.Found(one, manifest))
        return parts.newest(found), wrong

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.url.iterdir() if path.name.endswith(".ckpt"))
        except FileNotFoundError:
            return []

    def held(self, name: str, manifest: Mapping[str, Any]) -> parts.Held:
        """Fetch what is there into the partial folder."""
        folder = files.partial(self.place(name))
        shutil.rmtree(folder, ignore_errors=True)
        names = set()
        with suppress(OSError):
            folder.mkdir()
            there = self._sizes(name)
            for file, about in manifest["files"].items():
                source = self.url / name / stored_name(file, about)
                if there.get(source.name) == about["bytes"] and download(source, folder / file, about["sha256"]):
                    names.add(file)
        return parts.Held(folder, frozenset(names))

    def _sizes(self, name: str) -> dict[str, int]:
        try:
            return (self.url / name).sizes() or {}
        except FileNotFoundError:
            return {}

    def upload(self, name: str, sealed: Mapping[str, Any]) -> None:
        """Each file under a name that another content would not have."""
        self._put_in_place(name)
        there = self._sizes(name)
        for file, about in sealed.items():
            target = self.url / name / stored_name(file, about)
            if there.get(target.name) != about["bytes"]:  # else a manifest may list it: it is left alone
                target.upload(files.partial(self.place(name)) / file)

    def write_manifest(self, name: str) -> None:
        """Under a name that a complete checkpoint does not have."""
        (self.url / name / NEW).write_bytes((files.partial(self.place(name)) / files.MANIFEST).read_bytes())

    def complete(self, name: str) -> None:
        """Put the manifest in place; then remove what it does not list, and what lies here."""
        folder = self.place(name)
        self._owed[name] = manifest = (folder / files.MANIFEST).read_bytes()
        shutil.rmtree(folder, ignore_errors=True)
        self._put_in_place(name)
        with suppress(OSError):  # what stays goes with the next checkpoint
            self._keep_only(name, files.parse_manifest(manifest.decode(), folder))

    def _put_in_place(self, name: str) -> None:
        """Write a manifest that all sites have."""
        if name in self._owed:
            (self.url / name / files.MANIFEST).write_bytes(self._owed[name])
            del self._owed[name]

    def give_up(self, name: str) -> None:
        """Keep what the complete checkpoint of this name lists."""
        if name in self._owed:
            return
        with suppress(OSError, ConfigError, UnicodeDecodeError):
            try:
                text = (self.url / name / files.MANIFEST).read_text("utf-8")
            except FileNotFoundError:
                self._keep_only(name, {"files": {}})
            else:
                self._keep_only(name, files.parse_manifest(text, Path(name)))

    def adopt(self, name: str, fetched: Collection[str]) -> None:
        """Let it be complete here, too, where only other sites had come so far."""
        folder = self.place(name)
        manifest = (folder / files.MANIFEST).read_bytes()
        listed = files.parse_manifest(manifest.decode(), folder)
        for file in fetched:
            (self.url / name / stored_name(file, listed["files"][file])).upload(folder / file)
        (self.url / name / files.MANIFEST).write_bytes(manifest)
        with suppress(OSError):
            self._keep_only(name, listed)

    def _keep_only(self, name: str, manifest: Mapping[str, Any]) -> None:
        (self.url / name / NEW).remove()
        listed = {stored_name(file, about) for file, about in manifest["files"].items()}
        for file in self._sizes(name).keys() - listed - {files.MANIFEST}:
            (self.url / name / file).remove()

    def remove(self, name: str) -> None:
        """The manifest first: what is half removed is no checkpoint."""
        (self.url / name / files.MANIFEST).remove()
        self._keep_only(name, {"files": {}})

    def clear(self) -> None:
        """Remove the temporary folder, of which the next one that is needed has another name."""
        if "folder" in vars(self):
            shutil.rmtree(self.folder, ignore_errors=True)
            del self.folder
