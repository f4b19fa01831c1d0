"""Rung 10 of the ladder: the initial global model is the same bit for bit, whatever is resident where."""

from collections.abc import Callable

import pytest
import torch

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.init import initialize
from fomoe_pl.model.parametrization import rule_of
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

PLACEMENTS = [((0, 2, 5), (1, 2, 3)), ((5,), (0,)), ((0, 1, 2, 3, 4, 5), (4, 5))]


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_rows_are_those_of_the_whole_model(
    make_config: Callable[..., ModelConfig], routing: str, placement: tuple[tuple[int, ...], ...]
) -> None:
    config = make_config(n_shared_experts=1, expert="swiglu")
    whole = dict(Transformer(config, seed=3).named_parameters())
    part = Transformer(config, Residency(routing, placement), seed=3)
    rows = part.expert_tensors()
    for name, tensor in part.named_parameters():
        expected = whole[name][list(placement[rows[name]])] if name in rows else whole[name]
        assert torch.equal(tensor, expected), name


def test_seeds_layers_and_experts_differ(make_config: Callable[..., ModelConfig]) -> None:
    one, other = (Transformer(make_config(), seed=seed) for seed in (0, 1))
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert ("norm" in name) == torch.equal(a, b), name
    experts = torch.cat([block.moe.experts.w_in.flatten(1) for block in one.layers])
    assert len(experts.unique(dim=0)) == 12


def test_spread_is_the_rule(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(base_width=8, d_expert=64, n_shared_experts=1, tie_embeddings=False)
    for name, parameter in Transformer(config).named_parameters():
        rule = rule_of(name, config)
        assert parameter.mean().item() == pytest.approx(rule.init_mean, abs=0.15 * config.init_std), name
        assert parameter.std().item() == pytest.approx(rule.init_std, rel=0.15), name


def test_global_randomness_and_defaults_are_left_alone(make_config: Callable[..., ModelConfig]) -> None:
    reference = dict(Transformer(make_config()).named_parameters())
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(make_config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference[name].bfloat16()), name


def test_meta_then_initialize_is_the_same_model(make_config: Callable[..., ModelConfig]) -> None:
    config, residency = make_config(balance="bias"), Residency("ghost", ((0, 2), (1, 3)))
    direct = Transformer(config, residency, seed=5)
    with torch.device("meta"):
        late = Transformer(config, residency, seed=5)
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cpu")
    initialize(late, seed=5)
    for tensors in ("named_parameters", "named_buffers"):
        for (name, a), (_, b) in zip(getattr(direct, tensors)(), getattr(late, tensors)(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_has_the_bits_of_the_cpu(make_config: Callable[..., ModelConfig]) -> None:
    reference = dict(Transformer(make_config()).named_parameters())
    with torch.device("cuda"):
        model = Transformer(make_config())
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda
        assert torch.equal(parameter.cpu(), reference[name]), name
