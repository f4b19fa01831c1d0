"""tools/system_model/cost_report.py, tools/benchmarks/check_costs.py and tools/network/shaped_links.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fomoe_pl.costs.network import Links
from fomoe_pl.costs.rounds import Collective
from fomoe_pl.model.sizes import parameter_counts
from tests.tools import load as tool

ROOT = Path(__file__).parents[2]
shapes = tool("scale").shapes


# -- the report -----------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_report_writes_quickly_and_always_the_same(tmp_path: Path) -> None:
    report, page = tool("cost_report"), tmp_path / "page.md"
    page.write_text((ROOT / "docs/system-model.md").read_text())
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        report.main(["--output", str(folder), "--page", str(page)])
    assert page.read_text() == (ROOT / "docs/system-model.md").read_text()
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in (ROOT / "docs/system-model").iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert (folders[0] / "scale.md").read_text() == (ROOT / "docs/system-model/scale.md").read_text()


def test_a_page_without_marks_is_refused() -> None:
    report = tool("cost_report")
    with pytest.raises(ValueError, match="table-1"):
        report.insert("# no marks", "table-1", "| a |")
    assert report.insert("<!-- table x -->\nold\n<!-- end -->", "x", "new") == "<!-- table x -->\nnew\n<!-- end -->"


def test_public_shapes_have_their_sizes() -> None:
    """DeepSeek-V3 has 671e9 parameters (its first three layers are dense: 37e9 less), Qwen3-235B 235e9."""
    found = {name: parameter_counts(config).total / 1e9 for name, config in shapes().items()}
    assert found["Qwen3-235B-like"] == pytest.approx(235, rel=0.01)
    assert found["DeepSeek-V3-like"] == pytest.approx(671 + 37, rel=0.01)


def test_the_study_compares_as_it_should() -> None:
    report = tool("cost_report")
    rows = [r for r in report.all_rows() if r.sites == 8 and r.bandwidth_mbit == 1000.0]
    for name in shapes():
        own = {(r.method, r.overlap): r for r in rows if r.model == name}
        assert own["ddp", 8].hours > own["local_adamw", 8].hours > own["diloco", 8].hours
        assert own["local_adamw", 8].sent_gib == pytest.approx(3 * own["diloco", 8].sent_gib)
        for value in ("sent_gib", "states_gib", "hours"):
            by_overlap = [getattr(own["fomoe", o], value) for o in (1, 2, 4)] + [getattr(own["local_adamw", 8], value)]
            assert by_overlap == sorted(by_overlap)


# -- the check on a GPU ---------------------------------------------------------------------------------------------

CASE = '{"model": "tiny", "batch_size": 2, "sequence_length": 32, "evaluation_window": 2, "precision": "32-true"%s}'


def test_steps_are_timed_and_the_first_case_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = tool("check_costs")
    output = tmp_path / "step.json"
    other = CASE % ', "architecture": {"n_layers": 1}'
    check.main(["step", "--case", CASE % "", CASE % ', "overlap": 1', other, "--output", str(output)])
    first, second, third = json.loads(output.read_text())
    assert first["predicted"] == pytest.approx(first["median"])
    assert second["resident"] == 4
    assert second["factor"] == first["factor"]
    assert second["predicted"] < first["predicted"]
    assert [r["calibrates"] for r in (first, second, third)] == [True, False, True]
    assert "MFU" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_sites_is_measured_for_one_case_after_another_and_failures_are_rows(tmp_path: Path) -> None:
    """A case that fails leaves those before and after it alone; another number of sites has processes of its own."""
    output = tmp_path / "memory.json"
    cases = [CASE % more for more in (', "overlap": 1', ', "overlap": 3', ', "outer": "nesterov", "sites": 1')]
    tool_ = str(ROOT / "tools/benchmarks/check_costs.py")
    command = [sys.executable, tool_, "memory", "--output", str(output), "--case", *cases]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    two, refused, one = json.loads(output.read_text())
    assert [case["case"]["outer"] for case in (two, one)] == ["average", "nesterov"]
    assert [len(case["sites"]) for case in (two, one)] == [2, 1]
    assert all(site["predicted"]["steps"] > 0 for case in (two, one) for site in case["sites"])
    assert two["sites"][0]["parts"]["outer_momentum"] == 0 < one["sites"][0]["parts"]["outer_momentum"]
    assert "a site failed" in refused["problem"]
    assert "n_resident = 12" in done.stderr
    assert "validated" in done.stdout


@pytest.mark.slow
def test_a_case_that_takes_too_long_is_told_and_its_process_ended(tmp_path: Path) -> None:
    """Sites that say how far they are and then hang; every case has its own limit."""
    sites, script = tool("memory_sites"), tmp_path / "hangs.py"
    script.write_text("import time\nprint('NEXT', flush=True)\nprint('  1 rounds', flush=True)\ntime.sleep(60)\n")
    case = sites.Case(model="tiny", sites=1)
    first, second = sites.measured([case, case], script, limit=0.5)
    assert first["problem"] == second["problem"] == "no result in 0.5 s; last: 1 rounds"


# -- shaped links ---------------------------------------------------------------------------------------------------


def test_namespaces_are_joined_and_limited_in_both_directions() -> None:
    namespaces = tool("namespaces")
    made = [" ".join(words) for words in namespaces.build_commands(3, 9000)]
    own = f"fomoe{os.getpid()}-"
    assert [line for line in made if line.startswith("ip netns add")] == [
        f"ip netns add {own}{name}" for name in ("hub", "0", "1", "2")
    ]
    # Nothing is made outside of the namespaces.
    assert all(re.match(rf"ip (netns add|-n) {own}", line) for line in made)
    assert sum("mtu 9000" in line for line in made) == 6
    limits = [" ".join(words) for words in namespaces.limit_commands(3, 200.0)]
    assert len(limits) == 6
    assert all("tbf rate 200.0mbit burst 50000" in line for line in limits)
    assert sum("dev eth0" in line for line in limits) == 3


def test_a_run_without_limit_explains_itself() -> None:
    """What is calibrated predicts the round that it was calibrated with."""
    shaped = tool("shaped_links")
    calls = [Collective("dense", (0, 1), 8_000_000), Collective("expert", (0, 1), 2_000_000)]
    links = Links.between([shaped.link_of(shaped.NOT_A_LIMIT)] * 2, mtu=9000)
    measured = {"seconds": 0.5, "outside_collectives": 0.1}
    found = shaped.calibrated(measured, calls, links, 0.0)
    assert found.round_seconds(calls) == pytest.approx(0.5)
    assert found.copy_seconds_per_byte == pytest.approx(0.1 / 10_000_000)
    found = shaped.calibrated(measured, calls, links, 2_000_000.0)  # of copies
    assert found.copy_seconds_per_byte == pytest.approx(0.1 / 12_000_000)


def test_a_limit_and_its_calibration_take_turns() -> None:
    shaped, done = tool("shaped_links"), []

    def run(n: int) -> list[list[dict[str, float]]]:
        done.append(n)
        return [[{"seconds": float(len(done))}] * n for _ in range(2)]

    free, limited = shaped.in_turns(run, 5, lambda on: done.append("limit" if on else "free"))
    assert done == ["free", 1, 2, "limit", 1, 2] * 3
    assert [[len(site) for site in readings] for readings in (free, limited)] == [[6, 6], [6, 6]]
    assert [reading["seconds"] for reading in free[1]] == [3.0, 3.0, 9.0, 9.0, 15.0, 15.0]


def test_readings_are_summed_over_sites_and_medians_over_rounds() -> None:
    shaped = tool("shaped_links")
    calls = [Collective("dense", (0, 1), 1_000)]
    reading = {"outside_collectives": 0.0, "ledger": 1000.0, "tx_packets": 3.0}
    readings = [
        [{**reading, "seconds": s, "tx_bytes": b} for s, b in ((1.0, 1100.0), (3.0, 1300.0), (2.0, 1200.0))],
        [{**reading, "seconds": s, "tx_bytes": b} for s, b in ((4.0, 1100.0), (2.0, 1300.0), (2.5, 1200.0))],
    ]
    links = Links.between([shaped.link_of(8.0)] * 2)
    found: dict[str, Any] = shaped.summarize(readings, calls, links, 0.0)
    assert (found["seconds"], found["fastest"], found["slowest"]) == (3.0, 2.5, 4.0)
    assert (found["sent_bytes"], found["ledger_bytes"], found["predicted_bytes"]) == (2400.0, 2000.0, 2000)
    assert found["framed_bytes"] == pytest.approx((2000 / 1448) * (1514 + 33))


def test_without_root_or_limits_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shaped = tool("shaped_links")
    monkeypatch.setattr(shaped.os, "geteuid", lambda: 1000)
    for words, told in (
        (["--rates", "50"], "needs root"),
        (["--rates", "0"], "above 0"),
        (["--latencies", "-1"], "above 0"),
    ):
        with pytest.raises(SystemExit):
            shaped.main(words)
        assert told in capsys.readouterr().err


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"fomoe{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip and tc")
def test_a_real_link_carries_what_was_predicted_as_slowly_as_predicted(tmp_path: Path) -> None:
    output = tmp_path / "links.json"
    command = [sys.executable, str(ROOT / "tools/network/shaped_links.py"), "--rates", "40", "--sites", "2",
               "--overlap", "1", "--moments", "keep", "--rounds", "2", "--latencies", "50",
               "--output", str(output)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    shaped, waiting = json.loads(output.read_text())
    assert shaped["ledger_bytes"] == shaped["predicted_bytes"] > 1e6
    assert shaped["framed_bytes"] == pytest.approx(shaped["sent_bytes"], rel=0.02)
    # The limit is felt; how exactly is measured on an idle machine.
    assert shaped["seconds"] > max(shaped["free"]["seconds"], 0.8 * shaped["predicted_seconds"])
    # Four latencies follow each other in an average of two sites, whatever the machine does besides.
    assert 4 <= waiting["latencies"] < 5.5
    assert waiting["predicted_latencies"] == 4
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    pids = re.findall(r"^fomoe(\d+)-", left, flags=re.MULTILINE)
    assert [pid for pid in pids if not Path("/proc", pid).exists()] == []


def test_a_killed_runs_namespaces_are_removed_and_a_living_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces, removed = tool("namespaces"), []
    living, dead = f"fomoe{os.getppid()}-hub", "fomoe999999999-0"
    listed = f"{living} (id: 1)\n{dead}\n{namespaces.HUB}\nfomoe-mine\nother\n"

    def call(*words: str) -> str:
        removed.extend(words[3:])
        return listed

    monkeypatch.setattr(namespaces, "call", call)
    namespaces.remove()
    assert removed == [dead, namespaces.HUB]
