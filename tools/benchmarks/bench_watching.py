"""Cost of observing: rounds with all callbacks and rounds with none, interleaved in one process.

    python tools/benchmarks/bench_watching.py -c configs/model/fomoe-153m.yaml --data runs/data/sample \
      --output runs/bench_watching

Every second round of one site is observed, and of these every second one is measured in full ("looked" in the
results). A round's last step, with what follows it, is timed apart from the steps before it: observing a round of K
steps costs (K - 1) times the difference of a step between rounds, and once that of its end; full measurements count as
often as RoutingStability takes them by default. Short rounds give many pairs in little time. Drawing is rarer than
rounds and gets rarer still: it is timed alone, with all pictures, and counts as often as RunPictures draws by default
in the reported run, its end included. The corpus gives text to train on and the probe; its vocabulary may be smaller
than the model's.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from harness import BARE, CLIP_NORM, Report, markdown, now, read
from lightning.pytorch.loggers import TensorBoardLogger

from fomoe_pl.callbacks import (
    CommunicationMonitor,
    FoMoEProgressBar,
    RoutingStability,
    RunPictures,
    RunReport,
    ThroughputMonitor,
)
from fomoe_pl.callbacks.pictures import next_drawing
from fomoe_pl.data import FoMoEData
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.recorded import RecordedPass
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import FederatedStrategy

WARMUP_ROUNDS = 4  # one of each kind, and two alone
DRAWINGS = 3
LOOK_EVERY = 4  # rounds; of these two are watched, and the first of them is looked at


@dataclass
class Rounds:
    """Seconds of the rounds of one kind: of the steps between rounds together, and of the last step with the end."""

    steps: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


class Switch(L.Callback):
    """Lets the callbacks it holds see every second round, and times rounds. Must be the only one that watches.

    Args:
        callbacks: Those whose cost is asked for.
        seconds: After which training ends, once the four rounds of a cycle are complete.
    """

    def __init__(self, callbacks: list[L.Callback], seconds: float) -> None:
        self.callbacks, self.limit = callbacks, seconds
        self.rounds = {kind: Rounds() for kind in ("alone", "watched", "looked")}
        self._on, self._over = True, False
        self._hidden: tuple[Any, ...] = ([], None, False, None)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """As theirs."""
        for callback in self.callbacks:
            callback.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs; they watch the first round."""
        for callback in self.callbacks:
            callback.on_train_start(trainer, pl_module)
        self._began = self._start = now()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs."""
        for callback in self.callbacks:
            callback.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Theirs, in their rounds; before the last step the clock is read."""
        local_steps = self._local_steps(trainer)
        if trainer.global_step % local_steps == local_steps - 1:
            time = now()
            self._steps, self._start = time - self._start, time
        for callback in self.callbacks if self._on else []:
            callback.on_train_batch_start(trainer, pl_module, *rest)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Theirs, in their rounds; at the end of a round it is the other's turn."""
        for callback in self.callbacks if self._on else []:
            callback.on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step % self._local_steps(trainer):
            return
        time = now()
        done: int = trainer.strategy.rounds_done  # type: ignore[attr-defined]
        if done > WARMUP_ROUNDS and not self._over:
            looked = any(isinstance(c, RoutingStability) and c._looking for c in self.callbacks)
            rounds = self.rounds["alone" if not self._on else "looked" if looked else "watched"]
            rounds.steps.append(self._steps)
            rounds.ends.append(time - self._start)
        if done % LOOK_EVERY == 0 and done > WARMUP_ROUNDS and time - self._began > self.limit:
            trainer.should_stop = self._over = True  # the run ends with its next round
        self._turn(trainer, pl_module)
        self._start = now()

    def _turn(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take observers, movements and the measuring of routing away, or put them back.

        A step that measures is another graph: each kind of round keeps its own.
        """
        strategy: Any = trainer.strategy
        self._on = not self._on
        passes = pl_module._passes
        assert passes is not None
        recorded = passes.recorded
        shown = strategy.observers, strategy.federation.movement, pl_module.watches_routing, recorded
        strategy.observers, strategy.federation.movement, pl_module.watches_routing, passes.recorded = self._hidden
        if passes.recorded is None and recorded is not None:
            passes.recorded = RecordedPass(recorded.run, pl_module.transformer)
        for block in pl_module.transformer.layers:
            block.moe.router.measures_entropy = pl_module.watches_routing
        self._hidden = shown

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As theirs, whose rounds the last ones were or not."""
        if not self._on:
            self._turn(trainer, pl_module)
        for callback in self.callbacks:
            callback.on_train_end(trainer, pl_module)

    @staticmethod
    def _local_steps(trainer: L.Trainer) -> int:
        strategy: Any = trainer.strategy
        steps: int = strategy.settings.schedule.segments[0][1]
        return steps


def seconds_to_draw(pictures: RunPictures, trainer: L.Trainer, module: Any, domains: int) -> float:
    """Seconds of a drawing with every picture that a run of several sites and domains has; median of a few."""
    layers, experts = module.config.n_layers, module.config.n_experts
    assert pictures._stability is not None
    view = pictures._stability.view
    assert view is not None
    view.drift_LE = torch.rand(layers, experts)
    taken = []
    for _ in range(DRAWINGS):
        module.domain_load_LNE = torch.rand(layers, domains, experts)  # as after a validation
        start = now()
        pictures._draw(trainer, module, view)
        taken.append(now() - start)
    return statistics.median(taken)


def drawings(rounds: int, draw_every: int) -> int:
    """How often a run of this many rounds is drawn, including the drawing at its end."""
    drawn_after, times = 0, 0
    while drawn_after < rounds:
        drawn_after, times = next_drawing(drawn_after, draw_every), times + 1
    return times


def bench(
    architecture: ModelConfig,
    data: str,
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    batch_size: int = 16,
    sequence_length: int = 2048,
    local_steps: int = 6,
    reported_steps: int = 32,
    reported_rounds: int = 1000,
    seconds: float = 24.0,
) -> dict[str, float]:
    """Measure, print and write both files.

    Args:
        architecture: The model.
        data: Folder of a prepared corpus.
        output: Folder for the result and curves.
        accelerator: Gpu or cpu.
        batch_size: Sequences of a step B.
        sequence_length: Tokens of a sequence S.
        local_steps: Steps of a round that is timed, at least 2.
        reported_steps: Steps K of the round whose cost is reported.
        reported_rounds: Rounds of the run over which drawings are spread.
        seconds: Of training, about; the whole takes twice as long.

    Returns:
        Shares of a round's time: `watching`, `drawing`, `total`.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stability, pictures = RoutingStability(), RunPictures()
    callbacks: list[L.Callback] = [
        stability, CommunicationMonitor(), ThroughputMonitor(), FoMoEProgressBar(), RunReport(), pictures
    ]  # fmt: skip
    draw_every, pictures.draw_every = pictures.draw_every, 10**9  # not in the rounds that are timed
    look_every, stability.every_n_rounds = stability.every_n_rounds, LOOK_EVERY
    pictures._find_stability = lambda trainer: stability  # type: ignore[method-assign]  # it is not the trainer's
    switch = Switch(callbacks, seconds)
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, strategy=FederatedStrategy(sites=1, local_steps=local_steps),
        precision="bf16-mixed", gradient_clip_val=CLIP_NORM, max_steps=10**6, limit_val_batches=0, log_every_n_steps=10,
        default_root_dir=folder, callbacks=[switch],
        **BARE | {"logger": TensorBoardLogger(folder, name="", version="", default_hp_metric=False)},
    )  # fmt: skip
    corpus = FoMoEData(data, sequence_length, batch_size)
    trainer.fit(FoMoEModule(architecture), corpus)
    drawing = seconds_to_draw(pictures, trainer, trainer.lightning_module, len(corpus.domains))

    rounds, share = switch.rounds, 1 / look_every
    step = statistics.median(rounds["alone"].steps) / (local_steps - 1)
    end = statistics.median(rounds["alone"].ends)
    more_steps = _more(rounds["watched"].steps + rounds["looked"].steps, rounds["alone"].steps) / (local_steps - 1)
    more_end = {kind: _more(rounds[kind].ends, rounds["alone"].ends) for kind in ("watched", "looked")}
    alone = (reported_steps - 1) * step + end
    at_end = share * more_end["looked"] + (1 - share) * more_end["watched"]
    watching = ((reported_steps - 1) * more_steps + at_end) / alone
    times = drawings(reported_rounds, draw_every)
    drawn = drawing * times / reported_rounds / alone
    rows = [
        ("a step between rounds, alone", step, ""),
        ("the same, watched: more", more_steps, f"{more_steps / step:+.2%} of a step"),
        ("a round's last step and its end, alone", end, ""),
        ("the same, watched: more", more_end["watched"], ""),
        (f"the same, looked at (every {look_every}th by default): more", more_end["looked"], ""),
        (f"a round of {reported_steps} steps, alone", alone, ""),
        ("watching it: more", watching * alone, f"**{watching:+.2%}** of it"),
        (f"a drawing ({times} in {reported_rounds} rounds by default)", drawing, f"**{drawn:+.2%}** of the rounds"),
        ("all together", (watching + drawn) * alone, f"**{watching + drawn:+.2%}** of a round"),
    ]
    numbers = ", ".join(f"{len(of.ends)} {kind}" for kind, of in rounds.items())
    found = {"watching": watching, "drawing": drawn, "total": watching + drawn}
    parameters = sum(p.numel() for p in trainer.lightning_module.parameters())
    settings = {"parameters": parameters, "batch_size": batch_size, "sequence_length": sequence_length,
                "local_steps": local_steps}  # fmt: skip
    report = Report(folder, "bench_watching", accelerator, settings)
    print(report.write(
        {**found, "rounds": {kind: asdict(of) for kind, of in rounds.items()}},
        f"Rounds of {local_steps} steps were timed, in turns: {numbers}. Medians.",
        markdown(("", "seconds", "share"), [(name, f"{value:.4f}", of) for name, value, of in rows]),
        *(f"{kind}: steps {_listed(of.steps)}; end {_listed(of.ends)}" for kind, of in rounds.items()),
    ))  # fmt: skip
    return found


def _more(with_it: list[float], without: list[float]) -> float:
    return statistics.median(with_it) - statistics.median(without)


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser, architecture, settings = read(
        "Training steps with all callbacks against steps with none, in turns.", bench, arguments
    )
    if settings["local_steps"] < 2:
        parser.error(f"local_steps = {settings['local_steps']} must be at least 2: one before a round's last")
    bench(architecture, **settings)


if __name__ == "__main__":
    main()
