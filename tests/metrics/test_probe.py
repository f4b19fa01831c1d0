import itertools
import math

import pytest
import torch
from torch import Tensor

from fomoe_pl.federation.packing import digits, pack_counts, unpack_counts
from fomoe_pl.metrics.drift import mean_cosine, relative_drift
from fomoe_pl.metrics.probe import pick_overlap, picked_by, row_similarity, site_agreement


def random_picks(seed: int, layers: int = 3, tokens: int = 20, experts: int = 6, k: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, tokens, experts, generator=generator).topk(k).indices


def test_overlap_by_hand() -> None:
    first = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    second = torch.tensor([[[1, 0], [2, 5]], [[4, 5], [0, 1]]])
    assert pick_overlap(first, second).tolist() == [0.75, 0.0]  # order does not matter
    assert pick_overlap(first, first).tolist() == [1, 1]


def test_overlap_of_nothing_is_undefined_and_of_one_expert_is_whole() -> None:
    assert pick_overlap(torch.zeros(1, 0, 2, dtype=torch.int64), torch.zeros(1, 0, 2, dtype=torch.int64)).isnan().all()
    alone = torch.zeros(1, 5, 1, dtype=torch.int64)
    assert pick_overlap(alone, alone).tolist() == [1]


def test_agreement_is_the_mean_overlap_of_pairs_where_all_score_all() -> None:
    sites = [random_picks(seed) for seed in range(4)]
    counts = sum(picked_by(picks, 6) for picks in sites)
    assert isinstance(counts, Tensor)
    agreement_L = site_agreement(counts, torch.full((3, 6), 4.0))
    pairs = [pick_overlap(a, b) for a, b in itertools.combinations(sites, 2)]
    torch.testing.assert_close(agreement_L, torch.stack(pairs).mean(dim=0))


def test_agreement_counts_only_experts_that_two_sites_score() -> None:
    # Sites 0 and 1 score experts 0, 1; sites 2 and 3 score 2, 3; a token each, one pick: 0 and 0, 2 and 3.
    counts = torch.tensor([[[2, 0, 1, 1]]])
    assert site_agreement(counts, torch.full((1, 4), 2.0)).item() == pytest.approx(2 / 4)
    # Nobody shares an expert: there is nothing to agree on.
    assert site_agreement(torch.tensor([[[1, 1, 1, 1]]]), torch.ones(1, 4)).isnan().all()


def test_all_sites_alike_agree() -> None:
    picks = random_picks(0)
    assert site_agreement(4 * picked_by(picks, 6), torch.full((3, 6), 4.0)).tolist() == [1, 1, 1]


def test_row_similarity_by_brute_force() -> None:
    weights = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = [
        torch.nn.functional.cosine_similarity(weights[:, i], weights[:, j], dim=1)
        for i, j in itertools.permutations(range(5), 2)
    ]
    torch.testing.assert_close(row_similarity(weights), torch.stack(cosines).mean(dim=0))
    assert row_similarity(torch.ones(1, 4, 3)).tolist() == pytest.approx([1])
    assert row_similarity(torch.eye(4)[None]).tolist() == pytest.approx([0])
    assert row_similarity(torch.ones(2, 1, 3)).isnan().all()


@pytest.mark.parametrize("sites", [1, 2, 4, 9, 1000])
def test_packed_counts_add_up(sites: int) -> None:
    generator = torch.Generator().manual_seed(sites)
    parts = [torch.randint(0, 2, (2, 7, 5), generator=generator) for _ in range(min(sites, 8))]
    packed = sum(pack_counts(part, sites) for part in parts)
    assert isinstance(packed, Tensor)
    assert packed.numel() == -(-70 // digits(sites))
    assert torch.equal(unpack_counts(packed, sites, (2, 7, 5)), torch.stack(parts).sum(dim=0))


def test_packed_counts_are_exact_where_every_site_counts_everything() -> None:
    packed = 4 * pack_counts(torch.ones(100, dtype=torch.int64), 4)
    assert unpack_counts(packed, 4, (100,)).tolist() == [4] * 100
    assert 5 ** digits(4) <= 2**53 < 5 ** (digits(4) + 1)


def sums(moved: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stacked = torch.stack(moved)
    norms = torch.stack([d.norm() for d in moved]).sum()
    return stacked.square().sum(), stacked.mean(dim=0).square().sum(), norms, torch.tensor(float(len(moved)))


def test_drift_and_cosine_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(11, generator=generator, dtype=torch.float64)
    moved = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(3)]
    own, mean, norms, holders = sums(moved)
    places = torch.stack([start - d for d in moved])
    distance = (places - places.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    torch.testing.assert_close(relative_drift(own, mean, start.square().sum(), holders), distance / start.norm())
    equal = [d / d.norm() for d in moved]  # of equal norms: the plain mean of the cosines
    own, mean, norms, holders = sums(equal)
    cosines = torch.stack([a @ b for a, b in itertools.combinations(equal, 2)])
    torch.testing.assert_close(mean_cosine(own, mean, norms, holders), cosines.mean())


@pytest.mark.parametrize(
    ("moved", "drift", "cosine"),
    [
        ([[3.0, 4.0], [3.0, 4.0]], 0.0, 1.0),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.5, -1.0),
        ([[1.0, 0.0], [0.0, 1.0]], math.sqrt(0.5) / 2, 0.0),
        ([[1.0, 0.0], [3.0, 0.0]], 0.5, 1.0),  # the same way, not as far
        ([[1.0, 0.0], [0.0, 0.0]], 0.25, math.nan),  # only one moved
        ([[1.0, 0.0]], math.nan, math.nan),  # one holder
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, math.nan),  # nothing moved
    ],
)
def test_drift_by_hand(moved: list[list[float]], drift: float, cosine: float) -> None:
    own, mean, norms, holders = sums([torch.tensor(d) for d in moved])
    assert relative_drift(own, mean, torch.tensor(4.0), holders).item() == pytest.approx(drift, nan_ok=True)
    assert mean_cosine(own, mean, norms, holders).item() == pytest.approx(cosine, nan_ok=True)
