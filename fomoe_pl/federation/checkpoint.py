"""The checkpoint folder: one global model, independent of sites, overlap, placement and world size.

Layout of the folder:
    dense.safetensors             tensors that every site holds, written by site 0
    experts-00003.safetensors     the experts that site 3 writes: `<tensor name>#<expert id>`; each expert once
    site-00003.pt                 what site 3 needs beside the global model to go on (inner and outer moments, ledger)
    trainer.pt                    Lightning's own state (loops, schedulers, callbacks)
    manifest.json                 written last; a folder without it is incomplete

Files are written into `<folder>.partial`, which is renamed when every site is done. A folder that it replaces is kept
as `<folder>.old` until then, so that at each moment one of the three is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe_pl.errors import ConfigError

FORMAT = 2


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
    return [path for path in (partial(folder), replaced(folder)) if (path / "manifest.json").is_file()]


def write_dense(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the dense tensors (site 0)."""
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial(folder) / "dense.safetensors")


def write_experts(folder: Path, site: int, rows: Mapping[tuple[str, int], Tensor]) -> None:
    """Write the experts that this site owns: (tensor name, expert id) -> its row."""
    flat = {f"{name}#{expert}": row.detach().cpu().contiguous() for (name, expert), row in rows.items()}
    save_file(flat, partial(folder) / f"experts-{site:05d}.safetensors")


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write a torch file beside the weights."""
    torch.save(state, partial(folder) / f"{name}.pt")


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and give the folder its final name (site 0, after all have written)."""
    path = partial(folder) / "manifest.json"
    path.with_suffix(".tmp").write_text(json.dumps({"format": FORMAT, **manifest}, indent=1, sort_keys=True))
    path.with_suffix(".tmp").rename(path)
    if replaced(folder).exists():
        shutil.rmtree(replaced(folder))
    if folder.exists():
        folder.rename(replaced(folder))
    partial(folder).rename(folder)
    shutil.rmtree(replaced(folder), ignore_errors=True)  # what stays goes with the next checkpoint


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest.

    Raises:
        ConfigError: if the folder is no complete checkpoint of a known format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        left = complete_siblings(folder)
        hint = "give a folder that `fomoe fit` has written, such as runs/quickstart/checkpoints/last.ckpt"
        if left:
            hint = f"saving was interrupted; {left[0]} is complete"
        raise ConfigError("ckpt_path", str(folder), "is no complete checkpoint: it has no manifest.json", hint)
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
        rule = f"has format {manifest['format']}, this version reads {FORMAT}"
        raise ConfigError("ckpt_path", str(folder), rule, "use the version that wrote it")
    return manifest


def check_architecture(
    folder: Path, saved: Mapping[str, Any], architecture: Mapping[str, Any], ignored: frozenset[str]
) -> None:
    """Refuse a checkpoint of another architecture.

    Args:
        folder: checkpoint folder.
        saved: the settings in its manifest.
        architecture: the model's settings, plain values.
        ignored: settings that do not change the weights.

    Raises:
        ConfigError: listing every setting that differs.
    """
    keys = [k for k in architecture if k not in ignored and saved.get(k) != architecture[k]]
    if keys:
        differences = "; ".join(f"{k}: checkpoint {saved.get(k)!r}, configured {architecture[k]!r}" for k in keys)
        rule = f"was trained with another architecture ({differences})"
        raise ConfigError("ckpt_path", str(folder), rule, "use the model settings that it was trained with")


def read_weights(
    folder: Path,
    names: list[str],
    expert_layer: Mapping[str, int],
    residents: tuple[tuple[int, ...], ...],
    n_experts: int,
) -> dict[str, Tensor]:
    """Read only what a site holds: dense tensors, and its residents' rows stacked in order.

    A tensor may be dense in the file and sparse here or the other way round (the router in ghost and partitioned
    mode); rows are then cut or stacked.

    Args:
        folder: checkpoint folder.
        names: tensors wanted.
        expert_layer: name -> layer of the stacked expert tensors among them.
        residents: per layer the expert ids that are wanted.
        n_experts: experts of a layer, E.

    Raises:
        ConfigError: if a tensor is missing.
    """
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    handles = {path: safe_open(path, framework="pt") for path in set(where.values())}

    def read(key: str) -> Tensor:
        if key not in where:
            raise ConfigError("ckpt_path", str(folder), f"has no tensor {key!r}", "give a complete checkpoint")
        tensor: Tensor = handles[where[key]].get_tensor(key)
        return tensor

    weights = {}
    for name in names:
        layer = expert_layer.get(name)
        wanted = range(n_experts) if layer is None else residents[layer]
        if name in where:
            tensor = read(name)
            weights[name] = tensor if layer is None else tensor[list(wanted)]
        else:
            weights[name] = torch.stack([read(f"{name}#{expert}") for expert in wanted])
    return weights
