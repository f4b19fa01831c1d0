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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fomoe_pl.errors import ConfigError

PlacementKind = Literal["fixed", "random"]


def check_placement(n_experts: int, n_sites: int, overlap: int) -> None:
    """Refuse sizes that cannot be placed.

    Args:
        n_experts: Experts of a layer, E.
        n_sites: Number of sites, M.
        overlap: Number of sites that hold each expert.

    Raises:
        ConfigError: Naming the overlaps that would work.
    """
    key = "overlap"
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
        arcs: Sorted tuples of neighbouring sites on the ring.
        n_sites: Number of sites M.
    """

    def first(sites: tuple[int, ...]) -> int:
        return next((site for site in sites if (site - 1) % n_sites not in sites), 0)

    return sorted(arcs, key=lambda sites: (first(sites) % len(sites), first(sites)))


@dataclass(frozen=True)
class Placement:
    """Holders of every expert of every layer.

    Attributes:
        holders: `holders[layer][expert]` is the sorted tuple of sites that hold it.
        n_sites: Number of sites M.
    """

    holders: tuple[tuple[tuple[int, ...], ...], ...]
    n_sites: int

    @classmethod
    def of_record(cls, record: Sequence[str], n_sites: int) -> Placement:
        """The placement that `record` has described.

        Args:
            record: Of each layer the holders of its experts.
            n_sites: Number of sites M.
        """
        holders = (tuple(tuple(map(int, sites.split(","))) for sites in layer.split()) for layer in record)
        return cls(tuple(holders), n_sites)

    @property
    def is_full(self) -> bool:
        """Whether every site holds every expert."""
        return all(len(sites) == self.n_sites for layer in self.holders for sites in layer)

    def record(self) -> list[str]:
        """For files: a line for each layer, the holders of its experts in order, `0,1 2,3 0,1`."""
        return [" ".join(",".join(map(str, sites)) for sites in layer) for layer in self.holders]

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

    def complement(self) -> Placement:
        """Who lacks each expert."""
        lacking = tuple(
            tuple(tuple(site for site in range(self.n_sites) if site not in sites) for sites in layer)
            for layer in self.holders
        )
        return Placement(lacking, self.n_sites)

    def owner(self, layer: int, expert: int) -> int:
        """The one holder that writes this expert into a checkpoint (spread evenly over the holders)."""
        sites = self.holders[layer][expert]
        return sites[(layer + expert) % len(sites)]


class PlacementPolicy(ABC):
    """In which order the experts of a layer sit on the ring of sites; a subclass is one method.

    Whatever the order, every expert has `overlap` holders and every site equally many experts, and the holder sets are
    those that process groups were made for.

    Attributes:
        moves: Whether experts are placed again every `reshuffle_rounds` rounds; they travel then.
        sees_loads: Whether `order` needs to know how often experts were picked. Sites add that up in a small message.
    """

    moves: ClassVar[bool] = False
    sees_loads: ClassVar[bool] = False

    def __str__(self) -> str:
        """How logs and the identity of a checkpoint name it; the same name, the same orders."""
        return type(self).__name__.lower()

    @abstractmethod
    def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
        """The experts of a layer in the order in which they take their places; a function of its arguments alone.

        Neighbours in the order share holders, as far as `overlap` allows.

        Args:
            layer: 0..L-1.
            n_experts: Experts of the layer, E.
            draw: How often experts have been placed before, 0 at the start.
            loads: Of each expert its picks over all sites, ghosts included, since the last draw; None at the start,
                and for policies that do not see loads.

        Returns:
            A permutation of 0..E-1.
        """


class Fixed(PlacementPolicy):
    """Experts stay where they are, in the order of their ids."""

    def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
        """The ids in order."""
        return range(n_experts)


class Random(PlacementPolicy):
    """Experts are dealt out at random, layer by layer (FoMoE, arXiv 2606.19025, random placement).

    Args:
        seed: Of the draws.
    """

    moves = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
        """A permutation that follows from seed, draw and layer."""
        order = list(range(n_experts))
        random.Random(f"placement-{self.seed}-{draw}-{layer}").shuffle(order)
        return order


def policy_of(placement: PlacementKind | PlacementPolicy, seed: int = 0) -> PlacementPolicy:
    """The policy of a name, or the one that is given.

    Args:
        placement: `fixed`, `random`, or a policy.
        seed: Of the random one.

    Raises:
        ConfigError: For another name.
    """
    if isinstance(placement, PlacementPolicy):
        return placement
    if placement not in get_args(PlacementKind):
        rule, hint = "is no placement", "type fixed or random, or give the class_path of a PlacementPolicy"
        raise ConfigError("placement", placement, rule, hint)
    return Random(seed) if placement == "random" else Fixed()


def place(
    placement: PlacementKind | PlacementPolicy,
    *,
    n_layers: int,
    n_experts: int,
    n_sites: int,
    overlap: int,
    seed: int = 0,
    draw: int = 0,
    loads: Sequence[Sequence[float]] | None = None,
) -> Placement:
    """Place every expert of every layer; deterministic in its arguments.

    Args:
        placement: `fixed`, `random`, or a policy.
        n_layers: Layers L.
        n_experts: Experts of a layer, E.
        n_sites: Number of sites M.
        overlap: Number of holders of each expert, 1..M.
        seed: Seed of the random placement.
        draw: How often experts have been placed before, 0 at the start.
        loads: For policies that see them, of each layer and expert.

    Returns:
        The placement; layers are staggered by one site each.

    Raises:
        ConfigError: If the sizes do not divide, or a policy's order is no permutation.
    """
    check_placement(n_experts, n_sites, overlap)
    policy = policy_of(placement, seed)
    layers = []
    for layer in range(n_layers):
        order = policy.order(layer, n_experts, draw, None if loads is None else loads[layer])
        if sorted(order) != list(range(n_experts)):
            rule = f"order() of layer {layer} must be a permutation of 0..{n_experts - 1}, not {list(order)}"
            raise ConfigError("placement", str(policy), rule, "return each expert exactly once")
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
