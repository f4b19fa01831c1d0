"""The time that observers take is theirs: no part of it is called synchronisation."""

import time
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

SITES, ROUNDS = 2, 2
LOOK, SHARE, NOTE = 0.1, 0.3, 0.02  # seconds


class SlowMovement(Movement):
    """Takes its time for every tensor."""

    noted = 0

    def add(self, *args: Any) -> None:
        time.sleep(NOTE)
        self.noted += 1
        super().add(*args)


class Slow(L.Callback, RoundObserver):
    """Takes its time at every place; at one of them on one site only, for which the other one waits."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        self.site = strategy.topology.site
        strategy.observers.append(self)
        movement = strategy.watch_movement()
        self.movement = SlowMovement(2, 4, movement.watched)
        strategy.federation.movement = self.movement

    def before_synchronization(self) -> None:
        time.sleep(LOOK)

    def after_synchronization(self) -> None:
        time.sleep(LOOK)

    def statistics(self) -> Tensor:
        time.sleep(SHARE * self.site)
        return torch.ones(1, dtype=torch.float64)

    def receive(self, total: Tensor) -> None:
        time.sleep(LOOK)


def _fit(rank: int, root: str, folder: str) -> tuple[float, float, float]:
    with launched_as(rank, SITES, folder):
        slow = Slow()
        run = Run(root=root, folder=folder, settings={"local_steps": 2, "overlap": 1},
                  trainer={"max_steps": 2 * ROUNDS})  # fmt: skip
        strategy: Any = fit(run, rank, SITES, [slow]).strategy
        slept = ROUNDS * (3 * LOOK + SHARE) + NOTE * slow.movement.noted
        return slept, strategy.watch_seconds, strategy.sync_seconds


def test_a_slow_observer_is_no_synchronisation(root: str, tmp_path_factory: Any) -> None:
    for slept, watched, synchronized in run_distributed(_fit, SITES, root, str(tmp_path_factory.mktemp("slow"))):
        assert slept > 2
        assert watched > 0.95 * slept
        assert synchronized < 0.2 * slept
