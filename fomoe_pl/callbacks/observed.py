"""What callbacks read from strategies and modules, which stand above them in the order of imports."""

from __future__ import annotations

import resource
import sys
from typing import Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.topology import Topology
from fomoe_pl.metrics import RoutingHealth

MIB = 2**20


@runtime_checkable
class ObservedStrategy(Protocol):
    """The part of this project's strategies that callbacks read.

    Attributes:
        topology: this rank's place.
        ledger: bytes that this rank sent so far.
        rounds_done: rounds that have ended; stays 0 in synchronous training.
        sync_seconds: seconds spent in synchronisation so far.
        round_stats: means over all sites of the last round; empty before the first.
    """

    topology: Topology
    ledger: Ledger
    rounds_done: int
    sync_seconds: float
    round_stats: dict[str, float]


class ObservedModule(Protocol):
    """The part of the language model's LightningModule that callbacks read.

    Attributes:
        routing_health: sums of every training step since its last reset.
        tokens_seen: tokens that this site trained on.
        tokens_of_all_sites: tokens that all sites trained on, also those of a checkpoint of other sites.
        validation_before_training: `val/...` of the initial global model; empty if it was not validated.
    """

    routing_health: RoutingHealth
    tokens_seen: int
    tokens_of_all_sites: int
    validation_before_training: dict[str, float]


class _Unsynchronized:
    """Stands in for Lightning's own strategies, of which nothing is known but that they have no rounds."""

    topology = Topology(n_sites=1, ranks_per_site=1, rank=0)
    rounds_done = 0
    sync_seconds = 0.0

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.round_stats: dict[str, float] = {}


def observed_strategy(trainer: Trainer) -> ObservedStrategy:
    """Return the trainer's strategy, or a blank one-site stand-in if it is not one of this project's."""
    strategy: object = trainer.strategy
    return strategy if isinstance(strategy, ObservedStrategy) else _Unsynchronized()


def observed_module(pl_module: LightningModule) -> ObservedModule:
    """Return the module as what these callbacks are made for."""
    return cast(ObservedModule, pl_module)


def log(trainer: Trainer, values: dict[str, float]) -> None:
    """Write values to all loggers at the optimizer step that has just ended; loggers of other ranks ignore them."""
    for logger in trainer.loggers:
        # Lightning counts steps from 0 in its own curves: the same place on the axis for the same step.
        logger.log_metrics(values, step=trainer.global_step - 1)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of tensors on a GPU (this process's only), of the whole process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    # getrusage(2): kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def check_interval(callback: Callback, every_n_steps: int) -> int:
    """Return a logging interval in optimizer steps.

    Raises:
        ConfigError: if it is below 1.
    """
    if every_n_steps < 1:
        key = f"trainer.callbacks.{type(callback).__name__}.every_n_steps"
        raise ConfigError(key, every_n_steps, "must be at least 1 optimizer step", "10 is the default")
    return every_n_steps


class RoundCallback(Callback):
    """Calls :meth:`on_round_end` after each round, and every `every_n_steps` optimizer steps while there is none.

    Synchronous training has no rounds; a federated run is observed in the same way until its first round ends.

    Args:
        every_n_steps: Interval without rounds, in optimizer steps.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = check_interval(self, every_n_steps)
        self._rounds = 0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from where the run starts or resumes."""
        self._rounds = observed_strategy(trainer).rounds_done
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Tell whether a round ended with this batch."""
        rounds = observed_strategy(trainer).rounds_done
        due = rounds == 0 and trainer.global_step - self._step >= self.every_n_steps
        if due or rounds != self._rounds:
            self._rounds, self._step = rounds, trainer.global_step
            self.on_round_end(trainer, pl_module)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the round that has just ended."""
        raise NotImplementedError
