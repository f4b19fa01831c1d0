"""Which experts are here: the only thing the model knows of sites."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fomoe_pl.model.config import ModelConfig

Routing = Literal["ghost", "partitioned"]


@dataclass(frozen=True)
class Residency:
    """The resident experts of every layer, and what becomes of the others (FoMoE §3.3).

    Attributes:
        routing: ``ghost`` scores all experts and drops picks of those that are not resident; ``partitioned`` scores
            and picks among the residents alone.
        experts: For each layer the sorted ids of its resident experts. Row r of that layer's stacked expert tensors
            is expert ``experts[layer][r]``.
    """

    routing: Routing
    experts: tuple[tuple[int, ...], ...]

    @classmethod
    def full(cls, config: ModelConfig) -> "Residency":
        """Return the residency of a whole model: every expert of every layer, in ghost mode."""
        return cls("ghost", (tuple(range(config.n_experts)),) * config.n_layers)

    def is_full(self, config: ModelConfig) -> bool:
        """Return whether every expert of every layer is resident."""
        return all(len(ids) == config.n_experts for ids in self.experts)

    def n_scored(self, layer: int, config: ModelConfig) -> int:
        """Return how many experts of a layer the router scores: all in ghost mode, else the residents."""
        return config.n_experts if self.routing == "ghost" else len(self.experts[layer])


@lru_cache(maxsize=4)  # a copy to the device makes the host wait
def resident_mask(residency: Residency, n_experts: int, device: torch.device) -> Tensor:
    """Return which experts are resident, bool (L,E), on a device; the same tensor for the same arguments."""
    mask_LE = torch.zeros(len(residency.experts), n_experts, dtype=torch.bool)
    for layer, ids in enumerate(residency.experts):
        mask_LE[layer, list(ids)] = True
    return mask_LE.to(device)
