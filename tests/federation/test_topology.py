from fomoe_pl.federation.topology import Topology


def test_ranks_are_numbered_site_by_site() -> None:
    topology = Topology(n_sites=3, ranks_per_site=2, rank=3)
    assert (topology.site, topology.place, topology.world_size) == (1, 1, 6)
    assert topology.peers((0, 2), 1) == (1, 5)
