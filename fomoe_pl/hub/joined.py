"""A checkpoint whose parts lie on several sites' disks, or behind URLs, as one folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fomoe_pl.checkpoint.disks import NEW, download, stored_name
from fomoe_pl.checkpoint.format import MANIFEST, hash_of, is_part, parse_manifest
from fomoe_pl.checkpoint.parts import lost
from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, RemotePath, is_url, location


@contextmanager
def joined(folders: str | Sequence[str], beside: Path | None = None) -> Iterator[Path]:
    """The folder of a checkpoint; of several, or of a URL, one that is there for as long as the context lasts.

    Local files are linked into it, others are copied.

    Args:
        folders: Parts of one checkpoint, or one whole one; local folders or URLs.
        beside: Where a folder may be made, under a name that begins with this one's; None is a temporary one.

    Raises:
        ConfigError: If they are of different checkpoints, or something of the model is in none of them.
    """
    folders = [folders] if isinstance(folders, str) else folders
    places = [location(folder) for folder in folders]
    if len(places) == 1 and isinstance(places[0], Path) and not _is_part(places[0]):
        yield places[0]
        return
    of_places = [_manifests(place) for place in places]
    common = [one for one in of_places[0] if all(one in others for others in of_places)]
    if not common:
        differing = next(
            place for place, others in zip(places, of_places, strict=True) if of_places[0][0] not in others
        )
        rule = f"is another checkpoint than {places[0]}"
        raise ConfigError("checkpoint", str(differing), rule, "give the same step's folder of every site")
    if beside is None:
        folder = Path(tempfile.mkdtemp(prefix="fomoe-parts-"))
    else:
        folder = beside.with_name(f"{beside.name}.parts")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        _join(places, common[0], folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def local_of(folders: str | Sequence[str]) -> Path | None:
    """The first folder that is on this machine: its run's settings and results lie beside it."""
    folders = [folders] if isinstance(folders, str) else folders
    return next((Path(folder) for folder in folders if not is_url(folder)), None)


def _join(places: Sequence[AnyPath], manifest: dict[str, Any], folder: Path) -> None:
    has = {name: [0] if _bring(name, about, places, folder) else [] for name, about in manifest["files"].items()}
    missing = [f"{name} is in none of them" for name, there in has.items() if not there]
    missing = lost(manifest, has) if is_part(manifest) else missing
    if missing:
        rule = f"nobody has {'; nor '.join(missing)}" if is_part(manifest) else "; ".join(missing)
        raise ConfigError("checkpoint", ", ".join(map(str, places)), rule, "give the folders of all sites")
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _is_part(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and is_part(parse_manifest(_read(folder / MANIFEST), folder))


def _read(path: AnyPath) -> str:
    with path.open("rb") as file:
        return file.read().decode(errors="replace")


def _manifests(place: AnyPath) -> list[dict[str, Any]]:
    """The manifest; behind a URL also the one that not all sites had when the run broke off."""
    found = []
    for name in (MANIFEST, NEW):
        try:
            found.append(parse_manifest(_read(place / name), Path(str(place))))
        except OSError as error:
            if name == MANIFEST:
                why = error
    if not found:
        raise ConfigError("checkpoint", str(place), f"its {MANIFEST} cannot be read ({why})",
                          "give folders that `fomoe fit` has written")  # fmt: skip
    return found


def _bring(name: str, about: dict[str, Any], places: Sequence[AnyPath], folder: Path) -> bool:
    """Link or copy a file from the first place that has it as it was written; whether there is one."""
    for source in (place / called for place in places for called in (name, stored_name(name, about))):
        target = folder / name
        with suppress(OSError):
            if isinstance(source, RemotePath):
                if download(source, target, about["sha256"]):
                    return True
            elif hash_of(source) == about["sha256"]:
                target.symlink_to(source.resolve())
                return True
    return False
