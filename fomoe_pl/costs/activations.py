"""What a forward pass keeps for its backward pass, and what the loss needs, from the configuration alone.

Letters: T tokens of a batch, D width, V vocabulary, W the vocabulary rounded up, N scored experts, K picks of a token,
I input width of an expert, F expert width, H heads, C rows of a chunk of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_pl.model.backends import AUTO, Backend, backend_of
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import chunk_rows
from fomoe_pl.model.sizes import resident_counts

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True)
class Types:
    """Bytes of an element by what it is.

    Attributes:
        parameter: Parameters, their gradients and moments.
        stream: Residual stream and the inputs of norms.
        compute: Matrix products.
        casts: Copies of one input that the query, key and value projections keep for the backward pass.
        kernels: The loss, and experts unless configured otherwise, run in our kernels, as on a GPU.
    """

    parameter: int
    stream: int
    compute: int
    casts: int
    kernels: bool = True

    @classmethod
    def of(cls, precision: Precision, kernels: bool = True) -> Types:
        """Types of a Trainer's precision."""
        if precision == "bf16-mixed":
            return cls(4, 4, 2, casts=3, kernels=kernels)  # autocast casts the input of each product again
        itemsize = 4 if precision == "32-true" else 2
        return cls(itemsize, itemsize, itemsize, casts=1, kernels=kernels)

    def backend(self, config: ModelConfig) -> Backend:
        """What runs the experts."""
        if config.expert_backend not in (AUTO, "triton"):
            return backend_of(config.expert_backend)
        return backend_of("triton" if self.kernels else "grouped")

    def experts_in_kernels(self, config: ModelConfig) -> bool:
        """Whether experts run in our kernels."""
        return self.backend(config).fused


def layer_activation_bytes(config: ModelConfig, types: Types, n_scored: int) -> int:
    """Bytes a token that one layer keeps for the backward pass without activation checkpointing.

    On an accelerator picks of ghosts take space like all others, so their number does not matter.

    Args:
        config: The architecture.
        types: Bytes of an element.
        n_scored: Experts N that the router scores.
    """
    r, c = types.stream, types.compute
    d, k, f, i = config.d_model, min(config.top_k, n_scored), config.d_expert, config.expert_in_width
    q, kv = config.n_heads * config.head_size, config.kv_heads * config.head_size
    statistics = 8 if config.norm == "layernorm" else 4
    norms = (4 if config.norm_placement == "peri" else 2) * (r * d + statistics)
    if config.qk_norm != "none":
        norms_of_heads = config.n_heads + config.kv_heads if config.qk_norm == "head" else 2
        norms += r * (q + kv) + statistics * norms_of_heads
    attention = types.casts * c * d + 2 * c * (q + kv) + 4 * config.n_heads
    router = 4 * d + 2 * 4 * n_scored + 4 + (4 if config.gate == "sigmoid" else 0)
    router += 4 * k if config.normalize_gates and config.gate == "sigmoid" else 0
    experts = k * (8 + 4)  # which expert, gate
    if types.experts_in_kernels(config) or config.activation_checkpointing == "experts":
        experts += c * d if c < 4 else 0  # in float32 their input is the router's
    if types.experts_in_kernels(config):
        experts += k * 2 * 4  # two orders
    if config.activation_checkpointing != "experts":
        experts += expert_activation_bytes(config, types, n_scored)
    shared = 0
    if config.n_shared_experts:
        # In float32 their input is the router's.
        shared = (c * d if c < 4 else 0) + config.n_shared_experts * c * (
            i + f * (2 if config.expert == "swiglu" else 1)
        )
    return norms + attention + router + experts + shared


def expert_activation_bytes(config: ModelConfig, types: Types, n_scored: int) -> int:
    """Bytes a token that a layer's experts keep, or with checkpointing recompute.

    Args:
        config: The architecture.
        types: Bytes of an element.
        n_scored: Experts N that the router scores.

    Raises:
        ConfigError: If a custom backend does not declare it.
    """
    return types.backend(config).kept_bytes(config, types.compute, min(config.top_k, n_scored))


def activation_bytes(
    config: ModelConfig, types: Types, tokens: int, n_resident: int, n_scored: int, *, copies: bool = False
) -> int:
    """Bytes that the forward pass keeps: of all layers (or their inputs, with checkpointing), and weights' casts.

    Args:
        config: The architecture.
        types: Bytes of an element.
        tokens: T of a micro-batch.
        n_resident: Resident experts of each layer.
        n_scored: Experts N that the router scores.
        copies: Experts' weights have lasting copies in the type of products.
    """
    checkpointing = config.activation_checkpointing
    r, d = types.stream, config.d_model
    statistics = 8 if config.norm == "layernorm" else 4
    ends = (2 if config.embedding_norm else 1) * (r * d + statistics) + 3 * 8  # inputs, targets, domain
    layer = r * d if checkpointing == "blocks" else layer_activation_bytes(config, types, n_scored)
    casts = 0
    if checkpointing != "blocks":
        counts = resident_counts(config, n_resident, "ghost")
        if types.parameter != types.compute:
            experts = 0 if copies or checkpointing == "experts" else counts.experts
            casts = types.compute * (counts.attention + experts + counts.shared)
        elif types.parameter < 4:
            casts = 4 * config.n_layers * n_scored * d  # the router's products are in float32
    return tokens * (ends + config.n_layers * layer) + casts


def chunk_bytes(config: ModelConfig, types: Types, tokens: int) -> tuple[int, int]:
    """Bytes of a chunk of logits while its gradient is computed, and of the gradient."""
    width, c = -(-config.vocab_size // 8) * 8, types.compute
    cells = min(tokens, chunk_rows(width, config.loss_chunk_bytes, c, types.kernels)) * width
    if types.kernels:
        return c * cells, c * cells  # the gradient takes the logits' place
    # Logits, in float32 if they are not yet, and their log-probabilities, which become the gradient.
    return (c + 4 + (4 if c < 4 else 0)) * cells, c * cells


def loss_bytes(config: ModelConfig, types: Types, tokens: int) -> int:
    """Bytes of the loss at its peak: hidden states, the output matrix and both gradients, and logits by the chunk."""
    width, d, c = -(-config.vocab_size // 8) * 8, config.d_model, types.compute
    copied = c != types.parameter or width != config.vocab_size
    matrix = c * width * d if copied else 0
    hidden = tokens * d * (types.stream + (c if c != types.stream else 0))
    gradients = 4 * width * d + tokens * d * types.stream
    made, used = chunk_bytes(config, types, tokens)
    product = 0 if types.kernels and c < 4 else c * width * d  # added to the gradient inside the product, or after it
    return matrix + hidden + gradients + max(made, used + product)
