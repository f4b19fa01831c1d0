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
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation import checkpoint as files
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.writing import CANNOT_WRITE, HostCopies, Writing
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency

ENDED = "ended"
PATIENCE_SECONDS = 5.0  # for the files of other sites, when one of them may be gone


def save_as_newest(callback: ModelCheckpoint, trainer: Any) -> None:
    """Have a callback without a metric save under its own name, as if its interval had ended here."""
    candidates = callback._monitor_candidates(trainer)
    callback._save_topk_checkpoint(trainer, candidates)
    callback._save_last_checkpoint(trainer, candidates)


def keep_from_saving_failures(trainer: Any) -> None:
    """Switch off callbacks' `save_on_exception`: where one site has failed, the others cannot save with it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            callback.save_on_exception = False
            rank_zero_info("ModelCheckpoint's save_on_exception is off: sites save together, and where one of them has "
                           "failed it prints its error and the newest checkpoint stays")  # fmt: skip


class SavingStrategy(Strategy):
    """Writes checkpoint folders.

    Attributes:
        ledger: bytes that this rank sent.
        rounds_done: rounds that have ended.
        redraws: how often experts have been placed again.
        loads_at_draw: of each layer and expert, what a policy that sees loads saw last.
        sync_seconds: seconds spent in synchronisation.
        last_saved: the newest complete checkpoint that this run has written or was resumed from, as far as all sites
            know.
        saved_at: optimizer steps in `last_saved`; -1 without one.
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
    loads_at_draw: list[list[float]] | None
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
    _step_is_ending = False
    _open_micro_batches = 0

    # Whether every site writes a part, or rank 0 everything.
    every_site_writes = False

    def init_saving(self, async_save: bool) -> None:
        """Set the counters; called by the constructors."""
        self.last_saved, self.saved_at = None, -1
        self.saves_failed = 0
        self.save_seconds = self.write_seconds = 0.0
        self.async_save, self._host_copies = async_save, HostCopies()
        self._training, self._keep_old, self._saving = False, False, None
        self._postponed: list[str] = []  # saves that were asked for in the middle of an optimizer step
        self._outdated: list[str] = []  # checkpoints that they replace

    @property
    def trainer(self) -> Any:
        """The Trainer that runs."""
        return cast(Any, self.lightning_module).trainer

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the run has taken. Lightning counts them, once all that belongs to a step is done."""
        return int(self.trainer.global_step) + self._step_is_ending

    @property
    def in_step(self) -> bool:
        """Whether there are gradients of micro-batches that no optimizer step has used yet."""
        return self._open_micro_batches > 0

    @property
    def alone(self) -> bool:
        """Whether this rank has failed while the others go on: nothing may be sent to them."""
        return False

    @property
    def topology(self) -> Topology:
        """This rank's place; for data-parallel strategies every rank counts as a site."""
        raise NotImplementedError

    def residency(self, config: ModelConfig) -> Residency:
        """Which experts the model on this rank holds."""
        return Residency.full(config)

    @property
    def placement(self) -> Placement | None:
        """Who holds what; None where every rank holds all."""
        return None

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

    def outer_slots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The outer rule's state: slot -> values by name, as `global_tensors`; empty without."""
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
        Between the micro-batches of an optimizer step, whose gradients a checkpoint does not hold, it is saved at the
        step's end instead. Where this rank alone has failed, nothing is saved, which is printed.

        Raises:
            ConfigError: after `fit` of several sites, which have parted then.
        """
        if self._refused(str(filepath)):
            return
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

    def _refused(self, path: str) -> bool:
        failed = self.trainer.state.status == TrainerStatus.INTERRUPTED
        if self.alone or (failed and self.in_step):
            why = "the other sites cannot save with it" if self.alone else "a step is half done"
            newest = f"{self.last_saved} is the newest" if self.last_saved else "there is none yet"
            told = f"site {self.topology.site} has failed and saves no checkpoint: {why}; {newest}"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)
            return True
        if self.topology.world_size > 1 and not dist.is_initialized():
            hint = f"copy {self.last_saved}" if self.last_saved else "give the Trainer a ModelCheckpoint"
            raise ConfigError("trainer.save_checkpoint", path, "the sites have parted when `fit` returns, and each has "
                              "some of the model only", f"{hint}: a run saves at its end")  # fmt: skip
        if self.in_step:
            if path not in self._postponed:
                self._postponed.append(path)
            rank_zero_info(f"{path} is asked for between the micro-batches of a step: it is saved at the step's end")
            return True
        return False

    def save_postponed(self) -> None:
        """Save what was asked for within the step that has ended."""
        paths, self._postponed = self._postponed, []
        for path in paths:
            self.trainer.save_checkpoint(path)
        outdated, self._outdated = self._outdated, []
        for path in outdated:
            self.remove_checkpoint(path)

    def save_last(self, name: str) -> None:
        """Save what the run ends with, unless that has been done; every rank must call it.

        Args:
            name: of the file, without its ending, where no ModelCheckpoint has a name for what is simply the newest.
        """
        self.settle_save()
        if self.saved_at == self.optimizer_steps:
            return
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        newest = [c for c in callbacks if c.monitor is None and c.save_top_k]
        if newest and name == ENDED:
            save_as_newest(newest[0], self.trainer)
        else:
            folder = callbacks[0].dirpath if callbacks else Path(self.trainer.default_root_dir, "checkpoints")
            self.trainer.save_checkpoint(Path(cast(Path, folder), f"{name}.ckpt"))

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
        slots = {files.of_slot(slot): tensors for slot, tensors in self.outer_slots().items()}
        for prefix, tensors in {"": self.global_tensors(), **slots, files.AVERAGE: self.average}.items():
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
                "steps": cast(Any, self.lightning_module).round_steps(),
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
        placement = self.placement
        placed = {} if placement is None or placement.is_full else {"placement": placement.record()}
        return {
            "architecture": asdict(config), "n_sites": n_sites,
            "rounds": self.rounds_done, "redraws": self.redraws, "optimizer_steps": self.optimizer_steps,
            **({} if self.loads_at_draw is None else {"loads_at_draw": self.loads_at_draw}),
            "identity": self.identity(n_sites),
            **placed,
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
        """A run ends when a checkpoint of its last step is complete, where it saves checkpoints at all."""
        super().on_train_end()
        self._training = False
        self.settle_save()
        if self.trainer.checkpoint_callbacks and not self.trainer.fast_dev_run:
            self.save_last(ENDED)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint folder once its successor is complete; never if that could not be written."""
        path = str(filepath)
        if path in self._postponed:
            self._postponed.remove(path)
        elif self._postponed:
            self._outdated.append(path)
            return
        if not self.is_global_zero:
            return

        def remove() -> None:
            with suppress(OSError):
                self.checkpoint_io.remove_checkpoint(filepath)

        if self._saving is not None:
            self._saving.after(remove)
        elif not self._keep_old:
            remove()
