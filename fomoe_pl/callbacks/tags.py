"""Measured tensors as logged numbers by tag: one for each layer, and their mean."""

from __future__ import annotations

import math

from torch import Tensor

from fomoe_pl.federation.movement import AGREED, MEAN, OWN, OWN_NORM
from fomoe_pl.metrics import RoutingHealth
from fomoe_pl.metrics.drift import mean_cosine, relative_drift
from fomoe_pl.model.residency import Routing


def routing_values(health: RoutingHealth, routing: Routing = "ghost") -> dict[str, float]:
    """Return `routing/<statistic>/mean` and `routing/<statistic>/layer_<ii>`; statistics as in `RoutingHealth`.

    Layer numbers have at least two digits, so that they sort. With shadow routing the picks of absent experts are
    no ghosts, copies have served them: `copy_fraction` and `copy_excess`.
    Custom statistics are under `statistic/` instead.
    """
    values: dict[str, float] = {}
    for statistic, value_L in health.by_layer().items():
        if routing == "shadow":
            statistic = statistic.replace("ghost_", "copy_")
        values |= _named(f"routing/{statistic}", value_L, float(value_L.mean()))
    for name, value_L in health.named().items():
        values |= by_layer(f"statistic/{name}", value_L)
    return values


def by_layer(name: str, value_L: Tensor) -> dict[str, float]:
    """Return `<name>/mean` and `<name>/layer_<ii>`, without NaNs."""
    values = _named(name, value_L, float(value_L.nanmean()))
    return {key: value for key, value in values.items() if not math.isnan(value)}


def _named(name: str, value_L: Tensor, mean: float) -> dict[str, float]:
    # All layers in one list: reading a tensor element by element takes ten times as long.
    return {f"{name}/mean": mean} | {f"{name}/layer_{i:02d}": value for i, value in enumerate(value_L.tolist())}


def copy_errors(sums_L2: Tensor) -> dict[str, float]:
    """Return `routing/copy_error/...`: norm of the error of quantisation over that of the experts.

    Args:
        sums_L2: Squares of errors and of values, of all sites.
    """
    return by_layer("routing/copy_error", (sums_L2[:, 0] / sums_L2[:, 1]).sqrt())


def movement_values(
    values: dict[str, float], dense: Tensor, expert_LE4: Tensor, sites: Tensor, holders_LE: Tensor
) -> Tensor:
    """Add drift and pseudo-gradients to `values`; return the drift of each expert."""
    own_LE, mean_LE, agreed_LE = expert_LE4[..., OWN], expert_LE4[..., MEAN] / holders_LE, expert_LE4[..., AGREED]
    drift_LE = relative_drift(own_LE, mean_LE, agreed_LE / holders_LE, holders_LE)
    values |= by_layer("routing/drift", drift_LE.nanmean(dim=1))
    cosine_LE = mean_cosine(own_LE, mean_LE, expert_LE4[..., OWN_NORM], holders_LE)
    values |= by_layer("routing/drift_cosine", cosine_LE.nanmean(dim=1))
    values |= by_layer("pseudo_gradient/expert_norm", mean_LE.sqrt().mean(dim=1))
    own, mean = dense[OWN], dense[MEAN] / sites[0]
    values["pseudo_gradient/dense_norm"] = float(mean.sqrt())
    if sites > 1:
        values["pseudo_gradient/dense_drift"] = float(relative_drift(own, mean, dense[AGREED] / sites[0], sites[0]))
        values["pseudo_gradient/dense_cosine"] = float(mean_cosine(own, mean, dense[OWN_NORM], sites[0]))
    return drift_LE
