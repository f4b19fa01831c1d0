"""Bytes that one site sends in a run, from the configuration alone (FoMoE, arXiv 2606.19025, cost model).

Equal to the byte to the ledger that a run keeps, for the kinds dense, expert, moments, migration, shadow and
evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fomoe_pl.codec import Codec
from fomoe_pl.costs.rounds import (
    ITEMSIZE,
    Collective,
    SynchronizedSizes,
    collectives,
    copy_bytes,
    count,
    ddp_collectives,
    held_by,
)
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.federation import averaged
from fomoe_pl.federation.flight import buckets
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger, ring_all_reduce_bytes
from fomoe_pl.federation.packing import digits
from fomoe_pl.federation.placement import Placement, gather_layer, migration
from fomoe_pl.federation.settings import FederationConfig, WireDtype
from fomoe_pl.federation.shadow import refresh_layer
from fomoe_pl.federation.transport import bucket_numel, slice_numel
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer


def predict_bytes(
    architecture: ModelConfig,
    federation: FederationConfig,
    *,
    n_sites: int,
    site: int,
    steps: int,
    validations: Sequence[int] = (),
    evaluation_windows: int = 1,
    metric_bytes: int = 0,
    param_dtype: WireDtype = "float32",
) -> Ledger:
    """Predict the ledger of one site for an uninterrupted run with AdamW as inner optimizer.

    Args:
        architecture: The model.
        federation: The federation's settings; experts must not move by loads, which only a run knows.
        n_sites: Number of sites M.
        site: The site whose bytes are predicted, 0..M-1.
        steps: Optimizer steps of the run.
        validations: For each validation of the global model the number of optimizer steps taken before it; 0 for the
            sanity check. One at the end of a round comes after that round's migration.
        evaluation_windows: Windows of batches in a validation; each gathers every layer once.
        metric_bytes: Bytes of the vector of metrics that a validation sums over the sites, see `metric_bytes_of`.
        param_dtype: dtype of the parameters, in which a validation gathers experts (buffers are float32).

    Returns:
        A ledger with payload and wire bytes of the kinds dense, expert, moments, migration, shadow and evaluation. Its
        number of calls counts one for each average or exchange, whatever the buckets.

    Raises:
        ConfigError: If sizes or the schedule do not fit, or experts move by loads.
    """
    if federation.policy.moves and federation.policy.sees_loads:
        rule = "experts move by how often they are picked, which only a run knows"
        raise ConfigError("placement", str(federation.policy), rule, "predict with fixed or random, or run it")
    sizes = SynchronizedSizes.of(architecture, federation.routing)
    ledger = Ledger()

    def placed(draw: int) -> Placement:
        return federation.place(architecture.n_layers, architecture.n_experts, n_sites, draw)

    def calls_of(placement: Placement) -> list[Collective]:
        calls = collectives(
            held_by(placement), sizes, n_sites=n_sites, wire_dtype=federation.wire_dtype,
            inner_moments=federation.inner_moments,
        )  # fmt: skip
        if federation.wire_codec is None:
            return calls
        return [call for call in calls if call.kind == "moments"]  # the others are codes

    current, rounds, draws, n_layers = placed(0), 0, 0, architecture.n_layers
    averages = calls_of(current)
    for step in range(steps + 1):
        if step and federation.schedule.is_round_end(step, steps):
            rounds += 1
            count(ledger, averages, site)
            if federation.wire_codec is not None:
                _coded(ledger, architecture, federation, federation.wire_codec, current, site)
            moved = federation.moves_after(rounds) and step < steps
            if moved:
                draws += 1
                new = placed(draws)
                _migration(ledger, current, new, site, sizes, n_slots=len(federation.rule.slots))
                current, averages = new, calls_of(new)
            if federation.refreshes_after(rounds, moved=moved):
                given = sum(t.giver == site for layer in range(n_layers) for t in refresh_layer(current, layer))
                ledger.send("shadow", given * copy_bytes(architecture, federation.shadow))
        for _ in range(list(validations).count(step)):
            for _ in range(evaluation_windows):
                _evaluation(ledger, current, site, sizes, ITEMSIZE[param_dtype])
            if n_sites > 1 and metric_bytes:
                ledger.all_reduce("evaluation", metric_bytes, n_sites)
    return ledger


def metric_bytes_of(architecture: ModelConfig, n_domains: int) -> int:
    """Payload of the sums that a validation adds over the sites, float64.

    Nats, tokens and bytes of each domain; each expert's picks by domain; nats of three views, and their tokens.

    Args:
        architecture: The model.
        n_domains: Domains of the corpus.
    """
    return 8 * (3 * n_domains + architecture.n_layers * n_domains * architecture.n_experts + 3 + 1)


def control_bytes(
    architecture: ModelConfig,
    n_sites: int,
    *,
    watched: bool = False,
    looked: bool = False,
    probe_tokens: int = 0,
    monitored: bool = False,
    copied: bool = False,
    n_statistics: int = 0,
) -> int:
    """Payload of the message in which callbacks add their float64 numbers over all sites after a round's averages.

    The sites' own report before the averages is of `report_numbers` more (`fomoe_pl.federation.report`).

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        watched: Whether `RoutingStability` is among the callbacks.
        looked: Whether it measures the probe and drift in this round.
        probe_tokens: Tokens of its probe, sequences x tokens of each; 0 for no probe.
        monitored: Whether `CommunicationMonitor` is among the callbacks.
        copied: Whether sites have copies of absent experts.
        n_statistics: Custom statistics that `RoutingStability` has.
    """
    layers, cells = architecture.n_layers, architecture.n_layers * architecture.n_experts
    numbers = 0
    if watched:
        # Loads, live loads, scored, resident; holders, scorers; gate entropy, picks, sites.
        numbers += (4 + 2) * cells + layers + 1 + 1
        numbers += n_statistics * layers + 1 if n_statistics else 0  # sums, and the tokens that they are over
    if watched and looked:
        numbers += 4 * cells + 4  # three squares of norms and a norm, of each expert and dense
        numbers += 2 * layers if copied else 0  # squares of the copies' errors and of the originals
        if probe_tokens:
            numbers += 3 * layers + 2 + -(-cells * probe_tokens // digits(n_sites))
    numbers += n_sites if monitored else 0
    return 8 * numbers


def ddp_step_bytes(architecture: ModelConfig, n_sites: int, param_dtype: WireDtype = "float32") -> int:
    """Wire bytes of an optimizer step of data parallelism: all gradients, and with `balance: bias` the loads.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        param_dtype: dtype of parameters and so of gradients.
    """
    payload = sum(call.payload for call in ddp_collectives(architecture, n_sites, ITEMSIZE[param_dtype]))
    if architecture.balance == "bias":
        payload += architecture.n_layers * architecture.n_experts * ITEMSIZE["float32"]
    return ring_all_reduce_bytes(payload, n_sites)


def replica_round_bytes(architecture: ModelConfig, n_sites: int, wire_dtype: WireDtype = "float32") -> int:
    """Wire bytes of a round of full-replica DiLoCo: all parameters, no moments.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        wire_dtype: dtype on the wire.
    """
    ledger = predict_bytes(
        architecture, FederationConfig(local_steps=1, wire_dtype=wire_dtype), n_sites=n_sites, site=0, steps=1
    )
    return ledger.total_wire


def _coded(
    ledger: Ledger, architecture: ModelConfig, federation: FederationConfig, codec: Codec, placement: Placement,
    site: int,
) -> None:  # fmt: skip
    """Codes of a round, bucket by bucket: a slice to each other site, then the mean of the own slice to each."""
    with torch.device("meta"):
        model = Transformer(architecture, federation.residency(placement.residents(site)), device=torch.device("meta"))
    layout = ParameterLayout.of(model, model.expert_tensors())
    limit = bucket_numel(federation.bucket_mib * 2**20, federation.wire_dtype)
    for kind, sites, pieces in averaged(layout, placement, site, limit):
        numels = [piece.of(layout.tensors[piece.name]).numel() for piece in pieces]
        for indices in buckets(numels, limit) if len(sites) > 1 else ():
            of_slice = codec.nbytes(slice_numel(sum(numels[i] for i in indices), len(sites)))
            for _ in range(2):
                ledger.send(kind, (len(sites) - 1) * of_slice)


def _migration(
    ledger: Ledger, old: Placement, new: Placement, site: int, sizes: SynchronizedSizes, *, n_slots: int
) -> None:
    """Anchors, and the outer rule's slots of what is trained, of the experts that this site gives away; float32."""
    given = sum(transfer.giver == site for transfer in migration(old, new))
    elements = sizes.expert + sizes.expert_buffers + n_slots * sizes.expert
    ledger.send("migration", given * elements * ITEMSIZE["float32"])


def _evaluation(ledger: Ledger, placement: Placement, site: int, sizes: SynchronizedSizes, itemsize: int) -> None:
    """Every layer's experts go from their holders to the sites that lack them."""
    given = sum(
        transfer.giver == site for layer in range(len(placement.holders)) for transfer in gather_layer(placement, layer)
    )
    ledger.send("evaluation", given * (sizes.expert * itemsize + sizes.expert_buffers * ITEMSIZE["float32"]))
