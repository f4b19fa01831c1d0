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
    SynchronizedSizes,
    collectives,
    copy_bytes,
    count,
    ddp_collectives,
    held_by,
    router_collectives,
    router_layers,
)
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.federation import Due, averaged
from fomoe_pl.federation.layout import ParameterLayout, fragment_of
from fomoe_pl.federation.ledger import Kind, Ledger, ring_all_reduce_bytes
from fomoe_pl.federation.packing import digits
from fomoe_pl.federation.placement import Placement, gather_layer, migration
from fomoe_pl.federation.settings import FederationConfig, WireDtype
from fomoe_pl.federation.shadow import refresh_layer
from fomoe_pl.federation.state import buckets
from fomoe_pl.federation.transport import bucket_numel, coded_bytes
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

    def averages(placement: Placement, due: Due, fragment: int | None) -> Ledger:
        """What a fragment's turn in this placement sends, or None: a whole round."""
        found = Ledger()
        if fragment is not None or federation.codec is not None or federation.codec_of_moments is not None:
            _by_bucket(found, architecture, federation, placement, site, due, fragment)
            return found
        calls = collectives(
            held_by(placement), sizes, n_sites=n_sites, wire_dtype=federation.wire_dtype,
            moments=sum(due) if federation.inner_moments == "average" else 0,
        )  # fmt: skip
        count(found, calls, site)
        return found

    current, rounds, draws, n_layers = placed(0), 0, 0, architecture.n_layers
    known: dict[tuple[Due, int | None], Ledger] = {}
    for step in range(steps + 1):
        turn = federation.schedule.turn(step, steps) if step else None
        closes = False
        if turn is not None:
            closes = turn.ends_round and federation.closes(rounds + 1, step, steps)
            what = federation.moments_due(rounds + 1), None if closes or federation.fragments == 1 else turn.fragment
            if what not in known:
                known[what] = averages(current, *what)
            ledger.add(known[what])
            moved = closes and federation.moves_after(rounds + 1) and step < steps
            if moved:
                draws += 1
                new = placed(draws)
                _migration(ledger, current, new, site, sizes, n_slots=len(federation.rule.slots))
                current, known = new, {}
            # What is applied only when the run ends is sent with all the others.
            refreshes = federation.refreshes_after(rounds + 1, moved=moved)
            if refreshes and (closes or step + federation.delay < steps):
                layers = [i for i in range(n_layers) if closes or fragment_of(i, federation.fragments) == turn.fragment]
                given = sum(t.giver == site for layer in layers for t in refresh_layer(current, layer))
                ledger.send("shadow", given * copy_bytes(architecture, federation.shadow))
            rounds += turn.ends_round
        if not closes and (layers := router_layers(federation.schedule, step, n_layers, steps)):
            held = {sites: sum(layer in layers for layer, _ in current.experts_of(sites))
                    for sites in current.holder_sets()}  # fmt: skip
            count(ledger, router_collectives(
                architecture, held, len(layers), n_sites=n_sites, routing=federation.routing,
                wire_dtype=federation.wire_dtype,
            ), site)  # fmt: skip
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


def _by_bucket(
    ledger: Ledger, architecture: ModelConfig, federation: FederationConfig, placement: Placement, site: int, due: Due,
    fragment: int | None,
) -> None:  # fmt: skip
    """A round, or a fragment's turn, bucket by bucket: of codes a site sends what depends on where they are cut."""
    with torch.device("meta"):
        model = Transformer(architecture, federation.residency(placement.residents(site)), device=torch.device("meta"))
    layout = ParameterLayout.of(model, model.expert_tensors())
    limit = bucket_numel(federation.bucket_mib * 2**20, federation.wire_dtype)
    names = None if fragment is None else layout.fragment(fragment, federation.fragments)

    def send(kind: Kind, sites: tuple[int, ...], numels: list[int], codec: Codec | None) -> None:
        if codec is None:
            ledger.all_reduce(kind, sum(numels) * ITEMSIZE[federation.wire_dtype], len(sites))
            return
        for indices in buckets(numels, limit):
            ledger.send(kind, coded_bytes(codec, sum(numels[i] for i in indices), len(sites)))

    for kind, sites, pieces, codec in averaged(layout, placement, site, limit, federation.codec, names):
        if len(sites) > 1:
            send(kind, sites, [piece.of(layout.tensors[piece.name]).numel() for piece in pieces], codec)
    if federation.inner_moments != "average":
        return
    for _, sites, pieces, codec in averaged(layout, placement, site, limit, federation.codec_of_moments, names):
        numels = [piece.of(layout.tensors[piece.name]).numel() for piece in pieces if piece.name in layout.trained]
        if len(sites) > 1:
            for _ in range(sum(due)):
                send("moments", sites, numels, codec)


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
