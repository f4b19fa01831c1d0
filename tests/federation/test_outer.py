from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.outer import Average, Nesterov, OuterRule, Slots


class FedAdam(OuterRule):
    """Two slots, and nothing said of rows: what somebody outside of the package would write (arXiv 2003.00295)."""

    slots = ("m", "v")

    def step_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        for anchor, change, m, v in zip(anchors, changes, slots["m"], slots["v"], strict=True):
            m.lerp_(change, 0.1)
            v.lerp_(change.square(), 0.01)
            anchor -= 0.1 * m / (v.sqrt() + 1e-3)


def changes(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("step", ["step_", "step_rows_"])
def test_nesterov_is_torchs_sgd(step: str) -> None:
    parameter = torch.ones(3, 2, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    anchor, momentum = torch.ones(3, 2), torch.zeros(3, 2)
    for change in changes(5):
        parameter.grad = change.clone()
        sgd.step()
        getattr(Nesterov(0.7, 0.9), step)([anchor], [change], {"momentum": [momentum]})
        torch.testing.assert_close(anchor, parameter.detach())


def test_average_moves_to_the_mean() -> None:
    anchor, [change] = torch.ones(3, 2), changes(1)
    Average().step_([anchor], [change], {})
    torch.testing.assert_close(anchor, 1 - change)
    Average(0.5).step_rows_([anchor], [change], {})
    torch.testing.assert_close(anchor, 1 - 1.5 * change)


@pytest.mark.parametrize("rule", [Nesterov(0.7, 0.9), FedAdam()], ids=str)
def test_only_rows_of_experts_ignore_a_zero_pseudo_gradient(rule: OuterRule) -> None:
    change = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    anchor, slots = torch.ones(2, 2), {name: [torch.ones(2, 2)] for name in rule.slots}
    rule.step_rows_([anchor], [change], slots)
    assert anchor[0].tolist() == [1, 1]
    assert all(value[0].tolist() == [1, 1] for [value] in slots.values())
    # One element that moved is enough: the rest of the row is trained too.
    assert anchor[1].max() < 1
    assert all((value[1] != 1).any() for [value] in slots.values())
    rule.step_([anchor], [torch.zeros(2, 2)], slots)
    assert anchor.max() < 1


def test_a_rule_that_says_nothing_of_rows_takes_the_same_step_where_all_have_a_change() -> None:
    found = []
    for step in ("step_", "step_rows_"):
        anchor, slots = torch.ones(3, 2), {name: [torch.zeros(3, 2)] for name in FedAdam.slots}
        for change in changes(3):
            getattr(FedAdam(), step)([anchor], [change], slots)
        found.append(anchor)
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", [Nesterov(), FedAdam()], ids=str)
def test_a_diverged_site_is_not_hidden(rule: OuterRule) -> None:
    anchor, slots = torch.ones(1, 2), {name: [torch.zeros(1, 2)] for name in rule.slots}
    rule.step_rows_([anchor], [torch.tensor([[float("nan"), 0.0]])], slots)
    assert anchor.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("options", "key"),
    [({"lr": 0.0}, "lr"), ({"lr": -1.0}, "lr"), ({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum")],
)
def test_rates_that_cannot_train(options: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        Nesterov(**options)
    assert error.value.key == f"outer.{key}"


@pytest.mark.parametrize("names", ["momentum", ("anchor",), ("m", "m"), ("m/v",), ["m"]])
def test_slots_that_files_cannot_have_are_refused(names: Any) -> None:
    with pytest.raises(ConfigError, match=r"slots of Wrong must be a tuple of different names"):
        type("Wrong", (OuterRule,), {"slots": names})
