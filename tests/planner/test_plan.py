"""The planner: what fits and why not, and files that `fomoe fit` runs."""

import functools
import inspect
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomoe_pl import cli
from fomoe_pl.costs.bytes import predict_bytes
from fomoe_pl.costs.memory import GIB, MIB, Load
from fomoe_pl.costs.rounds import refresh_bytes
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Shadow
from fomoe_pl.model.sizes import expert_parameters
from fomoe_pl.module import FoMoEModule
from fomoe_pl.planner import command as plan_command
from fomoe_pl.planner.choices import Plan, RunLength
from fomoe_pl.planner.fit_yaml import fit_settings, fit_yaml, processes
from fomoe_pl.planner.output import merged, one_of_each, pareto, setting_text, spans
from fomoe_pl.planner.plan import Planner
from fomoe_pl.planner.quality import MEASUREMENTS, Measurement, measured_quality
from fomoe_pl.planner.request import PlanRequest
from fomoe_pl.strategies import FederatedStrategy

ROOT = Path(__file__).parents[2]
THREE_SITES = str(ROOT / "configs/plan/three_sites.yaml")
TINY = str(ROOT / "configs/model/tiny.yaml")
SITES = [
    {
        "name": name,
        "tflops": 0.05,
        "tflops_fp32": 0.05,
        "memory_gib": 4,
        "memory_gbps": 10,
        "bandwidth_mbit": 500,
        "price_per_hour": 2,
    }
    for name in "abcd"
]  # fmt: skip
REQUEST: dict[str, Any] = {
    "models": [TINY], "sites": SITES, "tokens": 32_768, "global_batch": 16, "sequence_length": 64, "local_steps": [4],
    "accelerator": "cpu", "precision": "32-true", "data_root": "runs/data/none",
}  # fmt: skip


def read_model(path: str) -> ModelConfig:
    return ModelConfig(**plan_command.read_settings(path)["architecture"])


def request(**changes: Any) -> PlanRequest:
    settings = REQUEST | changes
    return PlanRequest(**settings | {"sites": [Site(**site) for site in settings["sites"]]})


def planned(**changes: Any) -> tuple[list[Plan], list[Any]]:
    asked = request(**changes)
    return Planner("tiny", read_model(TINY), asked).results


def test_plans_are_ranked_and_full() -> None:
    plans, refusals = planned(routings=["ghost", "partitioned"], local_steps=[4, 8])
    assert [p.hours for p in plans] == sorted(p.hours for p in plans)
    assert {p.choice.overlap for p in plans} == {1, 2, 3, 4}
    assert {p.choice.method for p in plans} == {"local_adamw", "diloco", "ddp"}
    assert {p.choice.layout for p in plans} == {"one"}  # all layouts are the same with one device a site
    assert refusals == []
    for plan in plans:
        assert plan.price == pytest.approx(4 * 2 * plan.hours)
        assert (plan.length.steps, plan.tokens, plan.global_batch) == (32, 32_768, 16)
        assert plan.batches[0] * plan.accumulate * 4 == 16


def test_less_overlap_is_smaller_and_faster_and_larger_k_is_faster() -> None:
    plans, _ = planned(methods=["local_adamw"], wire_dtypes=["float32"], local_steps=[4, 8], routings=["ghost"])
    by = {(p.choice.overlap, p.choice.local_steps): p for p in plans}
    for k in (4, 8):
        held = [max(by[o, k].held_bytes) for o in (1, 2, 3, 4)]
        assert held == sorted(set(held))
        assert by[1, k].sent_per_round < by[2, k].sent_per_round < by[4, k].sent_per_round
    assert all(by[o, 8].hours < by[o, 4].hours for o in (1, 2, 3, 4))


def test_copies_are_offered_beside_ghosts_and_full_replicas() -> None:
    plans, _ = planned(methods=["local_adamw"], wire_dtypes=["float32"])
    by = {(p.choice.overlap, p.choice.routing): p for p in plans}
    assert [key for key in by if key in {(p.choice.overlap, p.choice.routing) for p in one_of_each(plans)}] == [*by]
    assert {routing for overlap, routing in by if overlap == 4} == {"ghost"}  # nobody lacks an expert
    config = read_model(TINY)
    for overlap in (1, 2, 3):
        ghost, shadow = by[overlap, "ghost"], by[overlap, "shadow"]
        copies = refresh_bytes(config, Shadow(4), n_sites=4, overlap=overlap)
        assert shadow.sent_per_round - ghost.sent_per_round == pytest.approx(copies)
        assert shadow.round_seconds > ghost.round_seconds
        assert shadow.step_seconds > ghost.step_seconds
        assert shadow.memory[0].copies > 0
        assert shadow.quality is None
    rare, _ = planned(methods=["local_adamw"], wire_dtypes=["float32"], shadow_refresh=4, shadow_bits=2)
    rarely = next(p for p in rare if (p.choice.overlap, p.choice.routing) == (2, "shadow"))
    ghost, shadow = by[2, "ghost"], by[2, "shadow"]
    copies = refresh_bytes(config, Shadow(2), n_sites=4, overlap=2)
    assert rarely.sent_per_round - ghost.sent_per_round == pytest.approx(copies / 4)
    assert rarely.round_seconds < shadow.round_seconds
    written = fit_settings(rarely, request(shadow_refresh=4, shadow_bits=2), plan_command.read_settings(TINY))
    settings = written["trainer"]["strategy"]["init_args"]
    assert (settings["routing"], settings["shadow_bits"], settings["shadow_refresh"]) == ("shadow", 2, 4)
    FederatedStrategy(**settings)
    ghosts = fit_settings(ghost, request(), plan_command.read_settings(TINY))["trainer"]["strategy"]["init_args"]
    assert "shadow_bits" not in ghosts


def test_turns_hide_what_steps_are_long_enough_for() -> None:
    settings = {"methods": ["local_adamw"], "overlaps": [2], "routings": ["shadow"], "wire_dtypes": ["float32"],
                "local_steps": [8], "fragments": [1, 3, 4], "delays": [0, 1, 2, 3]}  # fmt: skip
    plans, _ = planned(**settings)
    by = {(p.choice.fragments, p.choice.delay): p for p in plans}
    assert sorted(by) == [*((1, d) for d in range(4)), (4, 0), (4, 1)]  # 3 does not divide, 2 is not below 8 / 4
    assert by[1, 0].waiting_seconds == pytest.approx(by[1, 0].round_seconds)
    for n, d in by:
        assert by[n, d].sent_per_round == pytest.approx(by[1, 0].sent_per_round, rel=1e-3)
        hidden = by[n, 0].waiting_seconds - by[n, d].waiting_seconds
        assert 0 <= hidden <= 2 * n * d * by[n, d].step_seconds + 1e-9
        assert (hidden > 0) == (d > 0)
        assert by[n, d].hours == pytest.approx(by[n, 0].hours - by[n, d].length.steps / 8 * hidden / 3600)
    asked = request(**settings)
    written = fit_settings(by[4, 1], asked, plan_command.read_settings(TINY))["trainer"]["strategy"]["init_args"]
    assert (written["fragments"], written["delay"]) == (4, 1)
    FederatedStrategy(**written)
    assert "K 8, 4 fragments, delay 1, shadow" in setting_text(by[4, 1])
    with pytest.raises(ConfigError, match="fit no K"):
        request(local_steps=[8], fragments=[3])


def test_formats_and_periods_are_those_of_the_ledger() -> None:
    """Bytes of the mean round of a run of nine, the last moments' round being the eighth; overlap 2 averages in pairs.

    Each bucket fills up its own last groups, which plans leave out.
    """
    config = replace(read_model(str(ROOT / "configs/model/fomoe-153m.yaml")), n_layers=2)
    asked = request(methods=["local_adamw"], overlaps=[2], routings=["ghost"], tokens=9 * 4 * 16 * 64, validations=1,
                    wire_dtypes=["float32", "bfloat16", "int8", "int4"], moments_every=[1, 4],
                    sites=[dict(site, memory_gib=80) for site in SITES])  # fmt: skip
    plans = Planner("153M", config, asked).results[0]
    assert len(plans) == 8
    for plan in plans:
        written = fit_settings(plan, asked, plan_command.read_settings(TINY))["trainer"]["strategy"]["init_args"]
        FederatedStrategy(**written)
        ledger = predict_bytes(config, FederationConfig(**written), n_sites=4, site=1, steps=36)
        assert plan.length.steps == 36
        assert plan.sent_per_round == pytest.approx(ledger.total_wire / 9, rel=0.005)
        assert plan.sent_in_all == pytest.approx(ledger.total_wire + plan.sent_per_validation, rel=0.005)
    by = {(p.choice.wire_dtype, p.choice.moments_every): p for p in plans}
    for every in (1, 4):
        formats = [by[wire, every] for wire in ("float32", "bfloat16", "int8", "int4")]
        for figure in ("sent_per_round", "round_seconds"):
            found = [getattr(plan, figure) for plan in formats]
            assert found == sorted(set(found), reverse=True)
    whole, seldom = by["float32", 1], by["float32", 4]
    changes = planned_of(config, replace(asked, methods=["local_sgd"], wire_dtypes=["float32"]))
    assert seldom.round_seconds == pytest.approx(
        changes.round_seconds + 2 / 9 * (whole.round_seconds - changes.round_seconds)
    )
    coded = fit_settings(by["int4", 4], asked, plan_command.read_settings(TINY))["trainer"]["strategy"]["init_args"]
    assert {name: coded[name] for name in ("wire_dtype", "wire_codec", "error_feedback", "moments_codec")} == {
        "wire_dtype": "float32", "wire_codec": "int4", "error_feedback": True, "moments_codec": "int8"
    }  # fmt: skip
    assert coded["moments_every"] == 4
    assert "int4, moments every 4 rounds, batch" in setting_text(by["int4", 4])
    # What is kept of a round is counted where it is: on the device, and in each site's file.
    less = by["float32", 1].memory[0]
    lost = by["int4", 1].memory[0].residual
    assert by["int4", 1].memory[0].lasting - less.lasting == lost > 0
    assert by["int4", 1].checkpoint["site"] - by["float32", 1].checkpoint["site"] == lost


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_routers_within_rounds_are_those_of_the_ledger(routing: str) -> None:
    settings = {"methods": ["local_sgd"], "overlaps": [2], "routings": [routing], "wire_dtypes": ["float32"],
                "local_steps": [8], "fragments": [2], "validations": 1}  # fmt: skip
    [[plain], [often]] = (planned(**settings, router_every=every)[0] for every in (None, 2))
    written = fit_settings(often, request(**settings), plan_command.read_settings(TINY))
    federation = FederationConfig(**written["trainer"]["strategy"]["init_args"])
    assert (federation.router_every, plain.choice.router_every) == (2, None)
    steps, config = often.length.steps, read_model(TINY)
    with_routers, without = (
        predict_bytes(config, one, n_sites=4, site=0, steps=steps).total_wire
        for one in (federation, replace(federation, router_every=None))
    )
    # The run's last round has the routers of the first fragment's turn with all the others, and none for the last.
    assert often.sent_per_round - plain.sent_per_round == pytest.approx((with_routers - without) / (steps / 8), rel=0.1)
    assert often.waiting_seconds > plain.waiting_seconds
    with pytest.raises(ConfigError, match="divides no K"):
        request(router_every=3, local_steps=[8])


def planned_of(config: ModelConfig, asked: PlanRequest) -> Plan:
    """The fastest."""
    return Planner("model", config, asked).results[0][0]


def test_where_memory_is_short_the_host_keeps_what_was_agreed_on() -> None:
    """Not where nothing is short, and only where it is faster than activations that are made again."""
    config = read_model(str(ROOT / "configs/model/fomoe-54m.yaml"))

    def best(sites: list[dict[str, Any]] = SITES, **changes: Any) -> Plan:
        settings = {"methods": ["diloco"], "overlaps": [4], "wire_dtypes": ["float32"], "bucket_mib": 1,
                    "global_batch": 4, "sequence_length": 512} | changes  # fmt: skip
        asked = request(sites=sites, **settings)
        return Planner("54M", config, asked).results[0][0]

    roomy = best()
    assert (roomy.saving, roomy.memory[0].on_host) == (("none", "device"), 0)
    state = roomy.memory[0].anchors + roomy.memory[0].outer_momentum
    usable = max(roomy.held_bytes) - 10 * MIB  # which blocks that are made again give, too
    short = [dict(site, memory_gib=usable / 0.92 / GIB) for site in SITES]
    plan = best(short)
    assert (plan.saving, plan.memory[0].on_host) == (("none", "host"), state)
    assert max(plan.held_bytes) < usable
    assert plan.round_seconds == roomy.round_seconds  # the link takes longer than the bus
    written = fit_settings(plan, request(), plan_command.read_settings(TINY))
    assert written["trainer"]["strategy"]["init_args"]["outer_state"] == "host"
    slow_bus = [dict(site, host_gbps=1e-3) for site in short]
    assert best(slow_bus).saving == ("blocks", "device")
    held = best(slow_bus, outer_states=["host"])
    assert held.round_seconds == pytest.approx(state / 1e6, rel=1e-3)  # and two small messages
    averaging = best(slow_bus, outer_states=["host"], methods=["local_adamw"])
    anchors = averaging.memory[0].on_host / 1e6
    assert averaging.round_seconds > anchors + 0.6 * best(short, methods=["local_adamw"]).round_seconds  # its moments
    for order in (["device", "host"], ["host", "device"]):  # what is asked for, not what is preferred
        assert best(outer_states=order).saving == ("none", "device")


def test_what_the_models_file_turns_off_is_not_counted(tmp_path: Path) -> None:
    model = yaml.safe_load((ROOT / "configs/model/fomoe-153m.yaml").read_text())
    files = {"both": {}, "none": {"cuda_graphs": False, "bf16_gradients": False}}
    for name, changes in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": model["model"] | changes}))
    asked = request(models=[str(tmp_path / f"{name}.yaml") for name in files], methods=["diloco"], overlaps=[4],
                    precision="bf16-mixed", sites=[dict(site, memory_gib=80) for site in SITES])  # fmt: skip
    memory = {plan.choice.model: plan.memory[0] for plan in plan_command.plan_all(asked)[0]}
    assert memory["both"].recorded > memory["none"].recorded == 0
    assert memory["both"].gradients < memory["none"].gradients
    assert memory["both"].weights > memory["none"].weights


def test_without_our_kernels_more_is_kept() -> None:
    config = read_model(str(ROOT / "configs/model/fomoe-153m.yaml"))
    places = [{"name": "a", "accelerator": "h200"}, {"name": "b", "accelerator": "h100"}]
    found = []
    for sites in (places, [places[0] | {"accelerator": "mi300x"}, places[1]]):
        asked = request(sites=sites, methods=["diloco"], precision="bf16-mixed", sequence_length=2048)
        found.append(Planner("153M", config, asked).results[0][0].memory[1])
    assert found[0].activations < found[1].activations
    assert found[0].gradients < found[1].gradients


def test_one_process_has_no_copies_of_gradients() -> None:
    """Data parallelism of one process is a site alone, which is what is written."""
    alone, several = (planned(methods=["ddp"], sites=SITES[:n], global_batch=4 * n)[0][0] for n in (1, 4))
    assert alone.memory[0].gradients == alone.memory[0].weights
    assert several.memory[0].gradients == 3 * several.memory[0].weights


def test_what_overflows_is_told_for_each_method_with_what_would_fit() -> None:
    """Full replicas of DDP and DiLoCo do not fit where LocalAdamW does: that is told beside the plans."""
    small = [dict(SITES[0], name="cramped", memory_gib=0.0885), *SITES[1:]]
    plans, refusals = planned(sites=small, wire_dtypes=["float32"], bucket_mib=1)
    fitting = {(p.choice.method, p.choice.overlap) for p in plans}
    refused = {(method, o): r.reason for r in refusals for method in r.methods for o in r.overlaps}
    tried = {(method, o) for method in ("local_adamw", "diloco") for o in (1, 2, 3, 4)} | {("ddp", 4)}
    assert fitting | set(refused) == tried
    assert fitting.isdisjoint(refused)
    assert ("ddp", 4) in refused
    assert ("local_adamw", 4) in fitting
    for reason in refused.values():
        assert "cramped needs" in reason
        assert "usable are 0.08 of 0.0885" in reason
        assert "b needs" not in reason
        assert "GiB would do; without cramped it fits" in reason
    assert "Peak at the backward pass: library 0.1" in refused["ddp", 4]
    assert all(max(p.held_bytes) <= 0.92 * 0.0885 * GIB for p in plans)


def test_devices_of_the_told_size_do() -> None:
    [refusal] = planned(sites=[dict(site, memory_gib=0.05) for site in SITES], methods=["ddp"])[1]
    told = float(refusal.reason.split("Devices of ")[1].split()[0])
    assert "it fits" not in refusal.reason  # no site has room
    assert planned(sites=[dict(site, memory_gib=told) for site in SITES], methods=["ddp"])[0]


def test_the_reason_is_that_of_the_smallest_setting() -> None:
    """Partitioned routing has fewer router rows, whatever the order in which it is asked for."""
    config = read_model(str(ROOT / "configs/model/fomoe-1.8b.yaml"))

    def reasons(*routings: str) -> list[str]:
        asked = request(routings=list(routings), overlaps=[1], methods=["local_adamw"])
        return [refusal.reason for refusal in Planner("large", config, asked).results[1]]

    assert reasons("ghost", "partitioned") == reasons("partitioned") != reasons("ghost")


def test_what_was_not_tried_has_a_reason() -> None:
    for changes, told in (
        ({"methods": ["ddp"], "overlaps": [1]}, "needs the overlap 4"),
        ({"methods": ["ddp"], "sites": [dict(s, devices=2) for s in SITES], "layouts": ["sharded"]},
         "no sites of several devices"),
        ({"layouts": ["one"], "sites": [dict(s, devices=2) for s in SITES], "overlaps": [8],
          "methods": ["diloco"]}, "an overlap is 1 to 4"),
    ):  # fmt: skip
        if changes.get("overlaps") == [8]:
            changes["layouts"] = ["one", "each"]
        plans, refusals = planned(**changes)
        assert any(told in r.reason for r in refusals)
        assert not any(p.choice.layout == "one" for p in plans)


def test_overlaps_are_those_that_divide_evenly_if_there_are_any() -> None:
    plans, refusals = planned(sites=SITES[:3], global_batch=18)  # 4 experts
    assert ({p.choice.overlap for p in plans}, refusals) == ({1, 2, 3}, [])
    assert {p.choice.overlap for p in planned(sites=SITES[:4])[0]} == {1, 2, 3, 4}
    plans, refusals = planned(sites=[dict(SITES[0], name=str(i)) for i in range(10)], overlaps=[1, 2], global_batch=20)
    assert {p.choice.overlap for p in plans} == {2}
    assert ((1,), True) in [(r.overlaps, "leave some of 10 sites without one" in r.reason) for r in refusals]


def test_refusals_that_differ_in_model_and_layout_alone_are_one_row() -> None:
    devices = [dict(SITES[0], name=str(i), devices=2) for i in range(10)]
    _, refusals = planned(
        sites=devices, layouts=["one", "sharded"], overlaps=[1], global_batch=20, methods=["local_adamw"]
    )
    again = [replace(refusal, model="other") for refusal in refusals]
    [(models, layouts, told)] = merged(refusals + again)
    assert (models, layouts, told.overlaps) == (["tiny", "other"], ["one", "sharded"], (1,))


def test_every_device_a_site_of_its_own() -> None:
    sites = [dict(SITES[0], devices=4), dict(SITES[1], devices=2)]
    plans, _ = planned(sites=sites, layouts=["each", "sharded"], overlaps=[2, 3], global_batch=18)
    each = next(p for p in plans if p.choice.layout == "each")
    assert each.choice.sites == 6
    assert processes(each, request(sites=sites, accelerator="gpu")) == (2, 3)
    assert each.why_not_today is None
    sharded = [p for p in plans if p.choice.layout == "sharded"]
    assert all("as many devices at each site" in (p.why_not_today or "") for p in sharded)
    assert all(p.held_bytes[0] < p.held_bytes[1] for p in sharded)  # spread over more devices
    assert all(p.memory[0].weights < p.memory[1].weights for p in sharded)


def test_the_front_has_no_plan_that_another_beats() -> None:
    plans, _ = planned(local_steps=[4, 8])
    front = pareto(plans)
    assert 1 <= len(front) < len(plans)
    for plan in front:
        assert not any(other.hours < plan.hours and max(other.held_bytes) <= max(plan.held_bytes) for other in plans)


def test_quality_is_a_measurement_or_unknown() -> None:
    settings: dict[str, Any] = {"method": "local_adamw", "sites": 4, "overlap": 2, "local_steps": 32}
    known = measured_quality(routing="partitioned", **settings)
    assert isinstance(known, Measurement)
    assert known.penalty == pytest.approx(112.00 / 103.91 - 1)
    assert "2606.19025" in known.source
    assert measured_quality(routing="ghost", **settings | {"local_steps": 64}) is None
    assert measured_quality(routing="partitioned", moments_every=4, **settings) is None
    assert measured_quality(routing="partitioned", wire_dtype="bfloat16", **settings) is None
    full = measured_quality(routing="ghost", **settings | {"overlap": 4})
    assert full is not None
    assert (full.value, full.penalty) == (103.91, 0.0)
    # Nobody measured data parallelism, nor three sites: full replicas are no reference there.
    assert measured_quality(routing="ghost", **settings | {"overlap": 4, "method": "ddp", "local_steps": 1}) is None
    assert measured_quality(routing="ghost", **settings | {"overlap": 3, "sites": 3}) is None
    keys = {(m.method, m.routing, m.shadow_bits, m.sites, m.overlap, m.local_steps) for m in MEASUREMENTS}
    assert len(keys) == len(MEASUREMENTS)
    copies = [measured_quality(routing="shadow", shadow_bits=bits, **settings) for bits in (2, 4, 8)]
    assert [None if found is None else found.penalty for found in copies] == [0.047, 0.027, None]
    assert measured_quality(routing="shadow", shadow_refresh=2, **settings) is None


def test_measurements_of_the_studies_are_those_of_the_page() -> None:
    page = (ROOT / "docs/quality.md").read_text().split("## Results")[1]
    found = [m for m in MEASUREMENTS if m.source == "docs/quality.md"]
    assert {m.routing for m in found} == {"ghost", "shadow"}
    for m in found:
        table = page.split(f"**{m.model}**")[1].split("### iid, K = 32")[1].split("###")[0]
        arm = f"| {m.routing}{m.shadow_bits or ''}_{m.overlap} |"
        [row] = (line for line in table.splitlines() if line.startswith(arm))
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[2], cells[5]) == (f"{m.value:.4f}", f"{m.penalty:+.1%}")


def test_a_measured_setting_is_shown_beside_a_faster_one_that_nobody_measured() -> None:
    """A bfloat16 wire is always faster; the measurements are of float32."""
    plans, _ = planned(methods=["local_adamw"], overlaps=[2], local_steps=[32], routings=["partitioned"])
    shown = one_of_each(plans)
    assert [(p.choice.wire_dtype, p.quality is None) for p in shown] == [("bfloat16", True), ("float32", False)]


def test_our_own_measurements_are_those_of_the_page() -> None:
    page = next(m.source for m in MEASUREMENTS if m.source.startswith("docs/benchmarks/"))
    rows = dict(
        line.split("|")[1:4:2]
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith("| `") and " 8.017 " in line
    )
    ends = {name.strip(" `"): float(value) for name, value in rows.items()}
    for m in (m for m in MEASUREMENTS if m.source == page):
        assert m.value in ends.values()
        assert m.value / (1 + m.penalty) == pytest.approx(ends[m.method])


def test_three_sites_get_an_answer_in_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    start = time.process_time()  # whatever else the machine is doing
    plan_command.main(["-c", THREE_SITES, "--json", str(tmp_path / "all.json"), "--write", str(tmp_path / "fit.yaml")])
    assert time.process_time() - start < 30
    told = capsys.readouterr().out
    assert told.splitlines()[0].startswith("fomoe-54m: yes, in ")
    assert "fomoe-1.8b: yes, in " in told
    assert "fomoe-13.3b: no" in told
    assert re.search(r"desk needs [\d.]+ GiB a device, usable are 22.08 of 24", (tmp_path / "all.json").read_text())
    assert (
        "micro-batches of 1, checkpointed, outer state on the host): desk needs" in (tmp_path / "all.json").read_text()
    )
    assert "20% of the peak" in told  # the assumption behind all hours
    everything = json.loads((tmp_path / "all.json").read_text())
    hours = {(p["model"], p["layout"], p["overlap"]): p["hours"] for p in everything["plans"]}
    assert ("fomoe-153m", "each", 5) in hours
    # As a site each, the 4090s have room for a quarter or half of the experts, for fewer where others hold more.
    of_large = [p for p in everything["plans"] if (p["model"], p["layout"]) == ("fomoe-1.8b", "each")]
    assert {p["overlap"] for p in of_large if p["capacities"] is None} == {5, 10}
    assert {p["overlap"] for p in of_large if p["capacities"]} == {5, 10, 15}
    assert {p["checkpointing"] for p in of_large} == {"blocks"}
    assert "outer state on the host (8.3 GiB a device)" in " ".join(told.split())
    # Whole GPUs of the three sites, unlike batches: no site waits long for another.
    first = next(p for p in everything["plans"] if p["model"] == "fomoe-153m")
    assert (first["layout"], first["ranks"], first["why_not_today"]) == ("replicated", [8, 8, 4], None)
    assert first["batches"][0] > 3 * first["batches"][1] > 3 * first["batches"][2]
    # A validation, with fit's window, is no more than training.
    for p in everything["plans"]:
        assert p["validations"] * p["sent_per_validation"] < 0.5 * p["sent_in_all"]
    asked = request(models=["configs/model/fomoe-1.8b.yaml"], tokens=1e9, global_batch=1024, sequence_length=2048,
                    precision="bf16-mixed", layouts=["each"], overlaps=[1, 16], local_steps=[32],
                    sites=[{"name": a, "accelerator": a, "devices": 8} for a in ("h100", "a100-80")])  # fmt: skip
    assert {plan.choice.overlap for plan in plan_command.plan_all(asked)[0]} == {1, 16}
    written = yaml.safe_load((tmp_path / "fit.yaml").read_text())
    assert written["trainer"]["devices"] * written["trainer"]["num_nodes"] == 20
    plan_command.main(["-c", THREE_SITES, "--layouts", "[sharded]", "--models", f"[{asked.models[0]}]"])
    assert "fomoe-1.8b: not with `fomoe fit` today" in capsys.readouterr().out


@pytest.mark.slow
def test_the_written_file_trains(tmp_path: Path, root: str) -> None:
    """`fomoe fit` runs what `fomoe plan` has written, on real processes, with the bytes that were planned."""
    model = tmp_path / "own.yaml"
    section = yaml.safe_load(Path(TINY).read_text())["model"]
    model.write_text(yaml.safe_dump({"model": section | {"optimizer": {"lr": 0.003, "warmup_steps": 2}}}))
    settings = REQUEST | {
        "models": [str(model)], "data_root": root, "overlaps": [1], "sites": SITES[:2], "wire_dtypes": ["int4"],
        "tokens": 8 * 16 * 64, "val_sequences": 14, "validations": 2, "methods": ["diloco"], "routings": ["ghost"],
    }  # fmt: skip
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(settings))
    written = tmp_path / "fit.yaml"
    plan_command.main(
        ["-c", str(tmp_path / "request.yaml"), "--write", str(written), "--json", str(tmp_path / "all.json")]
    )
    done = subprocess.run(
        [sys.executable, "-m", "fomoe_pl", "fit", "-c", str(written)], cwd=tmp_path, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next((tmp_path / "runs").rglob("report.json")).read_text())
    [plan] = json.loads((tmp_path / "all.json").read_text())["plans"]
    assert report["steps"] == plan["steps"] == 8
    wire = report["bytes"]["wire"]
    assert wire["dense"] + wire["expert"] + wire["moments"] == 2 * plan["sent_per_round"]  # groups are whole here
    # Metrics are summed as well: the same few bytes whatever the model is.
    assert wire["evaluation"] == pytest.approx(2 * plan["sent_per_validation"], rel=0.01)
    kept = yaml.safe_load(next((tmp_path / "runs").rglob("config.yaml")).read_text())["model"]["optimizer"]
    assert (kept["lr"], kept["warmup_steps"]) == (0.003, 2)
    sizes = {path.name: path.stat().st_size for path in next((tmp_path / "runs").rglob("last.ckpt")).iterdir()}
    overhead = 100_000  # names, headers, ledger
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    momentum = sum(size for name, size in sizes.items() if name.startswith("momentum-"))
    assert 0 < momentum - plan["checkpoint"]["momentum"] < overhead
    assert 0 < weights - momentum - plan["checkpoint"]["model"] < overhead
    sites = [size for name, size in sizes.items() if name.startswith("site-")]
    assert len(sites) == plan["checkpoint"]["files"] == 2
    assert all(0 < size - plan["checkpoint"]["site"] < overhead for size in sites)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"sites": SITES[:1], "methods": ["ddp"]},
    "rounds of one process": {"sites": SITES[:1], "methods": ["diloco"]},
    "data parallel": {"methods": ["ddp"]},
    "ghosts": {"methods": ["diloco"], "overlaps": [1]},
    "routed among residents, less than a round": {
        "methods": ["local_sgd"], "overlaps": [2], "routings": ["partitioned"], "local_steps": [4000]},
    "codes": {"methods": ["local_adamw"], "wire_dtypes": ["int4"], "moments_every": [4]},
    "four sites that differ": {"sites": [dict(SITES[0], memory_gib=1), dict(SITES[1], tflops_fp32=0.2),
                                         dict(SITES[2], bandwidth_mbit=50), dict(SITES[3], latency_ms=80)]},
    "replicated sites": {"sites": [dict(s, devices=2) for s in SITES[:2]], "layouts": ["replicated"]},
    "replicated sites that differ": {
        "sites": [dict(SITES[0], devices=4), dict(SITES[1], devices=2, tflops_fp32=0.02)], "layouts": ["replicated"],
        "global_batch": 32, "methods": ["local_adamw"]},
    "sharded sites with copies": {
        "sites": [dict(s, devices=2) for s in SITES[:2]], "layouts": ["sharded"], "overlaps": [1],
        "routings": ["shadow"], "methods": ["diloco"]},
    "capacities": {"sites": [SITES[0], dict(SITES[1], memory_gib=0.0779)], "layouts": ["one"], "overlaps": [1],
                   "capacities": ["memory"], "methods": ["local_adamw"], "bucket_mib": 1, "wire_dtypes": ["float32"]},
    "devices are sites": {"sites": [dict(SITES[0], devices=2), dict(SITES[1], devices=1)], "layouts": ["each"],
                          "global_batch": 18},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fit_takes_the_written_file_of_every_layout(
    layout: str, tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the first step: settings, data, strategy, processes and intervals are checked; nothing is trained."""
    asked = request(data_root=root, **LAYOUTS[layout])
    model = plan_command.read_settings(TINY)
    plan = Planner("tiny", read_model(TINY), asked).results[0][0]
    (tmp_path / "fit.yaml").write_text(fit_yaml(plan, asked, model))
    seen: list[Any] = []

    @functools.wraps(cli.Trainer.fit)  # whose arguments are options of the command line
    def fit(trainer: Any, *_: Any, datamodule: Any, **__: Any) -> None:
        seen.extend([trainer, datamodule])

    monkeypatch.setattr(cli.Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    cli.main(["fit", "-c", "fit.yaml"])
    trainer, data = seen
    assert trainer.num_devices * trainer.num_nodes == sum(plan.ranks[place] for place in plan.place_of)
    settings = getattr(trainer.strategy, "settings", None) or FederationConfig()
    assert settings.capacities == plan.choice.capacities
    assert (settings.capacities is not None) == (layout == "capacities")
    assert settings.most_ranks == max(plan.ranks)
    assert data.batch_sizes(plan.choice.sites) == plan.site_batches
    assert trainer.max_steps == plan.length.steps
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    assert batches % trainer.val_check_interval == 0  # the last validation is at the end
    assert trainer.val_check_interval <= batches
    assert trainer.checkpoint_callback._every_n_train_steps == plan.length.every
    assert batches * asked.sequence_length * sum(plan.site_batches) == plan.tokens


def test_what_fit_cannot_run_is_not_written(tmp_path: Path) -> None:
    plans, _ = planned(sites=[dict(site, devices=1 + (i == 0)) for i, site in enumerate(SITES)], layouts=["sharded"])
    with pytest.raises(ConfigError, match="as many devices at each site"):
        plan_command.chosen(plans[:3], 1)
    with pytest.raises(ConfigError, match="can be run"):
        plan_command.chosen(plans[:3], None)
    with pytest.raises(ConfigError, match="no row"):
        plan_command.chosen(plans[:3], 4)


def test_a_sharded_plan_is_written_with_its_ranks() -> None:
    sites = [dict(site, devices=2) for site in SITES]
    plans, _ = planned(sites=sites, layouts=["sharded"], routings=["ghost"])
    plan, model = plans[0], plan_command.read_settings(TINY)
    assert plan_command.chosen(plans[:3], 1) is plan
    for accelerator, where in (("gpu", (2, len(SITES))), ("cpu", (2 * len(SITES), 1))):
        written = fit_settings(plan, request(sites=sites, accelerator=accelerator), model)
        assert (written["trainer"]["devices"], written["trainer"]["num_nodes"]) == where
        settings, data = written["trainer"]["strategy"]["init_args"], written["data"]
        assert (settings["ranks_per_site"], settings["inside"]) == (2, "shard")
        read = data["batch_size"] * written["trainer"]["accumulate_grad_batches"] * len(SITES)
        assert (data["batch_size"], read) == (2 * plan.batches[0], plan.global_batch)
    [copied, *_] = planned(sites=sites, layouts=["sharded"], routings=["shadow"], overlaps=[1])[0]
    settings = fit_settings(copied, request(sites=sites), model)["trainer"]["strategy"]["init_args"]
    assert (copied.why_not_today, settings["routing"], settings["inside"]) == (None, "shadow", "shard")


def test_settings_name_what_was_planned() -> None:
    model = plan_command.read_settings(TINY)
    plans, _ = planned(methods=["ddp"])
    assert fit_settings(plans[0], request(), model)["trainer"]["strategy"] == "ddp_counted"
    plans, _ = planned(methods=["diloco"], overlaps=[2], wire_dtypes=["bfloat16"])
    on_gpu = [
        fit_settings(plans[0], request(accelerator="gpu"), model | own)["model"]
        for own in ({}, {"compile_blocks": False})
    ]
    assert [settings["compile_blocks"] for settings in on_gpu] == [True, False]  # unless the model's file says it
    assert "compile_blocks" not in fit_settings(plans[0], request(), model)["model"]
    strategy = fit_settings(plans[0], request(), model)["trainer"]["strategy"]["init_args"]
    assert (strategy["overlap"], strategy["wire_dtype"]) == (2, "bfloat16")
    assert strategy["outer"]["class_path"] == "fomoe_pl.federation.outer.Nesterov"


def test_numbers_are_drawn_together() -> None:
    assert spans([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"models": []}, "models"),
        ({"sites": []}, "sites"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": float("inf")}, "tokens"),
        ({"val_sequences": 0}, "val_sequences"),
        ({"validations": 0}, "validations"),
        ({"mtu": 10}, "mtu"),
        ({"round_overhead_seconds": float("nan")}, "round_overhead_seconds"),
        ({"models": [TINY, TINY]}, "models"),
        ({"sites": [{n: v for n, v in SITES[0].items() if n != "tflops_fp32"}]}, "sites.a.tflops_fp32"),
        ({"headroom": 1.0}, "headroom"),
        ({"rounding": 1.0}, "rounding"),
        ({"shares": []}, "shares"),
        ({"capacities": []}, "capacities"),
        ({"shadow_bits": 3}, "shadow_bits"),
        ({"shadow_refresh": 0}, "shadow_refresh"),
        ({"local_steps": [0]}, "local_steps"),
        ({"moments_every": [0]}, "moments_every"),
        ({"moments_every": []}, "moments_every"),
        ({"wire_dtypes": ["int2"]}, "wire_dtypes"),
        ({"overlaps": [5]}, "overlaps"),
        ({"overlaps": []}, "overlaps"),
        ({"sites": [SITES[0], SITES[0]]}, "sites"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        request(**changes)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sites", "[{name: a, accelerator: h100, bandwidth_mbit: 0}]"], "sites.a.bandwidth_mbit"),
        (["--sites", "[{name: a, accelerator: h100, latency_ms: .nan}]"], "sites.a.latency_ms"),
        (["--tokens", "inf"], "tokens"),
        (["--models", "[none.yaml]"], "none.yaml"),
        (["--models", "[configs]"], "configs"),
        (["--json", "configs/quickstart.yaml/all.json"], "json"),
        (["--write", "configs"], "write"),
        (["--plot", "x.foo"], ".svg"),
        (["--overlaps", "[30]"], "overlaps"),
        (["--rows", "0"], "rows"),
        (["--choose", "99", "--write", "x.yaml"], "choose"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "-c", THREE_SITES, *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1


def test_a_batch_smaller_than_the_sites_is_told() -> None:
    plans, refusals = planned(global_batch=3)
    assert plans == []
    assert "a step of 3 sequences cannot be shared equally by 4 sites: 4 at least; nearest that can: 4" in [
        r.reason for r in refusals
    ]


@pytest.mark.parametrize(("asked", "trained"), [(1024, 1026), (390, 390), (100, 102), (18, 18)])
def test_a_step_is_what_was_asked_or_a_little_more_and_told(asked: int, trained: int) -> None:
    """Three sites have equal shares: not 1152 sequences for 1024, which powers of two would be."""
    plans, _ = planned(sites=SITES[:3], global_batch=asked, tokens=1e6)
    for plan in plans:
        assert trained <= plan.global_batch <= 1.02 * trained
        assert plan.batches[0] * plan.accumulate * 3 == plan.global_batch
        steps = -(-1_000_000 // (plan.global_batch * 64))
        # Whole rounds, as many between two validations.
        assert steps <= plan.length.steps < steps * 1.05 + plan.choice.local_steps
        assert plan.tokens == plan.length.steps * plan.global_batch * 64
        assert f"{plan.global_batch:,} sequences" in fit_yaml(plan, request(), plan_command.read_settings(TINY))


def test_a_step_that_cannot_be_shared_is_refused_with_the_nearest_that_can() -> None:
    plans, refusals = planned(sites=SITES[:3], global_batch=19)
    assert plans == []
    assert "nearest that can: 18 or 21" in refusals[-1].reason


def test_few_tokens_are_no_whole_round() -> None:
    plans, _ = planned(tokens=1000, local_steps=[1000])
    assert {(plan.length.steps, plan.tokens) for plan in plans} == {(1, 1024)}
    assert {plan.length.validations for plan in plans} == {1}


@pytest.mark.parametrize(("asked", "k"), [(1, 32), (32, 32), (33, 32), (320, 32), (4769, 32), (3232, 32), (997, 1)])
def test_a_run_ends_with_a_validation_after_whole_rounds(asked: int, k: int) -> None:
    length = RunLength.of(asked, k, 10)
    assert length.every % k == 0 or length.steps < k
    assert length.steps == length.validations * length.every
    assert asked <= length.steps < asked + k + 0.05 * asked
    assert 1 <= length.validations <= 15
    assert length.validations > 5 or length.steps <= 10 * k


def test_copies_on_disks_of_the_sites_own_are_sent_in_each_save() -> None:
    settings: dict[str, Any] = {
        "methods": ["diloco"],
        "overlaps": [2],
        "wire_dtypes": ["float32"],
        "routings": ["ghost"],
    }
    shared, holders, three = (planned(checkpoint_copies=copies, **settings)[0][0] for copies in (None, 2, 3))
    assert holders.sent_in_all == shared.sent_in_all  # who holds an expert stores it
    config = read_model(TINY)
    experts = config.n_layers * config.n_experts * expert_parameters(config)
    more = 2 * 4 * experts / 4  # anchors and momentum, float32, one more copy, over four sites
    assert three.sent_per_save - shared.sent_per_save == pytest.approx(more)
    assert three.hours > shared.hours


def test_hours_and_bytes_include_validations() -> None:
    """By hand: ten validations more are ten times a validation's seconds and bytes."""
    few, many = (
        next(p for p in planned(validations=n, methods=["local_adamw"], overlaps=[1], wire_dtypes=["float32"],
                                tokens=20 * 4 * 1024)[0])
        for n in (10, 20)
    )  # fmt: skip
    assert (few.length.validations, many.length.validations) == (10, 20)
    assert 3600 * (many.hours - few.hours) == pytest.approx(10 * many.validation_seconds)
    assert many.sent_in_all - few.sent_in_all == pytest.approx(10 * many.sent_per_validation)
    wide, narrow = (
        planned(val_sequences=n, methods=["local_adamw"], overlaps=[1], evaluation_window=4)[0][0] for n in (1024, 512)
    )
    assert wide.validation_seconds == pytest.approx(2 * narrow.validation_seconds, rel=0.01)
    assert 0 == planned(methods=["ddp"])[0][0].sent_per_validation < wide.sent_per_validation


def test_ddp_sends_gradients_in_their_own_dtype() -> None:
    whole, half = (planned(methods=["ddp"], precision=precision)[0][0] for precision in ("bf16-mixed", "bf16-true"))
    assert whole.sent_per_round == 2 * half.sent_per_round
    assert (whole.choice.wire_dtype, half.choice.wire_dtype) == ("float32", "bfloat16")


def test_float32_is_timed_by_its_own_peak() -> None:
    quick = [dict(site, tflops_fp32=0.005) for site in SITES]
    slow = planned(sites=quick, methods=["ddp"])[0][0]
    assert slow.step_seconds == pytest.approx(10 * planned(methods=["ddp"])[0][0].step_seconds)
    mixed = planned(sites=quick, methods=["ddp"], precision="bf16-mixed")[0][0]
    assert mixed.step_seconds == pytest.approx(slow.step_seconds / 10)


def test_measured_constants_of_a_link_make_rounds_longer() -> None:
    settings: dict[str, Any] = {"methods": ["diloco"], "overlaps": [2], "wire_dtypes": ["float32"]}
    plain = planned(**settings)[0][0]
    beside = planned(round_overhead_seconds=2.0, **settings)[0][0]
    assert beside.round_seconds == pytest.approx(plain.round_seconds + 2)
    assert planned(copy_seconds_per_byte=1e-6, **settings)[0][0].round_seconds > plain.round_seconds + 1
    assert planned(transport_seconds_per_byte=1e-5, **settings)[0][0].round_seconds > 10 * plain.round_seconds
    assert planned(bucket_mib=1, **settings)[0][0].round_seconds > plain.round_seconds  # more messages wait


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    other = tmp_path / "tiny.yaml"
    other.write_text(Path(TINY).read_text().replace("n_layers: 4", "n_layers: 8"))
    assert plan_command.names_of([TINY, str(other), "a/b.yaml"]) == {
        TINY: TINY, str(other): str(other), "b": "a/b.yaml"
    }  # fmt: skip
    plans, _ = plan_command.plan_all(request(models=[TINY, str(other)], methods=["ddp"]))
    assert {plan.choice.model for plan in plans} == {TINY, str(other)}
    assert len({plan.sent_per_round for plan in plans}) == 2


def test_an_optimizer_whose_state_is_not_counted_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "sgd.yaml"
    section = yaml.safe_load(Path(TINY).read_text())["model"]
    model.write_text(yaml.safe_dump({"model": section | {"optimizer": {"kind": "sgd"}}}))
    with pytest.raises(ConfigError, match="AdamW"):
        read_model(str(model))


def test_replacing_a_field_keeps_a_request_checked() -> None:
    with pytest.raises(ConfigError):
        replace(request(), global_batch=0)


def test_three_data_centres_are_three_sites_of_eight() -> None:
    asked = request(sites=[dict(site, devices=8) for site in SITES[:3]], layouts=["replicated", "sharded"],
                    global_batch=1024, methods=["diloco"], accelerator="gpu")  # fmt: skip
    plans = Planner("tiny", read_model(TINY), asked).results[0]
    assert {(p.choice.layout, p.choice.routing) for p in plans if p.choice.overlap == 1} == {
        (layout, routing) for layout in ("replicated", "sharded") for routing in ("ghost", "shadow")
    }
    for plan in plans:
        assert (plan.choice.sites, plan.ranks, plan.why_not_today) == (3, (8, 8, 8), None)
        assert processes(plan, asked) == (8, 3)
        assert "3 sites of 8 (" in setting_text(plan)
        written = fit_settings(plan, asked, plan_command.read_settings(TINY))
        settings = written["trainer"]["strategy"]["init_args"]
        inside = {"replicated": "replicate", "sharded": "shard"}[plan.choice.layout]
        assert (settings["ranks_per_site"], settings["inside"]) == (8, inside)
        assert 3 * written["data"]["batch_size"] * plan.accumulate == plan.global_batch == 1032
    by = {p.choice.layout: p for p in plans if (p.choice.overlap, p.choice.routing) == (1, "ghost")}
    assert by["sharded"].memory[0].weights < by["replicated"].memory[0].weights / 7
    assert by["sharded"].inside_seconds > by["replicated"].inside_seconds > 0
    slow = [replace(site, inside_gbps=1.0) for site in asked.sites]
    again = Planner("tiny", read_model(TINY), replace(asked, sites=slow, layouts=["replicated"])).results[0][0]
    first = by["replicated"]
    assert again.inside_seconds == pytest.approx(32 * first.inside_seconds, rel=0.1)
    assert again.step_seconds - again.inside_seconds == pytest.approx(first.step_seconds - first.inside_seconds)


def test_faster_sites_read_more() -> None:
    """Four times as fast and twice as many: eight times the sequences, and the step takes less than with equal ones."""
    sites = [dict(SITES[0], devices=2, tflops_fp32=0.2), SITES[1]]
    settings: dict[str, Any] = {"sites": sites, "layouts": ["replicated"], "overlaps": [2], "global_batch": 90,
                                "methods": ["diloco"], "wire_dtypes": ["float32"]}  # fmt: skip
    (even,), (unlike,), (best,) = (
        planned(shares=shares, **settings)[0] for shares in (["even"], ["speed"], ["even", "speed"])
    )
    assert (even.site_batches, unlike.site_batches) == ((46, 46), (80, 10))
    assert (even.global_batch, unlike.global_batch) == (92, 90)
    assert best == unlike
    assert unlike.step_seconds < 0.25 * even.step_seconds
    assert "batch 40/10×1 of 90" in setting_text(unlike)
    written = fit_settings(unlike, request(**settings), plan_command.read_settings(TINY))
    assert (written["data"]["batch_size"], written["data"]["val_batch_size"]) == ([80, 10], 10)
    settings = written["trainer"]["strategy"]["init_args"]
    assert (settings["ranks_per_site"], settings["weighting"]) == ([2, 1], "tokens")
    assert FederationConfig(**settings | {"ranks_per_site": (2, 1), "outer": None}).inside == "replicate"


def test_steps_are_rounded_where_that_is_allowed() -> None:
    settings: dict[str, Any] = {"sites": SITES[:1], "methods": ["ddp"], "global_batch": 43}
    whole = planned(**settings)[0][0]
    assert (whole.batches, whole.accumulate) == ((43,), 1)
    room = (max(whole.held_bytes) - 4 * MIB) / 0.92 / GIB
    settings["sites"] = [dict(SITES[0], memory_gib=room)]
    exact, rounded = planned(**settings)[0][0], planned(rounding=0.03, **settings)[0][0]
    assert (exact.batches, exact.accumulate) == ((1,), 43)
    assert rounded.batches[0] > 10
    assert abs(rounded.global_batch - 43) <= 1


def test_capacities_by_memory_are_planned_beside_equal_ones() -> None:
    """A site with little memory holds fewer experts; what it lacks for overlap 2 is told."""
    roomy = planned(methods=["local_adamw"], overlaps=[1], sites=SITES[:2], capacities=["memory"])[0]
    assert {p.choice.capacities for p in roomy} == {None}  # sites are alike
    settings: dict[str, Any] = {"methods": ["local_adamw"], "overlaps": [1], "bucket_mib": 1, "routings": ["ghost"],
                                "wire_dtypes": ["float32"]}  # fmt: skip
    plans, refusals = planned(sites=[SITES[0], dict(SITES[1], memory_gib=0.0779)], **settings)
    assert [p.choice.capacities for p in plans] == [(6, 2)]  # four experts of eight do not fit
    assert plans[0].held_experts == (6, 2)
    assert all(own.peak <= 0.92 * site * GIB for own, site in zip(plans[0].memory, (4, 0.0779), strict=True))
    assert "experts 6/2" in setting_text(plans[0])
    assert refusals == []
    _, refusals = planned(sites=[SITES[0], dict(SITES[1], memory_gib=0.07)], **settings)
    assert "with capacities by memory b would have no room for one expert" in refusals[0].reason


def test_the_window_of_validations_is_that_of_fit() -> None:
    default = inspect.signature(FoMoEModule).parameters["evaluation_window"].default
    assert request().evaluation_window == default == Load().evaluation_window


def test_checkpoints_beyond_the_link_take_time() -> None:
    settings: dict[str, Any] = {"methods": ["diloco"], "overlaps": [2], "wire_dtypes": ["float32"]}
    near, far = (planned(checkpoint_over_link=over, **settings)[0][0] for over in (False, True))
    own = far.checkpoint["site"] + (far.checkpoint["model"] + far.checkpoint["momentum"]) / 4
    assert (near.sent_per_save, near.save_seconds, far.sent_per_save) == (0, 0, own)
    assert far.save_seconds == pytest.approx(own * 8 / 500e6, rel=0.05)
    assert 3600 * (far.hours - near.hours) == pytest.approx(far.length.validations * far.save_seconds)
    assert far.sent_in_all - near.sent_in_all == pytest.approx(far.length.validations * own)
    alike = planned(checkpoint_over_link=True, methods=["ddp"])[0][0]
    assert alike.sent_per_save == alike.checkpoint["total"]  # one site writes
    with pytest.raises(ConfigError, match="disks of their own"):
        request(checkpoint_over_link=True, checkpoint_copies=2)
