"""Resuming, the same for all strategies: on the same sites bit for bit, on others from the same global model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import _set_rng_states
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation import checkpoint as files
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.strategies.carryover import carry_over, differences
from fomoe_pl.strategies.checks import check_weights
from fomoe_pl.strategies.saving import SavingStrategy


class CheckpointingStrategy(SavingStrategy):
    """Reads the checkpoint folders that it has written, and those of other strategies and sites."""

    _rng_states: dict[str, Any] | None

    def load_site_state(self, state: dict[str, Any]) -> None:
        """Restore `site_state`."""
        self.ledger.load_state_dict(state["ledger"])
        self.sync_seconds = state["sync_seconds"]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state; weights are read by `load_model_state_dict`, only those of this site."""
        folder = Path(checkpoint_path)
        # Our own files: Lightning's loop and callback states hold more than plain tensors.
        path, observers = files.verify(folder, "trainer.pt"), files.observers_name(self.topology.site)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        if observers in files.read_manifest(folder)["files"]:
            own = torch.load(files.verify(folder, observers), map_location="cpu", weights_only=False)
            state["callbacks"] = {**state.get("callbacks", {}), **own}
        return {**state, "state_dict": {}, "optimizer_states": [], "folder": str(folder)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this site's weights from the folder."""
        folder = Path(checkpoint["folder"])
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        check_weights(folder, config)
        self.set_global(self._read(folder, list(self.layout().tensors)))

    def _read(self, folder: Path, names: list[str], prefix: str = "") -> dict[str, Tensor]:
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        residency: Residency = self.transformer.residency  # type: ignore[assignment]
        return files.read_weights(
            folder, names, self.layout().expert_layer, residency.experts, config.n_experts, prefix
        )

    def saved_average(self, folder: Path) -> dict[str, Tensor] | None:
        """The moving average of the global model in a checkpoint, this site's rows; None if it has none."""
        if files.dense_name(files.AVERAGE) not in files.read_manifest(folder)["files"]:
            return None
        return self._read(folder, list(self.layout().tensors), files.AVERAGE)

    def set_global(self, weights: dict[str, Tensor]) -> None:
        """Put the global model's values into this rank's tensors."""
        self.layout().fill(weights)

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore inner optimizer, outer state and counters of this site, as far as they fit."""
        folder = Path(checkpoint["folder"])
        manifest = files.read_manifest(folder)
        self.rounds_done = manifest["rounds"]
        self.last_saved, self.saved_at = folder, manifest["optimizer_steps"]
        missing = []
        for slot, values in self.outer_slots().items():
            if files.dense_name(files.of_slot(slot)) not in manifest["files"]:
                missing.append(slot)
                continue
            for name, value in self._read(folder, list(values), files.of_slot(slot)).items():
                values[name].copy_(value)
        # Of data-parallel ranks, which are all alike, only the first has written; a site without a file of its own
        # goes on from another's.
        own_files = [name for name in manifest["files"] if name.startswith("site-")]
        site = self.topology.site % len(own_files) if self.writes_checkpoint() else 0
        path = files.verify(folder, files.site_name(site), manifest)
        own = torch.load(path, map_location="cpu", weights_only=False)
        changed = differences(manifest["identity"], self.identity(self.topology.n_sites))
        if not changed:
            if own["residents"] != self.transformer.residency.experts:  # type: ignore[union-attr]
                raise RuntimeError(f"site {site} of {folder} holds other experts than this one: {own['residents']}")
            super().load_optimizer_state_dict({"optimizer_states": own["optimizer_states"]})
            self.load_site_state(own["strategy"])
            self._rng_states = own["rng"]
            cast(Any, self.lightning_module).set_round_losses(own["losses"])
            cast(Any, self.lightning_module).set_round_steps(own.get("steps", (0, 0)))  # older ones have none
            return
        if site == self.topology.site:
            self.ledger.load_state_dict(own["strategy"]["ledger"])
        layout = self.layout()
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        residency: Residency = self.transformer.residency  # type: ignore[assignment]
        names = self._optimizer_names(layout)
        [optimizer] = self.optimizers
        fresh = carry_over(own, optimizer, names, layout.expert_layer, residency.experts, config.n_experts)
        told = f"resuming with other settings ({changed}); site 0 starts {fresh} with fresh inner moments"
        if missing:
            told += f", and outer {', '.join(missing)} at zero"
        rank_zero_info(told)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The first step of a resumed run draws the random numbers that the interrupted one would have drawn."""
        if self._rng_states is not None:
            _set_rng_states(self._rng_states)
            self._rng_states = None
        return super().training_step(*args, **kwargs)


def resolve(folders: list[Path], path: str, others: Path | None = None) -> str | None:
    """What `--ckpt_path` means: `auto` is the newest undamaged checkpoint of a run, or None for a start from scratch.

    Args:
        folders: where the run's checkpoints lie; in folders below, too, where a file name has a slash in it.
        path: as given.
        others: where other runs of this name would have theirs.

    Raises:
        ConfigError: for `auto`, if there are checkpoints but none is complete and undamaged.
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
