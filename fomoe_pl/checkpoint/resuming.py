"""Which checkpoint a run goes on from, and whether its model is the one that is configured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from fomoe_pl.checkpoint import format as files
from fomoe_pl.errors import ConfigError
from fomoe_pl.model.config import ModelConfig

# Settings that may differ between a checkpoint and the model that reads it: they leave the weights alone.
IRRELEVANT_TO_WEIGHTS = frozenset(
    {"expert_backend", "activation_checkpointing", "loss_chunk_bytes", "balance", "aux_loss_weight", "z_loss_weight",
     "bias_update_rate"}
)  # fmt: skip


def irrelevant_to_weights(saved: Mapping[str, Any], config: ModelConfig) -> frozenset[str]:
    """Settings that may differ; a balance bias chooses experts, so whether there is one may not."""
    same_bias = (saved.get("balance") == "bias") == (config.balance == "bias")
    return IRRELEVANT_TO_WEIGHTS if same_bias else IRRELEVANT_TO_WEIGHTS - {"balance"}


def check_weights(path: str | Path, config: ModelConfig) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ConfigError: Listing every setting that differs.
    """
    saved = files.read_manifest(Path(path))["architecture"]
    files.check_architecture(Path(path), saved, asdict(config), irrelevant_to_weights(saved, config))


def tokens_in(checkpoint: Path) -> tuple[int, int]:
    """Local steps and tokens of all sites in a checkpoint.

    Raises:
        ConfigError: If it is no complete checkpoint.
    """
    steps: int = files.read_manifest(checkpoint)["optimizer_steps"]
    return steps, int(files.read_state(checkpoint, "trainer.pt")["tokens_of_all_sites"])


def resolve(folders: list[Path], path: str, others: Path | None = None) -> str | None:
    """What `--ckpt_path` means: `auto` is the newest undamaged checkpoint of a run, or None for a start from scratch.

    Args:
        folders: Where the run's checkpoints lie; in folders below, too, where a file name has a slash in it.
        path: As given.
        others: Where other runs of this name would have theirs.

    Raises:
        ConfigError: For `auto`, if there are checkpoints but none is complete and undamaged.
    """
    if path != "auto":
        return path
    there = sorted({p.parent for folder in folders for p in _checkpoints(folder)})
    found, wrong = None, []
    for folder in there:
        newest, messages = files.newest(folder, hashes=True)
        wrong += messages
        if newest is not None and (found is None or _age(newest) > _age(found)):
            found = newest
    for message in wrong:
        rank_zero_info(f"not used: {message}")
    named = ", ".join(map(str, folders))
    # What the very first save was interrupted in is nothing to go on from, and no loss either.
    if found is None and any(p.suffix != ".partial" for folder in folders for p in _checkpoints(folder)):
        raise ConfigError("ckpt_path", path, f"no checkpoint in {named} is complete", "; ".join(wrong))
    rank_zero_info(f"going on from {found}" if found else f"no checkpoint in {named} yet: starting from scratch")
    beside = [] if others is None else [p for p in _checkpoints(others) if p.parent not in there]
    if found is None and beside:
        rank_zero_warn(f"starting from scratch, though other runs of this name have checkpoints, such as {beside[-1]}: "
                       "to go on from one, name it with --ckpt_path")  # fmt: skip
    return str(found) if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders below, complete or not, the newest last."""
    return sorted((p for p in folder.rglob("*.ckpt*") if p.is_dir()), key=lambda p: p.stat().st_mtime)


def _age(checkpoint: Path) -> tuple[int, float]:
    return files.read_manifest(checkpoint)["optimizer_steps"], (checkpoint / files.MANIFEST).stat().st_mtime
