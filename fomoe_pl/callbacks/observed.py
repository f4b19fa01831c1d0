"""What callbacks read from strategies and modules, which are above them in the import order."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fomoe_pl.costs.memory import MIB
from fomoe_pl.errors import check_range
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.metrics import RoutingHealth, Statistic
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.training.context import SiteContext, context


class ObservedModule(Protocol):
    """The part of the language model's LightningModule that callbacks read.

    Attributes:
        routing_health: Sums of every training step since its last reset, where `watch_routing` was called.
        tokens_seen: Tokens that this site trained on.
        tokens_of_all_sites: Tokens that all sites trained on, also those of a checkpoint of other sites.
        validation_before_training: `val/...` of the initial global model; empty if it was not validated.
        config: The architecture.
        transformer: The built model.
        domain_load_LNE: Picks of the last validation's text by layer, domain and expert; None before the first.
    """

    routing_health: RoutingHealth
    tokens_seen: int
    tokens_of_all_sites: int
    validation_before_training: dict[str, float]
    config: ModelConfig
    domain_load_LNE: torch.Tensor | None

    @property
    def transformer(self) -> Transformer:
        """The built model."""

    def watch_routing(self) -> None:
        """Keep `routing_health`; called when training starts."""

    def measure_other_views(self) -> None:
        """Have the next validation measure random routing and own views too."""

    def watch_statistics(self, statistics: Sequence[Statistic]) -> None:
        """Have training passes sum these in `routing_health` too; called before training starts."""


def observed_strategy(trainer: Trainer) -> SiteContext:
    """Return the `SiteContext` of the trainer's run."""
    return context(trainer)


def measures_sync(strategy: SiteContext) -> bool:
    """Whether the time of synchronisation is known: data parallelism hides it in the backward pass."""
    return strategy.measures_sync


def observe_rounds(trainer: Trainer, observer: RoundObserver) -> None:
    """Register an observer of rounds; idempotent."""
    observers = observed_strategy(trainer).observers
    if observer not in observers:
        observers.append(observer)


def observed_module(pl_module: LightningModule) -> ObservedModule:
    """Return the module, typed as `ObservedModule`."""
    return cast(ObservedModule, pl_module)


def log(trainer: Trainer, values: dict[str, float], after: int | None = None) -> None:
    """Write values to all loggers; loggers of other ranks ignore them.

    Args:
        trainer: Whose loggers.
        values: By tag.
        after: Optimizer steps at which they were measured; None is now.
    """
    for logger in trainer.loggers:
        # Lightning counts steps from 0 in its own curves: the same place on the axis for the same step.
        logger.log_metrics(values, step=(trainer.global_step if after is None else after) - 1)


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run alone: the first logger's, as Lightning's ModelCheckpoint finds it, or the root folder.

    A logger that numbers its runs when they start (W&B, MLflow, Comet) has started by the time training does.
    """
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    # Not trainer.log_dir: it broadcasts, and only rank zero may be here.
    own = getattr(logger, "log_dir", None)
    if own:
        return Path(own)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


@contextmanager
def watching(trainer: Trainer) -> Iterator[None]:
    """Count the time inside as time spent on observing."""
    start = time.perf_counter()
    yield
    observed_strategy(trainer).watch_seconds += time.perf_counter() - start


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
        ConfigError: If it is below 1.
    """
    key = f"trainer.callbacks.{type(callback).__name__}.every_n_steps"
    check_range(key, every_n_steps, "10 optimizer steps are the default", least=1)
    return every_n_steps


class EvaluatingCallback(Callback):
    """Evaluates the model on tasks; the run's report includes the results.

    Attributes:
        evaluations: The newest results, `{view: {steps, limit, tasks: {task: {metric: value}}}}`.
    """

    evaluations: dict[str, Any]

    def __init__(self) -> None:
        self.evaluations = {}


class RoundCallback(Callback):
    """Calls :meth:`on_round_end` after each round, or where there are none every `every_n_steps` optimizer steps.

    Nothing is read between rounds: on a GPU the host would wait for it.

    Args:
        every_n_steps: Interval in synchronous training, which has no rounds, in optimizer steps.
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
        """Return whether a round ended with this batch."""
        strategy = observed_strategy(trainer)
        # Counted from the run's start: a resumed run logs at the same steps. A step may have several micro-batches.
        new = trainer.global_step != self._step
        due = not strategy.has_rounds and new and trainer.global_step % self.every_n_steps == 0
        if due or strategy.rounds_done != self._rounds:
            self._rounds, self._step = strategy.rounds_done, trainer.global_step
            with watching(trainer):
                self.on_round_end(trainer, pl_module)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after a round."""
        raise NotImplementedError
