"""Saving, the same for all strategies: one checkpoint format, whatever trains, written while training goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from fomoe_pl.federation import checkpoint as files
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.writing import CANNOT_WRITE, HostCopies, Writing
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency

PATIENCE_SECONDS = 5.0  # for the files of other sites, when one of them may be gone


class SavingStrategy(Strategy):
    """Writes checkpoint folders.

    Attributes:
        ledger: bytes that this rank sent.
        rounds_done: rounds that have ended.
        redraws: how often experts were dealt anew.
        optimizer_steps: local optimizer steps taken.
        sync_seconds: seconds spent in synchronisation.
        last_saved: the newest complete checkpoint that this run has written or was resumed from, as far as all sites
            know.
        saved_at: optimizer steps in the newest checkpoint that this run has written; -1 without one.
        saves_failed: how often a checkpoint could not be written.
        save_seconds: seconds for which training stood still for saving so far.
        write_seconds: from the start of writing to the complete checkpoint, of the newest one (site 0).
        async_save: whether checkpoints are written while training goes on.
        observers: who looks at the ends of rounds.
        average: a moving average of the global model, this site's rows; empty without.
    """

    average: Mapping[str, Tensor] = {}
    ledger: Ledger
    rounds_done: int
    redraws: int
    optimizer_steps: int
    sync_seconds: float
    last_saved: Path | None
    saved_at: int
    saves_failed: int
    save_seconds: float
    write_seconds: float
    async_save: bool
    observers: list[RoundObserver]
    _training: bool
    _keep_old: bool
    _saving: Writing | None

    # Whether every site writes a part, or rank 0 everything.
    every_site_writes = False

    def init_saving(self, async_save: bool) -> None:
        """Set the counters; called by the constructors."""
        self.last_saved, self.saved_at = None, -1
        self.saves_failed = 0
        self.save_seconds = self.write_seconds = 0.0
        self.async_save, self._host_copies = async_save, HostCopies()
        self._training, self._keep_old, self._saving = False, False, None

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
        return self.every_site_writes or self.is_global_zero

    def identity(self, n_sites: int) -> dict[str, Any]:
        """What `site_state` depends on: a run that has the same goes on bit for bit."""
        return {"strategy": type(self).__name__, "sites": n_sites}

    def site_state(self) -> dict[str, Any]:
        """What this rank needs beside the global model to resume."""
        return {"ledger": self.ledger.state_dict(), "sync_seconds": self.sync_seconds}

    def check_before_saving(self) -> None:
        """Raise where what would be saved is not what all sites have; every rank calls it."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the folder's own files, expert by expert."""
        return {}

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Copy what this rank writes, and let a thread write it; every rank must call it.

        A save that is still being written is waited for first. Outside of training the checkpoint is complete on
        return. Where a disk is full or may not be written, all ranks go on training, and older checkpoints stay.
        """
        start = time.perf_counter()
        self.check_before_saving()
        self.settle_save()
        folder = Path(filepath)
        begun = self._begin(folder) if self.is_global_zero else True
        # A file name may have a metric in it, of which every site has its own.
        name, begun = self.broadcast((str(filepath), begun))
        if begun:
            self._saving = self._start_writing(Path(name), checkpoint)
            if not self._in_background:
                self.settle_save()
        else:
            self._note_failure(Path(name), self.optimizer_steps)
        self.save_seconds += time.perf_counter() - start

    @property
    def _in_background(self) -> bool:
        running = cast(Any, self.lightning_module).trainer.state.status == TrainerStatus.RUNNING
        return self.async_save and self._training and running

    def _begin(self, folder: Path) -> bool:
        try:
            files.begin(folder)
        except CANNOT_WRITE as error:
            print(f"fomoe: cannot write {folder}: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def _start_writing(self, folder: Path, checkpoint: dict[str, Any]) -> Writing:
        contents = self._contents(checkpoint)
        n_writers = self.topology.n_sites if self.every_site_writes else 1
        manifest = self._manifest() if self.is_global_zero else None
        writing = Writing(folder, self.optimizer_steps, self.topology.site, manifest, n_writers)
        if self._in_background:
            writing.start(contents, self._host_copies)
        else:
            writing.write(contents)
        return writing

    def _contents(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """File name -> content, of all files that this rank writes."""
        layout, site = self.layout(), self.topology.site
        names = {layer: layout.sparse(layer) for layer in set(layout.expert_layer.values())}
        contents: dict[str, Any] = {}
        for prefix, tensors in (("", self.global_tensors()), (files.MOMENTUM, self.outer_momenta()),
                                (files.AVERAGE, self.average)):  # fmt: skip
            if tensors and self.writes_checkpoint():
                contents[files.experts_name(site, prefix)] = {
                    f"{name}#{e}": tensors[name][row]
                    for layer, e, row in self.owned_experts()
                    for name in names[layer]
                    if name in tensors
                }
            if tensors and self.is_global_zero:
                contents[files.dense_name(prefix)] = {n: tensors[n] for n in layout.dense if n in tensors}
        if self.writes_checkpoint():
            contents[files.site_name(site)] = {
                "optimizer_states": checkpoint.get("optimizer_states", []),
                "optimizer_names": self._optimizer_names(layout),
                "strategy": self.site_state(),
                "residents": self.transformer.residency.experts,  # type: ignore[union-attr]
                "expert_layer": dict(layout.expert_layer),
                "rng": _collect_rng_states(),
                "losses": cast(Any, self.lightning_module).round_losses(),
            }
            # Lightning keeps rank zero's callbacks; those that look into rounds know things of their own site.
            watchers = {getattr(observer, "state_key", "") for observer in self.observers}
            kept = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key in watchers}
            if kept:
                contents[files.observers_name(site)] = kept
        if self.is_global_zero:
            skipped = ("state_dict", "optimizer_states")
            contents["trainer.pt"] = {key: value for key, value in checkpoint.items() if key not in skipped}
        return contents

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

    # -- how it ends ----------------------------------------------------------------------------------------------

    def save_flags(self) -> tuple[bool, bool]:
        """Of the save that is being written: whether this rank knows that it failed, and that it is complete."""
        if self._saving is None:
            return False, False
        self._saving.raise_unexpected()
        return self._saving.failed, self._saving.complete

    def conclude_save(self, *, failed: bool, complete: bool) -> None:
        """Take note of how a save has ended, once all sites know it.

        Args:
            failed: whether some site's flag says so.
            complete: whether site 0's says so.
        """
        saving = self._saving
        if saving is None or saving.concluded or not (failed or complete):
            return
        saving.concluded = True
        if failed:
            saving.give_up()
            self._note_failure(saving.folder, saving.steps)
        else:
            self.last_saved, self.saved_at, self._keep_old = saving.folder, saving.steps, False
            self.write_seconds = saving.seconds

    def _note_failure(self, folder: Path, steps: int) -> None:
        self.saves_failed += 1
        self._keep_old = True
        if self.is_global_zero:
            older = f"{self.last_saved} is the newest" if self.last_saved else "there is none yet"
            print(f"fomoe: NO CHECKPOINT after step {steps}: {folder} was not written; training goes on, {older}",
                  file=sys.stderr, flush=True)  # fmt: skip

    def settle_save(self) -> None:
        """Wait until the save that is being written is complete or has failed; every rank must call it.

        Its messages are the same whatever rounds have told already: bytes do not depend on the disk's speed.
        """
        if self._saving is None:
            return
        self._saving.wait_written()
        failed = self._on_any_site(self.save_flags()[0])
        if not failed:
            self._saving.wait_complete()
            failed = self._on_any_site(self.save_flags()[0])
        self.conclude_save(failed=failed, complete=not failed)
        self._saving = None

    def _on_any_site(self, flag: bool) -> bool:
        return float(self.sum_over_sites(torch.tensor([float(flag)]), "control")) > 0

    def leave_save(self) -> None:
        """As `settle_save`, without messages: where a run ends by an error, other sites may be gone."""
        saving = self._saving
        if saving is not None and not saving.concluded and saving.wait_alone(PATIENCE_SECONDS):
            self.last_saved, self.saved_at = saving.folder, saving.steps

    def on_train_start(self) -> None:
        """From now on there is something that can go on while a checkpoint is written."""
        super().on_train_start()
        self._training = True

    def on_train_end(self) -> None:
        """A run ends when its last checkpoint is complete."""
        super().on_train_end()
        self._training = False
        self.settle_save()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint folder once its successor is complete; never if that could not be written."""
        if not self.is_global_zero:
            return

        def remove() -> None:
            with suppress(OSError):
                self.checkpoint_io.remove_checkpoint(filepath)

        if self._saving is not None:
            self._saving.after(remove)
        elif not self._keep_old:
            remove()
