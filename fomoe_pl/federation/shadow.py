"""Copies of absent experts: after a round one holder of each expert sends it, packed, to the sites that lack it.

The owner of an expert in checkpoints encodes the agreed value once, so that all copies of an expert are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fomoe_pl.codec import Codec
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.placement import Placement, Transfer


@dataclass(frozen=True)
class Copies:
    """This site's copies of the experts that it does not hold.

    Attributes:
        tensors: Name of a stacked expert tensor -> its copies, uint8 (A, bytes of an expert), a row for each absent
            expert of the layer, by id.
        codec: What packs an expert's row, flattened.
        refreshing: Gives memory for new copies, by the same names, and takes them when its block ends without an
            exception, all of them or none.
    """

    tensors: Mapping[str, Tensor]
    codec: Codec
    refreshing: Callable[[], AbstractContextManager[Mapping[str, Tensor]]]

    def encode(self, values: Tensor) -> Tensor:
        """Pack experts (R, ...) to uint8 (R, bytes)."""
        return self.codec.encode(values.flatten(1))

    def error(self, values: Tensor) -> Tensor:
        """How far copies are from experts (R, ...): squares of difference and values, summed, float32 (2,)."""
        exact = values.flatten(1).float()
        decoded = self.codec.decode(self.encode(values), exact.shape[1])
        return torch.stack([(decoded - exact).square().sum(), exact.square().sum()])

    def layout(self, layout: ParameterLayout) -> ParameterLayout:
        """The layout of the copies, of absent experts, whose placement is `Placement.complement`."""
        layers = {name: layout.expert_layer[name] for name in self.tensors}
        return ParameterLayout(self.tensors, layers, frozenset())


class Arriving:
    """Fresh copies on their way.

    Args:
        waits: Layer -> waits for its copies: absent expert -> its tensors' rows.
    """

    def __init__(self, waits: Mapping[int, Callable[[], Any]]) -> None:
        self._waits = dict(waits)

    def land(self) -> dict[int, Any]:
        """Wait until all of them are here: layer -> absent expert -> {(0, name): packed row}."""
        found = {layer: wait() for layer, wait in self._waits.items()}
        self._waits = {layer: partial(found.__getitem__, layer) for layer in found}
        return found


def quantisation_errors(
    copies: Copies, layout: ParameterLayout, placement: Placement, site: int,
    values_of: Callable[[str, list[int]], Tensor],
) -> Tensor:  # fmt: skip
    """How far copies of today's agreed values would be from these, of the experts that this site owns.

    Added over the sites every expert counts once. Where experts are, a tensor at a time is encoded, of a layer.

    Args:
        copies: This site's.
        layout: Which layer a tensor belongs to.
        placement: Who holds what.
        site: This one.
        values_of: Gives agreed values: those of whole experts of a tensor, by its name and their rows.

    Returns:
        Squares of the differences and of the values, float64 (L,2), on the CPU.
    """
    sums = torch.zeros(len(placement.holders), 2, dtype=torch.float64)
    found = []
    for name in copies.tensors:
        found.append(copies.error(values_of(name, owned_rows(placement, layout.expert_layer[name], site))))
    layers = torch.tensor([layout.expert_layer[name] for name in copies.tensors])
    return sums.index_add_(0, layers, torch.stack(found).cpu().double())


def owned_rows(placement: Placement, layer: int, site: int) -> list[int]:
    """Rows of this site's residents of a layer that it owns: those that it gives copies of."""
    residents = placement.residents_in(layer, site)
    return [row for row, expert in enumerate(residents) if placement.owner(layer, expert) == site]


def refresh_layer(placement: Placement, layer: int) -> list[Transfer]:
    """Each expert of a layer from its owner to all sites that lack it."""
    return [
        Transfer(layer, expert, placement.owner(layer, expert), receiver)
        for expert, sites in enumerate(placement.holders[layer])
        for receiver in range(placement.n_sites)
        if receiver not in sites
    ]
