from collections import Counter
from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import (
    Placement,
    Transfer,
    all_arcs,
    check_placement,
    gather_layer,
    migration,
    place,
    valid_overlaps,
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
    placement = placed(kind, size, seed=3, epoch=2)
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
    arcs = all_arcs(e, LAYERS, m, o)
    assert len(arcs) <= m
    for epoch in range(5):
        placement = placed("random", size, epoch=epoch)
        assert placement.holder_sets() == arcs
        pairs = [pair for sites in arcs for pair in placement.experts_of(sites)]
        assert sorted(pairs) == [(layer, expert) for layer in range(LAYERS) for expert in range(e)]


def test_layers_are_staggered() -> None:
    placement = placed("fixed", (4, 4, 1))
    assert [layer[0] for layer in placement.holders] == [(0,), (1,), (2,), (3,), (0,)]


def test_random_placement_follows_from_seed_and_epoch_alone() -> None:
    size = (8, 4, 2)
    assert placed("random", size, seed=1, epoch=3) == placed("random", size, seed=1, epoch=3)
    different = [placed("random", size, seed=s, epoch=t) for s in range(3) for t in range(3)]
    assert len(set(different)) == len(different)
    assert len({placed("random", size).holders[layer] for layer in (0, 4)}) == 2  # same stagger, another order
    assert placed("fixed", size, seed=1, epoch=3) == placed("fixed", size)


@pytest.mark.parametrize("size", [s for s in SIZES if s[0] <= 12], ids=str)
def test_migration_gives_every_new_holder_the_expert_from_an_old_one_and_nothing_else(
    size: tuple[int, int, int],
) -> None:
    old, new = placed("random", size, epoch=0), placed("random", size, epoch=1)
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
    with pytest.raises(ConfigError, match=r"between 1 and the number of sites \(4,.*\[2, 4\]"):
        check_placement(6, 4, overlap)


def test_indivisible_sizes_name_valid_overlaps_and_valid_numbers_of_experts() -> None:
    assert valid_overlaps(6, 4) == [2, 4]
    with pytest.raises(ConfigError, match=r"overlap = 3: 6 experts x overlap 3 .* 4 sites.* from \[2, 4\].*\[4, 8\]"):
        placed("fixed", (6, 4, 3))
    for experts in range(1, 20):
        for sites in range(1, 9):
            for overlap in range(1, sites + 1):
                if overlap in valid_overlaps(experts, sites):
                    check_placement(experts, sites, overlap)
                else:
                    with pytest.raises(ConfigError) as error:
                        check_placement(experts, sites, overlap)
                    near = error.value.hint.rpartition("[")[2].rstrip("]").split(", ")
                    assert near != [""]
                    for number in near:
                        check_placement(int(number), sites, overlap)


@pytest.mark.parametrize("kind", ["anything", "Fixed", "", None])
def test_an_unknown_kind_is_no_fixed_placement(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"placement = .* use fixed, random|placement = .*Use fixed, random"):
        placed(kind, (4, 2, 1))
