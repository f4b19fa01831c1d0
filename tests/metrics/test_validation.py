"""Loads by domain, and the sums of a validation."""

import math

import pytest
import torch

from fomoe_pl.costs.bytes import metric_bytes_of
from fomoe_pl.metrics import DomainLoad, ValidationMetrics
from fomoe_pl.metrics.specialisation import domain_information
from fomoe_pl.metrics.validation import OtherViews
from fomoe_pl.model.config import ModelConfig


def test_domain_information_by_hand() -> None:
    # p(e|d): (3/4, 1/4) and (1/4, 3/4), domains equal: H(E) - H(E|D) = 1 - h(1/4)
    h = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    load_LNE = torch.tensor([[[6.0, 2.0], [25.0, 75.0]]])  # tokens of a domain do not weigh
    assert domain_information(load_LNE).item() == pytest.approx(1 - h)


@pytest.mark.parametrize(
    ("load_NE", "bits"),
    [
        ([[5.0, 5.0], [1.0, 1.0]], 0),  # uniform
        ([[9.0, 0.0], [7.0, 0.0]], 0),  # all tokens to one expert
        ([[9.0, 0.0], [0.0, 2.0]], 1),  # an expert for each domain
        ([[4.0], [2.0]], 0),  # one expert
        ([[9.0, 0.0], [0.0, 2.0], [0.0, 0.0]], 1),  # a domain without text does not count
        ([[0.0, 0.0], [0.0, 0.0]], math.nan),  # no pick
    ],
)
def test_domain_information_of_extremes(load_NE: list[list[float]], bits: float) -> None:
    assert domain_information(torch.tensor([load_NE])).item() == pytest.approx(bits, nan_ok=True)


def test_picks_are_counted_by_layer_domain_and_expert() -> None:
    metric = DomainLoad(2, 2, 3)
    metric.update(1, torch.tensor([[0, 2], [1, 2], [0, 1]]), torch.tensor([1, 0, -1]))  # the last one does not count
    metric.update(1, torch.tensor([[0, 2]]), torch.tensor([1]))
    assert metric.load_LNE[0].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert metric.load_LNE[1].tolist() == [[0, 1, 1], [2, 0, 2]]
    values = metric.compute()
    assert values["load_entropy/layer_01"].item() == pytest.approx(
        -sum(f * math.log(f) for f in (1 / 3, 1 / 6, 1 / 2)) / math.log(3)
    )
    assert values["max_violation/layer_01"].item() == pytest.approx(0.5)
    assert values["domain_information_bits/layer_00"].isnan()


def test_other_views_are_differences_over_counted_tokens() -> None:
    views = OtherViews()
    assert all(value.isnan() for value in views.compute().values())
    targets = torch.tensor([[3, -100], [1, 2]])
    learned, random, own = (torch.tensor([[x, 0.0], [x, x]]) for x in (1.0, 3.0, 1.5))
    views.update(learned, random, own, targets)
    views.update(learned, random, own, targets)
    values = {key: value.item() for key, value in views.compute().items()}
    assert values == {"routing_necessity_nats": pytest.approx(2), "own_view_gap_nats": pytest.approx(0.5)}


def test_one_vector_holds_all_sums_and_its_size_is_the_formula() -> None:
    config = ModelConfig(vocab_size=8, d_model=4, n_layers=2, n_heads=1, n_experts=4, top_k=1, d_expert=4)
    sites = [ValidationMetrics(["a", "b", "c"], 2, 4, "cpu") for _ in range(2)]
    for i, site in enumerate(sites):
        losses_BS, targets_BS = torch.full((1, 2), 1.0 + i), torch.tensor([[1, 2]])
        site.language.update(losses_BS, targets_BS, torch.tensor([i]), torch.ones(1, 2))
        site.loads.update(0, torch.tensor([[i], [i]]), torch.tensor([i, i]))
        site.views.update(losses_BS, losses_BS + 1, losses_BS, targets_BS)
    total = sites[0].states() + sites[1].states()
    assert total.nbytes == metric_bytes_of(config, 3)
    sites[0].load_states(total)
    values = sites[0].compute(with_views=True)
    assert values["loss"].item() == pytest.approx(1.5)
    assert values["domain_information_bits/layer_00"].item() == pytest.approx(1)
    assert values["routing_necessity_nats"].item() == pytest.approx(1)
    assert "routing_necessity_nats" not in sites[0].compute(with_views=False)
