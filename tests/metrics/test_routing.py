import math

import pytest
import torch
from torch import Tensor

from fomoe_pl.metrics import RoutingHealth

STATISTICS = ("load_entropy", "load_cv", "max_violation", "starved_experts", "ghost_fraction")


def health(load_LE: Tensor, live_L: list[float], picks: int, scored_LE: Tensor | None = None) -> dict[str, float]:
    metric = RoutingHealth(*load_LE.shape)
    metric.update(load_LE, torch.tensor(live_L), picks, scored_LE)
    return {key: value.item() for key, value in metric.compute().items()}


def test_even_load() -> None:
    values = health(torch.full((1, 8), 5.0), [40.0], 40)
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])


def test_all_tokens_to_one_expert() -> None:
    values = health(torch.tensor([[0.0, 12.0, 0.0, 0.0]]), [0.0], 12)  # and that expert is a ghost
    assert [values[name] for name in STATISTICS] == pytest.approx([0, math.sqrt(3), 3, 3, 1])


def test_values_by_hand() -> None:
    # mean 5; deviations -4, -2, 1, 5: variance (16+4+1+25)/4; none below 0.5
    values = health(torch.tensor([[1.0, 3.0, 6.0, 10.0]]), [15.0], 20)
    shares = [0.05, 0.15, 0.3, 0.5]
    assert values["load_entropy"] == pytest.approx(-sum(f * math.log(f) for f in shares) / math.log(4))
    assert values["load_cv"] == pytest.approx(math.sqrt(46 / 4) / 5)
    assert values["max_violation"] == pytest.approx(1)
    assert values["starved_experts"] == 0
    assert values["ghost_fraction"] == pytest.approx(0.25)


def test_starved_is_strictly_below_a_tenth_of_the_mean() -> None:
    # mean 100: 10 is exactly a tenth, 9 is below
    assert health(torch.tensor([[10.0, 9.0, 281.0, 100.0]]), [400.0], 400)["starved_experts"] == 1


def test_one_expert_is_even() -> None:
    values = health(torch.tensor([[7.0]]), [7.0], 7)
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])


@pytest.mark.parametrize("n_experts", [1, 4])
def test_no_pick_is_undefined(n_experts: int) -> None:
    values = health(torch.zeros(2, n_experts), [0.0, 0.0], 0)
    assert all(math.isnan(value) for value in values.values())


def test_layers_and_their_mean() -> None:
    values = health(torch.tensor([[4.0, 4.0], [8.0, 0.0]]), [8.0, 2.0], 8)
    assert values["load_entropy/layer_0"] == pytest.approx(1)
    assert values["load_entropy/layer_1"] == pytest.approx(0)
    assert values["load_entropy"] == pytest.approx(0.5)
    assert values["ghost_fraction/layer_1"] == pytest.approx(0.75)
    assert values["ghost_fraction"] == pytest.approx(0.375)
    assert len(values) == len(STATISTICS) * 3


def test_statistics_are_over_scored_experts() -> None:
    scored_LE = torch.tensor([[True, True, False, False]])
    over_residents = health(torch.tensor([[6.0, 2.0, 0.0, 0.0]]), [8.0], 8, scored_LE)
    assert over_residents == pytest.approx(health(torch.tensor([[6.0, 2.0]]), [8.0], 8))
    starved = health(torch.tensor([[8.0, 0.0, 0.0, 0.0]]), [8.0], 8, scored_LE)["starved_experts"]
    assert starved == 1  # the scored expert that nobody picks, not the two that nobody could pick


def test_one_scored_expert_is_even() -> None:
    values = health(torch.tensor([[0.0, 5.0]]), [5.0], 5, torch.tensor([[False, True]]))
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])


def test_sites_that_score_different_experts_add_up_to_the_whole() -> None:
    sites = [RoutingHealth(1, 4) for _ in range(2)]
    sites[0].update(torch.tensor([[6, 2, 0, 0]]), torch.tensor([8]), 8, torch.tensor([[True, True, False, False]]))
    sites[1].update(torch.tensor([[0, 0, 4, 4]]), torch.tensor([8]), 8, torch.tensor([[False, False, True, True]]))
    sites[0].load_states(sites[0].states() + sites[1].states())
    whole = RoutingHealth(1, 4)
    whole.update(torch.tensor([[6, 2, 4, 4]]), torch.tensor([16]), 16)
    assert sites[0].compute() == whole.compute()


def test_updates_accumulate_before_the_statistics() -> None:
    metric = RoutingHealth(1, 2)
    metric.update(torch.tensor([[8, 0]]), torch.tensor([8]), 8)
    metric.update(torch.tensor([[0, 8]]), torch.tensor([0]), 8)
    values = metric.compute()
    assert values["max_violation"].item() == pytest.approx(0)  # each batch alone would have 1
    assert values["ghost_fraction"].item() == pytest.approx(0.5)
