"""A checkpoint whose parts lie on several sites' disks, or behind URLs, as one folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fomoe_pl.checkpoint.format import MANIFEST, is_part, parse_manifest
from fomoe_pl.checkpoint.parts import lost
from fomoe_pl.data.remote import AnyPath, RemotePath, location
from fomoe_pl.errors import ConfigError

_CHUNK = 2**20


@contextmanager
def joined(folders: Sequence[str], beside: Path) -> Iterator[Path]:
    """The folder of a checkpoint; of several, or of a URL, one that is there for as long as the context lasts.

    Local files are linked into it, others are copied.

    Args:
        folders: Parts of one checkpoint, or one whole one; local folders or URLs.
        beside: Where a folder may be made, under a name that begins with this one's.

    Raises:
        ConfigError: If they are of different checkpoints, or something of the model is in none of them.
    """
    if len(folders) == 1 and not isinstance(location(folders[0]), RemotePath):
        yield Path(folders[0])
        return
    places = [location(folder) for folder in folders]
    manifests = [_manifest(place) for place in places]
    differing = [str(place) for place, other in zip(places, manifests, strict=True) if other != manifests[0]]
    if differing:
        rule = f"is another checkpoint than {places[0]}"
        raise ConfigError("checkpoint", differing[0], rule, "give the same step's folder of every site")
    manifest, folder = manifests[0], beside.with_name(f"{beside.name}.parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        has = {name: [0] if _bring(name, about, places, folder) else [] for name, about in manifest["files"].items()}
        missing = [f"{name} is in none of them" for name, there in has.items() if not there]
        missing = lost(manifest, has) if is_part(manifest) else missing
        if missing:
            rule = f"nobody has {'; nor '.join(missing)}" if is_part(manifest) else "; ".join(missing)
            raise ConfigError("checkpoint", ", ".join(map(str, places)), rule, "give the folders of all sites")
        (folder / MANIFEST).write_bytes(_read(places[0] / MANIFEST))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: AnyPath) -> bytes:
    with path.open("rb") as file:
        return bytes(file.read())


def _manifest(place: AnyPath) -> dict[str, Any]:
    try:
        text = _read(place / MANIFEST).decode(errors="replace")
    except OSError as error:
        raise ConfigError("checkpoint", str(place), f"its {MANIFEST} cannot be read ({error})",
                          "give folders that `fomoe fit` has written") from None  # fmt: skip
    return parse_manifest(text, Path(str(place)))


def _bring(name: str, about: dict[str, Any], places: Sequence[AnyPath], folder: Path) -> bool:
    """Link or copy a file from the first place that has it as it was written; whether there is one."""
    for place in places:
        source, target, digest = place / name, folder / name, hashlib.sha256()
        try:
            with source.open("rb") as file, open("/dev/null" if isinstance(source, Path) else target, "wb") as copy:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
        except OSError:
            continue
        if digest.hexdigest() == about["sha256"]:
            if isinstance(source, Path):
                target.symlink_to(source.resolve())
            return True
    (folder / name).unlink(missing_ok=True)
    return False
