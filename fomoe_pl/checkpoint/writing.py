"""Writing a checkpoint while training goes on: copies in host memory, and a thread that brings them to the disk.

The thread sends nothing. Each site's leaves a seal in the folder when the site's files are there, and site 0's
completes the checkpoint once it finds the seals of all. Where sites have disks of their own, each has its own seal
alone, and the `Checkpointer` completes the checkpoint on all of them once all have told that theirs is there.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint.disks import Disk

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # full or read-only disk, as each of the writers tells it
_POLL_SECONDS = 0.02
_VISIBLE_SECONDS = 120.0  # in which site 0 must see what others have written: network file systems take their time


class HostCopies:
    """Copies of nested content in host memory; the next copies take the buffers of the last ones.

    Fresh memory is slow: the system clears it page by page, and a GPU's driver pins it. So buffers are kept, and with
    them as much host memory as a rank writes.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._taken: list[tuple[tuple[Any, ...], Tensor]] = []

    def copy(self, content: Any) -> Any:
        """Copy everything; the copies of the last call must not be needed any more.

        Waits until the device has copied all, so that the originals may change on return.

        Args:
            content: Tensors and plain values in dicts, lists and tuples.

        Returns:
            The same with every tensor on the CPU, in memory of its own.
        """
        self._free.clear()
        for key, buffer in self._taken:
            self._free[key].append(buffer)
        self._taken = []
        with torch.inference_mode(False), torch.no_grad():  # a validation's buffers must serve training as well
            copied = self._copied(content)
        for device in {key[2] for key, _ in self._taken}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._free.clear()  # what this content has no use for
        return copied

    def _copied(self, content: Any) -> Any:
        if isinstance(content, Tensor):
            key = (content.shape, content.dtype, content.device)
            on_gpu = content.is_cuda
            if self._free[key]:
                buffer = self._free[key].pop()
            else:
                buffer = torch.empty(content.shape, dtype=content.dtype, pin_memory=on_gpu)
            self._taken.append((key, buffer))
            # From pinned memory the device copies on its own, after the work that is queued before.
            return buffer.copy_(content.detach(), non_blocking=on_gpu)
        if type(content) is dict:
            return {key: self._copied(value) for key, value in content.items()}
        if type(content) in (list, tuple):
            return type(content)(self._copied(value) for value in content)
        return copy.deepcopy(content)


class Writing:
    """A checkpoint on its way to the disk, as seen from one rank.

    Args:
        folder: Its final name; `begin` has made the folder that is written.
        steps: Optimizer steps in it.
        site: This site.
        manifest: On a site that completes a folder, site 0 or with disks of their own each, what the manifest says
            beside the files.
        n_writers: Sites that write into this folder, or 0 if the folder is not completed by itself.
        disk: Of the site's own.

    Attributes:
        failed: Whether it cannot be completed, as far as this rank knows.
        complete: Whether this rank has completed it: site 0, or with disks of their own each.
        concluded: Whether all sites have agreed on how it ended.
        seconds: From the start to the complete checkpoint, on site 0.
    """

    def __init__(
        self, folder: Path, steps: int, site: int, manifest: dict[str, Any] | None, n_writers: int,
        disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.steps, self._disk = folder, steps, disk
        self.failed = self.complete = self.concluded = False
        self.seconds = 0.0
        self._site, self._manifest, self._n_writers = site, manifest, n_writers
        self._thread: threading.Thread | None = None
        self._given_up, self._lock = threading.Event(), threading.Lock()
        self._written = threading.Event()
        self._deadline = math.inf
        self._afterwards: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self._start = time.perf_counter()

    def write(self, contents: Mapping[str, Any]) -> None:
        """Write this rank's files now.

        Args:
            contents: File name -> content; empty on a rank that writes none.
        """
        try:
            if contents:
                self._attempt(lambda: self._write_files(contents))
        finally:
            self._written.set()

    def start(self, contents: Mapping[str, Any], copies: HostCopies) -> None:
        """Copy the contents, then write and complete in a thread."""
        copied: dict[str, Any] = {}
        self._attempt(lambda: copied.update(copies.copy(contents)))  # host memory may be short

        def run() -> None:
            self.write({} if self.failed else copied)
            self._complete()

        # A daemon: a run that is ended by force does not wait for its disk.
        self._thread = threading.Thread(target=run, name=f"save {self.folder.name}", daemon=True)
        self._thread.start()

    def _attempt(self, part: Callable[[], None]) -> None:
        try:
            part()
        except CANNOT_WRITE as error:
            self.failed = True
            if not self._given_up.is_set():
                self._tell(error)
        except BaseException as error:
            self.failed, self._error = True, error  # raised where training looks, not here

    def _tell(self, error: BaseException) -> None:
        with suppress(OSError):  # the disk may be the one that messages go to, too
            # A torch file that meets a full disk says that it is somewhere else than it thought.
            free = shutil.disk_usage(self.folder.parent).free / 1e6
            called = self.folder if self._disk is None else self._disk.called(self.folder.name)
            where = "there" if called == self.folder else f"in {self.folder.parent}"
            told = f"site {self._site} cannot write {called}: {error} ({free:,.0f} MB are free {where})"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)

    def _write_files(self, contents: Mapping[str, Any]) -> None:
        for name, content in contents.items():
            if self._given_up.is_set():
                return
            files.write(self.folder, name, content)
        files.seal(self.folder, self._site, contents)
        if self._disk is not None:
            self._disk.upload(self.folder.name, self.sealed)

    def _complete(self) -> None:
        if self._manifest is not None and self._n_writers and not self.failed:
            self._attempt(self._finish)

    def _finish(self) -> None:
        while (sealed := files.n_sealed(self.folder)) < self._n_writers:
            if time.monotonic() > self._deadline:
                told = f"it has the files of {sealed} of {self._n_writers} sites; do all write into one file system?"
                raise FileNotFoundError(told)
            if self._given_up.wait(_POLL_SECONDS):
                return
        assert self._manifest is not None
        files.finish(self.folder, self._manifest)
        self._completed()

    def _completed(self) -> None:
        self.seconds = time.perf_counter() - self._start
        with self._lock:
            self.complete = True
        for action in self._afterwards:
            action()

    @property
    def written(self) -> bool:
        """Whether this rank's files are on its disk."""
        return self._written.is_set() and not self.failed

    @property
    def sealed(self) -> dict[str, Any]:
        """Sizes and hashes of this rank's files, once they are written."""
        return files.sealed(self.folder)

    def write_manifest(self, of_all: Mapping[str, Any]) -> None:
        """Write the manifest beside this rank's files; the folder keeps its unfinished name.

        Args:
            of_all: The files of all sites.
        """
        assert self._manifest is not None
        assert self._disk is not None
        manifest = {**self._manifest, "files": of_all}
        self._attempt(lambda: files.write_manifest(files.partial(self.folder), manifest))
        if not self.failed:
            self._attempt(partial(self._disk.write_manifest, self.folder.name))

    def complete_now(self) -> None:
        """Give the folder its name, where all sites have the manifest; under the other name it would be found too."""
        assert self._disk is not None
        self._attempt(lambda: files.put_in_place(self.folder))
        self._attempt(partial(self._disk.complete, self.folder.name))
        self._completed()

    def after(self, action: Callable[[], None]) -> None:
        """Do something once the checkpoint is complete, and never if it cannot be completed (site 0)."""
        with self._lock:
            if not self.complete:
                self._afterwards.append(action)
                return
        action()

    def raise_unexpected(self) -> None:
        """Raise what was no fault of the disk, where training looks."""
        if self._error is not None:
            raise self._error

    def wait_written(self) -> None:
        """Wait until this rank has written its files, or cannot."""
        self._written.wait()

    def wait_complete(self) -> None:
        """Wait on site 0 until the checkpoint is complete or cannot be completed; all sites must have written."""
        self._deadline = time.monotonic() + _VISIBLE_SECONDS
        if self._thread is None:
            self._complete()
        else:
            self._thread.join()

    def wait_alone(self, patience: float) -> bool:
        """Wait without the other sites, some of which may be gone.

        Args:
            patience: Seconds in which the others are waited for once this rank has written.

        Returns:
            Whether the checkpoint is complete.
        """
        self.wait_written()
        end = time.monotonic() + patience
        while not self.failed and time.monotonic() < end:
            if files.is_complete(self.folder, self.steps):
                return True
            time.sleep(_POLL_SECONDS)
        return files.is_complete(self.folder, self.steps)

    def stop(self) -> None:
        """Write no further file, and say nothing of one that could not be written."""
        self._given_up.set()

    def give_up(self) -> None:
        """End the thread; on site 0, remove what is there."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        self.failed = True
        if self._manifest is not None:
            with suppress(OSError):
                if not self._n_writers:  # a manifest on one disk alone is worth nothing
                    (files.partial(self.folder) / files.MANIFEST).unlink(missing_ok=True)
                files.give_up(self.folder)
                if self._disk is not None:
                    self._disk.give_up(self.folder.name)
