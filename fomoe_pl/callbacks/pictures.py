"""Pictures, text and a chart layout for TensorBoard."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fomoe_pl.callbacks import board, figures
from fomoe_pl.callbacks.history import LoadHistory, relative_load
from fomoe_pl.callbacks.observed import RoundCallback, observed_module, observed_strategy, watching
from fomoe_pl.callbacks.stability import RoundView, RoutingStability, stability_of
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.shipped import how_to_install


def next_drawing(drawn_after: int, draw_every: int) -> int:
    """Return the round after which to draw next: 1.5 times the round of the last drawing, or later.

    The time spent drawing thus grows with the logarithm of the run's length.

    Args:
        drawn_after: Rounds at the last drawing, 0 before the first.
        draw_every: Fewest rounds between two drawings.
    """
    return drawn_after + max(draw_every, math.ceil(drawn_after / 2))


class RunPictures(RoundCallback):
    """Writes what curves do not show into each TensorBoard logger of rank zero.

    - A layout that groups the curves (tab "Custom Scalars"), the configuration and a summary (tab "Text"), final values
      next to the settings (tab "HParams");
    - pictures (tab "Images"): the placement, heat maps layer by expert of load, skipped share and drift, the timeline
      of each layer's loads, domain by expert maps of the last validation; histograms of the gates on the probe.

    Must come after `RoutingStability`, whose measurements it draws; without it there are no pictures of routing. Other
    loggers get nothing. Pictures need matplotlib (the extra `plots`).

    Args:
        draw_every: Fewest rounds between two drawings, which become rarer: each comes after at least half as many
            rounds again as the one before it (by default after 64, 128, 192, 288, 432, ... rounds). There is a last
            one when training ends. A drawing takes about a second, in which the other sites wait. One that fails gives
            a warning, and the run goes on.
        every_n_steps: Steps that count as a round in synchronous training.
    """

    def __init__(self, draw_every: int = 64, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        check_range("trainer.callbacks.RunPictures.draw_every", draw_every, "64 rounds are the default", least=1)
        self.draw_every = draw_every
        self._ends = self._drawn_after = 0
        self._loads = LoadHistory()
        self._resumed: dict[str, Any] | None = None
        self._failed = False
        self._drawn_domains: Tensor | None = None
        self._stability: RoutingStability | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known before the first step."""
        super().on_train_start(trainer, pl_module)
        self._ends, self._drawn_after, self._failed = 0, 0, False
        self._loads = LoadHistory(trainer.global_step)
        if self._resumed is not None:
            self._ends, self._drawn_after = self._resumed["ends"], self._resumed.get("drawn_after", 0)
            self._loads.load_state_dict(self._resumed["loads"])
            self._resumed = None
        self._stability = self._find_stability(trainer)
        self._draws = find_spec("matplotlib") is not None
        if not self._draws:
            rank_zero_warn(f"RunPictures draws nothing without matplotlib: {how_to_install('plots')}")
        for writer, folder in _writers(trainer):
            writer.add_custom_scalars(board.layout(trainer, pl_module))
            saved = Path(folder, "config.yaml")
            configuration = saved.read_text() if saved.is_file() else None
            writer.add_text("run/configuration", board.introduction(trainer, pl_module, configuration))
            placement = observed_strategy(trainer).placement
            if self._draws and placement is not None:
                writer.add_figure("pictures/placement", figures.placement_map(placement))

    def _find_stability(self, trainer: Trainer) -> RoutingStability | None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = stability_of(trainer)
        if found is not None and callbacks.index(found) > callbacks.index(self):
            raise ConfigError("trainer.callbacks", "RunPictures, RoutingStability", "are in the wrong order",
                              "put RunPictures after RoutingStability")  # fmt: skip
        return found

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the loads; draw when it is time."""
        self._ends += 1
        view = None if self._stability is None else self._stability.view
        if not trainer.is_global_zero or view is None:
            return
        health = view.health
        self._loads.add(trainer.global_step, health.load_LE.cpu(), health.scored_LE.cpu() > 0)
        if self._ends >= next_drawing(self._drawn_after, self.draw_every):
            self._draw(trainer, pl_module, view)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw once more, and write what came out."""
        if not trainer.is_global_zero:
            return
        view = None if self._stability is None else self._stability.view
        if view is not None and self._ends > self._drawn_after:
            with watching(trainer):
                self._draw(trainer, pl_module, view)
        values = board.final_values(trainer, view)
        settings = board.columns(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("run/summary", board.summary(trainer, values), trainer.global_step - 1)
                logger.log_hyperparams(settings, metrics=values, step=trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The loads so far."""
        return {"ends": self._ends, "drawn_after": self._drawn_after, "loads": self._loads.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict` when training starts."""
        self._resumed = state_dict

    def _draw(self, trainer: Trainer, pl_module: LightningModule, view: RoundView) -> None:
        step, self._drawn_after = trainer.global_step - 1, self._ends
        try:
            writers = _writers(trainer)
            drawn = self._figures(trainer, pl_module, view) if self._draws and writers else {}
            for writer, _ in writers:
                for name, figure in drawn.items():
                    writer.add_figure(f"pictures/{name}", figure, step)
                if view.gates_LTK is not None:
                    _add_histograms(writer, view.gates_LTK, step)
            self._drawn_domains = observed_module(pl_module).domain_load_LNE
        except Exception as error:
            # Only rank zero draws: if it stopped here, the other sites would wait for it in the next round.
            if not self._failed:
                rank_zero_warn(f"RunPictures could not draw after step {trainer.global_step}, and does not warn again: "
                               f"{type(error).__name__}: {error}")  # fmt: skip
            self._failed = True

    def _figures(self, trainer: Trainer, pl_module: LightningModule, view: RoundView) -> dict[str, Any]:
        loads_RLE, edges = self._loads.columns()
        load_LE = relative_load(view.health.load_LE.cpu(), view.health.scored_LE.cpu() > 0)
        drawn = {
            "load": figures.heat_map(load_LE, "Load of the last round", figures.EVEN, even=True),
            "timeline": figures.timeline(loads_RLE, edges, self._loads.rounds_each),
        }
        away_LE = view.health.ghost_share()
        if away_LE.nansum() > 0:
            copied = observed_module(pl_module).transformer.residency.routing == "shadow"
            name, what = ("copy_share", "Picks of each expert that copies served") if copied else (
                "ghost_share", "Skipped picks of each expert"
            )  # fmt: skip
            drawn[name] = figures.heat_map(away_LE, what, "share of its picks, all sites", most=1.0)
        if view.drift_LE is not None and view.drift_LE.isfinite().any():
            drawn["drift"] = figures.heat_map(
                view.drift_LE, "Drift among holders before averaging", "distance / norm of the expert"
            )
        domain_load_LNE = observed_module(pl_module).domain_load_LNE
        if domain_load_LNE is not None and domain_load_LNE is not self._drawn_domains:  # another validation's
            domains = trainer.datamodule.domains  # type: ignore[attr-defined]
            drawn["domains"] = figures.domain_maps(domain_load_LNE, domains)
        return drawn


def _add_histograms(writer: Any, gates_LTK: Tensor, step: int) -> None:
    for layer, gates_TK in enumerate(gates_LTK):
        finite = gates_TK[gates_TK.isfinite()]
        if len(finite):  # a router that has diverged has none
            writer.add_histogram(f"gates_on_probe/layer_{layer:02d}", finite, step)


def _writers(trainer: Trainer) -> list[tuple[Any, str]]:
    """Each TensorBoard writer with its folder; none on other ranks."""
    if not trainer.is_global_zero:
        return []
    return [(lg.experiment, lg.log_dir) for lg in trainer.loggers if isinstance(lg, TensorBoardLogger)]
