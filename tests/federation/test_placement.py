from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import (
    Placement,
    PlacementPolicy,
    Transfer,
    all_holder_sets,
    gather_layer,
    in_one_place,
    migration,
    place,
    shares,
)

LAYERS = 5
SIZES = [(e, m, o) for e in (1, 4, 6, 8, 12, 64) for m in range(1, 9) for o in range(1, m + 1) if e * o % m == 0]

KINDS = ("fixed", "random")


def placed(kind: Any, size: tuple[int, int, int], **options: Any) -> Placement:
    e, m, o = size
    return place(kind, n_layers=LAYERS, n_experts=e, n_sites=m, overlap=o, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_expert_has_exactly_overlap_holders_and_every_site_equally_many_experts(
    kind: Any, size: tuple[int, int, int]
) -> None:
    e, m, o = size
    placement = placed(kind, size, seed=3, draw=2)
    assert len(placement.holders) == LAYERS
    for layer in placement.holders:
        assert len(layer) == e
        assert all(len(set(sites)) == o and list(sites) == sorted(sites) for sites in layer)
        assert Counter(site for sites in layer for site in sites) == dict.fromkeys(range(m), e * o // m)
    for site in range(m):
        for ids, layer in zip(placement.residents(site), placement.holders, strict=True):
            assert list(ids) == [expert for expert in range(e) if site in layer[expert]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_at_most_as_many_holder_sets_as_sites_whatever_is_drawn(size: tuple[int, int, int]) -> None:
    e, m, o = size
    arcs = all_holder_sets(e, LAYERS, m, o)
    assert len(arcs) <= m
    for epoch in range(5):
        placement = placed("random", size, draw=epoch)
        assert placement.holder_sets() == arcs
        pairs = [pair for sites in arcs for pair in placement.experts_of(sites)]
        assert sorted(pairs) == [(layer, expert) for layer in range(LAYERS) for expert in range(e)]


def test_layers_are_staggered() -> None:
    placement = placed("fixed", (4, 4, 1))
    assert [layer[0] for layer in placement.holders] == [(0,), (1,), (2,), (3,), (0,)]


def test_random_placement_follows_from_seed_and_epoch_alone() -> None:
    size = (8, 4, 2)
    assert placed("random", size, seed=1, draw=3) == placed("random", size, seed=1, draw=3)
    different = [placed("random", size, seed=s, draw=t) for s in range(3) for t in range(3)]
    assert len(set(different)) == len(different)
    assert len({placed("random", size).holders[layer] for layer in (0, 4)}) == 2  # same stagger, another order
    assert placed("fixed", size, seed=1, draw=3) == placed("fixed", size)


@pytest.mark.parametrize("size", [s for s in SIZES if s[0] <= 12], ids=str)
def test_migration_gives_every_new_holder_the_expert_from_an_old_one_and_nothing_else(
    size: tuple[int, int, int],
) -> None:
    old, new = placed("random", size, draw=0), placed("random", size, draw=1)
    transfers = migration(old, new)
    expected = {
        (layer, expert, site)
        for layer in range(LAYERS)
        for expert in range(size[0])
        for site in new.holders[layer][expert]
        if site not in old.holders[layer][expert]
    }
    assert len(transfers) == len(expected)
    assert {(t.layer, t.expert, t.receiver) for t in transfers} == expected
    assert all(t.giver in old.holders[t.layer][t.expert] for t in transfers)


def test_migration_takes_givers_in_turns() -> None:
    old, new = Placement((((0, 1),),), 4), Placement((((2, 3),),), 4)
    assert migration(old, new) == [Transfer(0, 0, 0, 2), Transfer(0, 0, 1, 3)]


@pytest.mark.parametrize("size", [s for s in SIZES if s[0] <= 12], ids=str)
def test_gather_layer_completes_every_site_once(size: tuple[int, int, int]) -> None:
    e, m, _ = size
    placement = placed("random", size)
    for layer in range(LAYERS):
        transfers = gather_layer(placement, layer)
        assert all(t.layer == layer and t.giver in placement.holders[layer][t.expert] for t in transfers)
        arrived = Counter((t.expert, t.receiver) for t in transfers)
        own = Counter((expert, site) for site in range(m) for expert in placement.residents(site)[layer])
        assert arrived + own == dict.fromkeys([(expert, site) for expert in range(e) for site in range(m)], 1)


def test_owners_are_holders_and_spread() -> None:
    placement = placed("fixed", (8, 4, 2))
    owners = [placement.owner(layer, expert) for layer in range(LAYERS) for expert in range(8)]
    assert all(owners[layer * 8 + e] in placement.holders[layer][e] for layer in range(LAYERS) for e in range(8))
    assert set(owners) == {0, 1, 2, 3}


@pytest.mark.parametrize("overlap", [0, -1, 5])
def test_overlap_outside_the_sites_names_the_valid_ones(overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"between 1 and the number of sites \(4\).*\[1, 2, 3, 4\]"):
        shares(6, 4, overlap)


def test_shares_differ_by_at_most_one_and_none_is_empty() -> None:
    assert shares(32, 3, 1) == (11, 11, 10)
    for experts in range(1, 20):
        for sites in range(1, 9):
            for overlap in range(1, sites + 1):
                if experts * overlap >= sites:
                    found = shares(experts, sites, overlap)
                    assert (sum(found), len(found)) == (experts * overlap, sites)
                    assert max(found) - min(found) <= 1
                else:
                    with pytest.raises(ConfigError, match="without an expert") as error:
                        shares(experts, sites, overlap)
                    more, _, larger = error.value.hint.partition(", or set n_experts to ")
                    shares(experts, sites, int(more.split("overlap ")[1].split()[0]))
                    shares(int(larger), sites, overlap)


UNLIKE: list[dict[str, Any]] = [
    {"n_experts": 32, "n_sites": 3, "overlap": 1},
    {"n_experts": 7, "n_sites": 4, "overlap": 3},
    {"n_experts": 8, "n_sites": 4, "overlap": 2, "capacities": (8, 4, 3, 1)},
    {"n_experts": 8, "n_sites": 4, "overlap": 2, "places": ("eu", "us", "eu", "us")},
    {"n_experts": 64, "n_sites": 8, "overlap": 3, "capacities": (64, 32, 32, 16, 16, 16, 8, 8)},
    {"n_experts": 12, "n_sites": 6, "overlap": 3, "places": ("a", "a", "b", "c", "b", "c")},
    {"n_experts": 9, "n_sites": 5, "overlap": 2, "capacities": (3, 4, 5, 4, 2), "places": ("a", "b", "a", "b", "b")},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", UNLIKE, ids=str)
def test_sites_that_are_unlike_hold_what_they_can_and_holder_sets_stay_few(sizes: dict[str, Any], kind: Any) -> None:
    n_experts, n_sites, overlap = sizes["n_experts"], sizes["n_sites"], sizes["overlap"]
    of_site = shares(n_experts, n_sites, overlap, sizes.get("capacities"))
    rest = {key: sizes[key] for key in ("capacities", "places") if key in sizes}
    sets = all_holder_sets(n_experts, LAYERS, n_sites, overlap, **rest)
    assert len(sets) <= 2 * n_sites
    for draw in range(3):
        placement = place(kind, n_layers=LAYERS, draw=draw, **sizes)
        assert placement.holder_sets() == sets
        for layer in placement.holders:
            assert all(len(set(sites)) == overlap and list(sites) == sorted(sites) for sites in layer)
            assert Counter(site for sites in layer for site in sites) == dict(enumerate(of_site))
        if "places" in sizes:
            names = sizes["places"]
            together = Counter({name: sum(n for n, at in zip(of_site, names, strict=True) if at == name)
                                for name in names})  # fmt: skip
            for layer in placement.holders:
                for sites in layer:
                    for name, n in Counter(names[site] for site in sites).items():
                        assert n <= -(-together[name] // n_experts)  # no more than there must be
            alone = in_one_place(placement, names)
            must = LAYERS * sum(max(0, n - (overlap - 1) * n_experts) for n in together.values())
            assert alone == must


def test_holder_sets_that_share_no_site_follow_each_other() -> None:
    placement = place("fixed", n_layers=2, n_experts=8, n_sites=4, overlap=2, places=("a", "a", "b", "b"))
    assert placement.holder_sets() == [(0, 2), (1, 3), (0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("capacities", "rule"),
    [
        ((8, 8), "there are 3 sites"),
        ((9, 4, 3), "1 to 8"),
        ((8, 8, 0), "1 to 8"),
        ((8, 4, 3), "must add up to .* = 16"),
    ],
)
def test_capacities_that_do_not_fit_are_refused_with_some_that_do(capacities: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        shares(8, 3, 2, capacities)


class HeaviestApart(PlacementPolicy):
    """The most picked experts take turns, so that they sit on different sites: written outside of the package."""

    moves = sees_loads = True

    def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
        return sorted(range(n_experts), key=lambda e: (-loads[e] if loads else 0, e))


def test_a_policy_may_see_loads() -> None:
    sizes = {"n_layers": 2, "n_experts": 4, "n_sites": 4, "overlap": 1}
    assert place(HeaviestApart(), **sizes) == place("fixed", **sizes)
    placement = place(HeaviestApart(), **sizes, draw=1, loads=[[0, 1, 2, 3], [5, 0, 0, 0]])
    assert [placement.holders[0][e] for e in (3, 2, 1, 0)] == [(0,), (1,), (2,), (3,)]
    assert placement.holders[1][0] == (1,)  # layers are staggered


def test_an_unknown_placement_and_an_order_that_loses_an_expert_are_refused() -> None:
    sizes = {"n_layers": 1, "n_experts": 2, "n_sites": 2, "overlap": 1}
    for unknown in ("anything", "Fixed", ""):
        with pytest.raises(ConfigError, match=r"fixed or random"):
            place(unknown, **sizes)

    class Twice(PlacementPolicy):
        def order(self, layer: int, n_experts: int, draw: int, loads: Sequence[float] | None) -> Sequence[int]:
            return [0, 0]

    with pytest.raises(ConfigError, match="permutation"):
        place(Twice(), **sizes)
