"""Strategies by name: `--trainer.strategy fomoe` is `configs/strategy/fomoe.yaml`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.strategies.ddp import CountedDDPStrategy
from fomoe_pl.strategies.federated import FederatedStrategy
from fomoe_pl.strategies.single import SingleSiteStrategy

_DILOCO = Nesterov(lr=0.7, momentum=0.9)
_K = 8  # local steps, as in the files
_LOCAL_ADAMW: dict[str, Any] = {"local_steps": _K, "inner_moments": "average"}
_FOMOE: dict[str, Any] = {**_LOCAL_ADAMW, "overlap": 2}
_SHADOW: dict[str, Any] = {**_FOMOE, "routing": "shadow", "shadow_bits": 4, "shadow_refresh": 1}
_LEAN: dict[str, Any] = {"wire_codec": "int4", "error_feedback": True, "moments_codec": "int8", "moments_every": 1}

# A test holds the settings of each name equal to those of its file.
REGISTERED: dict[str, tuple[type, str, dict[str, Any]]] = {
    "single_site": (SingleSiteStrategy, "the whole model on one device", {}),
    "ddp_counted": (CountedDDPStrategy, "stock DDP with counted bytes", {}),
    "local_sgd": (FederatedStrategy, "plain averaging, moments kept", {"local_steps": _K}),
    "photon": (FederatedStrategy, "plain averaging, moments reset", {"local_steps": _K, "inner_moments": "reset"}),
    "diloco": (FederatedStrategy, "Nesterov outer step", {"local_steps": _K, "outer": _DILOCO}),
    "local_adamw": (FederatedStrategy, "parameters and moments averaged", _LOCAL_ADAMW),
    "local_adamw_lean": (FederatedStrategy, "local_adamw in few bits", {**_LOCAL_ADAMW, **_LEAN}),
    "fomoe": (FederatedStrategy, "LocalAdamW, each expert on two sites", _FOMOE),
    "fomoe_overlap1": (FederatedStrategy, "fomoe, each expert on one site", {**_FOMOE, "overlap": 1}),
    "fomoe_partitioned": (
        FederatedStrategy, "fomoe with router rows that live with their experts", {**_FOMOE, "routing": "partitioned"}
    ),
    "fomoe_shadow": (FederatedStrategy, "fomoe with frozen 4-bit copies of absent experts", _SHADOW),
    "fomoe_lean": (FederatedStrategy, "fomoe_shadow in few bits", {**_SHADOW, **_LEAN}),
    "fomoe_overlapped": (
        FederatedStrategy, "fomoe_lean, averaged in turns while sites train",
        {**_SHADOW, **_LEAN, "fragments": 4, "delay": 1},
    ),
    "fomoe_random": (
        FederatedStrategy, "fomoe with experts dealt anew every fourth round",
        {**_FOMOE, "placement": "random", "reshuffle_rounds": 4},
    ),
    "fomoe_diloco": (
        FederatedStrategy, "fomoe with DiLoCo's outer step", {**_FOMOE, "outer": _DILOCO, "inner_moments": "keep"}
    ),
}  # fmt: skip


def register() -> None:
    """Make the names known to Lightning (idempotent)."""
    for name, (cls, description, settings) in REGISTERED.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, cls, description=description, **settings)
