"""Seconds: of a local step, of a round, of a run (FoMoE, arXiv 2606.19025, §3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_pl.costs.activations import Precision, Types, expert_activation_bytes, layer_activation_bytes
from fomoe_pl.costs.flops import token_flops
from fomoe_pl.costs.memory import Load
from fomoe_pl.costs.rounds import copy_bytes
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import Sharing
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.sizes import expert_parameters, resident_counts, scored_experts

MOVES_OF_AN_ACTIVATION = 6
"""How often a saved activation is moved to or from memory in a step: written and read forward, read
backward, and its gradient written, read and summed."""
MOVES_IN_VALIDATION = 2
"""The same without a backward pass: written and read."""
OPTIMIZER_MOVES = 10
"""Moves of a parameter-sized tensor a step: AdamW reads four and writes three, clipping reads one and writes it, and
the gradient is written."""
INSIDE_SHARE = 0.5
"""Share of `inside_gbps` that collectives inside a site reach: an assumption."""


@dataclass(frozen=True)
class StepWork:
    """Work of a local step or of a validation on a device.

    Attributes:
        flops: FLOPs executed, recomputation included.
        memory_bytes: Bytes that elementwise work and the optimizer move.
        precision: The Trainer's, which says whose peak counts.
    """

    flops: float
    memory_bytes: float
    precision: Precision = "bf16-mixed"

    def seconds_at_peak(self, site: Site) -> float:
        """Seconds if products ran at the peak and the rest at the memory's bandwidth: a lower bound to calibrate."""
        assert site.memory_gbps is not None
        return self.flops / site.peak_flops(self.precision) + self.memory_bytes / (site.memory_gbps * 1e9)


def step_work(
    config: ModelConfig,
    load: Load,
    *,
    n_resident: int,
    routing: Routing = "ghost",
    ghost_fraction: float | None = None,
    shadow: Shadow = Shadow(),  # noqa: B008  frozen
) -> StepWork:
    """Work of one optimizer step of one micro-batch.

    Args:
        config: The architecture.
        load: Precision and batch.
        n_resident: Resident experts R of each layer.
        routing: The routing mode.
        ghost_fraction: Measured share of picks that are not of residents; None for balanced routing's.
        shadow: How copies are kept and used, with `shadow` routing: each pass unpacks them.
    """
    flops = token_flops(
        config, load.sequence_length, n_resident=n_resident, routing=routing, ghost_fraction=ghost_fraction,
        shadow=shadow,
    )  # fmt: skip
    types = Types.of(load.precision, load.kernels)
    n_scored = scored_experts(config, n_resident, routing)
    kept = layer_activation_bytes(config, types, n_scored)
    again = {"none": 0, "experts": expert_activation_bytes(config, types, n_scored), "blocks": kept}
    moved = MOVES_OF_AN_ACTIVATION * kept + 2 * again[config.activation_checkpointing]
    logits = load.tokens * config.vocab_size * (3 * 4 + 3 * types.compute)
    parameters = resident_counts(config, n_resident, routing).total
    unpacked = 0
    if routing == "shadow":
        # Read packed and written as numbers, once for each pass.
        one = copy_bytes(config, shadow) + types.compute * expert_parameters(config)
        passes = 2 if config.activation_checkpointing == "none" else 3
        unpacked = passes * config.n_layers * (config.n_experts - n_resident) * one
    moved = load.tokens * config.n_layers * moved + logits + unpacked
    return StepWork(
        flops=load.tokens * flops.training_executed(checkpointing=config.activation_checkpointing),
        memory_bytes=moved + OPTIMIZER_MOVES * types.parameter * parameters,
        precision=load.precision,
    )


def validation_work(config: ModelConfig, load: Load, *, sequences: int) -> StepWork:
    """Work of one site in a validation of the global model, all of whose experts are live.

    Args:
        config: The architecture.
        load: Precision and length of sequences.
        sequences: Validation sequences of this site.
    """
    tokens, types = sequences * load.sequence_length, Types.of(load.precision, load.kernels)
    kept = config.n_layers * layer_activation_bytes(config, types, config.n_experts)
    return StepWork(
        flops=tokens * token_flops(config, load.sequence_length).forward,
        memory_bytes=tokens * (MOVES_IN_VALIDATION * kept + config.vocab_size * (2 * 4 + types.compute)),
        precision=load.precision,
    )


def calibration(work: StepWork, site: Site, measured_seconds: float) -> float:
    """Measured seconds over those at the peak: the factor by which `seconds_at_peak` of other settings is multiplied.

    Raises:
        ConfigError: If nothing was measured.
    """
    if not measured_seconds > 0:
        raise ConfigError("measured_seconds", measured_seconds, "must be above 0", "give the median of some steps")
    return measured_seconds / work.seconds_at_peak(site)


def step_seconds(work: StepWork, site: Site) -> float:
    """Seconds of this work: with the site's measured factor, else the paper's FLOPs / (peak x MFU)."""
    if site.step_factor is not None:
        return site.step_factor * work.seconds_at_peak(site)
    return work.flops / (site.peak_flops(work.precision) * site.mfu)


def inside_bytes(
    config: ModelConfig, load: Load, *, ranks: int, inside: Sharing, n_resident: int, routing: Routing = "ghost"
) -> tuple[float, float]:
    """Bytes that a rank of a site of several sends the others in a step: once, and with each micro-batch.

    Args:
        config: The architecture.
        load: Precision, and whether experts' gradients are bfloat16.
        ranks: Of the site.
        inside: `replicate` sums gradients when the last backward pass is over, in a ring; `shard` gathers experts in
            the type of products and all else in that of parameters, forward and backward, and sums gradients in
            float32, each rank its slices.
        n_resident: Resident experts R of each layer.
        routing: The routing mode.
    """
    types = Types.of(load.precision, load.kernels)
    counts = resident_counts(config, n_resident, routing)
    experts, rest = counts.experts, counts.total - counts.experts
    share = (ranks - 1) / ranks
    if inside == "replicate":
        small = load.bf16_gradients and types.experts_in_kernels(config)
        return 2 * share * ((types.compute if small else types.parameter) * experts + types.parameter * rest), 0.0
    return 0.0, share * (2 * (types.compute * experts + types.parameter * rest) + 4 * counts.total)


def inside_seconds(sent: float, site: Site) -> float:
    """Seconds for a rank to send so many bytes to the others of its site, which nothing hides."""
    assert site.inside_gbps is not None
    return sent / (INSIDE_SHARE * site.inside_gbps * 1e9)


def waiting_seconds(of_fragments: Sequence[float], *, delay: int, seconds_per_step: float) -> float:
    """Seconds of a round in which sites wait: what fragments' averages take longer than the steps that hide them.

    Args:
        of_fragments: Seconds that the average of each takes.
        delay: Local steps that a site takes meanwhile.
        seconds_per_step: Of the slowest site.
    """
    return sum(max(0.0, seconds - delay * seconds_per_step) for seconds in of_fragments)


def run_seconds(
    *, steps: int, local_steps: int, seconds_per_step: float, seconds_per_round: float, hidden: float = 0.0
) -> float:
    """Seconds of a run: T = steps/K x (K x step + (1 - alpha) x round) (FoMoE, §3.4).

    Args:
        steps: Optimizer steps.
        local_steps: K; a last, shorter round counts as one.
        seconds_per_step: Of the slowest site.
        seconds_per_round: Of the synchronisation.
        hidden: alpha, the share of communication behind computation; see `waiting_seconds` for what `fomoe fit` hides.

    Raises:
        ConfigError: For K below 1 or alpha outside 0..1.
    """
    if local_steps < 1:
        raise ConfigError("local_steps", local_steps, "K must be at least 1 optimizer step", "type a number such as 32")
    if not 0 <= hidden <= 1:
        raise ConfigError("hidden", hidden, "is a share of the communication", "give a number in 0..1")
    return steps * seconds_per_step + -(-steps // local_steps) * (1 - hidden) * seconds_per_round
