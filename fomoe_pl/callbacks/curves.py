"""Curves on a disk that is full: they have a gap, and training goes on."""

import os
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger


class ForgivingFile:
    """TensorBoard's file of events, which drops a record that cannot be written, and says so once.

    Without it the thread that writes ends with the first record that fails, and the training process with the next, or
    it waits for the thread for ever.

    Args:
        file: TensorBoard's own, with `filename`, `write`, `flush` and `close`.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._told = False

    def write(self, record: bytes) -> None:
        """Append a record, or leave the file as it was: half a record would hide all that follow."""
        path = os.fsdecode(self._file.filename)
        before = os.path.getsize(path) if os.path.exists(path) else 0
        try:
            self._file.write(record)
        except OSError as error:
            if os.path.exists(path):
                os.truncate(path, before)
            if not self._told:
                print(f"fomoe: curves have a gap: {path} cannot be written: {error}", file=sys.stderr, flush=True)
            self._told = True

    def __getattr__(self, name: str) -> Any:
        """All else is the file's."""
        return getattr(self._file, name)


class CurvesOnFullDisk(Callback):
    """Lets the curves of a run do without what a full disk does not take; the command line adds it to every run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand between TensorBoard and its file. The names are private ones of tensorboard; a test looks for them."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                record_writer = logger.experiment._get_file_writer().event_writer._async_writer._writer
                record_writer._writer = ForgivingFile(record_writer._writer)
