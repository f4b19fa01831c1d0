"""Placement: which site holds which expert (FoMoE, arXiv 2606.19025, section on placement).

The experts of a layer take positions 0..E-1 in an order that a policy chooses; which sites hold a position does not
depend on the policy. So all process groups can be made once, and a placement that is drawn again only moves experts.

Where sites are alike, holder sets are arcs of `overlap` neighbouring sites on the ring of sites: position p fills
`overlap` consecutive slots of the ring, and slot s belongs to site s mod M. Where they are not, because of capacities,
places, or experts that do not divide evenly, sites lie on a line, each as long as its experts, and position p is held
by the sites at p, p + E, ..., p + (overlap - 1) E (McNaughton's wrap-around rule). No site is longer than E, so they
are distinct; sites of one place lie together, so no expert has more holders there than it must. There are at most M
holder sets of arcs, and at most 2 M others, as layers take turns in two orders of the sites.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, cast, get_args

from fomoe_pl.errors import ConfigError

PlacementKind = Literal["fixed", "random"]


def shares(n_experts: int, n_sites: int, overlap: int, capacities: Sequence[int] | None = None) -> tuple[int, ...]:
    """Experts of a layer that each site holds.

    Args:
        n_experts: Experts of a layer, E.
        n_sites: Number of sites, M.
        overlap: Number of sites that hold each expert.
        capacities: One for each site; None is as equal as can be: where they differ, the first ones hold one more.

    Raises:
        ConfigError: Naming what would work.
    """
    if not 1 <= overlap <= n_sites:
        raise ConfigError("overlap", overlap, f"must be between 1 and the number of sites ({n_sites})",
                          f"choose one of {valid_overlaps(n_experts, n_sites)}")  # fmt: skip
    total = n_experts * overlap
    if total < n_sites:
        least = -(-n_sites // n_experts)
        hint = f"with {n_experts} experts choose overlap {least} or more, or set n_experts to {-(-n_sites // overlap)}"
        raise ConfigError("overlap", overlap, f"{n_experts} experts x overlap {overlap} leave some of the {n_sites} "
                          "sites without an expert", hint)  # fmt: skip
    if capacities is None:
        return tuple(total // n_sites + (site < total % n_sites) for site in range(n_sites))
    told = list(capacities)
    if len(told) != n_sites:
        raise ConfigError("capacities", told, f"there are {n_sites} sites", "give the experts of each of them")
    even = list(shares(n_experts, n_sites, overlap))
    if not all(1 <= n <= n_experts for n in told):
        rule = f"a site holds 1 to {n_experts} of a layer's experts"
        raise ConfigError("capacities", told, rule, f"such as {even}")
    if sum(told) != total:
        rule = f"must add up to {n_experts} experts x overlap {overlap} = {total}, not {sum(told)}"
        raise ConfigError("capacities", told, rule, f"such as {even}")
    return tuple(told)


def valid_overlaps(n_experts: int, n_sites: int) -> list[int]:
    """All overlaps with which every one of `n_sites` has an expert."""
    return [o for o in range(1, n_sites + 1) if n_experts * o >= n_sites]


def side_by_side(sets: Iterable[tuple[int, ...]], n_sites: int) -> list[tuple[int, ...]]:
    """Holder sets in an order in which those that share no site come together: they can be averaged at the same time.

    Sorted by their sites, each arc would wait for its neighbour, one after the other around the ring. In this order a
    round takes `overlap` averages' time where overlap divides the number of sites, instead of up to M.

    Args:
        sets: Sorted tuples of sites.
        n_sites: Number of sites M.
    """
    left = sorted(set(sets))
    starts = {sites: _start_of_arc(sites, n_sites) for sites in left}
    if None not in starts.values():
        return sorted(left, key=lambda sites: (cast(int, starts[sites]) % len(sites), starts[sites]))
    found: list[tuple[int, ...]] = []
    while left:
        busy: set[int] = set()
        for sites in list(left):
            if not busy & set(sites):
                busy |= set(sites)
                found.append(sites)
                left.remove(sites)
    return found


def _start_of_arc(sites: tuple[int, ...], n_sites: int) -> int | None:
    """The first site of neighbours on the ring; None of other sites."""
    if len(sites) == n_sites:
        return 0
    starts = [site for site in sites if (site - 1) % n_sites not in sites]
    return starts[0] if len(starts) == 1 else None


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
    """In which order the experts of a layer take their positions; a subclass is one method.

    Whatever the order, every expert has `overlap` holders and every site as many experts as it is to have, and the
    holder sets are those that process groups were made for.

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
    capacities: Sequence[int] | None = None,
    places: Sequence[str] | None = None,
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
        capacities: Experts of a layer that each site holds; None is equal shares.
        places: Of each site the place that it is in; sites of one place fail together. None: each fails alone.

    Returns:
        The placement; layers are staggered.

    Raises:
        ConfigError: If the sizes cannot be placed, or a policy's order is no permutation.
    """
    of_site = shares(n_experts, n_sites, overlap, capacities)
    policy = policy_of(placement, seed)
    holders_at = [_holders_at(layer, n_experts, overlap, of_site, places) for layer in range(n_layers)]
    layers = []
    for layer in range(n_layers):
        order = policy.order(layer, n_experts, draw, None if loads is None else loads[layer])
        if sorted(order) != list(range(n_experts)):
            rule = f"order() of layer {layer} must be a permutation of 0..{n_experts - 1}, not {list(order)}"
            raise ConfigError("placement", str(policy), rule, "return each expert exactly once")
        holders: list[tuple[int, ...]] = [()] * n_experts
        for sites, expert in zip(holders_at[layer], order, strict=True):
            holders[expert] = sites
        layers.append(tuple(holders))
    return Placement(tuple(layers), n_sites)


def _holders_at(
    layer: int, n_experts: int, overlap: int, of_site: Sequence[int], places: Sequence[str] | None
) -> list[tuple[int, ...]]:
    """The holders of each position of a layer; see the module."""
    n_sites = len(of_site)
    if places is None and len(set(of_site)) == 1:
        return [
            tuple(sorted((position * overlap + j + layer) % n_sites for j in range(overlap)))
            for position in range(n_experts)
        ]
    of_place: dict[str, list[int]] = {}
    for site in range(n_sites):
        of_place.setdefault(str(site) if places is None else places[site], []).append(site)
    groups = list(of_place.values())
    if layer % 2:  # in another order, so that not the same sites share experts in all layers
        groups = [_turned(sites, by) for by, sites in enumerate(groups[::2] + groups[1::2])]
    line = [site for sites in groups for site in sites]
    ends = list(accumulate(of_site[site] for site in line))
    return [
        tuple(sorted(line[bisect_right(ends, position + k * n_experts)] for k in range(overlap)))
        for position in range(n_experts)
    ]


def _turned(sites: list[int], by: int) -> list[int]:
    by %= len(sites)
    return sites[by:] + sites[:by]


def all_holder_sets(
    n_experts: int, n_layers: int, n_sites: int, overlap: int, *, capacities: Sequence[int] | None = None,
    places: Sequence[str] | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Every holder set that any placement of these sizes can have."""
    return place(
        "fixed", n_layers=n_layers, n_experts=n_experts, n_sites=n_sites, overlap=overlap, capacities=capacities,
        places=places,
    ).holder_sets()  # fmt: skip


def set_numbers(placement: Placement) -> dict[tuple[int, ...], int]:
    """A number for each holder set, for names: of arcs the first site, of others M and more."""
    sets = placement.holder_sets()
    starts = {sites: _start_of_arc(sites, placement.n_sites) for sites in sets}
    return {sites: placement.n_sites + i if start is None else start for i, (sites, start) in enumerate(starts.items())}


def in_one_place(placement: Placement, places: Sequence[str]) -> int:
    """Experts, over all layers, whose holders are all in one place, with which they would be lost.

    Args:
        placement: Who holds what.
        places: Of each site the place that it is in.
    """
    return sum(len({places[site] for site in sites}) == 1 for layer in placement.holders for sites in layer)


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
