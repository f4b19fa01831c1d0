import math

import pytest
import torch
from torch import Tensor

from fomoe_pl.metrics import RoutingHealth

STATISTICS = ("load_entropy", "load_cv", "max_violation", "starved_experts", "ghost_fraction")
LIVE = tuple(f"live_{name}" for name in STATISTICS[:4])


def health(
    load_LE: Tensor, resident_LE: Tensor | None = None, scored_LE: Tensor | None = None, gate_entropy: float = 0.5
) -> dict[str, float]:
    metric = RoutingHealth(*load_LE.shape)
    entropy_L = torch.full((len(load_LE),), gate_entropy)
    metric.update(load_LE, entropy_L, int(load_LE[0].sum()), scored_LE, resident_LE)
    return {key: value.item() for key, value in metric.compute().items()}


def test_even_load() -> None:
    values = health(torch.full((1, 8), 5.0))
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])
    assert [values[name] for name in LIVE] == pytest.approx([1, 0, 0, 0])


def test_all_tokens_to_one_expert_that_is_a_ghost() -> None:
    resident_LE = torch.tensor([[True, False, True, True]])
    values = health(torch.tensor([[0.0, 12.0, 0.0, 0.0]]), resident_LE)
    assert [values[name] for name in STATISTICS] == pytest.approx([0, math.sqrt(3), 3, 3, 1])
    assert values["ghost_excess"] == pytest.approx(0.75)  # 1 instead of a quarter
    assert all(math.isnan(values[name]) for name in LIVE)  # no live pick


def test_values_by_hand() -> None:
    # mean 5; deviations -4, -2, 1, 5: variance (16+4+1+25)/4; none below 0.5
    resident_LE = torch.tensor([[True, False, True, True]])
    values = health(torch.tensor([[1.0, 3.0, 6.0, 10.0]]), resident_LE, gate_entropy=0.25)
    shares = [0.05, 0.15, 0.3, 0.5]
    assert values["load_entropy"] == pytest.approx(-sum(f * math.log(f) for f in shares) / math.log(4))
    assert values["load_cv"] == pytest.approx(math.sqrt(46 / 4) / 5)
    assert values["max_violation"] == pytest.approx(1)
    assert values["starved_experts"] == 0
    assert values["ghost_fraction"] == pytest.approx(3 / 20)
    assert values["ghost_excess"] == pytest.approx(3 / 20 - 1 / 4)
    assert values["gate_entropy"] == pytest.approx(0.25)
    # Without ghosts: 1, 6, 10 with mean 17/3.
    shares = [1 / 17, 6 / 17, 10 / 17]
    assert values["live_load_entropy"] == pytest.approx(-sum(f * math.log(f) for f in shares) / math.log(3))
    assert values["live_max_violation"] == pytest.approx(10 / (17 / 3) - 1)


def test_starved_is_strictly_below_a_tenth_of_the_mean() -> None:
    # mean 100: 10 is exactly a tenth, 9 is below
    assert health(torch.tensor([[10.0, 9.0, 281.0, 100.0]]))["starved_experts"] == 1


def test_a_starved_resident_is_not_hidden_by_busy_ghosts() -> None:
    resident_LE = torch.tensor([[True, True, False, False]])
    values = health(torch.tensor([[1.0, 99.0, 99.0, 99.0]]), resident_LE)
    assert values["starved_experts"] == values["live_starved_experts"] == 1
    values = health(torch.tensor([[1.0, 2.0, 99.0, 99.0]]), resident_LE)
    assert (values["starved_experts"], values["live_starved_experts"]) == (2, 0)


def test_one_expert_is_even() -> None:
    values = health(torch.tensor([[7.0]]))
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])


@pytest.mark.parametrize("n_experts", [1, 4])
def test_no_pick_is_undefined(n_experts: int) -> None:
    values = health(torch.zeros(2, n_experts))
    assert all(math.isnan(value) for value in values.values())


def test_layers_and_their_mean() -> None:
    resident_LE = torch.tensor([[True, True], [False, True]])
    values = health(torch.tensor([[4.0, 4.0], [6.0, 2.0]]), resident_LE)
    assert values["load_entropy/layer_0"] == pytest.approx(1)
    assert values["load_entropy/layer_1"] == pytest.approx(0.8112781)
    assert values["load_entropy"] == pytest.approx(0.9056391)
    assert values["ghost_fraction/layer_1"] == pytest.approx(0.75)
    assert values["ghost_fraction"] == pytest.approx(0.375)
    assert values["ghost_excess/layer_1"] == pytest.approx(0.25)
    assert set(values) == {
        f"{name}{of}"
        for name in (*STATISTICS, *LIVE, "gate_entropy", "ghost_excess")
        for of in ("", "/layer_0", "/layer_1")
    }


def test_statistics_are_over_scored_experts() -> None:
    scored_LE = torch.tensor([[True, True, False, False]])
    over_residents = health(torch.tensor([[6.0, 2.0, 0.0, 0.0]]), scored_LE, scored_LE)
    assert over_residents == pytest.approx(health(torch.tensor([[6.0, 2.0]])))  # no ghosts either
    starved = health(torch.tensor([[8.0, 0.0, 0.0, 0.0]]), scored_LE, scored_LE)["starved_experts"]
    assert starved == 1  # the scored expert that nobody picks, not the two that nobody could pick


def test_one_scored_expert_is_even() -> None:
    scored_LE = torch.tensor([[False, True]])
    values = health(torch.tensor([[0.0, 5.0]]), scored_LE, scored_LE)
    assert [values[name] for name in STATISTICS] == pytest.approx([1, 0, 0, 0, 0])


def test_sites_that_score_different_experts_add_up_to_the_whole() -> None:
    sites = [RoutingHealth(1, 4) for _ in range(2)]
    first_LE, second_LE = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, True]])
    half_L = torch.tensor([0.5])
    sites[0].update(torch.tensor([[6, 2, 0, 0]]), half_L, 8, first_LE, first_LE)
    sites[1].update(torch.tensor([[0, 0, 4, 4]]), half_L, 8, second_LE, second_LE)
    sites[0].load_states(sites[0].states() + sites[1].states())
    whole = RoutingHealth(1, 4)
    whole.update(torch.tensor([[6, 2, 4, 4]]), half_L, 16)
    assert sites[0].compute() == whole.compute()


def test_updates_accumulate_before_the_statistics() -> None:
    metric = RoutingHealth(1, 2)
    metric.update(torch.tensor([[8, 0]]), torch.tensor([0.2]), 8)
    metric.update(torch.tensor([[0, 24]]), torch.tensor([0.6]), 24, None, torch.tensor([[True, False]]))
    values = metric.compute()
    assert values["max_violation"].item() == pytest.approx(0.5)  # each batch alone would have 1
    assert values["ghost_fraction"].item() == pytest.approx(24 / 32)
    assert values["gate_entropy"].item() == pytest.approx((8 * 0.2 + 24 * 0.6) / 32)  # weighted by picks


def test_ghost_share_of_each_expert() -> None:
    metric = RoutingHealth(1, 3)
    for resident in ([True, False, True], [True, True, False]):  # two sites, or two rounds
        metric.update(torch.tensor([[4, 2, 0]]), torch.tensor([0.0]), 6, None, torch.tensor([resident]))
    assert metric.ghost_share()[0, :2].tolist() == [0, 0.5]
    assert metric.ghost_share()[0, 2].isnan()
