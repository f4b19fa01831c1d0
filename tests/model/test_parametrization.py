from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parametrization import branch_multiplier, logits_multiplier, parameter_groups, rule_of
from fomoe_pl.model.transformer import Transformer

WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)


def config_at(width: int, depth: int, parametrization: str) -> ModelConfig:
    """FoMoE's way of growing (table 1): heads, experts and top-k with the width, expert and head size fixed."""
    return ModelConfig(
        vocab_size=64,
        d_model=width,
        n_layers=depth,
        n_heads=width // 32,
        n_experts=width // 16,
        top_k=width // 32,
        d_expert=32,
        parametrization=parametrization,
        base_width=WIDTHS[0],
        base_depth=DEPTHS[0],
        init_std=0.1,
    )


def observe(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What the coordinate check looks at, before any norm hides its scale."""
    seen: dict[str, Tensor] = {}
    last = model.layers[-1]
    handles = [
        module.register_forward_hook(lambda _module, _inputs, out, name=name: seen.__setitem__(name, out))
        for name, module in {"attention": last.attention, "moe": last.moe.experts, "residual": last}.items()
    ]
    with torch.no_grad():
        hidden, _ = model(tokens)
        seen["logits"] = model.logits(hidden)
    for handle in handles:
        handle.remove()
    seen["residual"] = seen["residual"][0]
    return seen


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def coordinates(width: int, depth: int, parametrization: str) -> dict[str, float]:
    """Root mean squares of activations after a few Adam steps, and of what the steps changed."""
    torch.manual_seed(0)
    model = Transformer(config_at(width, depth, parametrization))
    tokens = torch.randint(0, 64, (4, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    groups = [
        {"params": group["params"], "lr": 0.01 * group["lr_scale"], "eps": 1e-8 * group["eps_scale"]}
        for group in parameter_groups(model)
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    before = observe(model, inputs)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(model(inputs)[0], targets).backward()
        optimizer.step()
    after = observe(model, inputs)
    sizes = {name: rms(after[name]) for name in before}
    return sizes | {f"change of {name}": rms(after[name] - before[name]) for name in before}


def spread(table: list[dict[str, float]]) -> dict[str, float]:
    """Largest over smallest value of each quantity."""
    return {name: max(row[name] for row in table) / min(row[name] for row in table) for name in table[0]}


@pytest.mark.parametrize("axis", ["width", "depth"])
def test_completep_keeps_activations_and_updates(axis: str) -> None:
    grid = [(width, DEPTHS[0]) for width in WIDTHS] if axis == "width" else [(WIDTHS[0], depth) for depth in DEPTHS]
    found = spread([coordinates(width, depth, "completep") for width, depth in grid])
    assert {name: factor for name, factor in found.items() if factor > 2} == {}


def test_standard_does_not_so_the_check_can_fail() -> None:
    over_width = spread([coordinates(width, DEPTHS[0], "standard") for width in (WIDTHS[0], WIDTHS[-1])])
    assert min(over_width[name] for name in ("attention", "moe", "change of attention", "change of moe")) > 5
    over_depth = spread([coordinates(WIDTHS[0], depth, "standard") for depth in (DEPTHS[0], DEPTHS[-1])])
    assert min(over_depth[name] for name in ("residual", "change of residual")) > 4


# (name, initial std, learning rate, epsilon, weight decay) at twice the base width and four times the base depth, where
# the experts' fan-in top_k·d_expert is eight times the base width.
RULES = [
    ("embedding.weight", 0.02, 1, 1 / 2, 1),
    ("output.weight", 0.02, 1, 1 / 2, 1),
    ("layers.3.attention.q.weight", 0.02 / 2**0.5, 1 / 2, 1 / 8, 2),
    ("layers.3.attention.o.weight", 0.02 / 2**0.5, 1 / 2, 1 / 8, 2),
    ("layers.3.moe.router.weight", 0.02 / 2**0.5, 1 / 2, 1 / 8, 2),
    ("layers.3.moe.experts.w_in", 0.02 / 2**0.5, 1 / 2, 1 / 8, 2),
    ("layers.3.moe.experts.w_out", 0.02 / 8**0.5, 1 / 8, 1 / 8, 8),
    ("layers.3.moe.shared.w_out", 0.02 / 6**0.5, 1 / 6, 1 / 8, 6),
]


@pytest.mark.parametrize(("name", "std", "lr", "eps", "decay"), RULES, ids=lambda value: str(value))
def test_rules_of_matrices(name: str, std: float, lr: float, eps: float, decay: float) -> None:
    config = ModelConfig(
        vocab_size=50,
        d_model=64,
        n_layers=8,
        n_heads=2,
        n_experts=8,
        top_k=4,
        d_expert=64,
        n_shared_experts=3,
        base_width=32,
        base_depth=2,
    )
    assert rule_of(name, config) == pytest.approx((0, std, lr, eps, decay, True))
    assert branch_multiplier(config) == 1 / 4
    assert logits_multiplier(config) == 1 / 2


@pytest.mark.parametrize("parametrization", ["completep", "standard"])
def test_groups_hold_every_parameter_once(make_config: Callable[..., ModelConfig], parametrization: str) -> None:
    model = Transformer(make_config(parametrization=parametrization, n_shared_experts=1, qk_norm="head", d_expert=48))
    groups = parameter_groups(model)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        assert all(model.get_parameter(n) is p for n, p in zip(group["names"], group["params"], strict=True))
        assert {"norm" in name.split(".")[-2] for name in group["names"]} == {not group["decay"]}
    if parametrization == "standard":
        assert {(g["lr_scale"], g["eps_scale"], g["weight_decay_scale"]) for g in groups} == {(1, 1, 1)}


def test_at_the_base_completep_is_standard(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config()
    for name, _ in Transformer(config).named_parameters():
        assert rule_of(name, config) == rule_of(name, make_config(parametrization="standard"))
