"""Tasks of lm-evaluation-harness during training: the global model, layer by layer, as in validation."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from fomoe_pl.callbacks.observed import EvaluatingCallback, observed_strategy
from fomoe_pl.errors import ConfigError
from fomoe_pl.hub import needs

KEY = "trainer.callbacks.TaskEvaluation."


class TaskEvaluation(EvaluatingCallback):
    """Evaluates the global model on tasks every few rounds, and when training ends.

    Logs `eval/<task>/<metric>`, which also go into `report.json` if `RunReport` stands behind it. Every site scores its
    share of the sequences; each layer's experts are gathered once a window, and scores are added in one message.

    Args:
        tasks: As of `fomoe evaluate`; tasks that generate text are measured after training alone.
        every_n_rounds: Rounds from one evaluation to the next; at the end of training there is always one.
        every_n_steps: Interval in synchronous training, which has no rounds, in optimizer steps.
        limit: Most rows of each task; null is all.
        batch_size: Sequences that are scored together.
        window: Batches that go through each layer together.

    Raises:
        ConfigError: If a setting is out of range, a task file is missing, or lm-evaluation-harness is not installed.
    """

    def __init__(
        self,
        tasks: list[str] = ["sample"],  # noqa: B006  read alone
        every_n_rounds: int = 16,
        every_n_steps: int = 100,
        limit: int | None = None,
        batch_size: int = 16,
        window: int = 64,
    ) -> None:
        super().__init__()
        sizes = {"every_n_rounds": every_n_rounds, "every_n_steps": every_n_steps, "limit": limit,
                 "batch_size": batch_size, "window": window}  # fmt: skip
        for key, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(KEY + key, value, "must be at least 1", "leave it out")
        needs("lm_eval", "fit with TaskEvaluation")
        from fomoe_pl.hub.tasks import resolved

        resolved(tasks)
        self.tasks, self.every_n_rounds, self.every_n_steps = list(tasks), every_n_rounds, every_n_steps
        self.limit, self.batch_size, self.window = limit, batch_size, window
        self._seen = (0, 0)
        self._loaded: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read tasks and data before training, so that errors come early."""
        if stage == "fit":
            from fomoe_pl.hub.tasks import load_tasks

            with isolate_rng():
                self._loaded = load_tasks(self.tasks, generates=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was evaluated before the run was resumed is not evaluated again."""
        self.evaluations, self._seen = {}, (observed_strategy(trainer).rounds_done, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when due; all sites agree on when."""
        strategy = observed_strategy(trainer)
        before, now = self._seen, (strategy.rounds_done, trainer.global_step)
        self._seen = now
        if before == now:  # between micro-batches of a step
            return
        ended = now[1] == trainer.max_steps
        if strategy.has_rounds:
            due = now[0] > before[0] and (ended or now[0] % self.every_n_rounds == 0)
        else:
            due = ended or now[1] % self.every_n_steps == 0
        if due:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from fomoe_pl.hub.in_training import TrainingLM
        from fomoe_pl.hub.tasks import run_tasks

        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.val_step_context():
            lm = TrainingLM(trainer, pl_module, self.batch_size, self.window)
            found = run_tasks(lm, self._loaded, limit=self.limit)
        if found is None:
            return
        self.evaluations = {"global": {"steps": trainer.global_step, "limit": self.limit, "tasks": found}}
        values = {f"eval/{task}/{metric}": value for task, metrics in found.items() for metric, value in metrics.items()
                  if math.isfinite(value)}  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
