"""Which experts one site of a run holds, from what its checkpoint says."""

from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.hub.source import site_view
from fomoe_pl.model.config import ModelConfig
from tests.hub.models import TINY

CONFIG = ModelConfig(**TINY)


@pytest.mark.parametrize(
    ("settings", "draw"),
    [
        ({}, 0),
        ({"routing": "partitioned"}, 0),
        ({"routing": "shadow", "shadow_bits": 2}, 0),
        ({"placement": "random", "placement_seed": 3}, 2),
    ],
)
def test_a_sites_experts_are_those_of_its_run(settings: dict[str, Any], draw: int) -> None:
    run = FederationConfig(overlap=1, **settings)
    training = {"n_sites": 2, "redraws": draw, "identity": run.identity(2)}
    placement = run.place(CONFIG.n_layers, CONFIG.n_experts, 2, draw)
    for site in range(2):
        assert site_view(CONFIG, training, site) == run.residency(placement.residents(site))


def test_a_site_with_older_copies_is_refused_rather_than_shown_with_others() -> None:
    run = FederationConfig(overlap=1, routing="shadow", shadow_refresh=2)
    training = {"n_sites": 2, "redraws": 0, "identity": run.identity(2)}
    with pytest.raises(ConfigError, match="copies of absent experts"):
        site_view(CONFIG, training, 1)
    full = {"n_sites": 2, "redraws": 0, "identity": FederationConfig(overlap=2, routing="shadow").identity(2)}
    assert site_view(CONFIG, full, 1).is_full(CONFIG)
