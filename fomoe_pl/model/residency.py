"""Which experts are resident: all that the model knows of sites."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fomoe_pl.codec import Codec, codec_of
from fomoe_pl.errors import check_choice
from fomoe_pl.model.config import ModelConfig

Routing = Literal["ghost", "partitioned", "shadow"]
ShadowBits = Literal[2, 4, 8, 16, 32]


@dataclass(frozen=True)
class Shadow:
    """How copies of absent experts are kept and used (routing `shadow`).

    Attributes:
        bits: Of a number in a copy; see `codec.py`. 32 is for tests.
        input_gradient: Whether tokens get gradients through copies. Gates get theirs either way.

    Raises:
        ConfigError: If there is no such number of bits.
    """

    bits: ShadowBits = 4
    input_gradient: bool = True

    def __post_init__(self) -> None:
        check_choice("shadow_bits", self.bits, ShadowBits)

    @property
    def codec(self) -> Codec:
        """What turns an expert's matrix, flattened, into the bytes of its copy."""
        return codec_of(self.bits)


@dataclass(frozen=True)
class Residency:
    """The resident experts of every layer, and what becomes of the others (FoMoE §3.3).

    Attributes:
        routing: `ghost` scores all experts and drops picks of those that are not resident; `partitioned` scores
            and picks among the residents alone; `shadow` scores all experts and computes picks of those that are not
            resident with copies, which are not trained.
        experts: For each layer the sorted ids of its resident experts. Row r of that layer's stacked expert tensors
            is expert `experts[layer][r]`.
        shadow: How copies are kept; used with `shadow` routing.
    """

    routing: Routing
    experts: tuple[tuple[int, ...], ...]
    shadow: Shadow = Shadow()

    @classmethod
    def full(cls, config: ModelConfig) -> "Residency":
        """Return the residency of a whole model: every expert of every layer, in ghost mode."""
        return cls("ghost", (tuple(range(config.n_experts)),) * config.n_layers)

    def is_full(self, config: ModelConfig) -> bool:
        """Return whether every expert of every layer is resident."""
        return all(len(ids) == config.n_experts for ids in self.experts)

    def n_scored(self, layer: int, config: ModelConfig) -> int:
        """Return how many experts of a layer the router scores: the residents in partitioned mode, else all."""
        return len(self.experts[layer]) if self.routing == "partitioned" else config.n_experts

    def absent(self, layer: int, config: ModelConfig) -> tuple[int, ...]:
        """Return the sorted ids of a layer's experts that are not resident."""
        return absent_ids(config.n_experts, self.experts[layer])


def absent_ids(n_experts: int, resident: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sorted ids of those of E experts that are not resident."""
    return tuple(sorted(set(range(n_experts)) - set(resident)))


@lru_cache(maxsize=4)  # a copy to the device makes the host wait
def resident_mask(residency: Residency, n_experts: int, device: torch.device) -> Tensor:
    """Return which experts are resident, bool (L,E), on a device; the same tensor for the same arguments."""
    mask_LE = torch.zeros(len(residency.experts), n_experts, dtype=torch.bool)
    for layer, ids in enumerate(residency.experts):
        mask_LE[layer, list(ids)] = True
    return mask_LE.to(device)
