"""Device memory of one rank by part, from the configuration alone: what this code allocates, not an ideal.

The paper counts 18 bytes a parameter (FoMoE, arXiv 2606.19025, cost model). Here every tensor is counted that lives at
one of the moments that can be the peak: the end of the forward pass, where activations and the loss's buffers live, and
with accumulation gradients; the backward pass; the round's averaging; the validation of the global model.

Letters: T tokens of a batch, D width, K picks of a token, I input width of an expert, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fomoe_pl.codec import GROUP, Codec, Groups
from fomoe_pl.costs.activations import (
    Precision,
    Types,
    activation_bytes,
    chunk_bytes,
    expert_activation_bytes,
    layer_activation_bytes,
    loss_bytes,
)
from fomoe_pl.costs.rounds import ADAMW_MOMENTS, ITEMSIZE, copy_bytes, matrices
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import FORMATS, WireFormat
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.sizes import ParameterCounts, expert_parameters, parameter_counts, resident_counts, scored_experts

MIB, GIB = 2**20, 2**30

LIBRARY_BYTES = 64 * MIB
"""Workspaces of the matrix library, from torch's allocator (cuBLAS on Hopper: two of 32 MiB)."""
GROUP_BYTES = 17
"""Of a group's magnitude and scale while it is encoded."""
DDP_COPIES = 2
"""Copies of the gradients that DDP adds: its buckets, and as much again at the peak (measured on an H100)."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a rank works on.

    Attributes:
        precision: The Trainer's.
        batch_size: Sequences of a micro-batch B.
        sequence_length: Tokens of a sequence S.
        method: `rounds` keeps float32 anchors, `ddp` gradients' copies, `single` neither.
        outer_momentum: The outer rule keeps a momentum besides the anchor.
        wire_on_device: Wire buffers are on the device (NCCL), not on the host (gloo).
        wire_dtype: dtype of averaged values on the wire that are not coded.
        wire_codec: Of the changes of matrices; None casts them.
        error_feedback: What coding loses of them is kept.
        moments_codec: Of averaged moments of matrices.
        holders: Sizes of the sets of sites that average codes; a pair takes most.
        bucket_bytes: Size of a wire buffer; there are two.
        state_on_host: Anchors and outer momentum are not on the device.
        val_batch_size: Sequences of a validation batch; 0 for no validation.
        evaluation_window: Validation batches that go through a layer together, at most the validation's.
        kernels: On a GPU for which triton is there; else torch's own operations run.
        accumulate: Micro-batches of a step.
        recorded: Steps are replayed (`model/recorded.py`), from memory that stays reserved while sites average.
        bf16_gradients: Experts' gradients are of the type of products where that is another and they run in our
            kernels, and so are lasting copies of their weights, unless activations are recomputed (`model/copies.py`).
        fragments: Parts of the model that take turns in a round.
        delay: Local steps while an average of them is on its way.
        averaged_moments: How many of the moments are averaged too.
    """

    precision: Precision = "bf16-mixed"
    batch_size: int = 16
    sequence_length: int = 2048
    method: Literal["rounds", "ddp", "single"] = "rounds"
    outer_momentum: bool = False
    wire_on_device: bool = True
    wire_dtype: str = "float32"
    wire_codec: WireFormat | None = None
    error_feedback: bool = False
    moments_codec: WireFormat | None = None
    holders: tuple[int, ...] = (2,)
    bucket_bytes: int = 64 * MIB
    state_on_host: bool = False
    val_batch_size: int = 0
    evaluation_window: int = 64
    kernels: bool = True
    accumulate: int = 1
    recorded: bool = False
    bf16_gradients: bool = False
    fragments: int = 1
    delay: int = 0
    averaged_moments: int = 0

    def __post_init__(self) -> None:
        """Refuse empty batches.

        Raises:
            ConfigError: For a size below 1.
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


LASTING = ("weights", "copies", "moments", "anchors", "outer_momentum", "residual", "flight", "library")
OF_MOMENT = {
    "end of the forward pass": ("gradients_kept", "activations", "logits", "gathered"),
    "backward pass": ("backward", "gathered"),
    "averaging": ("wire", "recorded"),
    "refresh of the copies": ("refresh", "recorded"),
    "global validation": ("gradient_buckets", "validation", "gathered"),
}
"""Parts of `RankMemory` that are always there, and those that are there at each moment that can be the peak."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. The parts down to `flight` last as long as the run, the others are of one moment.

    Attributes:
        weights: Parameters, and copies of experts' that last.
        copies: Packed copies of absent experts.
        gradients: Their gradients, in the backward pass, and until the last micro-batch of a step; and DDP's copies.
        gradients_kept: What of that is there in a forward pass; in rounds and validations DDP's copies alone are.
        gradient_buckets: DDP's copies.
        moments: AdamW's two moments.
        anchors: The last agreed values, float32.
        outer_momentum: Of the outer rule, float32.
        residual: What coding has lost of the changes of matrices, float32.
        flight: Averages that are on their way while the site computes, as float32 where they have arrived.
        activations: What the forward pass keeps for the backward pass, the logits' part excluded.
        logits: The loss's buffers: a chunk of logits and the output matrix's gradient.
        wire: Buffers and temporary values of a round's averaging.
        validation: Streams of a window and one whole layer of experts.
        library: Workspace of the matrix library.
        backward: Most of what the backward pass holds besides weights, moments, anchors and outer momentum; with copies
            one layer's unpacked ones, which the forward pass has before that.
        refresh: New copies of absent experts besides the old ones, and a layer's in flight.
        gathered: What a device of a sharded site gathers of the others' slices: all outside of layers, and two layers.
        recorded: What stays reserved of a step's passes while sites average.
        on_host: Anchors, outer momentum and residual in the host's memory, which is no part of any moment of the
            device.
    """

    weights: int
    copies: int
    gradients: int
    gradients_kept: int
    gradient_buckets: int
    moments: int
    anchors: int
    outer_momentum: int
    residual: int
    flight: int
    activations: int
    logits: int
    wire: int
    validation: int
    library: int
    backward: int
    refresh: int
    gathered: int
    recorded: int
    on_host: int

    @property
    def lasting(self) -> int:
        """Bytes that are always there: weights, copies, moments, anchors, outer momentum, residual, the library's."""
        return self._sum(LASTING)

    @property
    def moments_of_peak(self) -> dict[str, int]:
        """Bytes at each moment that can be the peak."""
        return {moment: self.lasting + self._sum(parts) for moment, parts in OF_MOMENT.items()}

    def _sum(self, parts: Iterable[str]) -> int:
        return sum(getattr(self, part) for part in parts)

    @property
    def peak(self) -> int:
        """The largest of them: what `torch.cuda.max_memory_allocated` shows where passes are not recorded."""
        return max(self.moments_of_peak.values())

    def at_peak(self) -> tuple[str, dict[str, int]]:
        """The moment of the peak, and what is held then by part, the largest part first."""
        moment = max(self.moments_of_peak, key=self.moments_of_peak.__getitem__)
        parts = {name.removesuffix("_kept"): getattr(self, name) for name in (*LASTING, *OF_MOMENT[moment])}
        return moment, dict(sorted(parts.items(), key=lambda part: -part[1]))


def _flight_bytes(config: ModelConfig, load: Load, parameters: int, coded: int) -> int:
    """Of the largest fragment: means, and what coding has lost of the changes."""
    outside = parameter_counts(config).embeddings
    share = 1.0
    if load.fragments > 1:
        layers = -(-config.n_layers // (load.fragments - 1)) / config.n_layers
        share = max(outside, layers * (parameters - outside)) / parameters
    lost = coded if load.error_feedback else 0
    return math.ceil(4 * share * (parameters * (1 + load.averaged_moments) + lost))


def _wire_bytes(config: ModelConfig, load: Load, resident_elements: int, coded_elements: int, shards: int) -> int:
    """Of the largest buckets, casts or codes, with the state that was fetched for them."""
    itemsize = ITEMSIZE[load.wire_dtype]
    largest_row = -(-config.d_model * config.expert_in_width // shards)  # tensors are cut between rows: an expert's
    elements = max(load.bucket_bytes // itemsize, largest_row)
    one, two, three = (min(n * elements, resident_elements) for n in (1, 2, 3))
    # Of the bucket that is read, of the one that is written, and of the one before, on its way back to the host.
    slots = 1 + load.outer_momentum + load.error_feedback
    state = 4 * three * slots if load.state_on_host else 0
    steps = 4 * one if load.outer_momentum else 0
    mean = 4 * one if itemsize < 4 else 0  # of one buffer, while the next one travels
    casts = two * itemsize + max(4 * one, mean + steps)
    if not load.wire_on_device:
        # Changes and the buffer to be sent; later means, of the wire's type and as float32, and steps.
        casts = 4 * one + max(itemsize * one, (itemsize * one if itemsize < 4 else 0) + steps)
    ends = [min(n * elements, coded_elements) for n in (0, 1, 2, 3)]
    sizes = [end - start for start, end in pairwise(ends)]
    return state + max([casts, *(_coded_bytes(load, sizes, g) for g in load.holders if g > 1)])


def _coded_bytes(load: Load, sizes: Sequence[int], g: int) -> int:
    """Most of what averages of coded buckets over g sites hold, read off `Transport.average` and `Flight.drain`.

    Args:
        load: Its formats.
        sizes: Elements of a bucket, of the one after it, and of a third: two are on their way, and what one has lost
            is held until the next but one has started.
        g: Number of sites.
    """
    one, second, third = sizes
    rows = 2 if g == 2 else 1  # of a pair both are decoded, else slices that are as many numbers together
    peak = 0
    for form, kept, root in ((load.wire_codec, load.error_feedback, False), (load.moments_codec, False, True)):
        if form is None:
            continue
        codec, levels = FORMATS[form], 1 if form == "int4" else 0
        code = codec.nbytes(one)
        encoding = _bytes_encoding(codec) + 4 * root
        start = max(encoding, 12 if kept else 0) * one + code  # values, those decoded, and their difference
        # Decoding: numbers, and of 4 bits four bytes of each on their way there; roots, and their squares.
        decoding = 4 + 4 * max(levels, root)
        mean = rows * decoding if g == 2 else decoding + 4 / g
        wait = max(mean, 4 * rows + 4 / (1 if g == 2 else g)) * one
        if kept:
            start, wait = start + 4 * (second + third), wait + 4 * (one + second)
        if load.wire_on_device:
            # What is sent, what arrives, and the buffer in which all sites' codes of a gather arrive.
            flying = codec.nbytes(second) * (1 + 2 * 2 if g == 2 else 2)
            start += flying + rows * codec.nbytes(third)
            wait += flying + code * (2 if g == 2 else 2 + 1 / g)
        else:
            wait += rows * code
        peak = max(peak, math.ceil(start), math.ceil(wait))
    return peak


def _bytes_encoding(codec: Codec) -> float:
    """Bytes of a float32 number while it is encoded, its code left out.

    In groups its magnitude, later its level as float32 and as a byte, shifted onto others' below 8 bits; their scales.
    """
    return 8 + 1 + (codec.bits < 8) + GROUP_BYTES / GROUP if isinstance(codec, Groups) else 8


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


def _layer_in_flight(config: ModelConfig, types: Types, tokens: int, n_resident: int, n_scored: int) -> int:
    """Temporary memory of the backward pass through one layer, besides the stream: recomputed values, and rows."""
    i, f, d = config.expert_in_width, config.d_expert, config.d_model
    picks = tokens * min(config.top_k, n_scored) * types.compute
    in_kernels = types.experts_in_kernels(config)
    # Rows of picks: in our kernels the gradient inside the activation, and what is recomputed or goes to the tokens.
    rows = picks * (i + max(f, d) if in_kernels else 3 * d + f)
    if config.activation_checkpointing == "blocks":
        return tokens * layer_activation_bytes(config, types, n_scored) + (rows if in_kernels else 2 * picks * d)
    if config.activation_checkpointing == "experts":
        rows += tokens * expert_activation_bytes(config, types, n_scored)
        if types.parameter != types.compute:
            rows += types.compute * n_resident * expert_parameters(config)
    return rows


def _unpacked_bytes(config: ModelConfig, types: Types, n_resident: int, shadow: Shadow) -> int:
    """A matrix of each of a layer's copies, unpacked for one product of the backward pass."""
    d, i, f = config.d_model, config.expert_in_width, config.d_expert
    absent = config.n_experts - n_resident
    if types.experts_in_kernels(config):
        return types.compute * absent * d * (i if shadow.input_gradient else f)
    # One tensor of all experts is concatenated from residents (cast if their type differs) and copies.
    parts = absent + (n_resident if types.parameter != types.compute else 0)
    return types.compute * (config.n_experts + parts) * d * (i if shadow.input_gradient else f)


def _refresh_bytes(config: ModelConfig, n_resident: int, shadow: Shadow) -> int:
    """New copies besides the old ones; of one layer what arrives, what is sent, and the encoding of one tensor.

    Upper bound: as if this site owned all its residents.
    """
    one, absent = copy_bytes(config, shadow), config.n_experts - n_resident
    encoding = math.ceil(_bytes_encoding(shadow.codec) * n_resident * config.d_model * config.expert_in_width)
    return config.n_layers * absent * one + config.n_experts * one + encoding


def _gathered_bytes(config: ModelConfig, types: Types, counts: ParameterCounts, n_resident: int) -> int:
    """Of a layer that computes and of the next one: experts in the type of products, all else as parameters are."""
    experts = n_resident * expert_parameters(config)
    rest = (counts.total - counts.embeddings) // config.n_layers - experts
    return types.parameter * (counts.embeddings + 2 * rest) + types.compute * 2 * experts


def rank_memory(
    config: ModelConfig, load: Load, *, n_resident: int, routing: Routing = "ghost", shards: int = 1,
    shadow: Shadow = Shadow(),  # noqa: B008  frozen
) -> RankMemory:  # fmt: skip
    """Memory of a rank that holds `n_resident` experts of every layer, in training with AdamW.

    Args:
        config: The architecture.
        load: Precision, batch and what else is held.
        n_resident: Resident experts R of each layer, 1..E.
        routing: With partitioned routing router rows go with their experts.
        shards: Devices of a site over which its weights, gradients, moments, anchors and outer momentum are spread.
            Then there are no lasting copies of weights, and gradients that last are of the parameters' type.
        shadow: How copies are kept, with shadow routing.

    Raises:
        ConfigError: If `n_resident` is no number of experts of a layer, or there is no shard.
    """
    if shards < 1:
        raise ConfigError("shards", shards, "must be at least 1", "1 is a site of one device")
    if not 1 <= n_resident <= config.n_experts:
        raise ConfigError("n_resident", n_resident, "must be a number of experts of a layer",
                          f"give 1 to {config.n_experts}")  # fmt: skip
    types = Types.of(load.precision, load.kernels)
    n_scored = scored_experts(config, n_resident, routing)
    counts = resident_counts(config, n_resident, routing)
    parameters, experts, coded = (-(-n // shards) for n in (counts.total, counts.experts, matrices(counts)))
    output = config.vocab_size * config.d_model
    federated = load.method == "rounds"
    agreed = 4 * parameters if federated else 0
    momentum = agreed if load.outer_momentum else 0
    lost = 4 * coded if federated and load.error_feedback else 0
    small = load.bf16_gradients and types.parameter != types.compute and types.experts_in_kernels(config)
    of_gradient = types.compute if small else types.parameter  # of experts
    gradients = types.parameter * (parameters - experts) + (of_gradient if shards == 1 else types.parameter) * experts
    copies = types.compute * experts if small and config.activation_checkpointing == "none" and shards == 1 else 0
    buckets = DDP_COPIES * gradients if load.method == "ddp" else 0
    copied = routing == "shadow" and n_resident < config.n_experts
    in_kernels = types.experts_in_kernels(config)
    # With copies torch's grouped products cast weights again in each pass, and keep none; slices are gathered as cast.
    no_casts = bool(copies) or shards > 1 or (copied and not in_kernels)
    activations = activation_bytes(config, types, load.tokens, n_resident, n_scored, copies=no_casts)
    stream = load.tokens * config.d_model * types.stream
    unpacked = _unpacked_bytes(config, types, n_resident, shadow) if copied else 0
    in_flight = 2 * stream + unpacked + _layer_in_flight(config, types, load.tokens, n_resident, n_scored)
    kept = gradients if load.accumulate > 1 else 0
    # Gradients come while activations go. First the output matrix's is made, of its float32 sum; then the last layer
    # has gradients in flight, its experts' made before their tokens'.
    first = kept + activations + output * (4 + types.parameter) + 2 * stream
    of_experts = of_gradient * n_resident * expert_parameters(config)
    last_layer = kept + activations + output * types.parameter + of_experts + in_flight
    ends = gradients + types.parameter * output + in_flight
    logits, backward = loss_bytes(config, types, load.tokens), max(first, last_layer, ends) + buckets
    return RankMemory(
        weights=types.parameter * parameters + copies,
        copies=config.n_layers * (config.n_experts - n_resident) * copy_bytes(config, shadow) if copied else 0,
        gradients=gradients + buckets,
        # Freed after the step, with accumulation after the last micro-batch's.
        gradients_kept=kept + buckets,
        gradient_buckets=buckets,
        moments=ADAMW_MOMENTS * types.parameter * parameters,
        anchors=0 if load.state_on_host else agreed,
        outer_momentum=0 if load.state_on_host else momentum,
        residual=0 if load.state_on_host else lost,
        flight=_flight_bytes(config, load, parameters, coded) if federated and load.delay else 0,
        activations=activations,
        logits=logits,
        wire=_wire_bytes(config, load, parameters, coded, shards) if federated else 0,
        validation=_validation_bytes(config, load, types, n_resident, routing),
        library=LIBRARY_BYTES,
        backward=backward,
        gathered=_gathered_bytes(config, types, counts, n_resident) if shards > 1 else 0,
        refresh=_refresh_bytes(config, n_resident, shadow) if copied and federated else 0,
        recorded=max(activations + logits, backward) if load.recorded else 0,
        on_host=agreed + momentum + lost if load.state_on_host else 0,
    )
