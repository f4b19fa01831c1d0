"""Saving and resuming, the same for all strategies: one checkpoint format, whatever trains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation import checkpoint as files
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.strategies.carryover import carry_over, differences
from fomoe_pl.strategies.checks import check_weights

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # full or read-only disk, as each of the writers tells it


class CheckpointingStrategy(Strategy):
    """Writes and reads checkpoint folders.

    Attributes:
        ledger: bytes that this rank sent.
        rounds_done: rounds that have ended.
        redraws: how often experts were dealt anew.
        optimizer_steps: local optimizer steps taken.
        sync_seconds: seconds spent in synchronisation.
        last_saved: the newest complete checkpoint that this run has written or was resumed from.
        saved_at: optimizer steps in the newest checkpoint that this run has written; -1 without one.
        saves_failed: how often a checkpoint could not be written.
    """

    ledger: Ledger
    rounds_done: int
    redraws: int
    optimizer_steps: int
    sync_seconds: float
    last_saved: Path | None
    saved_at: int
    saves_failed: int
    _keep_old: bool
    _rng_states: dict[str, Any] | None

    @property
    def topology(self) -> Topology:
        """This rank's place; for data-parallel strategies every rank counts as a site."""
        raise NotImplementedError

    def residency(self, config: ModelConfig) -> Residency:
        """Which experts the model on this rank holds."""
        return Residency.full(config)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all sites, counted."""
        raise NotImplementedError

    # -- what is saved --------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> torch.nn.Module:
        """The model inside the LightningModule."""
        model = self.lightning_module.model  # type: ignore[union-attr]
        assert isinstance(model, torch.nn.Module)
        return model

    def layout(self) -> ParameterLayout:
        """The tensors that make up the global model."""
        return ParameterLayout.of(self.transformer, self.transformer.expert_tensors())  # type: ignore[operator]

    def global_tensors(self) -> Mapping[str, Tensor]:
        """Agreed values by name, with this site's rows of expert tensors."""
        return self.layout().tensors

    def outer_momenta(self) -> Mapping[str, Tensor]:
        """Outer momentum by name, as `global_tensors`; empty without."""
        return {}

    def owned_experts(self) -> list[tuple[int, int, int]]:
        """(layer, expert, row) of each expert that this rank writes."""
        residency: Residency = self.transformer.residency  # type: ignore[assignment]
        return [(i, e, r) for i, layer in enumerate(residency.experts) for r, e in enumerate(layer)]

    def writes_checkpoint(self) -> bool:
        """Whether this rank writes experts and its own state."""
        return self.is_global_zero

    def identity(self, n_sites: int) -> dict[str, Any]:
        """What `site_state` depends on: a run that has the same goes on bit for bit."""
        return {"strategy": type(self).__name__, "sites": n_sites}

    def site_state(self) -> dict[str, Any]:
        """What this rank needs beside the global model to resume."""
        return {"ledger": self.ledger.state_dict(), "sync_seconds": self.sync_seconds}

    def load_site_state(self, state: dict[str, Any]) -> None:
        """Restore `site_state`."""
        self.ledger.load_state_dict(state["ledger"])
        self.sync_seconds = state["sync_seconds"]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the folder's own files, expert by expert."""
        return {}

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint folder; every rank must call it.

        Where a disk is full or may not be written, all ranks go on training, and older checkpoints stay.
        """
        # A file name may have a metric in it, of which every site has its own.
        folder = Path(self.broadcast(str(filepath)))
        parts: list[Callable[[], None]] = [
            lambda: files.begin(folder) if self.is_global_zero else None,
            lambda: self._write_parts(folder, checkpoint),
            lambda: files.finish(folder, self._manifest()) if self.is_global_zero else None,
        ]
        for part in parts:
            problem = self._attempt(part, folder)
            if float(self.sum_over_sites(torch.tensor([float(problem)]), "control")):
                self.saves_failed += 1
                self._keep_old = True
                if self.is_global_zero:
                    files.give_up(folder)
                    older = f"{self.last_saved} is the newest" if self.last_saved else "there is none yet"
                    print(f"fomoe: NO CHECKPOINT after step {self.optimizer_steps}: {folder} was not written; training "
                          f"goes on, {older}", file=sys.stderr, flush=True)  # fmt: skip
                return
        self.last_saved, self.saved_at, self._keep_old = folder, self.optimizer_steps, False

    def _attempt(self, write: Callable[[], None], folder: Path) -> bool:
        try:
            write()
        except CANNOT_WRITE as error:
            print(f"fomoe: site {self.topology.site} cannot write {folder}: {error}", file=sys.stderr, flush=True)
            return True
        return False

    def _write_parts(self, folder: Path, checkpoint: dict[str, Any]) -> None:
        layout, site, written = self.layout(), self.topology.site, []
        names = {layer: layout.sparse(layer) for layer in set(layout.expert_layer.values())}
        for prefix, tensors in (("", self.global_tensors()), (files.MOMENTUM, self.outer_momenta())):
            if tensors and self.writes_checkpoint():
                rows = {
                    (name, e): tensors[name][row]
                    for layer, e, row in self.owned_experts()
                    for name in names[layer]
                    if name in tensors
                }
                written.append(files.write_experts(folder, site, rows, prefix))
            if tensors and self.is_global_zero:
                dense = {name: tensors[name] for name in layout.dense if name in tensors}
                written.append(files.write_dense(folder, dense, prefix))
        if self.writes_checkpoint():
            own = {
                "optimizer_states": checkpoint.get("optimizer_states", []),
                "optimizer_names": self._optimizer_names(layout),
                "strategy": self.site_state(),
                "residents": self.transformer.residency.experts,  # type: ignore[union-attr]
                "expert_layer": dict(layout.expert_layer),
                "rng": _collect_rng_states(),
                "losses": cast(Any, self.lightning_module).round_losses(),
            }
            written.append(files.write_state(folder, f"site-{site:05d}", own))
        if self.is_global_zero:
            state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
            written.append(files.write_state(folder, "trainer", state))
        if written:
            files.seal(folder, site, written)

    def _optimizer_names(self, layout: ParameterLayout) -> list[str]:
        """Names of the inner optimizer's parameters, in the order of its state."""
        name_of = {id(tensor): name for name, tensor in layout.tensors.items()}
        return [name_of[id(p)] for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]]

    def _manifest(self) -> dict[str, Any]:
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        n_sites = self.topology.n_sites
        return {
            "architecture": asdict(config), "n_sites": n_sites,
            "rounds": self.rounds_done, "redraws": self.redraws, "optimizer_steps": self.optimizer_steps,
            "identity": self.identity(n_sites),
        }  # fmt: skip

    # -- resuming -------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state; weights are read by `load_model_state_dict`, only those of this site."""
        folder = Path(checkpoint_path)
        # Our own file: Lightning's loop and callback states hold more than plain tensors.
        path = files.verify(folder, "trainer.pt")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
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

    def set_global(self, weights: dict[str, Tensor]) -> None:
        """Put the global model's values into this rank's tensors."""
        self.layout().fill(weights)

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore inner optimizer, outer state and counters of this site, as far as they fit."""
        folder = Path(checkpoint["folder"])
        manifest = files.read_manifest(folder)
        self.rounds_done, self.optimizer_steps = manifest["rounds"], manifest["optimizer_steps"]
        self.last_saved = folder
        momenta = self.outer_momenta()
        has_momentum = f"{files.MOMENTUM}dense.safetensors" in manifest["files"]
        if momenta and has_momentum:
            for name, value in self._read(folder, list(momenta), files.MOMENTUM).items():
                momenta[name].copy_(value)
        # Of data-parallel ranks, which are all alike, only the first has written; a site without a file of its own
        # goes on from another's.
        own_files = [name for name in manifest["files"] if name.startswith("site-")]
        site = self.topology.site % len(own_files) if self.writes_checkpoint() else 0
        own = torch.load(files.verify(folder, f"site-{site:05d}.pt"), map_location="cpu", weights_only=False)
        changed = differences(manifest["identity"], self.identity(self.topology.n_sites))
        if not changed:
            if own["residents"] != self.transformer.residency.experts:  # type: ignore[union-attr]
                raise RuntimeError(f"site {site} of {folder} holds other experts than this one: {own['residents']}")
            super().load_optimizer_state_dict({"optimizer_states": own["optimizer_states"]})
            self.load_site_state(own["strategy"])
            self._rng_states = own["rng"]
            cast(Any, self.lightning_module).set_round_losses(own["losses"])
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
        if momenta and not has_momentum:
            told += ", and outer momentum at zero"
        rank_zero_info(told)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The first step of a resumed run draws the random numbers that the interrupted one would have drawn."""
        if self._rng_states is not None:
            _set_rng_states(self._rng_states)
            self._rng_states = None
        return super().training_step(*args, **kwargs)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint folder; not while its successor could not be written."""
        if self._keep_old:
            return
        if self.is_global_zero:
            with suppress(OSError):
                self.checkpoint_io.remove_checkpoint(filepath)


def resolve(folder: Path, path: str) -> str | None:
    """What `--ckpt_path` means: `auto` is the newest undamaged checkpoint of a run, or None for a start from scratch.

    Args:
        folder: where the run's checkpoints lie.
        path: as given.

    Raises:
        ConfigError: for `auto`, if there are checkpoints but none is complete and undamaged.
    """
    if path != "auto":
        return path
    found, wrong = files.newest(folder, hashes=True)
    for message in wrong:
        rank_zero_info(f"not used: {message}")
    # What the very first save was interrupted in is nothing to go on from, and no loss either.
    if found is None and any(not name.name.endswith(".partial") for name in folder.glob("*.ckpt*")):
        raise ConfigError("ckpt_path", path, f"no checkpoint in {folder} is complete", "; ".join(wrong))
    rank_zero_info(f"going on from {found}" if found else f"no checkpoint in {folder} yet: starting from scratch")
    return str(found) if found else None
