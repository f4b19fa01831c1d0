"""The paper's own model, formula by formula (FoMoE, arXiv 2606.19025, §3.4), and the settings of its numbers.

The rest of this package models what this code does; here is what the paper calculates, so that its figures can be
redrawn and the differences named.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_pl.costs.flops import token_flops
from fomoe_pl.costs.network import Links
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import shares
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import dense_parameters, parameter_counts, sparse_parameters

VOCABULARY = 200_019
"""Of openai/gpt-oss-120b's tokenizer."""
WIDTH_OF_AN_EXPERT = 128
PAPER_SIZES = {  # name: (width, layers, heads, experts, top-k), Table 1
    "54M": (256, 4, 4, 8, 2),
    "153M": (512, 16, 8, 16, 4),
    "1.8B": (1024, 128, 16, 32, 8),
    "13.3B": (2048, 256, 32, 64, 16),
    "104B": (4096, 512, 64, 128, 32),
}


def paper_model(d_model: int, n_layers: int, n_experts: int | None = None, top_k: int | None = None) -> ModelConfig:
    """A model of the paper's family: heads of 64, experts of width 128, together 4 D wide.

    Args:
        d_model: Width D.
        n_layers: Layers L.
        n_experts: Experts of a layer; None is 4 D / 128.
        top_k: Experts of a token; None is a quarter of them.
    """
    experts = 4 * d_model // WIDTH_OF_AN_EXPERT if n_experts is None else n_experts
    return ModelConfig(
        vocab_size=VOCABULARY, d_model=d_model, n_layers=n_layers, n_heads=d_model // 64, n_experts=experts,
        top_k=max(1, experts // 4) if top_k is None else top_k, d_expert=WIDTH_OF_AN_EXPERT,
    )  # fmt: skip


def table_1(name: str) -> ModelConfig:
    """A row of Table 1 by its name."""
    d_model, n_layers, _, n_experts, top_k = PAPER_SIZES[name]
    return paper_model(d_model, n_layers, n_experts, top_k)


def expert_share(config: ModelConfig) -> float:
    """Share of the parameters that routed experts have (Fig. 2)."""
    counts = parameter_counts(config)
    return counts.experts / counts.total


def bytes_per_round(
    config: ModelConfig, *, n_sites: int, overlap: int, reshuffled: float = 0.0, moments: bool = False
) -> float:
    """Bytes of a site and round: 2(M-1)/M dense + (R + P) resident experts, R = 2(O-1)/O, P = gamma (1 - O/M).

    Args:
        config: The model; the router counts as an expert's (the paper's first routing mode).
        n_sites: Number of sites M.
        overlap: Sites that hold each expert O.
        reshuffled: gamma, the share of rounds after which experts are placed again.
        moments: LocalAdamW's, three times the payload.

    Raises:
        ConfigError: If the sizes cannot be placed, or gamma is no share.
    """
    shares(config.n_experts, n_sites, overlap)
    if not 0 <= reshuffled <= 1:
        raise ConfigError("reshuffled", reshuffled, "is a share of the rounds", "give a number in 0..1")
    resident = sparse_parameters(config, "partitioned") * overlap / n_sites
    factor = 2 * (overlap - 1) / overlap + reshuffled * (1 - overlap / n_sites)
    dense = 2 * (n_sites - 1) / n_sites * dense_parameters(config, "partitioned")
    return 4 * (3 if moments else 1) * (dense + factor * resident)


def ddp_bytes_per_step(config: ModelConfig, n_sites: int) -> float:
    """Bytes of a site and step of data parallelism: all gradients in a ring, float32."""
    return 4 * 2 * (n_sites - 1) / n_sites * parameter_counts(config).total


def counted_parameters(config: ModelConfig) -> tuple[int, int]:
    """Dense and expert parameters as the paper's two ratios count them: embeddings and attention; experts.

    Norms and the router, 0.3% of the 1.8B model, are left out.
    """
    counts = parameter_counts(config)
    return counts.embeddings + counts.attention, counts.experts


def saving(config: ModelConfig, share: float, local_steps: int = 1) -> float:
    """Payload of a full replica over that of a partial one with this share of the experts, times K.

    The 1.8B model with half of the experts gives 1.4199 against a full replica (K = 1 here) and with K = 32 45.437
    against DDP: the paper's 1.42 and 45.44.

    Args:
        config: The model.
        share: Of the experts that a site sends, O/M.
        local_steps: K, to compare with averaging every step.
    """
    dense, experts = counted_parameters(config)
    return local_steps * (dense + experts) / (dense + share * experts)


def ffn_share(config: ModelConfig, sequence_length: int, *, n_sites: int, overlap: int) -> float:
    """Share of experts and router in a site's FLOPs, ghosts skipped, without the output matrix (Fig. 8, Eq. 2)."""
    shares(config.n_experts, n_sites, overlap)
    flops = token_flops(config, sequence_length, n_resident=config.n_experts * overlap // n_sites)
    ffn = flops.experts + flops.router
    return ffn / (flops.forward - flops.output)


@dataclass(frozen=True)
class Budget:
    """Settings of a modelled run.

    Attributes:
        tokens: Of the whole run.
        batch_sequences: Sequences of a step of all sites together.
        sequence_length: Tokens of a sequence.
        local_steps: K.
        peak_flops: Of one site.
        mfu: Share of it that is reached.
    """

    tokens: float
    batch_sequences: int = 1024
    sequence_length: int = 2048
    local_steps: int = 32
    peak_flops: float = 989e12
    mfu: float = 0.4


def run_hours(
    config: ModelConfig, budget: Budget, *, n_sites: int, overlap: int, bandwidth_mbit: float, moments: bool = True,
    links: Links | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Hours of computing and of communication of a run: T = N/(M B K) x (K t_comp + t_comm), nothing hidden (Fig. 10).

    Args:
        config: The model.
        budget: Tokens, batch, speed.
        n_sites: Number of sites M.
        overlap: Sites that hold each expert.
        bandwidth_mbit: Of each site, 10^6 bits a second; no frames, no latency, as the paper.
        moments: LocalAdamW.
        links: Not the paper's: adds the latency of 2(M-1) messages of these links to each round.
    """
    if not bandwidth_mbit > 0:
        raise ConfigError("bandwidth_mbit", bandwidth_mbit, "must be above 0", "give a positive number")
    shares(config.n_experts, n_sites, overlap)
    tokens_per_step = budget.batch_sequences * budget.sequence_length
    steps = budget.tokens / tokens_per_step
    flops = token_flops(config, budget.sequence_length, n_resident=config.n_experts * overlap // n_sites)
    computing = steps * flops.training * tokens_per_step / n_sites / (budget.mfu * budget.peak_flops)
    sent = bytes_per_round(config, n_sites=n_sites, overlap=overlap, moments=moments)
    wait = 0.0 if links is None else 2 * (n_sites - 1) * max(place.latency_ms for place in links.places) / 1e3
    communicating = steps / budget.local_steps * (sent * 8 / (bandwidth_mbit * 1e6) + wait)
    return computing / 3600, communicating / 3600
