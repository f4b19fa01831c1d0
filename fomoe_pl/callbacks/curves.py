"""Robust curves: a full disk leaves a gap instead of an error, and a resumed run continues the curves in its folder."""

import csv
import os
import sys
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from fomoe_pl.lightning_internals import given_version


class ForgivingFile:
    """TensorBoard's file of events, which drops a record that cannot be written, and says so once.

    Without it the thread that writes ends with the first record that fails, and the training process with the next, or
    it waits for the thread forever.

    Args:
        file: TensorBoard's own, with `filename`, `write`, `flush` and `close`.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._warned = False

    def write(self, record: bytes) -> None:
        """Append a record, or leave the file as it was: half a record would hide all that follow."""
        path = os.fsdecode(self._file.filename)
        before = os.path.getsize(path) if os.path.exists(path) else 0
        try:
            self._file.write(record)
        except OSError as error:
            if os.path.exists(path):
                os.truncate(path, before)
            if not self._warned:
                print(f"fomoe: curves have a gap: {path} cannot be written: {error}", file=sys.stderr, flush=True)
            self._warned = True

    def __getattr__(self, name: str) -> Any:
        """All else is the file's."""
        return getattr(self._file, name)


class CurvesOnFullDisk(Callback):
    """Lets a run go on when the disk of its curves is full; the command line adds it to every run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap TensorBoard's event file. The names are private ones of tensorboard; a test checks that they exist."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                record_writer = logger.experiment._get_file_writer().event_writer._async_writer._writer
                record_writer._writer = ForgivingFile(record_writer._writer)


class ResumedRows(Callback):
    """Keeps the rows of a resumed run in its folder; the command line adds it to every run.

    Lightning's `CSVLogger` removes a `metrics.csv` that it finds. Rows of steps after the checkpoint are dropped: they
    are written a second time.

    Args:
        loggers: The trainer's, before it runs.
    """

    def __init__(self, loggers: list[Logger]) -> None:
        # Before Lightning's first hook, which starts the loggers. One without a version has a new folder.
        paths = [Path(logger.log_dir, "metrics.csv") for logger in loggers
                 if isinstance(logger, CSVLogger) and given_version(logger) is not None]  # fmt: skip
        self._found = {path: _rows(path) for path in paths}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the rows up to the checkpoint, which only now is known."""
        resumed = trainer.ckpt_path and trainer.is_global_zero
        for logger in trainer.loggers if resumed else ():
            path = Path(logger.log_dir, "metrics.csv") if isinstance(logger, CSVLogger) else None
            if path is None or not self._found.get(path):
                continue
            kept = [row for row in self._found[path] if int(row["step"]) < trainer.global_step]
            writer: Any = cast(Any, logger).experiment
            rows = [*kept, *_rows(path)]
            writer.metrics_keys = sorted({*writer.metrics_keys, *self._found[path][0]})
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, fieldnames=writer.metrics_keys)
                table.writeheader()
                table.writerows(rows)
        self._found.clear()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
