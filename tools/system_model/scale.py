"""What the model says of sizes that nobody here can train: bytes, hours and memory at 2 to 32 sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paper import VOCABULARY, table_1

from fomoe_pl.costs.flops import token_flops
from fomoe_pl.costs.memory import GIB
from fomoe_pl.costs.network import Links
from fomoe_pl.costs.rounds import ddp_collectives, round_collectives
from fomoe_pl.costs.sites import ACCELERATORS, Site
from fomoe_pl.costs.time import run_seconds
from fomoe_pl.federation.placement import valid_overlaps
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts, resident_counts

SWIGLU_FAMILY = {
    "vocab_size": VOCABULARY, "expert": "swiglu", "norm_placement": "pre", "norm": "rmsnorm", "gate": "softmax",
    "embedding_norm": False, "tie_embeddings": False,
}  # fmt: skip


def shapes() -> dict[str, ModelConfig]:
    """The paper's larger models, and two public ones in this project's terms.

    DeepSeek-V3 (arXiv 2412.19437): 61 layers of width 7168, 256 routed experts of width 2048, 8 chosen, a shared one.
    Its first three layers are dense and its attention is a low-rank one: here all layers have experts, and attention
    has 128 heads of 128 channels of which 16 are shared, of about as many parameters. Qwen3-235B-A22B (arXiv
    2505.09388): 94 layers of width 4096, 128 experts of width 1536, 8 chosen, 64 heads of 128, 4 of them shared.
    """
    deepseek = ModelConfig(
        d_model=7168, n_layers=61, n_heads=128, head_dim=128, n_kv_heads=16, n_experts=256, top_k=8, d_expert=2048,
        n_shared_experts=1, **SWIGLU_FAMILY | {"vocab_size": 129_280, "gate": "sigmoid"},  # type: ignore[arg-type]
    )  # fmt: skip
    qwen = ModelConfig(
        d_model=4096, n_layers=94, n_heads=64, head_dim=128, n_kv_heads=4, n_experts=128, top_k=8, d_expert=1536,
        qk_norm="head", **SWIGLU_FAMILY | {"vocab_size": 151_936},  # type: ignore[arg-type]
    )  # fmt: skip
    return {
        "1.8B": table_1("1.8B"), "13.3B": table_1("13.3B"), "104B": table_1("104B"),
        "Qwen3-235B-like": qwen, "DeepSeek-V3-like": deepseek,
    }  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What the table holds fixed.

    Attributes:
        tokens: Of a run.
        global_batch: Sequences of a step, all sites together.
        sequence_length: Tokens of a sequence.
        local_steps: K.
        devices: H100s of a site; its model is spread over them.
        mfu: Share of their peak that is assumed to be reached.
        latency_ms: One way between sites.
        headroom: Share of the memory that stays free.
    """

    tokens: float = 100e9
    global_batch: int = 2048
    sequence_length: int = 4096
    local_steps: int = 32
    devices: int = 64
    mfu: float = 0.4
    latency_ms: float = 25.0
    headroom: float = 0.1


STATE_BYTES = {"ddp": 4 + 4 + 8, "diloco": 4 + 4 + 8 + 4 + 4, "local_adamw": 4 + 4 + 8 + 4}
"""Bytes a parameter of weights, gradients, moments, and where there are rounds anchors and outer momentum."""


@dataclass(frozen=True)
class Row:
    """One method at one size, number of sites and bandwidth.

    Attributes:
        model: Name of the shape.
        sites: Number of sites M.
        method: `ddp`, `diloco`, `local_adamw` or `fomoe` (local_adamw with part of the experts).
        overlap: Sites that hold each expert.
        bandwidth_mbit: Of every site.
        sent_gib: GiB that a site sends in K steps.
        states_gib: Weights, gradients, moments, anchors and outer momentum of a site, GiB.
        fits: Whether they leave room on the site's devices; activations are not counted.
        hours: Of the run.
        waiting: Share of them in synchronisation.
    """

    model: str
    sites: int
    method: str
    overlap: int
    bandwidth_mbit: float
    sent_gib: float
    states_gib: float
    fits: bool
    hours: float
    waiting: float


def scale_rows(
    name: str, config: ModelConfig, assumed: Assumptions, n_sites: int, bandwidth_mbit: float
) -> Iterator[Row]:
    """DDP, DiLoCo, LocalAdamW, and FoMoE at every overlap below M that divides, as powers of two."""
    h100 = ACCELERATORS["h100"]
    site = Site(
        tflops=h100.tflops * assumed.devices, memory_gib=h100.memory_gib * assumed.devices,
        memory_gbps=h100.memory_gbps * assumed.devices, bandwidth_mbit=bandwidth_mbit, latency_ms=assumed.latency_ms,
        mfu=assumed.mfu,
    )  # fmt: skip
    links = Links.between([site] * n_sites)
    steps = int(assumed.tokens / (assumed.global_batch * assumed.sequence_length))
    methods = [("ddp", n_sites), ("diloco", n_sites), ("local_adamw", n_sites)]
    methods += [("fomoe", o) for o in valid_overlaps(config.n_experts, n_sites) if o < n_sites and o & (o - 1) == 0]
    for method, overlap in methods:
        resident = config.n_experts * overlap // n_sites
        if method == "ddp":
            calls, k, state = ddp_collectives(config, n_sites), 1, STATE_BYTES["ddp"]
        else:
            moments = "keep" if method == "diloco" else "average"
            calls = round_collectives(config, n_sites=n_sites, overlap=overlap, inner_moments=moments)
            k, state = assumed.local_steps, STATE_BYTES["diloco" if method == "diloco" else "local_adamw"]
        flops = token_flops(config, assumed.sequence_length, n_resident=resident).training
        step = flops * assumed.global_batch / n_sites * assumed.sequence_length / (site.peak_flops() * site.mfu)
        round_ = links.round_seconds(calls)
        seconds = run_seconds(steps=steps, local_steps=k, seconds_per_step=step, seconds_per_round=round_)
        held = state * resident_counts(config, resident, "ghost").total
        sent = max(links.sent_by_place(calls)) * (assumed.local_steps // k)
        yield Row(
            name, n_sites, method, overlap, bandwidth_mbit, sent / GIB, held / GIB,
            held <= (1 - assumed.headroom) * site.memory_bytes, seconds / 3600, round_ / (round_ + k * step),
        )  # fmt: skip


def billions(config: ModelConfig) -> float:
    """Parameters in 10^9."""
    return parameter_counts(config).total / 1e9
