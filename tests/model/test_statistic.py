"""Statistics of one's own are sums over the tokens of a training pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.costs.bytes import control_bytes
from fomoe_pl.errors import ConfigError
from fomoe_pl.metrics import RoutingHealth, Statistic
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

RESIDENT = ((0, 2), (1, 2))


class Ghosts(Statistic):
    name, unit = "ghosts", "share of picks"

    def of_tokens(self, picks_TK: Tensor, gates_TK: Tensor, live_TK: Tensor) -> Tensor:
        return (~live_TK).double().mean(dim=1)


class Known(Statistic):
    name, unit = "known", "picks"

    def of_tokens(self, picks_TK: Tensor, gates_TK: Tensor, live_TK: Tensor) -> Tensor:
        assert gates_TK.shape == picks_TK.shape
        return torch.isin(picks_TK, torch.tensor([0, 1])).sum(dim=1)


class Wrong(Ghosts):
    def of_tokens(self, picks_TK: Tensor, gates_TK: Tensor, live_TK: Tensor) -> Tensor:
        return live_TK.double()


@pytest.mark.parametrize("routing", ["ghost", "partitioned", "shadow"])
def test_they_are_told_ids_and_residents(make_config: Callable[..., ModelConfig], routing: Any) -> None:
    config = make_config(n_experts=4, n_layers=2, expert_backend="loop")
    model = Transformer(config, Residency(routing, RESIDENT))
    tokens = torch.randint(config.vocab_size, (2, 9))
    if routing == "shadow":
        with model.refreshing() as fresh:
            for tensor in fresh.values():
                tensor.zero_()
    done = training_pass(model, tokens[:, :-1], tokens[:, 1:], (Ghosts(), Known()))
    assert done.sums_NL is not None
    ghosts_L, known_L = done.sums_NL
    torch.testing.assert_close(ghosts_L / 16, 1 - done.live_L.double() / done.picks)
    assert known_L.tolist() == done.load_LE[:, :2].sum(dim=1).tolist()
    health = RoutingHealth(2, 4, ("ghosts", "known"))
    for _ in range(2):
        health.update(done.load_LE, torch.zeros(2), done.picks, sums_NL=done.sums_NL, tokens=16)
    torch.testing.assert_close(health.named()["ghosts"], ghosts_L / 16)


def test_the_message_is_as_long_as_predicted(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(n_experts=4, n_layers=2)
    longer = RoutingHealth(2, 4, ("a", "b")).states().nbytes - RoutingHealth(2, 4).states().nbytes
    sizes = [control_bytes(config, 2, watched=True, n_statistics=n) for n in (0, 2)]
    assert longer == sizes[1] - sizes[0] > 0


def test_a_number_of_each_pick_is_refused(make_config: Callable[..., ModelConfig]) -> None:
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"statistics.ghosts = \(4, 2\): of_tokens must give .* shape \(4,\)"):
        training_pass(Transformer(make_config(top_k=2)), tokens[:, :-1], tokens[:, 1:], (Wrong(),))
