"""The planner: what fits and why not, and files that `fomoe fit` runs."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomoe_pl import cli
from fomoe_pl.costs import plan_command
from fomoe_pl.costs.memory import GIB
from fomoe_pl.costs.plan import Plan, Planner, divisions
from fomoe_pl.costs.plan_output import fit_settings, fit_yaml, pareto, processes, spans
from fomoe_pl.costs.quality import MEASUREMENTS, Measurement, penalty
from fomoe_pl.costs.request import PlanRequest
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError

ROOT = Path(__file__).parents[2]
THREE_SITES = str(ROOT / "configs/plan/three_sites.yaml")
TINY = str(ROOT / "configs/model/tiny.yaml")
SITES = [
    {"name": name, "tflops": 0.05, "memory_gib": 4, "memory_gbps": 10, "bandwidth_mbit": 500, "price_per_hour": 2}
    for name in "abcd"
]
REQUEST: dict[str, Any] = {
    "models": [TINY], "sites": SITES, "tokens": 32_768, "global_batch": 16, "sequence_length": 64, "local_steps": [4],
    "accelerator": "cpu", "precision": "32-true", "data_root": "runs/data/none",
}  # fmt: skip


def request(**changes: Any) -> PlanRequest:
    settings = REQUEST | changes
    return PlanRequest(**settings | {"sites": [Site(**site) for site in settings["sites"]]})


def planned(**changes: Any) -> tuple[list[Plan], list[Any]]:
    asked = request(**changes)
    return Planner("tiny", plan_command.read_model(TINY), asked).results


def test_plans_are_ranked_and_full() -> None:
    plans, refusals = planned(routings=["ghost", "partitioned"], local_steps=[4, 8])
    assert [p.hours for p in plans] == sorted(p.hours for p in plans)
    assert {p.choice.overlap for p in plans} == {1, 2, 3, 4}
    assert {p.choice.method for p in plans} == {"local_adamw", "diloco", "ddp"}
    assert {p.choice.layout for p in plans} == {"one"}  # all layouts are the same with one device a site
    assert refusals == []
    for plan in plans:
        assert plan.price == pytest.approx(4 * 2 * plan.hours)
        assert (plan.steps, plan.tokens, plan.global_batch) == (32, 32_768, 16)
        assert plan.batch_size * plan.accumulate * 4 == 16


def test_less_overlap_is_smaller_and_faster_and_larger_k_is_faster() -> None:
    plans, _ = planned(methods=["local_adamw"], wire_dtypes=["float32"], local_steps=[4, 8])
    by = {(p.choice.overlap, p.choice.local_steps): p for p in plans}
    for k in (4, 8):
        held = [max(by[o, k].held_bytes) for o in (1, 2, 3, 4)]
        assert held == sorted(set(held))
        assert by[1, k].sent_per_round < by[2, k].sent_per_round < by[4, k].sent_per_round
    assert all(by[o, 8].hours < by[o, 4].hours for o in (1, 2, 3, 4))


def test_what_overflows_is_told_by_site_and_part() -> None:
    small = [dict(SITES[0], name="cramped", memory_gib=0.05), *SITES[1:]]
    plans, refusals = planned(sites=small, methods=["local_adamw"])
    assert {p.choice.overlap for p in plans} | {o for r in refusals for o in r.overlaps} == {1, 2, 3, 4}
    assert refusals
    for refusal in refusals:
        assert "cramped" in refusal.reason
        assert "b:" not in refusal.reason
        assert "largest part" in refusal.reason
    assert all(max(p.held_bytes) <= 0.92 * 0.05 * GIB for p in plans)


def test_overlaps_that_do_not_divide_are_told() -> None:
    plans, refusals = planned(sites=SITES[:3], global_batch=18)
    assert {p.choice.overlap for p in plans} == {3}
    assert [(r.overlaps, "divisible by 3" in r.reason) for r in refusals] == [((1, 2), True)]


def test_every_device_a_site_of_its_own() -> None:
    sites = [dict(SITES[0], devices=4), dict(SITES[1], devices=2)]
    plans, _ = planned(sites=sites, layouts=["each", "sharded"], overlaps=[2, 3], global_batch=18)
    each = next(p for p in plans if p.choice.layout == "each")
    assert each.choice.sites == 6
    assert processes(each, request(sites=sites, accelerator="gpu")) == (2, 3)
    assert each.why_not_today is None
    sharded = [p for p in plans if p.choice.layout == "sharded"]
    assert all("ranks_per_site" in (p.why_not_today or "") for p in sharded)
    assert all(p.held_bytes[0] < p.held_bytes[1] for p in sharded)  # spread over more devices


def test_the_front_has_no_plan_that_another_beats() -> None:
    plans, _ = planned(local_steps=[4, 8])
    front = pareto(plans)
    assert 1 <= len(front) < len(plans)
    for plan in front:
        assert not any(other.hours < plan.hours and max(other.held_bytes) <= max(plan.held_bytes) for other in plans)


def test_quality_is_a_measurement_or_unknown() -> None:
    known = penalty(method="local_adamw", routing="partitioned", sites=4, overlap=2, local_steps=32)
    assert isinstance(known, Measurement)
    assert known.penalty == pytest.approx(112.00 / 103.91 - 1)
    assert "2606.19025" in known.source
    settings: dict[str, Any] = {"method": "local_adamw", "sites": 4, "overlap": 2, "local_steps": 32}
    assert penalty(routing="ghost", **settings) is None
    assert penalty(routing="partitioned", wire_dtype="bfloat16", **settings) is None
    assert penalty(routing="ghost", **settings | {"overlap": 4}) == 0.0
    assert len({(m.method, m.routing, m.sites, m.overlap, m.local_steps) for m in MEASUREMENTS}) == len(MEASUREMENTS)


def test_our_own_measurements_are_those_of_the_page() -> None:
    page = next(m.source for m in MEASUREMENTS if m.source.startswith("docs/"))
    rows = dict(
        line.split("|")[1:4:2]
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith("| `") and " 8.017 " in line
    )
    ends = {name.strip(" `"): float(value) for name, value in rows.items()}
    for m in (m for m in MEASUREMENTS if m.source == page):
        assert m.value in ends.values()
        assert m.full in (ends["local_adamw"], ends["diloco"])


def test_three_sites_get_an_answer_in_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    start = time.perf_counter()
    plan_command.main(["-c", THREE_SITES, "--json", str(tmp_path / "all.json"), "--write", str(tmp_path / "fit.yaml")])
    assert time.perf_counter() - start < 10
    told = capsys.readouterr().out
    assert "fomoe-1.8b" in told
    assert "desk: " in told  # whose memory overflows
    everything = json.loads((tmp_path / "all.json").read_text())
    hours = {(p["model"], p["layout"], p["overlap"]): p["hours"] for p in everything["plans"]}
    assert ("fomoe-153m", "each", 5) in hours
    # 22.14 GiB of 24 are too near: the driver's context and fragments come on top. Without the 4090s it fits.
    assert not any(model == "fomoe-1.8b" and layout != "sharded" for model, layout, _ in hours)
    asked = request(models=["configs/model/fomoe-1.8b.yaml"], tokens=1e9, global_batch=1024, sequence_length=2048,
                    precision="bf16-mixed", layouts=["each"], overlaps=[1, 16], local_steps=[32],
                    sites=[{"name": a, "accelerator": a, "devices": 8} for a in ("h100", "a100-80")])  # fmt: skip
    assert {plan.choice.overlap for plan in plan_command.plan_all(asked)[1]} == {1, 16}
    written = yaml.safe_load((tmp_path / "fit.yaml").read_text())
    assert written["trainer"]["devices"] * written["trainer"]["num_nodes"] == 20


def test_the_written_file_trains(tmp_path: Path, root: str) -> None:
    """`fomoe fit` runs what `fomoe plan` has written, on real processes, with the bytes that were planned."""
    settings = REQUEST | {
        "data_root": root,
        "overlaps": [1],
        "sites": SITES[:2],
        "wire_dtypes": ["float32"],
        "tokens": 8 * 16 * 64,
    }
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(settings))
    written = tmp_path / "fit.yaml"
    plan_command.main(
        ["-c", str(tmp_path / "request.yaml"), "--write", str(written), "--json", str(tmp_path / "all.json")]
    )
    done = subprocess.run(
        [sys.executable, "-m", "fomoe_pl", "fit", "-c", str(written)], cwd=tmp_path, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next((tmp_path / "runs").rglob("report.json")).read_text())
    planned_ = json.loads((tmp_path / "all.json").read_text())["plans"][0]
    assert report["steps"] == planned_["steps"] == 8
    wire = report["bytes"]["wire"]
    assert wire["dense"] + wire["expert"] + wire.get("moments", 0) == pytest.approx(2 * planned_["sent_per_round"])


def test_what_fit_cannot_run_is_not_written(tmp_path: Path) -> None:
    plans, _ = planned(sites=[dict(site, devices=2) for site in SITES], layouts=["sharded"])
    with pytest.raises(ConfigError, match="ranks_per_site"):
        plan_command.chosen(plans[:3], 1)
    with pytest.raises(ConfigError, match="can be run"):
        plan_command.chosen(plans[:3], None)
    with pytest.raises(ConfigError, match="no row"):
        plan_command.chosen(plans[:3], 4)


def test_settings_name_what_was_planned() -> None:
    plans, _ = planned(methods=["ddp"])
    assert fit_settings(plans[0], request(), plan_command.read_model(TINY))["trainer"]["strategy"] == "ddp_counted"
    plans, _ = planned(methods=["diloco"], overlaps=[2], wire_dtypes=["bfloat16"])
    strategy = fit_settings(plans[0], request(), plan_command.read_model(TINY))["trainer"]["strategy"]["init_args"]
    assert (strategy["overlap"], strategy["wire_dtype"], strategy["outer"]["rule"]) == (2, "bfloat16", "nesterov")


def test_numbers_are_drawn_together() -> None:
    assert spans([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"models": []}, "models"),
        ({"sites": []}, "sites"),
        ({"tokens": 0}, "tokens"),
        ({"headroom": 1.0}, "headroom"),
        ({"local_steps": [0]}, "local_steps"),
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
        (["--models", "[none.yaml]"], "none.yaml"),
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
        assert plan.batch_size * plan.accumulate * 3 == plan.global_batch
        assert plan.steps == -(-1_000_000 // (plan.global_batch * 64))
        assert plan.tokens == plan.steps * plan.global_batch * 64
        assert f"{plan.global_batch:,} sequences" in fit_yaml(plan, request(), plan_command.read_model(TINY))


def test_a_step_that_cannot_be_shared_is_refused_with_the_nearest_that_can() -> None:
    plans, refusals = planned(sites=SITES[:3], global_batch=19)
    assert plans == []
    assert "nearest that can: 18 or 21" in refusals[-1].reason


def test_few_tokens_are_no_whole_round() -> None:
    plans, _ = planned(tokens=1000, local_steps=[1000])
    assert {(plan.steps, plan.tokens) for plan in plans} == {(1, 1024)}


def test_divisions_go_down_to_single_sequences() -> None:
    assert divisions(342)[:3] == [(342, 1), (171, 2), (114, 3)]
    assert divisions(342)[-1] == (1, 342)
    assert divisions(52) == [(52, 1), (26, 2), (13, 4), (4, 13), (2, 26), (1, 52)]


def test_replacing_a_field_keeps_a_request_checked() -> None:
    with pytest.raises(ConfigError):
        replace(request(), global_batch=0)
