"""The collectives of one round: who averages what, in which order, in how many bytes (arXiv 2606.19025, §3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fomoe_pl.codec import Codec
from fomoe_pl.federation.layout import fragment_of
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.placement import Placement, place, shares, side_by_side
from fomoe_pl.federation.report import report_numbers
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.settings import InnerMoments, WireDtype
from fomoe_pl.federation.transport import coded_bytes
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.sizes import (
    ParameterCounts,
    dense_parameters,
    expert_parameters,
    parameter_counts,
    resident_counts,
)

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class SynchronizedSizes:
    """Numbers of elements that sites synchronise.

    Attributes:
        dense: Trained parameters that every site holds.
        dense_buffers: Elements of buffers that every site holds (balance biases in ghost mode).
        expert: Trained parameters of one expert of one layer, in partitioned mode with its router row.
        expert_buffers: Buffer elements of one expert of one layer (its balance bias in partitioned mode).
        dense_matrices: Of `dense`, what a codec may round.
        expert_matrices: The same of `expert`.
    """

    dense: int
    dense_buffers: int
    expert: int
    expert_buffers: int
    dense_matrices: int
    expert_matrices: int

    @classmethod
    def of(cls, architecture: ModelConfig, routing: Routing) -> SynchronizedSizes:
        """Count them for an architecture and a routing mode."""
        partitioned = routing == "partitioned"
        biased = architecture.balance == "bias"
        return cls(
            dense=dense_parameters(architecture, routing),
            dense_buffers=architecture.n_layers * architecture.n_experts if biased and not partitioned else 0,
            expert=expert_parameters(architecture) + (architecture.d_model if partitioned else 0),
            expert_buffers=1 if biased and partitioned else 0,
            dense_matrices=matrices(resident_counts(architecture, 0, routing)),
            expert_matrices=expert_parameters(architecture),
        )


class Collective(NamedTuple):
    """One average of a round, all its buckets together.

    Attributes:
        kind: The ledger's.
        sites: Who takes part, sorted.
        payload: Bytes of its elements on the wire. Of codes, which are not added on their way, as many as a ring
            all-reduce has of which a site sends the same.
        share: Bytes on the wire of each byte that its buckets hold: below 1 for codes.
    """

    kind: Kind
    sites: tuple[int, ...]
    payload: int
    share: float = 1.0


def matrices(counts: ParameterCounts) -> int:
    """Parameters that a codec may round on the wire: all but norms and routers."""
    return counts.total - counts.norms - counts.router


def held_by(placement: Placement) -> dict[tuple[int, ...], int]:
    """Number of experts, over all layers, of each holder set, in the order of averaging."""
    return {sites: len(placement.experts_of(sites)) for sites in placement.holder_sets()}


def held_when_fixed(
    architecture: ModelConfig, n_sites: int, overlap: int, layers: Sequence[int] | None = None,
    capacities: Sequence[int] | None = None,
) -> dict[tuple[int, ...], int]:  # fmt: skip
    """What `held_by` gives for the fixed placement, without placing every expert of a large model.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        overlap: Sites that hold each expert.
        layers: Of which the experts are counted; None is all.
        capacities: Experts of a layer that each site holds; None is equal shares.

    Raises:
        ConfigError: If the sizes cannot be placed.
    """
    n_layers = architecture.n_layers
    # Layer i is as layer i mod 2 M: they are staggered by one site, or take turns in two ways.
    period = 2 * n_sites
    some = place(
        "fixed", n_layers=min(n_layers, period), n_experts=architecture.n_experts, n_sites=n_sites, overlap=overlap,
        capacities=capacities,
    )  # fmt: skip
    alike = Counter(layer % period for layer in (range(n_layers) if layers is None else layers))
    held: Counter[tuple[int, ...]] = Counter()
    for layer, times in alike.items():
        for sites in some.holders[layer]:
            held[sites] += times
    return {sites: held[sites] for sites in side_by_side(held, n_sites)}


def collectives(
    held: dict[tuple[int, ...], int],
    sizes: SynchronizedSizes,
    *,
    n_sites: int,
    wire_dtype: WireDtype = "float32",
    moments: int = 0,
    codec: Codec | None = None,
    moments_codec: Codec | None = None,
) -> list[Collective]:
    """The averages of a round in the order in which sites call them; groups of one site send nothing and are left out.

    Args:
        held: Holder set -> number of its experts, from `held_by`.
        sizes: What is synchronised.
        n_sites: Number of sites M.
        wire_dtype: dtype of averaged values on the wire.
        moments: How many of AdamW's moments of everything trained are averaged too, 0 to 2.
        codec: Of the changes of matrices; each group's codes are a collective of their own. Buckets, each of which
            fills up its last groups, are not told apart.
        moments_codec: The same of moments.
    """
    itemsize = ITEMSIZE[wire_dtype]
    groups: list[tuple[Kind, tuple[int, ...], int, int, int]] = [
        ("dense", tuple(range(n_sites)), sizes.dense, sizes.dense_buffers, sizes.dense_matrices)
    ]
    groups += [
        ("expert", sites, n * sizes.expert, n * sizes.expert_buffers, n * sizes.expert_matrices)
        for sites, n in held.items()
    ]
    found: list[Collective] = []

    def average(kind: Kind, sites: tuple[int, ...], numel: int, coded: int, of: Codec | None, times: int) -> None:
        if of is None:
            found.append(Collective(kind, sites, times * numel * itemsize))
            return
        if numel > coded:
            found.append(Collective(kind, sites, times * (numel - coded) * itemsize))
        g = len(sites)
        payload = coded_bytes(of, coded, g) * g // (2 * (g - 1))
        found.append(Collective(kind, sites, times * payload, payload / (coded * itemsize)))

    groups = [group for group in groups if len(group[1]) > 1]
    for kind, sites, trained, buffers, coded in groups:
        average(kind, sites, trained + buffers, coded, codec, 1)
    for _, sites, trained, _, coded in groups if moments else ():
        average("moments", sites, trained, coded, moments_codec, moments)
    return found


def count(ledger: Ledger, calls: list[Collective], site: int) -> None:
    """Enter the collectives that a site takes part in into its ledger."""
    for call in calls:
        if site in call.sites:
            ledger.all_reduce(call.kind, call.payload, len(call.sites))


def round_collectives(architecture: ModelConfig, **settings: Any) -> list[Collective]:
    """The averages of a round with fixed placement (a random one sends as much, on average over sites).

    Args:
        architecture: The model.
        **settings: Of `fragment_collectives`, for one fragment.
    """
    return fragment_collectives(architecture, 1, **settings)[0]


def fragment_collectives(
    architecture: ModelConfig,
    fragments: int,
    *,
    n_sites: int,
    overlap: int,
    routing: Routing = "ghost",
    wire_dtype: WireDtype = "float32",
    inner_moments: InnerMoments = "keep",
    codec: Codec | None = None,
    moments_codec: Codec | None = None,
    capacities: Sequence[int] | None = None,
) -> list[list[Collective]]:
    """The averages of each fragment's turn, with fixed placement.

    Args:
        architecture: The model.
        fragments: Their number; what is outside layers is the first of several, without its few norms.
        n_sites: Number of sites M.
        overlap: Sites that hold each expert.
        routing: The routing mode.
        wire_dtype: dtype of averaged values that are not coded.
        inner_moments: Whether moments are averaged too, with `average`.
        codec: Of the changes of matrices.
        moments_codec: The same of moments.
        capacities: Experts of a layer that each site holds; None is equal shares.
    """
    sizes, outside = SynchronizedSizes.of(architecture, routing), parameter_counts(architecture).embeddings
    found = []
    for index in range(fragments):
        layers = [i for i in range(architecture.n_layers) if fragment_of(i, fragments) == index]
        n, whole = len(layers), architecture.n_layers
        own = outside if index == 0 else 0
        part = replace(
            sizes, dense=own + (sizes.dense - outside) * n // whole, dense_buffers=sizes.dense_buffers * n // whole,
            dense_matrices=own + (sizes.dense_matrices - outside) * n // whole,
        )  # fmt: skip
        held = held_when_fixed(architecture, n_sites, overlap, layers, capacities)
        found.append(collectives(
            held, part, n_sites=n_sites, wire_dtype=wire_dtype, codec=codec, moments_codec=moments_codec,
            moments=ADAMW_MOMENTS if inner_moments == "average" else 0,
        ))  # fmt: skip
    return found


def router_collectives(
    architecture: ModelConfig, held: dict[tuple[int, ...], int], layers: int, *, n_sites: int, routing: Routing,
    wire_dtype: WireDtype = "float32",
) -> list[Collective]:  # fmt: skip
    """What an average of routers within a round sends (`router_every`), without the message of who is left out.

    Args:
        architecture: The model.
        held: Holder set -> number of its experts in the layers that are averaged.
        layers: Number of these.
        n_sites: Number of sites M.
        routing: The routing mode: in partitioned mode an expert's row goes to its holders.
        wire_dtype: dtype on the wire.
    """
    row = ITEMSIZE[wire_dtype] * (architecture.d_model + (architecture.balance == "bias"))
    if routing == "partitioned":
        return [Collective("expert", sites, n * row) for sites, n in held.items() if len(sites) > 1 and n]
    if n_sites < 2 or not layers:
        return []
    return [Collective("dense", tuple(range(n_sites)), layers * architecture.n_experts * row)]


def router_layers(schedule: RoundSchedule, step: int, n_layers: int, last_step: int | None = None) -> list[int]:
    """Layers whose routers are averaged within a round after a step: those whose turn it is take that."""
    if not schedule.routers_due(step, last_step):
        return []
    turn = schedule.turn(step, last_step)
    return [i for i in range(n_layers) if turn is None or fragment_of(i, schedule.fragments) != turn.fragment]


def ddp_collectives(architecture: ModelConfig, n_sites: int, itemsize: int = 4) -> list[Collective]:
    """What data parallelism over slow links averages in every step: all gradients, over all sites."""
    if n_sites < 2:
        return []
    return [Collective("dense", tuple(range(n_sites)), itemsize * parameter_counts(architecture).total)]


def control_collectives(n_sites: int) -> list[Collective]:
    """The two messages of a round, in which latency alone counts: the sites' report, and what observers add up.

    The second one is counted at its smallest size, one number per site (`control_bytes` of `fomoe_pl.costs.bytes`).
    """
    if n_sites < 2:
        return []
    everyone = tuple(range(n_sites))
    return [Collective("control", everyone, 8 * report_numbers(n_sites)), Collective("control", everyone, 8 * n_sites)]


def left_out_collective(n_sites: int) -> Collective:
    """The message that travels beside an average of routers: a float32 flag of each site."""
    return Collective("control", tuple(range(n_sites)), 4 * n_sites)


def copy_bytes(architecture: ModelConfig, shadow: Shadow) -> int:
    """Bytes of a packed copy of one expert of one layer: each matrix is one row of its codec."""
    d = architecture.d_model
    return sum(shadow.codec.nbytes(d * width) for width in (architecture.expert_in_width, architecture.d_expert))


def refresh_bytes(architecture: ModelConfig, shadow: Shadow, *, n_sites: int, overlap: int) -> float:
    """Mean bytes that a site sends when copies are refreshed: each expert goes from its owner to the M - O without it.

    Per round divide by `shadow_refresh`.
    """
    shares(architecture.n_experts, n_sites, overlap)
    lacking = architecture.n_layers * architecture.n_experts * (n_sites - overlap)
    return lacking * copy_bytes(architecture, shadow) / n_sites


def evaluation_bytes(
    architecture: ModelConfig,
    *,
    n_sites: int,
    overlap: int,
    routing: Routing = "ghost",
    param_dtype: WireDtype = "float32",
    windows: int = 1,
) -> float:
    """Mean bytes that a site sends in a validation of the global model: every layer goes to the sites that lack it."""
    shares(architecture.n_experts, n_sites, overlap)
    sizes = SynchronizedSizes.of(architecture, routing)
    one = sizes.expert * ITEMSIZE[param_dtype] + sizes.expert_buffers * ITEMSIZE["float32"]
    lacking = architecture.n_layers * architecture.n_experts * (n_sites - overlap)
    return windows * lacking * one / n_sites


def stored_elsewhere_bytes(
    architecture: ModelConfig, *, n_sites: int, overlap: int, copies: int, routing: Routing = "ghost", slots: int = 0
) -> float:
    """Mean bytes that a site sends in a save where sites have disks of their own: copies beyond the holders'.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        overlap: Sites that hold each expert, which store it without being sent it.
        copies: Sites that store each expert, 1..M.
        routing: The routing mode.
        slots: State tensors of the outer rule.
    """
    shares(architecture.n_experts, n_sites, overlap)
    sizes = SynchronizedSizes.of(architecture, routing)
    one = ITEMSIZE["float32"] * ((1 + slots) * sizes.expert + sizes.expert_buffers)
    return max(0, copies - overlap) * architecture.n_layers * architecture.n_experts * one / n_sites


def checkpoint_bytes(
    architecture: ModelConfig,
    *,
    n_sites: int,
    overlap: int,
    routing: Routing = "ghost",
    param_dtype: WireDtype = "float32",
    momentum: bool = False,
    rounds: bool = True,
    error_feedback: bool = False,
    capacities: Sequence[int] | None = None,
) -> dict[str, int]:
    """Bytes of the tensors of a checkpoint on disk; nothing of it crosses sites.

    Lightning's own state, ledgers, names and headers come on top: some ten thousand bytes.

    Args:
        architecture: The model.
        n_sites: Number of sites M.
        overlap: Sites that hold each expert.
        routing: The routing mode.
        param_dtype: dtype of parameters and inner moments.
        momentum: Whether there is outer momentum.
        rounds: Whether there are rounds; else ranks are alike, and the first alone writes.
        error_feedback: Whether sites keep what coding has lost of their changes.
        capacities: Experts of a layer that each site holds; None is equal shares.

    Returns:
        `model`: the global model, once: dense tensors and each expert, float32 where there are anchors.
        `momentum`: outer momentum, once, float32. `site`: the largest file of a site: inner moments, where there are
        rounds local values, and what coding has lost, float32. `files`: number of such files. `total`: all of them.
    """
    itemsize, sizes = ITEMSIZE[param_dtype], SynchronizedSizes.of(architecture, routing)
    total = parameter_counts(architecture).total
    of_sites = shares(architecture.n_experts, n_sites, overlap, capacities)
    slots = architecture.n_layers * architecture.n_experts
    # Balance biases are float32 whatever the parameters are.
    biases = ITEMSIZE["float32"] * (sizes.dense_buffers + slots * sizes.expert_buffers)
    model = (ITEMSIZE["float32"] if rounds else itemsize) * total + biases
    outer = ITEMSIZE["float32"] * total if momentum else 0

    def file(held: int) -> int:
        counts = resident_counts(architecture, held, routing)
        if not rounds:
            return itemsize * counts.total * ADAMW_MOMENTS
        own_biases = sizes.dense_buffers + architecture.n_layers * held * sizes.expert_buffers
        lost = matrices(counts) if error_feedback else 0
        return itemsize * counts.total * (1 + ADAMW_MOMENTS) + ITEMSIZE["float32"] * (own_biases + lost)

    written = [file(held) for held in (of_sites if rounds else of_sites[:1])]
    return {
        "model": model, "momentum": outer, "site": max(written), "files": len(written),
        "total": model + outer + sum(written),
    }  # fmt: skip
