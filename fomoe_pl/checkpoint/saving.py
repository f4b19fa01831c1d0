"""When and how checkpoints are written, the same for all strategies: together, and while training goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint.content import Content
from fomoe_pl.checkpoint.parts import merged
from fomoe_pl.checkpoint.writing import CANNOT_WRITE, HostCopies, Writing
from fomoe_pl.errors import ConfigError
from fomoe_pl.lightning_internals import save_as_newest
from fomoe_pl.remote import AnyPath

ENDED = "ended"
PATIENCE_SECONDS = 5.0  # for the files of other sites, when one of them may be gone


def keep_from_saving_failures(trainer: Any) -> None:
    """Switch off callbacks' `save_on_exception`: where one site has failed, the others cannot save with it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            callback.save_on_exception = False
            rank_zero_info("ModelCheckpoint's save_on_exception is off: sites save together, and where one of them has "
                           "failed it prints its error and the newest checkpoint stays")  # fmt: skip


class Checkpointer:
    """Writes a strategy's checkpoint folders, and reads them and those of other strategies and sites.

    Args:
        content: What they hold of the strategy.
        async_save: Whether checkpoints are written while training goes on.

    Attributes:
        last_saved: The newest complete checkpoint that this run has written or was resumed from, as far as all sites
            know.
        saved_at: Optimizer steps in `last_saved`; -1 without one.
        saves_failed: How often a checkpoint could not be written.
        save_seconds: Seconds for which training stood still for saving so far.
        write_seconds: From the start of writing to the complete checkpoint, of the newest one (site 0).
    """

    def __init__(self, content: Content, *, async_save: bool) -> None:
        self.content, self.async_save = content, async_save
        self.last_saved: AnyPath | None = None
        self.saved_at = -1
        self.saves_failed = 0
        self.save_seconds = self.write_seconds = 0.0
        self._site, self._host_copies = content.site, HostCopies()
        self._training, self._keep_old = False, False
        self._saving: Writing | None = None
        self._postponed: list[str] = []  # saves that were asked for in the middle of an optimizer step
        self._outdated: list[str] = []  # checkpoints that they replace

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Copy what this rank writes, and let a thread write it; every rank must call it.

        A save that is still being written is waited for first. Outside of training the checkpoint is complete on
        return. Where a disk is full or may not be written, all ranks go on training, and older checkpoints stay.
        Between the micro-batches of an optimizer step, whose gradients a checkpoint does not hold, it is saved at the
        step's end instead. Where this rank alone has failed, nothing is saved, which is printed.

        Args:
            checkpoint: Lightning's state.
            path: The checkpoint's folder.

        Raises:
            ConfigError: After `fit` of several sites, which have parted then.
        """
        if self._refused(str(path)):
            return
        start = time.perf_counter()
        self.content.check()
        self.settle()
        own_disks = self.content.own_disks
        begun = self._begin(Path(path)) if self._site.is_global_zero and not own_disks else True
        # A file name may have a metric in it, of which every site has its own.
        name, begun = self._site.broadcast((str(path), begun))
        folder = self.content.place(name)
        if own_disks:
            begun = not self._on_any_site(self.content.writes and not self._begin(folder))
        if begun:
            self._saving = self._start_writing(folder, checkpoint)
            if not self._in_background:
                self.settle()
        else:
            self._note_failure(folder, self._site.optimizer_steps)
        self.save_seconds += time.perf_counter() - start

    def _refused(self, path: str) -> bool:
        site = self._site
        failed = site.trainer.state.status == TrainerStatus.INTERRUPTED
        if site.alone or (failed and site.in_step):
            why = "the other sites cannot save with it" if site.alone else "a step is half done"
            newest = f"{self.last_saved} is the newest" if self.last_saved else "there is none yet"
            told = f"site {site.topology.site} has failed and saves no checkpoint: {why}; {newest}"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)
            return True
        if site.topology.world_size > 1 and not dist.is_initialized():
            hint = f"copy {self.last_saved}" if self.last_saved else "give the Trainer a ModelCheckpoint"
            raise ConfigError("trainer.save_checkpoint", path, "the sites have parted when `fit` returns, and each has "
                              "some of the model only", f"{hint}: a run saves at its end")  # fmt: skip
        if site.in_step:
            if path not in self._postponed:
                self._postponed.append(path)
            rank_zero_info(f"{path} is asked for between the micro-batches of a step: it is saved at the step's end")
            return True
        return False

    def save_postponed(self) -> None:
        """Save what was asked for within the step that has ended."""
        paths, self._postponed = self._postponed, []
        for path in paths:
            self._site.trainer.save_checkpoint(path)
        outdated, self._outdated = self._outdated, []
        for path in outdated:
            self.remove(path)

    def save_last(self, name: str) -> None:
        """Save what the run ends with, unless that has been done; every rank must call it.

        Args:
            name: Of the file, without its ending, where no ModelCheckpoint has a name for what is simply the newest.
        """
        self.settle()
        if self.saved_at == self._site.optimizer_steps:
            return
        trainer = self._site.trainer
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        newest = [c for c in callbacks if c.monitor is None and c.save_top_k]
        if newest and name == ENDED:
            save_as_newest(newest[0], trainer)
        else:
            folder = callbacks[0].dirpath if callbacks else Path(trainer.default_root_dir, "checkpoints")
            trainer.save_checkpoint(Path(cast(Path, folder), f"{name}.ckpt"))

    @property
    def _in_background(self) -> bool:
        running = self._site.trainer.state.status == TrainerStatus.RUNNING
        return self.async_save and self._training and running

    def _begin(self, folder: Path) -> bool:
        try:
            files.begin(folder)
        except CANNOT_WRITE as error:
            print(f"fomoe: cannot write {folder}: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def _start_writing(self, folder: Path, checkpoint: Mapping[str, Any]) -> Writing:
        site, contents = self._site, self.content.files(checkpoint)
        own_disks = self.content.own_disks
        manifest = self.content.manifest() if self.content.writes_common else None
        n_writers = 0 if own_disks else self.content.n_writers
        writing = Writing(folder, site.optimizer_steps, site.topology.site, manifest, n_writers, self.content.disk)
        if self._in_background:
            writing.start(contents, self._host_copies)
        else:
            writing.write(contents)
        return writing

    @property
    def saving(self) -> Writing | None:
        """What is being written."""
        return self._saving

    # -- how it ends ----------------------------------------------------------------------------------------------

    def flags(self) -> tuple[bool, bool]:
        """Of the save that is being written: whether this rank knows that it failed, and that it is complete.

        With disks of their own: that this rank's part is written.
        """
        saving = self._saving
        if saving is None:
            return False, False
        saving.raise_unexpected()
        return saving.failed, saving.written if self.content.own_disks else saving.complete

    def conclude(self, *, failed: bool, complete: int) -> None:
        """Take note of how a save has ended, once all sites know it; all call it together.

        Args:
            failed: Whether some site's flag says so.
            complete: How many sites' flags say so.
        """
        saving, enough = self._saving, self.content.n_writers if self.content.own_disks else 1
        if saving is None or saving.concluded or not (failed or complete >= enough):
            return
        saving.concluded = True
        if self.content.own_disks and not failed:
            failed = not self._completed_on_all_disks(saving)
        if failed:
            saving.give_up()
            self._note_failure(saving.folder, saving.steps)
        else:
            self.last_saved, self.saved_at = self.content.called(saving.folder), saving.steps
            self._keep_old = False
            self.write_seconds = saving.seconds

    def _completed_on_all_disks(self, saving: Writing) -> bool:
        """Write the manifest of all parts on every disk, and complete the checkpoint there once all have it."""
        of_all, differing = merged(self._site.texts_of_sites(json.dumps(saving.sealed)))
        if differing and self._site.is_global_zero:
            print(f"fomoe: copies of {', '.join(differing)} are not the same", file=sys.stderr, flush=True)
        if not differing:
            saving.write_manifest(of_all)
        if self._on_any_site(bool(differing) or saving.failed):
            return False
        saving.complete_now()
        return True

    def _note_failure(self, folder: Path, steps: int) -> None:
        self.saves_failed += 1
        self._keep_old = True
        if self._site.is_global_zero:
            older = f"{self.last_saved} is the newest" if self.last_saved else "there is none yet"
            print(f"fomoe: NO CHECKPOINT after step {steps}: {self.content.called(folder)} was not written; training "
                  f"goes on, {older}", file=sys.stderr, flush=True)  # fmt: skip

    def settle(self) -> None:
        """Wait until the save that is being written is complete or has failed; every rank must call it.

        Its messages are the same whatever rounds have told already: bytes do not depend on the disk's speed.
        """
        if self._saving is None:
            return
        self._saving.wait_written()
        failed = self._on_any_site(self.flags()[0])
        if not failed and not self.content.own_disks:
            self._saving.wait_complete()
            failed = self._on_any_site(self.flags()[0])
        self.conclude(failed=failed, complete=0 if failed else self.content.n_writers)
        self._saving = None

    def _on_any_site(self, flag: bool) -> bool:
        return float(self._site.sum_over_sites(torch.tensor([float(flag)]), "control")) > 0

    def leave(self) -> None:
        """As `settle`, without messages: where a run ends by an error, other sites may be gone."""
        saving = self._saving
        if saving is None or saving.concluded:
            return
        if self.content.own_disks:  # which nobody completes alone
            saving.stop()
            return
        if saving.wait_alone(PATIENCE_SECONDS):
            self.last_saved, self.saved_at = saving.folder, saving.steps

    def start_training(self) -> None:
        """From now on there is something that can go on while a checkpoint is written; all sites call it together.

        Raises:
            ConfigError: For a run that starts from scratch where sites' own disks have checkpoints of another one, or
                cannot be written.
        """
        self._training = True
        self.content.start_training(self.last_saved is None)

    def end_training(self) -> None:
        """A run ends when a checkpoint of its last step is complete, where it saves checkpoints at all."""
        self._training = False
        self.settle()
        if self._site.trainer.checkpoint_callbacks and not self._site.trainer.fast_dev_run:
            self.save_last(ENDED)

    def remove(self, path: str) -> None:
        """Remove a checkpoint folder once its successor is complete; never if that could not be written."""
        if path in self._postponed:
            self._postponed.remove(path)
        elif self._postponed:
            self._outdated.append(path)
            return
        if not self._site.is_global_zero and not self.content.own_disks:
            return

        def remove() -> None:
            with suppress(OSError):
                self.content.remove(path)

        if self._saving is not None:
            self._saving.after(remove)
        elif not self._keep_old:
            remove()

    # -- loading --------------------------------------------------------------------------------------------------

    def load_site(self, folder: Path, load_optimizers: Callable[[Mapping[str, Any]], None]) -> None:
        """As `Content.load_site`; what is loaded is the newest checkpoint from then on."""
        self.saved_at = self.content.load_site(folder, load_optimizers)
        self.last_saved = self.content.called(folder)
