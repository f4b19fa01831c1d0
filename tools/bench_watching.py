"""What watching costs: blocks of training steps with all callbacks, and blocks with none, in turns in one process.

`python tools/bench_watching.py -c configs/model/fomoe-153m.yaml --data runs/data/sample --output runs/bench_watching`

A block is a whole round of one site, so that what happens at rounds is in it. Every second round is watched, and of
these every second one is looked at; the cost at the defaults counts looks as often as RoutingStability takes them.
The corpus gives text to train on and the probe; its vocabulary may be smaller than the model's. Drawing happens less
often than a round: it is timed alone.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import command_line
import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fomoe_pl.callbacks import (
    CommunicationMonitor,
    FoMoEProgressBar,
    RoutingStability,
    RunPictures,
    RunReport,
    ThroughputMonitor,
)
from fomoe_pl.data import FoMoEData
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import FederatedStrategy

WARMUP_ROUNDS = 2


class Switch(L.Callback):
    """Lets the callbacks it holds see every second round, and times rounds. Must be the only one that watches.

    Args:
        callbacks: Those whose cost is asked for.
    """

    def __init__(self, callbacks: list[L.Callback]) -> None:
        self.callbacks = callbacks
        self.seconds: dict[str, list[float]] = {"alone": [], "watched": [], "looked": []}
        self._on = True
        self._start = 0.0
        self._hidden: tuple[list[RoundObserver], Any] = ([], None)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """As theirs."""
        for callback in self.callbacks:
            callback.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs; all of them watch the first rounds."""
        for callback in self.callbacks:
            callback.on_train_start(trainer, pl_module)
        self._start = self._now()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs."""
        for callback in self.callbacks:
            callback.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Theirs, in their rounds."""
        for callback in self.callbacks if self._on else []:
            callback.on_train_batch_start(trainer, pl_module, *rest)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Theirs, in their rounds; at the end of a round it is the other's turn."""
        strategy: Any = trainer.strategy
        for callback in self.callbacks if self._on else []:
            callback.on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step % strategy.schedule.segments[0][1] == 0:
            now = self._now()
            if strategy.rounds_done > WARMUP_ROUNDS:
                looked = any(isinstance(c, RoutingStability) and c._looking for c in self.callbacks)
                kind = "alone" if not self._on else "looked" if looked else "watched"
                self.seconds[kind].append(now - self._start)
            self._on = not self._on
            shown = (strategy.observers, strategy.federation.movement)
            strategy.observers, strategy.federation.movement = self._hidden
            self._hidden = shown
            self._start = self._now()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs."""
        for callback in self.callbacks:
            callback.on_train_end(trainer, pl_module)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def bench(
    architecture: ModelConfig,
    data: str,
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    batch_size: int = 16,
    sequence_length: int = 2048,
    local_steps: int = 32,
    pairs: int = 6,
) -> dict[str, Any]:
    """Measure, print and write `bench_watching.json`.

    Args:
        architecture: The model.
        data: Folder of a prepared corpus.
        output: Folder for results and curves.
        accelerator: gpu or cpu.
        batch_size: Sequences of a step B.
        sequence_length: Tokens of a sequence S.
        local_steps: Steps of a round K, and so of a block.
        pairs: Rounds that are watched, and as many that are not.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stability, pictures = RoutingStability(), RunPictures()
    callbacks: list[L.Callback] = [
        stability, CommunicationMonitor(), ThroughputMonitor(), FoMoEProgressBar(), RunReport(), pictures
    ]  # fmt: skip
    switch = Switch(callbacks)
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, strategy=FederatedStrategy(sites=1, local_steps=local_steps),
        precision="bf16-mixed", gradient_clip_val=1.0, max_steps=local_steps * (WARMUP_ROUNDS + 2 * pairs),
        max_epochs=-1, limit_val_batches=0, log_every_n_steps=10, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False), callbacks=[switch],
    )  # fmt: skip
    corpus = FoMoEData(data, sequence_length, batch_size)
    trainer.fit(FoMoEModule(architecture), corpus)
    pictures._stability, pictures._ends = stability, pictures.draw_every - 1
    start = time.perf_counter()
    pictures.on_round_end(trainer, trainer.lightning_module)
    drawing = time.perf_counter() - start
    alone, watched, looked = (statistics.median(switch.seconds[kind]) for kind in ("alone", "watched", "looked"))
    share = 1 / stability.every_n_rounds
    cost = share * looked + (1 - share) * watched - alone
    of_a_drawing = drawing / pictures.draw_every
    results = {
        "device": torch.cuda.get_device_name() if accelerator == "gpu" else "cpu",
        "torch": torch.__version__,
        "settings": {"batch_size": batch_size, "sequence_length": sequence_length, "local_steps": local_steps},
        "seconds_of_rounds": switch.seconds,
        "cost_of_watching": cost / alone,
        "drawing_seconds": drawing,
        "cost_of_drawing": of_a_drawing / alone,
    }
    (folder / "bench_watching.json").write_text(json.dumps(results, indent=2) + "\n")
    spread = [f"{kind} {min(of):.3f} to {max(of):.3f}" for kind, of in switch.seconds.items()]
    print(
        f"a round {alone:.3f} s alone, {watched:.3f} s watched, {looked:.3f} s looked at ({', '.join(spread)}); "
        f"at the defaults watching costs {cost / alone:+.2%} and drawing {of_a_drawing / alone:+.2%} "
        f"({drawing:.2f} s each)"
    )
    return results


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    _, architecture, settings = command_line.read(
        "Training steps with all callbacks against steps with none, in turns.", bench, arguments
    )
    bench(architecture, **settings)


if __name__ == "__main__":
    main()
