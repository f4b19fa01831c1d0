"""FLOPs, seconds of collectives, of steps and of runs: by hand, by order, and refused where they make no sense."""

from dataclasses import replace
from typing import Any

import pytest

from fomoe_pl.codec import Groups
from fomoe_pl.costs.bytes import predict_bytes
from fomoe_pl.costs.flops import executed_picks, token_flops
from fomoe_pl.costs.memory import Load
from fomoe_pl.costs.network import Links, framed
from fomoe_pl.costs.rounds import (
    Collective,
    checkpoint_bytes,
    evaluation_bytes,
    fragment_collectives,
    held_by,
    held_when_fixed,
    round_collectives,
)
from fomoe_pl.costs.sites import ACCELERATORS, Site
from fomoe_pl.costs.time import (
    StepWork,
    calibration,
    inside_bytes,
    inside_seconds,
    run_seconds,
    step_seconds,
    step_work,
    validation_work,
    waiting_seconds,
)
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.federation.placement import place
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.sizes import expert_parameters, flops_by_part, parameter_counts, resident_counts
from tests.tools import load

table_1 = load("paper").table_1
SMALL = ModelConfig(vocab_size=257, d_model=64, n_layers=3, n_heads=2, n_experts=8, top_k=2, d_expert=32)


def site(**changes: Any) -> Site:
    settings: dict[str, Any] = {
        "tflops": 1,
        "memory_gib": 1,
        "memory_gbps": 100,
        "bandwidth_mbit": 100,
        "latency_ms": 0,
    }
    return Site(**settings | changes)


def test_parts_sum_to_the_models_flops() -> None:
    assert token_flops(SMALL, 128).forward == flops_by_part(SMALL, 128).forward
    ghost = token_flops(SMALL, 128, n_resident=2, ghost_fraction=0.6)
    assert ghost.training == pytest.approx(flops_by_part(SMALL, 128, executed_picks=0.8).training)
    partitioned = token_flops(SMALL, 128, n_resident=4, routing="partitioned")
    assert partitioned.forward == flops_by_part(SMALL, 128, n_scored=4).forward
    assert ghost.training_executed(checkpointing="blocks") == ghost.training + ghost.forward - ghost.output
    assert ghost.training_executed(checkpointing="experts") == ghost.training + ghost.experts


def test_ghosts_are_skipped_and_residents_are_not() -> None:
    assert executed_picks(SMALL, 2, "ghost") == 0.5  # sigma_st = R/E
    assert executed_picks(SMALL, 2, "ghost", ghost_fraction=0.7) == pytest.approx(0.6)
    assert [executed_picks(SMALL, r, "partitioned") for r in (1, 2, 8)] == [1, 2, 2]
    forward = [token_flops(SMALL, 64, n_resident=r).forward for r in range(1, 9)]
    assert forward == sorted(set(forward))


def test_copies_compute_all_picks_and_learn_none() -> None:
    """2 of 8 experts are residents: of a token's two picks one and a half are computed with copies."""
    full, ghost = token_flops(SMALL, 64), token_flops(SMALL, 64, n_resident=2)
    shadow = token_flops(SMALL, 64, n_resident=2, routing="shadow")
    assert shadow.forward == full.forward
    matrix = 2 * SMALL.n_layers * 1.5 * SMALL.d_model * SMALL.d_expert  # of one of an expert's two matrices
    assert full.training - shadow.training == 2 * matrix
    assert shadow.training - ghost.training == (3 - 1) * 2 * matrix  # forward, and the gradient of what goes in
    sparing = token_flops(SMALL, 64, n_resident=2, routing="shadow", shadow=Shadow(input_gradient=False))
    assert shadow.training - sparing.training == matrix
    measured = token_flops(SMALL, 64, n_resident=2, routing="shadow", ghost_fraction=0.5)
    assert full.training - measured.training == pytest.approx(matrix * 2 / 1.5)
    assert shadow.training_executed(checkpointing="blocks") == shadow.training + full.forward - full.output
    whole = token_flops(SMALL, 64, n_resident=8, routing="shadow")
    assert whole == full


def test_copies_are_unpacked_once_in_each_pass() -> None:
    load = Load(batch_size=1, sequence_length=64)
    for checkpointing, passes in (("none", 2), ("experts", 3)):
        config = replace(SMALL, activation_checkpointing=checkpointing)
        ghost, shadow = (step_work(config, load, n_resident=2, routing=of) for of in ("ghost", "shadow"))
        packed = 2 * SMALL.d_model * SMALL.d_expert // 64 * (64 // 2 + 2)
        numbers = 2 * 2 * SMALL.d_model * SMALL.d_expert
        assert shadow.memory_bytes - ghost.memory_bytes == passes * 3 * 6 * (packed + numbers)


def test_a_ring_by_hand() -> None:
    """2.5 MB over 4 sites at 100 Mbit/s, 2 MB and the rest: a ring's halves send 3/4 each, two segments at once."""
    places = [site(latency_ms=5)] * 3 + [site(bandwidth_mbit=1000)]
    links = Links.between(places, bucket_bytes=2_000_000)
    call = Collective("dense", (0, 1, 2, 3), 2_500_000)

    def sending(segment: float) -> float:
        frames = segment / 1448
        return (frames * 1514 + frames / 2 * 66) * 8 / 100e6

    # Two segments for each site: of 250 kB, which the link needs longer for than the latency; and of 62.5 kB.
    pairs = 2 * 3
    large, small = sending(250_000), sending(62_500)
    assert 2 * large > 0.010 + large
    assert 2 * small < 0.010 + small
    assert links.seconds(call) == pytest.approx(pairs * 2 * large + pairs * (0.010 + small))
    without = Links.between([replace(place, latency_ms=0) for place in places])
    assert without.seconds(call) == pytest.approx(sending(2 * 3 / 4 * 2_500_000))
    assert links.seconds(Collective("dense", (2,), 1_000_000)) == 0.0
    assert framed(1448) == 1514
    assert framed(8948, mtu=9000) == 9014


@pytest.mark.parametrize("g", [2, 3, 4, 6])
def test_a_small_average_waits_for_four_latencies_a_neighbour(g: int) -> None:
    """Which links of 20 ms were measured to take, 2 to 6 sites: docs/benchmarks/latency_cpu_2026-11-25.md."""
    links = Links.between([site(latency_ms=20, bandwidth_mbit=1e6)] * g)
    assert links.seconds(Collective("dense", tuple(range(g)), 1024)) == pytest.approx(4 * (g - 1) * 0.020, rel=0.01)


def test_a_large_average_waits_for_every_pair_of_its_segments() -> None:
    """64 MiB over 4 sites: 16 segments for each site, of which three go on in both halves, in pairs."""
    links = Links.between([site(latency_ms=60, bandwidth_mbit=1e6)] * 4)
    assert links.seconds(Collective("dense", (0, 1, 2, 3), 2**26)) == pytest.approx(2 * 3 * 16 / 2 * 0.120, rel=0.01)


def test_the_slower_of_link_and_transport_counts_and_copies_are_added() -> None:
    call = Collective("dense", (0, 1), 1_000_000)
    links = Links.between([site()] * 2)
    slow = replace(links, transport_seconds_per_byte=1e-6, copy_seconds_per_byte=2e-7)
    quick = replace(links, transport_seconds_per_byte=1e-9)
    assert slow.seconds(call) == pytest.approx(1.0 + 0.2)
    assert quick.seconds(call) == links.seconds(call)


def test_with_gloo_a_part_of_the_host_is_in_series_with_the_link() -> None:
    call = Collective("dense", (0, 1), 1_000_000)
    links = Links.between([site()] * 2)
    assert replace(links, host_seconds_per_byte=1e-7).seconds(call) == pytest.approx(links.seconds(call) + 0.1)
    both = replace(links, host_seconds_per_byte=1e-7, transport_seconds_per_byte=1e-6)
    assert both.seconds(call) == pytest.approx(1.0)


def test_nccl_waits_for_its_window_and_each_step_of_a_ring() -> None:
    """40 MiB to the neighbour at 25 ms: eight windows, of a round trip each, and two steps."""
    slow = [site(latency_ms=25, bandwidth_mbit=1e6)] * 2
    nccl = Links.between(slow, backend="nccl", bucket_bytes=2**30)
    call = Collective("dense", (0, 1), 40 * 2**20)
    assert nccl.seconds(call) == pytest.approx(8 * 0.05 + 2 * 0.025, rel=0.01)
    near = Links.between([site(latency_ms=0)] * 2, backend="nccl", bucket_bytes=2**30)
    gloo = replace(near, backend="gloo")
    assert near.seconds(call) == pytest.approx(gloo.seconds(call))
    assert replace(gloo, places=tuple(slow)).seconds(call) > 2 * nccl.seconds(call)
    with pytest.raises(ConfigError, match="gloo, nccl"):
        Links.between(slow, backend="mpi")


def test_coding_is_of_values_and_of_codes_alone() -> None:
    links = Links.between([site()] * 2, bucket_bytes=2**30)
    coding = replace(links, coding_seconds_per_byte=1e-7)
    coded, cast = Collective("dense", (0, 1), 125_000, share=0.125), Collective("dense", (0, 1), 125_000)
    assert coding.seconds(coded) == pytest.approx(links.seconds(coded) + 0.1)
    assert coding.seconds(cast) == links.seconds(cast)


def test_what_steps_do_not_hide_is_waiting() -> None:
    assert waiting_seconds([1.0, 3.0, 2.5], delay=2, seconds_per_step=1.0) == pytest.approx(1.0 + 0.5)
    assert waiting_seconds([1.0, 3.0], delay=0, seconds_per_step=1.0) == 4.0


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_fragments_together_are_the_round(fragments: int, routing: Routing) -> None:
    config, settings = replace(SMALL, balance="bias"), {"n_sites": 4, "overlap": 2, "routing": routing}
    whole = round_collectives(config, inner_moments="average", **settings)
    parts = fragment_collectives(config, fragments, inner_moments="average", **settings)

    def payloads(calls: Any) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for call in calls:
            found[call.kind, call.sites] = found.get((call.kind, call.sites), 0) + call.payload
        return {key: n for key, n in found.items() if n}

    assert len(parts) == fragments
    assert payloads(call for part in parts for call in part) == pytest.approx(payloads(whole), rel=1e-3)
    if fragments > 1:
        embeddings = 4 * parameter_counts(config).embeddings
        assert [call.payload for call in parts[0] if call.payload] == [embeddings, 2 * embeddings]


def test_a_buffer_is_copied_while_another_one_travels() -> None:
    call = Collective("dense", (0, 1), 10_000_000)
    links = Links.between([site()] * 2, bucket_bytes=1_000_000)
    alone = links.seconds(call)
    light = replace(links, copy_seconds_per_byte=0.1 * alone / 10_000_000)
    assert light.seconds(call) == pytest.approx(alone + 0.1 * alone / 10)
    heavy = replace(links, copy_seconds_per_byte=3 * alone / 10_000_000)
    assert heavy.seconds(call) == pytest.approx(3 * alone)


def test_codes_are_a_ring_of_their_own_bytes_in_buckets_of_as_many_values() -> None:
    links = Links.between([site(latency_ms=5)] * 3, bucket_bytes=1_000_000)
    coded = Collective("dense", (0, 1, 2), 250_000, share=0.125)
    alike = Collective("dense", (0, 1, 2), 250_000)
    assert links.seconds(coded) == pytest.approx(replace(links, bucket_bytes=125_000).seconds(alike))
    copying = replace(links, copy_seconds_per_byte=1.0)
    whole = copying.seconds(Collective("dense", (0, 1, 2), 2_000_000))
    assert copying.seconds(coded) == pytest.approx(whole, rel=1e-6)  # values are copied, whatever they become


def test_collectives_of_codes_by_hand() -> None:
    """Three sites give each other thirds in whole groups, a pair all; what no codec may round is apart."""
    pair, all_three = (round_collectives(SMALL, n_sites=m, overlap=m, codec=Groups(4), moments_codec=Groups(8),
                                         inner_moments="average") for m in (2, 3))  # fmt: skip
    counts = parameter_counts(SMALL)
    small = counts.norms + counts.router
    dense = counts.total - counts.experts - small
    for calls, slices in ((pair, 1), (all_three, 3)):
        assert [call.kind for call in calls] == ["dense", "dense", "expert", *["moments"] * 3]
        padded = -(-dense // (slices * 64)) * slices * 64
        assert [call.payload for call in calls[:2]] == [4 * small, padded // 64 * 34]
        assert calls[2].payload == -(-counts.experts // (slices * 64)) * slices * 34
        assert [call.payload for call in calls[3:5]] == [2 * 4 * small, 2 * padded // 64 * 66]
        assert calls[1].share == pytest.approx(34 / 256, rel=0.01)


def test_disjoint_groups_run_side_by_side_and_neighbours_share_or_wait() -> None:
    """Arcs 01, 03, 12, 23 in this order. Over NCCL: 01; then 03 and 12 together; then 23."""
    arcs = [Collective("expert", sites, 1_000_000) for sites in ((0, 1), (0, 3), (1, 2), (2, 3))]
    for backend, times in (("gloo", 2), ("nccl", 3)):
        links = Links.between([site()] * 4, backend=backend)
        assert links.round_seconds(arcs) == pytest.approx(times * links.seconds(arcs[0]))
        assert links.round_seconds([arcs[0], arcs[3]]) == pytest.approx(links.seconds(arcs[0]))


def test_small_averages_of_several_groups_wait_for_latencies_together() -> None:
    arcs = [Collective("expert", sites, 40_000) for sites in ((0, 1), (2, 3), (0, 3), (1, 2))]
    for backend, times in (("gloo", 1), ("nccl", 2)):
        links = Links.between([site(latency_ms=20)] * 4, backend=backend)
        assert links.seconds(arcs[0]) == pytest.approx(0.08 if backend == "gloo" else 0.04, rel=0.1)
        assert links.round_seconds(arcs) == pytest.approx(times * links.seconds(arcs[0]), rel=0.05)
    # Of large ones no more are on their way than two buckets.
    large = [arc._replace(payload=64 * 2**20) for arc in arcs[:1] * 3]
    links = Links.between([site(latency_ms=20, bandwidth_mbit=1e6)] * 4)
    assert links.round_seconds(large[:2]) == pytest.approx(links.seconds(large[0]), rel=0.2)
    assert links.round_seconds(large) == pytest.approx(2 * links.seconds(large[0]), rel=0.2)


@pytest.mark.parametrize(("n_sites", "overlap"), [(4, 2), (8, 2), (8, 4), (16, 2), (32, 4)])
def test_a_round_takes_as_many_averages_as_an_expert_has_holders(n_sites: int, overlap: int) -> None:
    config = table_1("104B")
    links = Links.between([site()] * n_sites)
    experts = [c for c in round_collectives(config, n_sites=n_sites, overlap=overlap) if c.kind == "expert"]
    assert len(experts) == n_sites
    assert links.round_seconds(experts) == pytest.approx(overlap * links.seconds(experts[0]))


@pytest.mark.parametrize(("n_sites", "overlap"), [(4, 2), (3, 2), (6, 4), (5, 5), (2, 1)])
def test_the_fast_count_of_holders_is_that_of_the_placement(n_sites: int, overlap: int) -> None:
    config = replace(SMALL, n_experts=30, n_layers=5)
    placement = place("fixed", n_layers=5, n_experts=30, n_sites=n_sites, overlap=overlap)
    fast, slow = held_when_fixed(config, n_sites, overlap), held_by(placement)
    assert list(fast.items()) == list(slow.items())


def test_sites_of_one_place_share_its_link() -> None:
    links = Links((site(inner_bandwidth_mbit=1e5), site()), (0, 0, 1, 1))
    inside, across, other = (Collective("expert", s, 1_000_000) for s in ((0, 1), (0, 2), (1, 3)))
    assert links.seconds(inside) == pytest.approx(links.seconds(across) / 1000)
    assert links.round_seconds([across, other]) == pytest.approx(2 * links.seconds(across))
    assert links.sent_by_place([inside, across, other]) == [2_000_000, 2_000_000]


def test_rounds_cost_less_with_less_overlap_more_bandwidth_and_fewer_sites() -> None:
    config = table_1("153M")

    def seconds(m: int, overlap: int, **changes: Any) -> float:
        return Links.between([site(**changes)] * m).round_seconds(round_collectives(config, n_sites=m, overlap=overlap))

    assert seconds(4, 1) < seconds(4, 2) < seconds(4, 4)
    assert seconds(4, 4) < seconds(4, 4, latency_ms=50) < seconds(4, 4, bandwidth_mbit=50)
    assert seconds(2, 2) < seconds(4, 4) < seconds(8, 8)
    assert seconds(1, 1) == 0.0


def test_full_overlap_is_a_full_replica() -> None:
    """One group of all sites for everything: as many bytes as averaging the whole model."""
    ledger = Ledger()
    calls = round_collectives(SMALL, n_sites=4, overlap=4, inner_moments="average")
    assert {call.sites for call in calls} == {(0, 1, 2, 3)}
    for call in calls:
        ledger.all_reduce(call.kind, call.payload, 4)
    assert ledger.total_payload == 3 * 4 * parameter_counts(SMALL).total


def test_mean_bytes_are_the_mean_of_counted_ones() -> None:
    """Over all sites; of migration the mean is (1 - O/M) of the slots' anchors and momenta, nearly."""

    def mean(kind: Any, placement: Any = "fixed", **run: Any) -> float:
        federation = FederationConfig(overlap=2, local_steps=1, outer=Nesterov(0.7, 0.9), placement=placement)
        ledgers = [predict_bytes(SMALL, federation, n_sites=4, site=i, **run) for i in range(4)]
        return sum(ledger.payload(kind) for ledger in ledgers) / 4

    evaluated = mean("evaluation", steps=1, validations=[1], evaluation_windows=2)
    assert evaluation_bytes(SMALL, n_sites=4, overlap=2, windows=2) == evaluated
    rounds = 200
    moved = mean("migration", "random", steps=rounds + 1) / rounds
    slots = SMALL.n_layers * SMALL.n_experts * 2 / 4
    assert moved == pytest.approx(slots * (1 - 2 / 4) * 2 * 4 * expert_parameters(SMALL), rel=0.03)


def test_a_checkpoint_has_the_model_and_momentum_once_and_each_sites_state() -> None:
    """What is written is compared with files of a real run in test_plan.py; here what it depends on."""
    half, full = (checkpoint_bytes(SMALL, n_sites=4, overlap=o) for o in (2, 4))
    total = parameter_counts(SMALL).total
    assert half["model"] == full["model"] == 4 * total
    assert full["site"] == 3 * full["model"] > half["site"]
    outer = checkpoint_bytes(SMALL, n_sites=4, overlap=2, momentum=True)
    assert (outer["momentum"], outer["site"], outer["files"]) == (4 * total, half["site"], 4)
    assert outer["total"] == 8 * total + 4 * half["site"]
    # Ranks of data parallelism are alike: the first writes, in the parameters' dtype, and has no local values.
    ddp = checkpoint_bytes(SMALL, n_sites=4, overlap=4, param_dtype="bfloat16", rounds=False)
    assert (ddp["model"], ddp["site"], ddp["files"]) == (2 * total, 2 * 2 * total, 1)
    biased = replace(SMALL, balance="bias")
    cells = SMALL.n_layers * SMALL.n_experts
    with_biases = checkpoint_bytes(biased, n_sites=4, overlap=2, routing="partitioned")
    without = checkpoint_bytes(SMALL, n_sites=4, overlap=2, routing="partitioned")
    assert with_biases["model"] - without["model"] == 4 * cells
    assert with_biases["site"] - without["site"] == 4 * cells // 2
    assert without["site"] < half["site"]  # router rows of residents alone


def test_an_exchange_by_hand() -> None:
    """Three sites, two at one place: of 3 MB each, the pair sends half to each other and 3 MB in all away."""
    links = Links((site(latency_ms=5), site(bandwidth_mbit=1000)), (0, 0, 1))
    assert links.leaving(3e6) == [3e6, 3e6]
    frames = 3e6 / 1448
    expected = (frames * 1514 + frames / 2 * 66) * 8 / 100e6 + 7 * 2 * 0.005
    assert links.exchange_seconds(3e6, messages=7) == pytest.approx(expected)
    assert Links.between([site()]).exchange_seconds(3e6, 1) == 0.0
    assert links.exchange_seconds(0.0, 7) == 0.0


def test_a_validation_is_a_forward_pass_of_the_whole_model() -> None:
    load = Load(batch_size=1, sequence_length=64)
    work = validation_work(SMALL, load, sequences=10)
    assert work.flops == 640 * token_flops(SMALL, 64).forward
    trained = step_work(SMALL, load, n_resident=SMALL.n_experts)
    assert work.flops == pytest.approx(10 * trained.flops / 3)
    assert 0 < work.memory_bytes < 10 * trained.memory_bytes


def test_peaks_are_those_of_the_precision() -> None:
    work = StepWork(flops=67e12, memory_bytes=0, precision="32-true")
    assert step_seconds(work, Site(accelerator="h100", mfu=1.0)) == pytest.approx(1.0)
    mixed = replace(work, precision="bf16-mixed")
    assert step_seconds(mixed, Site(accelerator="h100", mfu=1.0)) == pytest.approx(67 / 989)
    with pytest.raises(ConfigError, match="tflops_fp32"):
        work.seconds_at_peak(site())


def test_steps_by_hand_calibrated_and_by_mfu() -> None:
    work = StepWork(flops=2e12, memory_bytes=1e11)
    assert work.seconds_at_peak(site()) == pytest.approx(2 + 1)
    assert calibration(work, site(), 4.5) == pytest.approx(1.5)
    assert step_seconds(work, site(step_factor=1.5)) == pytest.approx(4.5)
    assert step_seconds(work, site(mfu=0.5)) == pytest.approx(4.0)
    small, large = (step_work(SMALL, Load(batch_size=b, sequence_length=64), n_resident=8) for b in (1, 2))
    assert small.flops * 2 == large.flops
    assert small.memory_bytes < large.memory_bytes < 2 * small.memory_bytes  # the optimizer's part stays


def test_runs_by_hand() -> None:
    assert run_seconds(steps=100, local_steps=32, seconds_per_step=1, seconds_per_round=10) == 100 + 4 * 10
    assert run_seconds(steps=100, local_steps=32, seconds_per_step=1, seconds_per_round=10, hidden=0.5) == 120
    times = [run_seconds(steps=64, local_steps=k, seconds_per_step=1, seconds_per_round=3) for k in (1, 8, 32, 64)]
    assert times == sorted(times, reverse=True)


def test_data_sheets_fill_what_is_not_given() -> None:
    given = Site(accelerator="h100", memory_gib=40)
    assert (given.tflops, given.memory_gib, given.memory_gbps) == (989, 40, 3350)
    assert all(a.tflops > 0 and a.memory_gib > 0 and a.memory_gbps > 0 for a in ACCELERATORS.values())


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: site(bandwidth_mbit=0), "bandwidth_mbit"),
        (lambda: site(bandwidth_mbit=-1), "bandwidth_mbit"),
        (lambda: site(bandwidth_mbit=float("nan")), "bandwidth_mbit"),
        (lambda: site(bandwidth_mbit=float("inf")), "bandwidth_mbit"),
        (lambda: site(memory_gib=float("inf")), "memory_gib"),
        (lambda: site(price_per_hour=float("nan")), "price_per_hour"),
        (lambda: site(latency_ms=float("inf")), "latency_ms"),
        (lambda: site(latency_ms=-1), "latency_ms"),
        (lambda: site(mfu=1.2), "mfu"),
        (lambda: site(devices=0), "devices"),
        (lambda: site(price_per_hour=-1), "price_per_hour"),
        (lambda: Site(accelerator="abacus"), "accelerator"),
        (lambda: Site(name="x"), "tflops"),
        (lambda: round_collectives(SMALL, n_sites=4, overlap=5), "overlap"),
        (lambda: run_seconds(steps=1, local_steps=0, seconds_per_step=1, seconds_per_round=1), "local_steps"),
        (lambda: run_seconds(steps=1, local_steps=1, seconds_per_step=1, seconds_per_round=1, hidden=2), "hidden"),
        (lambda: executed_picks(SMALL, 9, "ghost"), "n_resident"),
        (lambda: executed_picks(SMALL, 2, "ghost", ghost_fraction=1.1), "ghost_fraction"),
        (lambda: calibration(StepWork(1, 1), site(), 0), "measured_seconds"),
        (lambda: framed(1, mtu=40), "mtu"),
        (lambda: Links.between([site()], bucket_bytes=0), "bucket_bytes"),
        (lambda: Links.between([site()], copy_seconds_per_byte=-1), "copy_seconds_per_byte"),
        (lambda: Links.between([site()], round_overhead_seconds=float("nan")), "round_overhead_seconds"),
        (lambda: Links.between([site()], mtu=40), "mtu"),
        (lambda: Links((site(),), (0, 1)), "place_of"),
    ],
)
def test_nonsense_is_refused_by_its_name(call: Any, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert key in error.value.key


def test_unlike_capacities_are_counted_as_they_are_placed() -> None:
    config, capacities = replace(SMALL, n_layers=17), (8, 5, 3)
    placed = place("fixed", n_layers=17, n_experts=8, n_sites=3, overlap=2, capacities=capacities)
    assert held_when_fixed(config, 3, 2, capacities=capacities) == held_by(placed)
    calls = fragment_collectives(config, 1, n_sites=3, overlap=2, capacities=capacities)[0]
    one = 4 * expert_parameters(config)
    sent = {call.sites: call.payload for call in calls if call.kind == "expert"}
    assert sent == {sites: one * n for sites, n in held_by(placed).items()}
    even, unlike = (checkpoint_bytes(config, n_sites=3, overlap=2, capacities=c) for c in (None, capacities))
    assert unlike["site"] - even["site"] == 3 * 17 * one * (8 - 6)  # values and two moments


def test_bytes_inside_a_site_by_hand() -> None:
    """Four ranks: gradients in a ring, or gathers of all that is not a rank's own and float32 sums."""
    counts = resident_counts(SMALL, 2, "ghost")
    experts, rest = counts.experts, counts.total - counts.experts
    mixed = Load(precision="bf16-mixed", bf16_gradients=True)
    whole = inside_bytes(SMALL, mixed, ranks=4, inside="replicate", n_resident=2)
    assert whole == (2 * 3 / 4 * (2 * experts + 4 * rest), 0)
    cut = inside_bytes(SMALL, mixed, ranks=4, inside="shard", n_resident=2)
    assert cut == (0, 3 / 4 * (2 * (2 * experts + 4 * rest) + 4 * (experts + rest)))
    assert inside_seconds(16e9, site()) == 1  # half of PCIe 4
    assert inside_seconds(225e9, Site(accelerator="h100")) == 1


def test_uploads_share_the_link_of_their_place() -> None:
    links = Links((site(bandwidth_mbit=100), site(bandwidth_mbit=400)), (0, 0, 1))
    assert links.uploaded(1e6) == [2e6, 1e6]
    assert links.upload_seconds(1e6) == pytest.approx(framed(2e6) * 8 / 100e6)
