from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fomoe_pl.model import sizes
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
# arXiv 2606.19025, table 1, and the OLMoE paper (arXiv 2409.02060).
PUBLISHED = {
    "fomoe-54m": 54e6,
    "fomoe-153m": 153e6,
    "fomoe-1.8b": 1.8e9,
    "fomoe-13.3b": 13.3e9,
    "fomoe-104b": 104e9,
    "olmoe": 6.9e9,
}


def load(path: Path) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(path.read_text())["model"]["architecture"])


def kind_of(name: str) -> str:
    part = name.split(".")[-2]
    if "norm" in part:
        return "norms"
    if part in ("router", "shared", "experts"):
        return part
    return "embeddings" if part in ("embedding", "output") else "attention"


def count(model: Transformer) -> sizes.ParameterCounts:
    counts = dict.fromkeys(("embeddings", "attention", "norms", "router", "shared", "experts"), 0)
    for name, parameter in model.named_parameters():
        counts[kind_of(name)] += parameter.numel()
    return sizes.ParameterCounts(**counts)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_built_and_the_published_size(path: Path) -> None:
    config = load(path)
    assert sizes.parameter_counts(config) == count(Transformer(config, device=torch.device("meta")))
    if path.stem in PUBLISHED:
        assert sizes.parameter_counts(config).total == pytest.approx(PUBLISHED[path.stem], rel=0.012)


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert": "swiglu", "n_shared_experts": 2, "tie_embeddings": False},
        {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "qk_norm": "full", "norm_placement": "pre"},
        {"qk_norm": "head", "embedding_norm": False},
    ],
)
def test_options_and_residents_have_the_built_size(
    make_config: Callable[..., ModelConfig], routing: str, changes: dict
) -> None:
    config = make_config(**changes)
    model = Transformer(config, Residency(routing, ((0, 2, 5),) * 2), device=torch.device("meta"))
    counts = sizes.resident_counts(config, 3, routing)
    assert counts == count(model)
    rows = {name: shape for name, shape in model.expert_tensors().items() if "bias" not in name}
    held = sum(dict(model.named_parameters())[name].numel() for name in rows)
    assert 2 * held == sizes.sparse_parameters(config, routing)
    assert counts.total - held == sizes.dense_parameters(config, routing)


def test_olmoe_is_7b_with_1b_active() -> None:
    config = load(next(path for path in PRESETS if path.stem == "olmoe"))
    assert sizes.active_parameters(config) == pytest.approx(1.3e9, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_kv_heads": 2, "n_shared_experts": 1, "expert": "swiglu"}])
def test_flops_are_those_of_the_products(make_config: Callable[..., ModelConfig], changes: dict) -> None:
    config = make_config(expert_backend="loop", loss_chunk_bytes=10**9, **changes)
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (3, 8))
    # The counter sees plain products, not the CPU's fused attention kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.logits(model(tokens)[0])
    expected = sizes.flops_by_part(config, 8).forward
    assert counter.get_total_flops() == expected * tokens.numel()
    assert sizes.flops_by_part(config, 8).training == 3 * expected


def test_executed_flops_count_what_runs(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config()
    nominal = sizes.flops_by_part(config, 8).forward
    halved = sizes.flops_by_part(config, 8, executed_picks=1.0).forward
    assert nominal - halved == 2 * config.n_layers * sizes.expert_parameters(config)
    fewer_rows = sizes.flops_by_part(config, 8, n_scored=3).forward
    assert nominal - fewer_rows == 2 * config.n_layers * 3 * config.d_model
