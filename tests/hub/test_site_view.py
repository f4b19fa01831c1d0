"""Which experts one site of a run holds, from what its checkpoint says."""

from collections.abc import Sequence
from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import PlacementPolicy
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.hub.source import site_view
from fomoe_pl.model.config import ModelConfig
from tests.hub.models import TINY

CONFIG = ModelConfig(**TINY)


class MostPickedFirst(PlacementPolicy):
    """One of somebody's own, which the name alone does not give back."""

    moves = sees_loads = True

    def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
        return sorted(range(n_experts), key=lambda e: -(loads or [0.0] * n_experts)[e])


def saved(run: FederationConfig, n_sites: int, draw: int = 0, loads: Any = None) -> dict[str, Any]:
    placement = run.place(CONFIG.n_layers, CONFIG.n_experts, n_sites, draw, loads)
    return {"n_sites": n_sites, "identity": run.identity(n_sites), "placement": placement.record()}


@pytest.mark.parametrize(
    ("settings", "draw"),
    [
        ({}, 0),
        ({"overlap": 2}, 0),
        ({"routing": "partitioned"}, 0),
        ({"routing": "shadow", "shadow_bits": 2}, 0),
        ({"placement": "random", "placement_seed": 3}, 2),
        ({"placement": MostPickedFirst()}, 1),
    ],
)
def test_a_sites_experts_are_those_of_its_run(settings: dict[str, Any], draw: int) -> None:
    run = FederationConfig(**{"overlap": 1, **settings})
    loads = [[3.0, 9.0, 0.0, 5.0, 1.0, 2.0]] * CONFIG.n_layers
    placement = run.place(CONFIG.n_layers, CONFIG.n_experts, 3, draw, loads)
    for site in range(3):
        assert site_view(CONFIG, saved(run, 3, draw, loads), site) == run.residency(placement.residents(site))


def test_a_site_with_older_copies_is_refused_rather_than_shown_with_others() -> None:
    with pytest.raises(ConfigError, match="copies of absent experts"):
        site_view(CONFIG, saved(FederationConfig(overlap=1, routing="shadow", shadow_refresh=2), 2), 1)


def test_where_every_site_holds_everything() -> None:
    for run in (FederationConfig(overlap=2), FederationConfig(overlap=2, routing="shadow", shadow_refresh=2)):
        training = saved(run, 2)
        del training["placement"]  # as in a checkpoint
        assert site_view(CONFIG, training, 1).is_full(CONFIG)
    assert site_view(CONFIG, {"n_sites": 2, "identity": {"strategy": "CountedDDPStrategy"}}, 1).is_full(CONFIG)


def test_a_checkpoint_that_does_not_say_is_refused() -> None:
    training = saved(FederationConfig(overlap=1), 2)
    del training["placement"]
    with pytest.raises(ConfigError, match="which experts each site holds"):
        site_view(CONFIG, training, 1)
