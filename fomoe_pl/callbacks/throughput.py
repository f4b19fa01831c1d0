"""Training speed and memory of site 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fomoe_pl.callbacks.observed import check_interval, log, observed_module, observed_strategy, peak_memory


@dataclass(frozen=True)
class Interval:
    """Time and tokens of some training steps of one site.

    Attributes:
        seconds: wall-clock time, waiting for data included.
        sync_seconds: the part of it spent in synchronisation.
        tokens: tokens trained on.
    """

    seconds: float = 0.0
    sync_seconds: float = 0.0
    tokens: int = 0

    def __add__(self, other: Interval) -> Interval:
        return Interval(
            self.seconds + other.seconds, self.sync_seconds + other.sync_seconds, self.tokens + other.tokens
        )

    def __sub__(self, other: Interval) -> Interval:
        return Interval(
            self.seconds - other.seconds, self.sync_seconds - other.sync_seconds, self.tokens - other.tokens
        )

    @property
    def local_rate(self) -> float:
        """Tokens a second of the local steps alone."""
        return self.tokens / (self.seconds - self.sync_seconds)

    @property
    def rate(self) -> float:
        """Tokens a second with synchronisation."""
        return self.tokens / self.seconds


class TimedCallback(Callback):
    """Measures training time: from batch end to batch end, but without validation and checkpoints.

    GPUs are not waited for: what is still queued at one end of a window is missing at the other.
    """

    def __init__(self) -> None:
        self.trained = Interval()
        self._reading = Interval()
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at zero."""
        self.trained, self._interrupted = Interval(), False
        self._reading = self._read(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time since the last batch does not count."""
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Time since the last batch does not count."""
        self._interrupted = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Take the time up again after an interruption."""
        if self._interrupted:
            self._reading, self._interrupted = self._read(trainer, pl_module), False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Add this batch."""
        reading = self._read(trainer, pl_module)
        self.trained += reading - self._reading
        self._reading = reading

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> Interval:
        """All three clocks; only their differences mean something."""
        sync_seconds = observed_strategy(trainer).sync_seconds
        return Interval(time.perf_counter(), sync_seconds, observed_module(pl_module).tokens_seen)


class ThroughputMonitor(TimedCallback):
    """Logs site 0's speed over the last window, and its peak memory since the start of the process.

    - `throughput/local(tokens per s)`: one site's local steps, synchronisation excluded;
    - `throughput/with_sync(tokens per s)`: one site, synchronisation included;
    - `throughput/with_sync_global(tokens per s)`: the same of all sites, which all wait for each other;
    - `memory/peak(MiB)`: tensors on a GPU, or the process's resident set on a CPU.

    Args:
        every_n_steps: Length of a window in optimizer steps.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__()
        self.every_n_steps = check_interval(self, every_n_steps)
        self._step = 0
        self._before = Interval()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first window."""
        super().on_train_start(trainer, pl_module)
        self._step, self._before = trainer.global_step, self.trained

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log at the end of a window."""
        super().on_train_batch_end(trainer, pl_module)
        if trainer.global_step - self._step < self.every_n_steps:
            return
        window = self.trained - self._before
        self._step, self._before = trainer.global_step, self.trained
        if trainer.is_global_zero:
            n_sites = observed_strategy(trainer).topology.n_sites
            values = {
                "throughput/local(tokens per s)": window.local_rate,
                "throughput/with_sync(tokens per s)": window.rate,
                "throughput/with_sync_global(tokens per s)": window.rate * n_sites,
                "memory/peak(MiB)": peak_memory(pl_module.device),
            }
            log(trainer, values)
