"""Placement: which site holds which expert (FoMoE, arXiv 2606.19025, section on placement).

Holder sets are always arcs of `overlap` neighbouring sites on the ring of sites: there are at most M of them, so
all process groups can be made once, and a random placement only redraws which experts sit on which arc.
Every expert of a layer fills `overlap` consecutive slots of the ring; slot s belongs to site s mod M. This gives
every expert exactly `overlap` distinct holders and every site exactly E * overlap / M experts, whenever M divides
E * overlap.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fomoe_pl.errors import ConfigError, check_choice

PlacementKind = Literal["fixed", "random"]


def check_placement(n_experts: int, n_sites: int, overlap: int) -> None:
    """Refuse sizes that cannot be placed.

    Args:
        n_experts: experts of a layer, E.
        n_sites: number of sites, M.
        overlap: number of sites that hold each expert.

    Raises:
        ConfigError: naming the overlaps that would work.
    """
    key = "trainer.strategy.init_args.overlap"
    if not 1 <= overlap <= n_sites:
        raise ConfigError(key, overlap, f"must be between 1 and the number of sites ({n_sites}, devices x num_nodes)",
                          f"choose one of {valid_overlaps(n_experts, n_sites)}")  # fmt: skip
    if n_experts * overlap % n_sites:
        valid = valid_overlaps(n_experts, n_sites)
        unit = n_sites // math.gcd(overlap, n_sites)
        below = n_experts // unit * unit
        near = [e for e in (below, below + unit) if e]
        raise ConfigError(
            key,
            overlap,
            f"{n_experts} experts x overlap {overlap} must be divisible by {n_sites} sites, "
            "so that every site holds equally many",
            f"with {n_experts} experts choose overlap from {valid}, or set n_experts to one of {near}",
        )


def valid_overlaps(n_experts: int, n_sites: int) -> list[int]:
    """All overlaps that place `n_experts` evenly on `n_sites`."""
    return [o for o in range(1, n_sites + 1) if n_experts * o % n_sites == 0]


def side_by_side(arcs: Iterable[tuple[int, ...]], n_sites: int) -> list[tuple[int, ...]]:
    """Arcs in an order in which those that share no site come together, so that they can be averaged at the same time.

    Sorted by their sites, each arc would wait for its neighbour, one after the other around the ring. In this order a
    round takes `overlap` averages' time where overlap divides the number of sites, instead of up to M.

    Args:
        arcs: sorted tuples of neighbouring sites on the ring.
        n_sites: number of sites M.
    """

    def first(sites: tuple[int, ...]) -> int:
        return next((site for site in sites if (site - 1) % n_sites not in sites), 0)

    return sorted(arcs, key=lambda sites: (first(sites) % len(sites), first(sites)))


@dataclass(frozen=True)
class Placement:
    """Holders of every expert of every layer.

    Attributes:
        holders: `holders[layer][expert]` is the sorted tuple of sites that hold it.
        n_sites: number of sites M.
    """

    holders: tuple[tuple[tuple[int, ...], ...], ...]
    n_sites: int

    def residents(self, site: int) -> tuple[tuple[int, ...], ...]:
        """Per layer the sorted ids of the experts that `site` holds."""
        return tuple(self.residents_in(layer, site) for layer in range(len(self.holders)))

    def residents_in(self, layer: int, site: int) -> tuple[int, ...]:
        """The sorted ids of the experts of one layer that `site` holds."""
        return tuple(e for e, sites in enumerate(self.holders[layer]) if site in sites)

    def holder_sets(self) -> list[tuple[int, ...]]:
        """The distinct holder sets, in `side_by_side` order: the same list, in the same order, on every rank."""
        return side_by_side({sites for layer in self.holders for sites in layer}, self.n_sites)

    def experts_of(self, sites: tuple[int, ...]) -> list[tuple[int, int]]:
        """All (layer, expert) whose holder set is exactly `sites`, in order."""
        return [(i, e) for i, layer in enumerate(self.holders) for e, held in enumerate(layer) if held == sites]

    def owner(self, layer: int, expert: int) -> int:
        """The one holder that writes this expert into a checkpoint (spread evenly over the holders)."""
        sites = self.holders[layer][expert]
        return sites[(layer + expert) % len(sites)]


def place(
    kind: PlacementKind, *, n_layers: int, n_experts: int, n_sites: int, overlap: int, seed: int = 0, epoch: int = 0
) -> Placement:
    """Place every expert of every layer; deterministic in its arguments.

    Args:
        kind: `fixed` ignores `seed` and `epoch`; `random` draws the experts' order from them, layer by layer.
        n_layers: layers L.
        n_experts: experts of a layer, E.
        n_sites: number of sites M.
        overlap: number of holders of each expert, 1..M.
        seed: seed of the random placement.
        epoch: how often the placement has been redrawn, 0 at the start.

    Returns:
        The placement; layers are staggered by one site each.

    Raises:
        ConfigError: if the kind is unknown, or the sizes do not divide.
    """
    check_choice("trainer.strategy.init_args.placement", kind, PlacementKind)
    check_placement(n_experts, n_sites, overlap)
    layers = []
    for layer in range(n_layers):
        order = list(range(n_experts))
        if kind == "random":
            random.Random(f"placement-{seed}-{epoch}-{layer}").shuffle(order)
        holders: list[tuple[int, ...]] = [()] * n_experts
        for position, expert in enumerate(order):
            holders[expert] = tuple(sorted((position * overlap + j + layer) % n_sites for j in range(overlap)))
        layers.append(tuple(holders))
    return Placement(tuple(layers), n_sites)


def all_arcs(n_experts: int, n_layers: int, n_sites: int, overlap: int) -> list[tuple[int, ...]]:
    """Every holder set that any placement of these sizes can have (at most M of them)."""
    return place("fixed", n_layers=n_layers, n_experts=n_experts, n_sites=n_sites, overlap=overlap).holder_sets()


@dataclass(frozen=True)
class Transfer:
    """One expert that goes from one site to another."""

    layer: int
    expert: int
    giver: int
    receiver: int


def migration(old: Placement, new: Placement) -> list[Transfer]:
    """The transfers that turn `old` into `new`: each new holder receives from one of the old holders, in turns."""
    return [
        Transfer(layer, expert, before[turn % len(before)], receiver)
        for layer, expert, before, after in _changes(old, new)
        for turn, receiver in enumerate(site for site in after if site not in before)
    ]


def _changes(old: Placement, new: Placement) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    for layer, (before, after) in enumerate(zip(old.holders, new.holders, strict=True)):
        for expert, (b, a) in enumerate(zip(before, after, strict=True)):
            yield layer, expert, b, a


def gather_layer(placement: Placement, layer: int) -> list[Transfer]:
    """The transfers after which every site has every expert of `layer` (for validating the global model)."""
    return [
        Transfer(layer, expert, sites[(receiver + expert) % len(sites)], receiver)
        for expert, sites in enumerate(placement.holders[layer])
        for receiver in range(placement.n_sites)
        if receiver not in sites
    ]
