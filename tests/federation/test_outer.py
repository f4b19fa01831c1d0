import pytest
import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.outer import OuterRule, outer_steps_


def deltas(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("freeze", [False, True])
def test_nesterov_is_torchs_sgd(freeze: bool) -> None:
    rule = OuterRule("nesterov", 0.7, 0.9)
    parameter = torch.ones(3, 2, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    anchor, momentum = torch.ones(3, 2), torch.zeros(3, 2)
    for delta in deltas(5):
        parameter.grad = delta.clone()
        sgd.step()
        outer_steps_(rule, [anchor], [delta], [momentum], freeze_if_zero=freeze)
        torch.testing.assert_close(anchor, parameter.detach())


def test_average_moves_to_the_mean() -> None:
    anchor, [delta] = torch.ones(3, 2), deltas(1)
    outer_steps_(OuterRule(), [anchor], [delta], None, freeze_if_zero=False)
    torch.testing.assert_close(anchor, 1 - delta)
    outer_steps_(OuterRule("average", 0.5), [anchor], [delta], None, freeze_if_zero=True)
    torch.testing.assert_close(anchor, 1 - 1.5 * delta)


def test_only_frozen_rows_ignore_a_zero_pseudo_gradient() -> None:
    rule, delta = OuterRule("nesterov", 0.7, 0.9), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    anchor, momentum = torch.ones(2, 2), torch.ones(2, 2)
    outer_steps_(rule, [anchor], [delta], [momentum], freeze_if_zero=True)
    assert anchor[0].tolist() == [1, 1]
    assert momentum[0].tolist() == [1, 1]
    # One element that moved is enough: the rest of the row is trained too.
    assert anchor[1].max() < 1
    assert momentum[1].tolist() == pytest.approx([0.9, 1.9])
    outer_steps_(rule, [anchor], [torch.zeros(2, 2)], [momentum], freeze_if_zero=False)
    assert anchor.max() < 1
    assert momentum[0].max() < 1


def test_a_diverged_site_is_not_hidden() -> None:
    anchor, momentum = torch.ones(1, 2), torch.zeros(1, 2)
    delta = torch.tensor([[float("nan"), 0.0]])
    outer_steps_(OuterRule("nesterov"), [anchor], [delta], [momentum], freeze_if_zero=True)
    assert anchor.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("options", "key"),
    [({"lr": 0.0}, "lr"), ({"lr": -1.0}, "lr"), ({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum")],
)
def test_rates_that_cannot_train(options: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        OuterRule("nesterov", **options)
    assert error.value.key == f"trainer.strategy.init_args.outer.{key}"


def test_momentum_belongs_to_nesterov() -> None:
    assert OuterRule("nesterov").has_momentum
    assert not OuterRule("average").has_momentum
