"""Device memory of one rank by part, from the configuration alone: what this code allocates, not an ideal.

The paper counts 18 bytes a parameter (FoMoE, arXiv 2606.19025, cost model). Here every tensor is counted that lives at
one of the moments that can be the peak: the end of the forward pass, where activations and the loss's buffers live, and
with accumulation gradients; the backward pass; the round's averaging; the validation of the global model.

Letters: T tokens of a batch, D width, V vocabulary, W the vocabulary rounded up, N scored experts, K picks of a token,
I input width of an expert, F expert width, H heads, C rows of a chunk of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_pl.costs.rounds import ADAMW_MOMENTS, ITEMSIZE
from fomoe_pl.errors import ConfigError
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import chunk_rows
from fomoe_pl.model.residency import Routing
from fomoe_pl.model.sizes import expert_parameters, resident_counts

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
MIB, GIB = 2**20, 2**30

LIBRARY_BYTES = 64 * MIB
"""Workspaces of the matrix library, from torch's allocator (cuBLAS on Hopper: two of 32 MiB)."""
DDP_COPIES = 2
"""Copies of the gradients that DDP adds: its buckets, and as much again at the peak (measured on an H100)."""


@dataclass(frozen=True)
class Types:
    """Bytes of an element by what it is.

    Attributes:
        parameter: parameters, their gradients and moments.
        stream: residual stream and the inputs of norms.
        compute: matrix products.
        casts: copies of one input that the query, key and value projections keep for the backward pass.
        kernels: the loss, and experts unless configured otherwise, run in our kernels, as on a GPU.
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
            return cls(4, 4, 2, casts=3, kernels=kernels)  # autocast casts the input of each product anew
        itemsize = 4 if precision == "32-true" else 2
        return cls(itemsize, itemsize, itemsize, casts=1, kernels=kernels)

    def experts_in_kernels(self, config: ModelConfig) -> bool:
        """Whether experts run in our kernels."""
        return self.kernels and config.expert_backend in ("auto", "triton")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a rank works on.

    Attributes:
        precision: the Trainer's.
        batch_size: sequences of a micro-batch B.
        sequence_length: tokens of a sequence S.
        method: `rounds` keeps float32 anchors, `ddp` gradients' copies, `single` neither.
        outer_momentum: the outer rule keeps a momentum beside the anchor.
        wire_on_device: wire buffers are on the device (NCCL), not on the host (gloo).
        wire_dtype: dtype of averaged values on the wire.
        bucket_bytes: size of a wire buffer; there are two.
        val_batch_size: sequences of a validation batch; 0 for no validation.
        evaluation_window: validation batches that go through a layer together, at most the validation's.
        kernels: on a GPU for which triton is there; else torch's own operations run.
        accumulate: micro-batches of a step.
        recorded: steps are replayed (``model/recorded.py``), from memory that stays reserved while sites average.
    """

    precision: Precision = "bf16-mixed"
    batch_size: int = 16
    sequence_length: int = 2048
    method: Literal["rounds", "ddp", "single"] = "rounds"
    outer_momentum: bool = False
    wire_on_device: bool = True
    wire_dtype: str = "float32"
    bucket_bytes: int = 64 * MIB
    val_batch_size: int = 0
    evaluation_window: int = 64
    kernels: bool = True
    accumulate: int = 1
    recorded: bool = False

    def __post_init__(self) -> None:
        """Refuse empty batches.

        Raises:
            ConfigError: for a size below 1.
        """
        for name in ("batch_size", "sequence_length", "bucket_bytes", "evaluation_window", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1", "give a positive number")
        if self.val_batch_size < 0:
            raise ConfigError("val_batch_size", self.val_batch_size, "must not be negative", "give 0 for none")

    @property
    def tokens(self) -> int:
        """Tokens T of a micro-batch."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. The parts down to ``outer_momentum`` last as long as the run, the others are of one moment.

    Attributes:
        weights: parameters.
        gradients: their gradients, in the backward pass, and until the last micro-batch of a step; and DDP's copies.
        gradients_kept: what of that is there in a forward pass and in a round.
        moments: AdamW's two moments.
        anchors: the last agreed values, float32.
        outer_momentum: of the outer rule, float32.
        activations: what the forward pass keeps for the backward pass, the logits' part excluded.
        logits: the loss's buffers: a chunk of logits and the output matrix's gradient.
        wire: buffers and temporary values of a round's averaging.
        validation: streams of a window and one whole layer of experts.
        library: workspace of the matrix library.
        backward: most of what the backward pass holds beside weights, moments, anchors and outer momentum.
        recorded: what stays reserved of a step's passes while sites average.
    """

    weights: int
    gradients: int
    gradients_kept: int
    moments: int
    anchors: int
    outer_momentum: int
    activations: int
    logits: int
    wire: int
    validation: int
    library: int
    backward: int
    recorded: int

    @property
    def lasting(self) -> int:
        """Bytes that are always there: weights, moments, anchors, outer momentum and the library's."""
        return self.weights + self.moments + self.anchors + self.outer_momentum + self.library

    @property
    def moments_of_peak(self) -> dict[str, int]:
        """Bytes at each moment that can be the peak."""
        held = self.lasting + self.gradients_kept
        return {
            "end of the forward pass": held + self.activations + self.logits,
            "backward pass": self.lasting + self.backward,
            "averaging": held + self.wire + self.recorded,
            "global validation": held + self.validation,
        }

    @property
    def peak(self) -> int:
        """The largest of them; of passes that are not recorded, what ``torch.cuda.max_memory_allocated`` shows."""
        return max(self.moments_of_peak.values())

    def at_peak(self) -> tuple[str, dict[str, int]]:
        """The moment of the peak, and what is held then by part, the largest part first."""
        moment = max(self.moments_of_peak, key=self.moments_of_peak.__getitem__)
        of_moment = {
            "end of the forward pass": ("gradients_kept", "activations", "logits"),
            "backward pass": ("backward",),
            "averaging": ("gradients_kept", "wire", "recorded"),
            "global validation": ("gradients_kept", "validation"),
        }[moment]
        names = ("weights", "moments", "anchors", "outer_momentum", "library", *of_moment)
        parts = {name.removesuffix("_kept"): getattr(self, name) for name in names}
        return moment, dict(sorted(parts.items(), key=lambda part: -part[1]))


def layer_activation_bytes(config: ModelConfig, types: Types, n_scored: int) -> int:
    """Bytes a token that one layer keeps for the backward pass without activation checkpointing.

    Picks of ghosts are laid out like all others on an accelerator: their number does not matter.

    Args:
        config: the architecture.
        types: bytes of an element.
        n_scored: experts N that the router scores.
    """
    r, c = types.stream, types.compute
    d, k, f, i = config.d_model, min(config.top_k, n_scored), config.d_expert, config.expert_in_width
    q, kv = config.n_heads * config.head_size, config.kv_heads * config.head_size
    swiglu = config.expert == "swiglu"
    statistics = 8 if config.norm == "layernorm" else 4
    norms = (4 if config.norm_placement == "peri" else 2) * (r * d + statistics)
    if config.qk_norm != "none":
        norms_of_heads = config.n_heads + config.kv_heads if config.qk_norm == "head" else 2
        norms += r * (q + kv) + statistics * norms_of_heads
    attention = types.casts * c * d + 2 * c * (q + kv) + 4 * config.n_heads
    router = 4 * d + 2 * 4 * n_scored + 4 + (4 if config.gate == "sigmoid" else 0)
    router += 4 * k + 4 if config.normalize_gates else 0
    if types.experts_in_kernels(config):
        picks = k * (8 + 2 * 4 + 4)  # which expert, two orders, gate
        experts = c * (k * i + (d if c < 4 else 0))  # in float32 their input is the router's
    else:
        picks = k * (3 * 8 + 1 + 4 + c)  # which expert, two orders, alive or not, gate twice
        experts = k * c * (d + i + f * (3 if swiglu else 2))
    shared = 0
    if config.n_shared_experts:
        # In float32 their input is the router's.
        shared = (c * d if c < 4 else 0) + config.n_shared_experts * c * (i + f * (2 if swiglu else 1))
    return norms + attention + router + picks + experts + shared


def activation_bytes(config: ModelConfig, types: Types, tokens: int, n_resident: int, n_scored: int) -> int:
    """Bytes that the forward pass keeps: of all layers (or their inputs, with checkpointing), and weights' casts."""
    r, d = types.stream, config.d_model
    statistics = 8 if config.norm == "layernorm" else 4
    ends = (2 if config.embedding_norm else 1) * (r * d + statistics) + 3 * 8  # inputs, targets, domain
    layer = r * d if config.activation_checkpointing else layer_activation_bytes(config, types, n_scored)
    casts = 0
    if not config.activation_checkpointing:
        counts = resident_counts(config, n_resident, "ghost")
        if types.parameter != types.compute:
            casts = types.compute * (counts.attention + counts.experts + counts.shared)
        elif types.parameter < 4:
            casts = 4 * config.n_layers * n_scored * d  # the router's products are in float32
    return tokens * (ends + config.n_layers * layer) + casts


def chunk_bytes(config: ModelConfig, types: Types, tokens: int) -> tuple[int, int]:
    """Bytes of a chunk of logits when its gradient is made, and of the gradient."""
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
    product = 0 if types.kernels and c < 4 else c * width * d  # added to the gradient while it is made, or after
    return matrix + hidden + gradients + max(made, used + product)


def _wire_bytes(load: Load, largest_piece: int, resident_elements: int) -> int:
    itemsize = ITEMSIZE[load.wire_dtype]
    elements = max(load.bucket_bytes // itemsize, largest_piece)
    temporary = 4 * largest_piece * (3 if load.outer_momentum else 1)
    if not load.wire_on_device:
        return temporary + 4 * largest_piece
    mean = 4 * min(elements, resident_elements) if itemsize < 4 else 0  # of one buffer, while the next one travels
    return temporary + min(2 * elements, resident_elements) * itemsize + mean


def _validation_bytes(config: ModelConfig, load: Load, types: Types, n_resident: int, routing: Routing) -> int:
    """Streams of a window, one layer of all experts with what was fetched, and one batch's way through it."""
    if not load.val_batch_size:
        return 0
    tokens, d = load.val_batch_size * load.sequence_length, config.d_model
    r, c, k = types.stream, types.compute, config.top_k
    streams = tokens * load.evaluation_window * (r * d + 16)
    one = expert_parameters(config) + (d if routing == "partitioned" else 0)
    layer = config.n_experts * one * (types.parameter + (c if c != types.parameter else 0))
    away = config.n_experts - n_resident
    if not away:
        layer = config.n_experts * one * c if c != types.parameter else 0
    elif load.wire_on_device:
        layer += 2 * away * one * types.parameter
    cached = c * resident_counts(config, n_resident, "ghost").attention if c != types.parameter else 0
    of_picks = k * c * ((1 if types.experts_in_kernels(config) else 3) * d + config.expert_in_width + config.d_expert)
    through = tokens * (3 * r * d + of_picks)
    width = -(-config.vocab_size // 8) * 8
    logits = chunk_bytes(config, types, tokens)[0] + c * width * d + tokens * d * (r + c)
    return streams + cached + max(layer + through, logits)


def rank_memory(
    config: ModelConfig, load: Load, *, n_resident: int, routing: Routing = "ghost", shards: int = 1
) -> RankMemory:
    """Memory of a rank that holds ``n_resident`` experts of every layer, in training with AdamW.

    Args:
        config: the architecture.
        load: precision, batch and what else is held.
        n_resident: resident experts R of each layer, 1..E.
        routing: with partitioned routing router rows go with their experts.
        shards: devices of a site over which its weights, gradients, moments, anchors and outer momentum are spread;
            what a device gathers of the others' parts is not counted.

    Raises:
        ConfigError: if ``n_resident`` is no number of experts of a layer, or there is no shard.
    """
    if shards < 1:
        raise ConfigError("shards", shards, "must be at least 1", "1 is a site of one device")
    if not 1 <= n_resident <= config.n_experts:
        raise ConfigError("n_resident", n_resident, "must be a number of experts of a layer",
                          f"give 1 to {config.n_experts}")  # fmt: skip
    types = Types.of(load.precision, load.kernels)
    n_scored = config.n_experts if routing == "ghost" else n_resident
    parameters = -(-resident_counts(config, n_resident, routing).total // shards)
    output = config.vocab_size * config.d_model
    federated, gradients = load.method == "rounds", types.parameter * parameters
    buckets = DDP_COPIES * gradients if load.method == "ddp" else 0
    activations = activation_bytes(config, types, load.tokens, n_resident, n_scored)
    # Gradients come while activations go. First the output matrix's is made, of its float32 sum; then the last layer,
    # recomputed if it is checkpointed, has gradients of its picks and of the stream in flight.
    stream = load.tokens * config.d_model * types.stream
    picks = load.tokens * min(config.top_k, n_scored) * types.compute
    i, f, d = config.expert_in_width, config.d_expert, config.d_model
    # Rows of picks: in our kernels the gradient inside the activation, and what is made anew or goes to the tokens.
    rows = picks * ((i + max(f, d)) if types.experts_in_kernels(config) else (3 * d + f))
    if config.activation_checkpointing:
        again = load.tokens * layer_activation_bytes(config, types, n_scored)
        in_flight = 2 * stream + again + (rows if types.experts_in_kernels(config) else 2 * picks * d)
    else:
        in_flight = 2 * stream + rows
    kept = gradients if load.accumulate > 1 else 0
    first = kept + activations + output * (4 + types.parameter) + 2 * stream
    of_experts = types.parameter * n_resident * expert_parameters(config)  # the last layer's, made before its tokens'
    last_layer = kept + activations + output * types.parameter + of_experts + in_flight
    ends = types.parameter * (parameters + output) + in_flight
    logits, backward = loss_bytes(config, types, load.tokens), max(first, last_layer, ends) + buckets
    return RankMemory(
        weights=types.parameter * parameters,
        gradients=gradients + buckets,
        # Freed after the step, with accumulation after the last micro-batch's.
        gradients_kept=kept + buckets,
        moments=ADAMW_MOMENTS * types.parameter * parameters,
        anchors=4 * parameters if federated else 0,
        outer_momentum=4 * parameters if federated and load.outer_momentum else 0,
        activations=activations,
        logits=logits,
        wire=_wire_bytes(load, -(-output // shards), parameters) if federated else 0,
        validation=_validation_bytes(config, load, types, n_resident, routing),
        library=LIBRARY_BYTES,
        backward=backward,
        recorded=max(activations + logits, backward) if load.recorded else 0,
    )
