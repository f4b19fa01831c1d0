import itertools

import numpy as np
import pytest

from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, partition
from fomoe_pl.errors import ConfigError

DOMAINS = [DomainSize("a", 16, 600), DomainSize("b", 17, 300), DomainSize("c", 40, 100)]


def readers(plans: list[list[StreamPlan]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Who reads each (domain, shard)."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for site, workers in enumerate(plans):
        for worker, plan in enumerate(workers):
            for domain, shards in zip(plan.domains, plan.shards, strict=True):
                for shard in shards:
                    found.setdefault((domain, shard), []).append((site, worker))
    return found


@pytest.mark.parametrize("split", ["iid", "domain", "dirichlet"])
@pytest.mark.parametrize(("n_sites", "n_workers"), [(1, 1), (2, 3), (3, 1), (4, 2), (5, 3), (8, 2)])
def test_every_shard_has_one_reader(split: SplitKind, n_sites: int, n_workers: int) -> None:
    plans = partition(DOMAINS, n_sites, n_workers, split)
    found = readers(plans)
    assert set(found) == {(d, shard) for d, size in enumerate(DOMAINS) for shard in range(size.shards)}
    assert all(len(who) == 1 for who in found.values())
    assert all(plan.weights == workers[0].weights for workers in plans for plan in workers)
    for plan in itertools.chain(*plans):
        assert sum(plan.weights) == pytest.approx(1)
        assert len(plan.domains) == len(plan.weights) == len(plan.shards)
        assert all(plan.shards)


def test_iid_mixes_by_tokens() -> None:
    for plan in itertools.chain(*partition(DOMAINS, 4, 2)):
        assert plan.domains == (0, 1, 2)
        assert plan.weights == pytest.approx((0.6, 0.3, 0.1))


def test_domains_are_dealt_to_fewer_sites() -> None:
    plans = partition(DOMAINS, 2, 1, "domain")
    assert [plan.domains for (plan,) in plans] == [(0, 2), (1,)]
    assert plans[0][0].weights == pytest.approx((6 / 7, 1 / 7))


def test_more_sites_than_domains_share() -> None:
    plans = partition(DOMAINS, 5, 2, "domain")
    assert [plan.domains for plan, _ in plans] == [(0,), (1,), (2,), (0,), (1,)]
    assert [len(plan.shards[0]) for plan in plans[0] + plans[3]] == [4, 4, 4, 4]


def test_dirichlet_follows_alpha_and_seed() -> None:
    def weights(alpha: float, seed: int) -> np.ndarray:
        return np.array([plan.weights for (plan,) in partition(DOMAINS, 16, 1, "dirichlet", alpha, seed)])

    assert np.array_equal(weights(0.3, 0), weights(0.3, 0))
    assert not np.array_equal(weights(0.3, 0), weights(0.3, 1))
    assert np.all(weights(0.01, 0).max(axis=1) > 0.6)
    assert np.allclose(weights(1e6, 0), 1 / 3, atol=0.01)
    with pytest.raises(ConfigError, match="dirichlet_alpha"):
        weights(0, 0)


def test_too_few_shards_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"'a' has 16 .* 6 sites x 3 .* need 18.*at most 2.*--shards_per_domain 18"):
        partition(DOMAINS, 6, 3)
    with pytest.raises(ConfigError, match="Use fewer sites"):
        partition(DOMAINS, 17, 1)
    assert partition(DOMAINS, 6, 3, "domain")
