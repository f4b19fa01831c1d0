"""The checkpoint folder: one global model, independent of sites, overlap, placement and world size.

Layout of the folder:
    dense.safetensors             tensors that every site holds, written by site 0
    experts-00003.safetensors     the experts that site 3 writes: `<tensor name>#<expert id>`; each expert once
    <slot>-*.safetensors          the outer rule's state under the same names, such as momentum-dense.safetensors
    site-00003.pt                 what site 3 needs beside the global model to go on (inner moments, ledger)
    observers-00003.pt            what site 3's callbacks know of its own routing, if any do
    trainer.pt                    Lightning's own state (loops, schedulers, callbacks) and the position in the data
    manifest.json                 hashes of all files and its own, sizes; written last: a folder without is incomplete

Files are written into `<folder>.partial`, where each site leaves a seal when it is done; with all seals there it is
renamed. A folder that it replaces is kept as `<folder>.old` until then, so that at each moment one of the three is
complete.

Where each site has a disk of its own (`parts.py`), its folder has a part of the files and the manifest of all of them:
    dense.safetensors             on every site, the same bytes
    experts-00003-00002.safetensors   the experts that site 3 owns of those whose holders begin at site 2 of the ring,
                                  on as many sites as there are copies, the same bytes
    trainer-00003.pt              `trainer.pt` as site 3 has it; site 0's is still called `trainer.pt`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.files import sha256_of, write_whole

FORMAT = 4
MANIFEST = "manifest.json"
AVERAGE = "average-"  # before the names of the files of a moving average of the global model
_SEALS = "sealed-*.json"
_KINDS: dict[str, Any] = {
    "architecture": dict, "identity": dict, "n_sites": int, "rounds": int, "redraws": int, "optimizer_steps": int,
    "copies": int, "placement": list, "loads_at_draw": list,
}  # fmt: skip
# States of NumPy's random numbers are arrays.
_NUMPY: list[Any] = [np.array(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def partial(folder: Path) -> Path:
    """The folder's name while it is written."""
    return folder.with_name(folder.name + ".partial")


def replaced(folder: Path) -> Path:
    """The name of the folder that is being replaced."""
    return folder.with_name(folder.name + ".old")


def begin(folder: Path) -> None:
    """Make an empty partial folder (site 0, before the others write)."""
    left = complete_siblings(folder)
    if left and not folder.exists():  # the last writer was interrupted between two names
        left[0].rename(folder)
    if partial(folder).exists():
        shutil.rmtree(partial(folder))
    partial(folder).mkdir(parents=True)


def complete_siblings(folder: Path) -> list[Path]:
    """Complete checkpoints that an interrupted writer left under another name, the newest first."""
    return [path for path in (partial(folder), replaced(folder)) if (path / MANIFEST).is_file()]


def of_slot(slot: str) -> str:
    """What the names of files of the outer rule's state begin with."""
    return f"{slot}-"


def dense_name(prefix: str = "") -> str:
    """The file of dense tensors, which site 0 writes."""
    return f"{prefix}dense.safetensors"


def experts_name(site: int, prefix: str = "", first: int | None = None) -> str:
    """The file of the experts that a site owns; with `first` of those whose holders begin at that site of the ring."""
    return f"{prefix}experts-{site:05d}{'' if first is None else f'-{first:05d}'}.safetensors"


def has_tensors(name: str, prefix: str = "") -> bool:
    """Whether a file has tensors of this prefix: a slot may be called `dense` or `experts_v` too."""
    return re.fullmatch(rf"{re.escape(prefix)}(dense|experts-\d+(-\d+)?)\.safetensors", name) is not None


def site_name(site: int) -> str:
    """The file of what a site needs beside the global model."""
    return f"site-{site:05d}.pt"


def trainer_name(site: int = 0) -> str:
    """The file of Lightning's state; of a site that writes its own."""
    return f"trainer-{site:05d}.pt" if site else "trainer.pt"


def observers_name(site: int) -> str:
    """The file of what a site's callbacks know that others' do not."""
    return f"observers-{site:05d}.pt"


def write(folder: Path, name: str, content: Any) -> None:
    """Write one file of an unfinished checkpoint.

    Args:
        folder: The checkpoint's final name.
        name: Of the file; `.safetensors` holds tensors by name, anything else is a torch file.
        content: What is in it.
    """
    if name.endswith(".safetensors"):
        save_file({key: t.detach().cpu().contiguous() for key, t in content.items()}, partial(folder) / name)
    else:
        torch.save(content, partial(folder) / name)
        check_plain(partial(folder) / name)


def check_plain(path: Path) -> None:
    """Refuse a torch file in which there is more than plain values and tensors: `read_state` would not read it.

    Raises:
        ConfigError: Naming the classes.
    """
    with torch.serialization.safe_globals(_NUMPY):
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if found:
        rule = f"a checkpoint has room for plain values and tensors, and {path.name} would have {', '.join(found)}"
        hint = "let `state_dict` of your callback, or the arguments that you save, be numbers, text, lists and tensors"
        raise ConfigError("checkpoint", found[0], rule, hint)


def read_state(folder: Path, name: str, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is in a checkpoint's torch file, whose hash is compared first; nothing that it may name is run.

    Args:
        folder: Checkpoint folder.
        name: Of the file.
        manifest: The folder's own, where it has been read already.

    Raises:
        ConfigError: If the file is not the one that was written, or holds more than plain values and tensors.
    """
    path = verify(folder, name, manifest)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch finds on its way through a file that is none
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = next((line for line in said if "GLOBAL" in line or "Unsupported" in line), (said or [""])[0])
        rule = f"{name} holds something else than plain values and tensors, and is not read: {what}"
        raise ConfigError("ckpt_path", str(folder), rule, "use a checkpoint that `fomoe fit` has written") from None
    return state


def seal(folder: Path, site: int, names: Iterable[str]) -> None:
    """Bring a site's files to the disk, and note their sizes and hashes for the manifest (every writer, last)."""
    seals = {}
    for name in names:
        with (partial(folder) / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        seals[name] = {"bytes": (partial(folder) / name).stat().st_size, "sha256": digest}
    write_whole(partial(folder) / _SEALS.replace("*", f"{site:05d}"), json.dumps(seals))


def n_sealed(folder: Path) -> int:
    """How many sites have written all their files."""
    return len(list(partial(folder).glob(_SEALS)))


def sealed(folder: Path) -> dict[str, Any]:
    """Sizes and hashes of the files that have been sealed."""
    files: dict[str, Any] = {}
    for path in sorted(partial(folder).glob(_SEALS)):
        files |= json.loads(path.read_text())
    return files


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and give the folder its final name (site 0, after all have written)."""
    write_manifest(partial(folder), {**manifest, "files": sealed(folder)})
    put_in_place(folder)


def write_manifest(unfinished: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a folder whose other files are on the disk, and clear seals away."""
    path = unfinished / MANIFEST
    with path.with_suffix(".tmp").open("w") as file:
        json.dump(signed({"format": FORMAT, **manifest}), file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for seal_path in unfinished.glob(_SEALS):
        seal_path.unlink()
    path.with_suffix(".tmp").rename(path)


def put_in_place(folder: Path) -> None:
    """Give a partial folder with a manifest its final name."""
    if replaced(folder).exists():
        shutil.rmtree(replaced(folder))
    if folder.exists():
        folder.rename(replaced(folder))
    partial(folder).rename(folder)
    shutil.rmtree(replaced(folder), ignore_errors=True)  # what stays goes with the next checkpoint


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own SHA-256: no file's hash is to be trusted in one that was changed."""
    plain = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def give_up(folder: Path) -> None:
    """Leave the unfinished checkpoint and keep the complete ones (site 0)."""
    if not (partial(folder) / MANIFEST).is_file():
        shutil.rmtree(partial(folder), ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest, and look whether all files are there in full size.

    Raises:
        ConfigError: If the folder is no complete checkpoint of a known format.
    """
    path = folder / MANIFEST
    left = complete_siblings(folder)
    hint = "give a folder that `fomoe fit` has written, such as runs/quickstart/checkpoints/last.ckpt"
    if left:
        hint = f"saving was interrupted; {left[0]} is complete"
    if not path.is_file():
        raise ConfigError("ckpt_path", str(folder), f"is no complete checkpoint: it has no {MANIFEST}", hint)
    manifest = parse_manifest(_read_text(path), folder, hint)
    if is_part(manifest):
        return manifest
    for name, about in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != about["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not {about['bytes']}"
            raise ConfigError("ckpt_path", str(folder), f"is damaged: {name} {what}", "use another checkpoint")
    return manifest


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""  # which is no manifest either


def is_part(manifest: Mapping[str, Any]) -> bool:
    """Whether the files of a manifest are on disks of several sites, and a folder has a part of them."""
    return "copies" in manifest


def parse_manifest(text: str, folder: Path, hint: str = "use another checkpoint") -> dict[str, Any]:
    """Read a manifest, which may come from a damaged disk or from another site.

    Args:
        text: What is in the file.
        folder: Where it lies, for messages.
        hint: What to do about a damaged one.

    Raises:
        ConfigError: If it is none of a known format, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError("ckpt_path", str(folder), f"is damaged: {path} is no manifest", hint) from None
    if version != FORMAT:
        rule = f"has format {version!r}, this version reads {FORMAT}"
        raise ConfigError("ckpt_path", str(folder), rule, "use the version that wrote it")
    if manifest != signed(manifest):
        raise ConfigError("ckpt_path", str(folder), f"is damaged: {path} does not have its own hash", hint)
    if wrong := _wrong_in(manifest):
        raise ConfigError("ckpt_path", str(folder), f"is damaged: {wrong} in {path} is not what it should be", hint)
    return dict(manifest)


def _wrong_in(manifest: Mapping[str, Any]) -> str | None:
    """Which field has no sense; a hash of its own keeps nobody from writing one."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "files"
    if not isinstance(manifest.get("optimizer_steps"), int):
        return "optimizer_steps"
    for name, about in files.items():
        plain = bool(name) and Path(name).name == name and "\0" not in name and name != MANIFEST
        known = isinstance(about, dict) and isinstance(about.get("bytes"), int) and isinstance(about.get("sha256"), str)
        if not (plain and known):
            return repr(name)
    for key, kind in _KINDS.items():
        value = manifest.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return key
    return None


def is_complete(folder: Path, optimizer_steps: int) -> bool:
    """Whether the folder is a complete checkpoint, and that of this step."""
    try:
        return bool(read_manifest(folder)["optimizer_steps"] == optimizer_steps)
    except (ConfigError, OSError):  # another one, or it is being replaced
        return False


_HASHED: dict[tuple[int, ...], str] = {}
_SETTLED_NS = 10**9  # a file that has changed within this time may change again without another time of change


def remember(path: Path, sha256: str) -> None:
    """Let `hash_of` know a file that has been hashed while it was written."""
    about = path.stat()
    _HASHED[about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns] = sha256


def hash_of(path: Path) -> str:
    """SHA-256 of a file, which is not read again as long as it has the same size and time of change.

    Raises:
        OSError: It cannot be read.
    """
    about = path.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if key in _HASHED:
        return _HASHED[key]
    digest = sha256_of(path)
    if time.time_ns() - about.st_mtime_ns > _SETTLED_NS:
        _HASHED[key] = digest
    return digest


def verify(folder: Path, name: str, manifest: Mapping[str, Any] | None = None) -> Path:
    """The path of one of the folder's files, once its hash has been compared with the manifest's.

    Args:
        folder: Checkpoint folder.
        name: Of the file.
        manifest: The folder's own, where it has been read already.

    Raises:
        ConfigError: If the file is not the one that was written.
    """
    about = (manifest or read_manifest(folder))["files"].get(name)
    if about is None:
        raise ConfigError("ckpt_path", str(folder), f"has no {name}", "use another checkpoint")
    if not (folder / name).is_file():
        raise ConfigError("ckpt_path", str(folder), f"is damaged: {name} is missing", "use another checkpoint")
    if hash_of(folder / name) != about["sha256"]:
        raise ConfigError("ckpt_path", str(folder), f"is damaged: the hash of {name} differs from the manifest's",
                          "use another checkpoint")  # fmt: skip
    return folder / name


def newest(folder: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The checkpoint in a folder that is furthest in training, and what is wrong with those that cannot be used.

    Args:
        folder: Where checkpoints lie; it need not exist.
        hashes: Compare the hashes of all its files too, and take an older one where they differ.

    Returns:
        Path of the newest complete checkpoint (None without one), messages about incomplete ones.
    """
    found: list[tuple[int, float, Path]] = []
    wrong = []
    for path in sorted(folder.glob("*.ckpt*")):
        try:
            manifest = read_manifest(path)
        except ConfigError as error:
            wrong.append(str(error))
        else:
            found.append((manifest["optimizer_steps"], (path / MANIFEST).stat().st_mtime, path))
    for *_, path in sorted(found, reverse=True):
        try:
            for name in read_manifest(path)["files"] if hashes else ():
                verify(path, name)
        except ConfigError as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong


def check_architecture(
    folder: Path, saved: Mapping[str, Any], architecture: Mapping[str, Any], ignored: frozenset[str]
) -> None:
    """Refuse a checkpoint of another architecture.

    Args:
        folder: Checkpoint folder.
        saved: The settings in its manifest.
        architecture: The model's settings, plain values.
        ignored: Settings that do not change the weights.

    Raises:
        ConfigError: Listing every setting that differs.
    """
    keys = [k for k in architecture if k not in ignored and saved.get(k) != architecture[k]]
    if keys:
        differences = "; ".join(f"{k}: checkpoint {saved.get(k)!r}, configured {architecture[k]!r}" for k in keys)
        rule = f"was trained with another architecture ({differences})"
        raise ConfigError("ckpt_path", str(folder), rule, "use the model settings that it was trained with")


MAPPED_BYTES = 32 * 2**20
"""What of open files may be in memory before they are closed."""


class TensorFiles:
    """Safetensors files whose tensors are read one by one.

    The library maps files into memory, and what was read of one counts as this process's until it is closed: without
    closing them now and then, reading a model would take the room of one.
    """

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._mapped = 0

    def file(self, path: Path) -> Any:
        """A file as the library has it.

        Raises:
            OSError, SafetensorError: if it cannot be read.
        """
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def read(self, path: Path, key: str, row: int | None = None) -> Tensor:
        """One tensor of a file, or one row (axis 0) of it."""
        file = self.file(path)
        tensor: Tensor = file.get_tensor(key) if row is None else file.get_slice(key)[row]
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED_BYTES:  # what is given back keeps its own until it is let go
            self._open.clear()
            self._mapped = 0
        return tensor


class WeightFiles:
    """The tensors of a checkpoint by name, read one by one; a file's hash is compared when it is first read.

    Args:
        folder: Checkpoint folder.
        prefix: Of the files that are read, from `of_slot`, or `AVERAGE`; empty for the weights.

    Raises:
        ConfigError: If the folder is no complete checkpoint.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._where: dict[str, str] = {}
        self._files = TensorFiles()
        self._verified: dict[str, Path] = {}
        for name in self.manifest["files"]:
            if has_tensors(name, prefix) and (folder / name).is_file():
                try:
                    with safe_open(folder / name, framework="pt") as file:
                        self._where |= dict.fromkeys(file.keys(), name)
                except SafetensorError as error:
                    raise _no_tensors(folder, name, error) from None

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def read(self, key: str) -> Tensor:
        """One tensor, or `<name>#<expert>` one expert's row.

        Raises:
            ConfigError: If there is none, or its file is damaged.
        """
        if key not in self._where:
            hint = "give a complete checkpoint"
            if is_part(self.manifest):
                hint = "it is one site's part: name the folders of all sites, one after the other"
            raise ConfigError("ckpt_path", str(self.folder), f"has no tensor {key!r}", hint)
        name = self._where[key]
        if name not in self._verified:
            self._verified[name] = verify(self.folder, name, self.manifest)
        try:
            return self._files.read(self._verified[name], key)
        except SafetensorError as error:
            raise _no_tensors(self.folder, name, error) from None


def _no_tensors(folder: Path, name: str, error: Exception) -> ConfigError:
    return ConfigError("ckpt_path", str(folder), f"is damaged: {name} cannot be read ({error})",
                       "use another checkpoint")  # fmt: skip


def check_shapes(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other shapes than the model has: some would be taken, and spread.

    Raises:
        ConfigError: Naming the first one.
    """
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            rule = f"has {name} of shape {tuple(tensor.shape)}, and the model of shape {tuple(wanted[name].shape)}"
            raise ConfigError("ckpt_path", str(folder), rule, "use another checkpoint")


def read_weights(
    folder: Path,
    names: list[str],
    expert_layer: Mapping[str, int],
    residents: tuple[tuple[int, ...], ...],
    n_experts: int,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Read only what a site holds: dense tensors, and its residents' rows stacked in order.

    A tensor may be dense in the file and sparse here or the other way round (the router in ghost and partitioned
    mode); rows are then cut or stacked.

    Args:
        folder: Checkpoint folder.
        names: Tensors wanted.
        expert_layer: Name -> layer of the stacked expert tensors among them.
        residents: Per layer the expert ids that are wanted.
        n_experts: Experts of a layer, E.
        prefix: Of the files that are read, from `of_slot`, or `AVERAGE`; empty for the weights.

    Raises:
        ConfigError: If a tensor is missing, or a file that has one of them is damaged.
    """
    files = WeightFiles(folder, prefix)
    weights = {}
    for name in names:
        layer = expert_layer.get(name)
        wanted = range(n_experts) if layer is None else residents[layer]
        if name in files:
            tensor = files.read(name)
            weights[name] = tensor if layer is None else tensor[list(wanted)]
        else:
            weights[name] = torch.stack([files.read(f"{name}#{expert}") for expert in wanted])
    return weights
