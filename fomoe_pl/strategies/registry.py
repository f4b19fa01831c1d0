"""Strategies by name: `--trainer.strategy fomoe` is `configs/strategy/fomoe.yaml` with one site a device."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.strategies.ddp import CountedDDPStrategy
from fomoe_pl.strategies.federated import FederatedStrategy
from fomoe_pl.strategies.single import SingleSiteStrategy

_DILOCO = OuterRule(rule="nesterov", lr=0.7, momentum=0.9)

REGISTERED: dict[str, tuple[type, str, dict[str, Any]]] = {
    "single_site": (SingleSiteStrategy, "the whole model on one device", {}),
    "ddp_counted": (CountedDDPStrategy, "stock DDP with counted bytes", {}),
    "local_sgd": (FederatedStrategy, "plain averaging, moments kept", {}),
    "photon": (FederatedStrategy, "plain averaging, moments reset", {"inner_moments": "reset"}),
    "diloco": (FederatedStrategy, "Nesterov outer step", {"outer": _DILOCO}),
    "local_adamw": (FederatedStrategy, "parameters and moments averaged", {"inner_moments": "average"}),
    "fomoe": (FederatedStrategy, "LocalAdamW, each expert on one site", {"inner_moments": "average", "overlap": 1}),
    "fomoe_partitioned": (
        FederatedStrategy,
        "fomoe with router rows that live with their experts",
        {"inner_moments": "average", "overlap": 1, "routing": "partitioned"},
    ),
    "fomoe_random": (
        FederatedStrategy,
        "fomoe with experts redrawn every round",
        {"inner_moments": "average", "overlap": 1, "placement": "random"},
    ),
}


def register() -> None:
    """Make the names known to Lightning (idempotent)."""
    for name, (cls, description, settings) in REGISTERED.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, cls, description=description, **settings)
