"""Lightning callbacks that are refused: those that change weights or the schedule without the rounds knowing."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from fomoe_pl.callbacks.average import GlobalEMA
from fomoe_pl.callbacks.observed import observed_strategy
from fomoe_pl.errors import ConfigError

_AVERAGE = "use fomoe_pl.callbacks.GlobalEMA, which averages the global model over its rounds"
REFUSED: dict[type[Callback], tuple[str, str]] = {
    WeightAveraging: ("exchanges each site's own weights for their average: experts that are validated with others' "
                      "are not averaged, and checkpoints hold the agreed model without it", _AVERAGE),
    StochasticWeightAveraging: ("replaces the learning-rate schedule and, at the end, each site's weights", _AVERAGE),
    LearningRateFinder: ("trains before the run, outside of its rounds, and replaces model.optimizer.lr",
                         "train briefly with several values of model.optimizer.lr; `fomoe compare` shows them"),
    BatchSizeFinder: ("trains before the run, outside of its rounds", "set data.batch_size: `fomoe plan` fits it"),
    ModelPruning: ("replaces parameters by masked ones, which sites do not average", "leave it out"),
    BaseFinetuning: ("freezes and thaws parameters, of which sites and optimizer know nothing", "leave it out"),
    GradientAccumulationScheduler: ("counts epochs, and the data has no end", "set trainer.accumulate_grad_batches"),
}  # fmt: skip
"""Refused classes, subclasses included: why, and what to do instead."""


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that would change training on this site only.

    Raises:
        ConfigError: Naming the callback, and what to use instead.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, (rule, hint) in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigError("trainer.callbacks", type(callback).__name__, rule, hint)
        if isinstance(callback, GlobalEMA) and observed_strategy(trainer).moves_experts:
            raise ConfigError("trainer.callbacks", type(callback).__name__,
                              "keeps averages of the experts that a site has, and a random placement moves experts",
                              "set placement to fixed, or leave it out")  # fmt: skip
