"""Logs how evenly experts are chosen and how many choices are lost."""

from lightning.pytorch import LightningModule, Trainer

from fomoe_pl.callbacks.observed import RoundCallback, log, observed_module
from fomoe_pl.metrics import RoutingHealth


def routing_values(health: RoutingHealth) -> dict[str, float]:
    """Return `routing/<statistic>/mean` and `routing/<statistic>/layer_<ii>`; statistics as in `RoutingHealth`.

    The layers' numbers have two digits or more, so that they sort.
    """
    values = {}
    for key, value in health.compute().items():
        statistic, _, layer = key.partition("/layer_")
        name = f"layer_{int(layer):02d}" if layer else "mean"
        values[f"routing/{statistic}/{name}"] = float(value)
    return values


class RoutingHealthLogger(RoundCallback):
    """Logs the routing health of site 0's training steps since the last time, then resets it.

    Statistics: load entropy, coefficient of variation, MaxVio, starved experts, ghost fraction; see
    `fomoe_pl.metrics.routing` for their formulas and sources.

    Args:
        every_n_steps: Interval in optimizer steps where there are no rounds.
    """

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and reset."""
        health = observed_module(pl_module).routing_health
        if trainer.is_global_zero:
            log(trainer, routing_values(health))
        health.reset()
