"""Bytes predicted from the configuration are those that real processes count, to the byte."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from fomoe_pl.costs.bytes import SynchronizedSizes, predict_bytes
from fomoe_pl.costs.rounds import refresh_bytes
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.outer import Average, Nesterov, OuterRule
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.federation.shadow import Copies
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from tests.distributed import run_distributed

KINDS: tuple[Kind, ...] = ("dense", "expert", "moments", "migration", "shadow", "evaluation")
# Odd sizes, so that rounding in the ring formula would show.
ARCHITECTURE = ModelConfig(
    vocab_size=37, d_model=12, n_layers=2, n_heads=2, n_experts=6, top_k=2, d_expert=5, n_shared_experts=1
)
SWIGLU = replace(ARCHITECTURE, expert="swiglu", qk_norm="full", tie_embeddings=False, balance="bias")
NESTEROV, AVERAGE = Nesterov(0.7, 0.9), Average()


class TwoSlots(OuterRule):
    """Two state tensors a value, which travel with experts; what they hold is no matter here."""

    slots = ("m", "v")

    def step_(self, anchors: Any, changes: Any, slots: Any) -> None:
        torch._foreach_sub_(anchors, changes)


M = 3
CASES: list[tuple[ModelConfig, dict[str, Any]]] = [
    (ARCHITECTURE, {"overlap": 1, "outer": AVERAGE, "validations": [0, 8]}),
    (ARCHITECTURE, {"overlap": 2, "outer": NESTEROV, "inner_moments": "average"}),
    (ARCHITECTURE, {"overlap": 3, "outer": NESTEROV, "wire_dtype": "bfloat16", "validations": [4]}),
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "placement": "random", "validations": [0, 3, 4, 7, 8, 11]}),
    (SWIGLU, {"overlap": 1, "outer": AVERAGE, "placement": "random", "routing": "partitioned", "validations": [4],
              "evaluation_windows": 3, "metric_bytes": 88}),
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "placement": "random", "routing": "partitioned", "placement_seed": 3,
              "inner_moments": "average", "reshuffle_rounds": 2, "local_steps": {0: 1, 4: 2}}),
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "routing": "partitioned", "param_dtype": "bfloat16",
              "validations": [4, 11], "wire_dtype": "bfloat16"}),
    (ARCHITECTURE, {"overlap": 2, "outer": TwoSlots(), "placement": "random"}),
    # Five rounds with a refresh after the second and fourth, and one after the last of three, which is a partial one.
    (ARCHITECTURE, {"overlap": 1, "outer": AVERAGE, "routing": "shadow", "shadow_bits": 2, "shadow_refresh": 2,
                    "local_steps": {0: 2, 4: 3}, "validations": [4]}),
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "routing": "shadow", "inner_moments": "average"}),
    # Where experts move copies are refreshed too, but nobody moves after the last round.
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "routing": "shadow", "placement": "random", "reshuffle_rounds": 3,
              "shadow_bits": 8, "shadow_refresh": 2, "local_steps": 2}),
    (ARCHITECTURE, {"overlap": 3, "outer": AVERAGE, "routing": "shadow"}),
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "wire_codec": "int4", "error_feedback": True, "moments_codec": "int8",
              "inner_moments": "average", "moments_every": (1, 2), "placement": "random"}),
    (SWIGLU, {"overlap": 3, "outer": AVERAGE, "wire_codec": "int8", "inner_moments": "average", "moments_every": 2}),
    # Sites that hold other numbers of experts.
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "placement": "random", "capacities": (6, 4, 2), "validations": [4]}),
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "routing": "shadow", "places": ("a", "a", "b"),
              "validations": [4]}),
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "wire_codec": "topk", "error_feedback": True}),
    # Fragments' turns and copies, and a run that ends with an average on its way.
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "routing": "shadow", "wire_codec": "int4", "inner_moments": "average",
              "moments_every": 2, "fragments": 2, "delay": 1}),
    (ARCHITECTURE, {"overlap": 3, "outer": NESTEROV, "fragments": 2, "placement": "random", "reshuffle_rounds": 2}),
    # Routers within rounds.
    (SWIGLU, {"overlap": 2, "outer": NESTEROV, "router_every": 1, "fragments": 2, "wire_dtype": "bfloat16"}),
    (SWIGLU, {"overlap": 2, "outer": AVERAGE, "router_every": 2, "routing": "partitioned", "placement": "random"}),
    # The embedding is cut.
    (replace(ARCHITECTURE, vocab_size=40_037), {"overlap": 1, "outer": AVERAGE, "moments_codec": "int8",
                                                "inner_moments": "average", "bucket_mib": 1}),
]  # fmt: skip
IDS = [f"{i}-overlap{case['overlap']}" for i, (_, case) in enumerate(CASES)]


RUN = ("validations", "evaluation_windows", "metric_bytes", "param_dtype")


def parts(case: dict[str, Any]) -> tuple[FederationConfig, dict[str, Any]]:
    """Settings of the federation, and of the run."""
    settings = {"local_steps": 4} | {name: value for name, value in case.items() if name not in RUN}
    return FederationConfig(**settings), {"steps": 11} | {name: case[name] for name in RUN if name in case}


def _count(
    rank: int, architecture: ModelConfig, settings: FederationConfig, *, steps: int, validations: Any = (),
    evaluation_windows: int = 1, metric_bytes: int = 0, param_dtype: str = "float32",
) -> Ledger:  # fmt: skip
    """The ledger of a run on real processes, with gradients of ones instead of training."""
    sizes = (architecture.n_layers, architecture.n_experts, M)
    placement = settings.place(*sizes)
    model = Transformer(architecture, settings.residency(placement.residents(rank)))
    model.to(getattr(torch, param_dtype))
    layout = ParameterLayout.of(model, model.expert_tensors())
    arcs = settings.holder_sets(architecture.n_layers, architecture.n_experts, M)
    transport = Transport(
        Topology(M, 1, rank),
        arcs,
        Ledger(),
        device=torch.device("cpu"),
        dtype=settings.wire_dtype,
        bucket_bytes=settings.bucket_mib * 2**20 if settings.codec or settings.codec_of_moments else 2000,
    )
    buffers = dict(model.named_buffers())
    packed = {name.replace(".shadow.", ".experts."): buffers[name] for name in model.shadow_tensors()}
    federation = Federation(
        layout, placement, transport, outer=settings.rule, inner_moments=settings.inner_moments,
        codec=settings.codec, moments_codec=settings.codec_of_moments, error_feedback=settings.error_feedback,
        copies=Copies(packed, settings.shadow.codec, lambda: nullcontext(packed)) if packed else None,
    )  # fmt: skip
    optimizer = RowAdamW(model.parameters(), lr=0.01)
    rounds = draws = 0
    for step in range(steps + 1):
        if step:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        turn = settings.schedule.turn(step, steps) if step else None
        if step and settings.schedule.routers_due(step, steps):
            done = frozenset() if turn is None else layout.fragment(turn.fragment, settings.fragments)
            if not (turn and turn.ends_round and settings.closes(rounds + 1, step, steps)):
                federation.average_routers(layout.routers - done, LeftOut())
        if turn is not None:
            closes = turn.ends_round and settings.closes(rounds + 1, step, steps)
            names = None if closes else layout.fragment(turn.fragment, settings.fragments)
            federation.finish(federation.begin(optimizer, due=settings.moments_due(rounds + 1), names=names))
            moved = closes and settings.moves_after(rounds + 1) and step != steps
            if moved:
                draws += 1
                federation.adopt(settings.place(*sizes, draws), optimizer)
            if settings.refreshes_after(rounds + 1, moved=moved):
                if closes:
                    federation.refresh_copies()
                elif step + settings.delay < steps and (sent := federation.start_refresh(names)) is not None:
                    federation.finish_refresh(sent)
            rounds += turn.ends_round
        if step in validations:
            for _ in range(evaluation_windows):
                for layer in range(architecture.n_layers):
                    federation.gather(layer)
            if metric_bytes:
                transport.sum("evaluation", torch.zeros(metric_bytes // 8, dtype=torch.float64))
    return transport.ledger


def _count_all(rank: int) -> list[Ledger]:
    found = []
    for architecture, case in CASES:
        settings, run = parts(case)
        found.append(_count(rank, architecture, settings, **run))
    return found


@pytest.fixture(scope="module")
def counted() -> list[list[Ledger]]:
    return run_distributed(_count_all, M)


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_predicted_bytes_equal_counted_bytes(counted: list[list[Ledger]], index: int) -> None:
    architecture, case = CASES[index]
    for site in range(M):
        ledger = counted[site][index]
        settings, run = parts(case)
        predicted = predict_bytes(architecture, settings, n_sites=M, site=site, **run)
        for kind in KINDS:
            assert (kind, predicted.payload(kind)) == (kind, ledger.payload(kind))
            assert (kind, predicted.wire(kind)) == (kind, ledger.wire(kind))


def test_the_cases_count_every_kind(counted: list[list[Ledger]]) -> None:
    for kind in KINDS:
        assert sum(ledger.payload(kind) > 0 for ledger in counted[0]) >= 2


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_a_refresh_by_hand_is_the_planners_mean(overlap: int) -> None:
    """Matrices of 12 x 5 numbers in 4 bits: a group of 64 levels and a scale each, twelve experts."""
    settings = FederationConfig(overlap=overlap, routing="shadow", local_steps=4)
    runs = [predict_bytes(ARCHITECTURE, settings, n_sites=M, site=site, steps=12) for site in range(M)]
    sent = [ledger.payload("shadow") / 3 for ledger in runs]
    assert sum(sent) == 12 * (M - overlap) * 2 * (64 // 2 + 2)
    assert refresh_bytes(ARCHITECTURE, settings.shadow, n_sites=M, overlap=overlap) == sum(sent) / M


@pytest.mark.parametrize("routing", ["ghost", "partitioned", "shadow"])
@pytest.mark.parametrize("architecture", [ARCHITECTURE, SWIGLU])
def test_synchronized_sizes_are_those_of_the_built_model(architecture: ModelConfig, routing: Any) -> None:
    ids = (0, 2, 5)
    model = Transformer(architecture, Residency(routing, (ids,) * architecture.n_layers))
    layout = ParameterLayout.of(model, model.expert_tensors())
    sizes = SynchronizedSizes.of(architecture, routing)

    def elements(names: list[str], *, trained: bool) -> int:
        return sum(layout.tensors[n].numel() for n in names if (n in layout.trained) == trained)

    assert (sizes.dense, sizes.dense_buffers) == tuple(elements(layout.dense, trained=t) for t in (True, False))
    assert sizes.dense_matrices == sum(layout.tensors[n].numel() for n in layout.dense if layout.may_be_coded(n))
    coded = (layout.tensors[n].numel() for n in layout.sparse(1) if layout.may_be_coded(n))
    assert sizes.expert_matrices * len(ids) == sum(coded)
    per_layer = tuple(elements(layout.sparse(1), trained=t) for t in (True, False))
    assert (sizes.expert * len(ids), sizes.expert_buffers * len(ids)) == per_layer


def test_round_bytes_are_the_papers_formula() -> None:
    """FoMoE's bytes of a site and round: 2(M-1)/M x dense + 2(O-1)/O x resident experts, fixed placement."""
    architecture = ModelConfig(vocab_size=64, d_model=32, n_layers=3, n_heads=2, n_experts=8, top_k=2, d_expert=16)
    sizes = SynchronizedSizes.of(architecture, "ghost")
    for overlap in (1, 2, 4, 8):
        ledger = predict_bytes(architecture, FederationConfig(overlap=overlap), n_sites=8, site=5, steps=64)
        resident = 3 * 8 * overlap // 8 * sizes.expert * 4
        assert ledger.total_wire == 2 * (2 * 7 * sizes.dense * 4 // 8 + 2 * (overlap - 1) * resident // overlap)


def test_one_site_sends_nothing() -> None:
    settings = FederationConfig(local_steps=2, outer=NESTEROV, placement="random", inner_moments="average")
    ledger = predict_bytes(ARCHITECTURE, settings, n_sites=1, site=0, steps=9, validations=[0, 9], metric_bytes=80)
    assert ledger.total_payload == 0
