"""`tools/study/quality.py`: small runs on the CPU that go on where they were, and the arithmetic of the table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.sizes import parameter_counts
from tests.tools import load

ROOT = Path(__file__).parents[2]
ARMS = ("full", "ghost_1", "partitioned_1", "shadow4_1", "synchronous", "shadow4_1+lean", "full+diloco0.4")


def run(root: str, results: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/study/quality.py"), "run", "--root", root, "--results", str(results)]
    command += ["--study", "tiny", "--accelerator", "cpu", "--seeds", "[0]", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_go_on_where_they_were(root: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    first = run(root, results, "--only", "[full, ghost_1]", "--lanes", "2")
    assert first.returncode == 0, first.stderr
    lines = results.read_text().splitlines()
    assert len(lines) == 2
    second = run(root, results, "--lanes", "1")
    assert second.returncode == 0, second.stderr
    assert results.read_text().splitlines()[:2] == lines
    quality, runs = load("quality"), load("quality_runs")
    available = [arm for arm in ARMS if runs.is_available(arm)]
    assert f"7 runs, 2 are done, {len(available) - 2} to train" in second.stdout
    assert ("not available in this version: shadow4_1" in second.stdout) == ("shadow4_1" not in available)
    rows = quality.Results(results).of("tiny")
    assert sorted(item.arm for item in rows) == sorted(available)
    assert all(quality.bits_per_byte(row) > 1 for row in rows.values())
    sent = {item.arm: sum(row["sent_bytes"].values()) for item, row in rows.items()}
    assert sent["full"] > sent["ghost_1"] > sent["synchronous"] == 0
    skips = {item.arm: "own_view_gap_nats" in row["quality"] for item, row in rows.items()}
    assert (skips["full"], skips["ghost_1"]) == (False, True)
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nText.\n\n## Results\nold\n\n## After\nmore\n")
    for _ in range(2):
        assert quality.table(results, page) == 0
        text = page.read_text()
        assert text.startswith("# Page\n\nText.\n\n## Results\n**tiny**: ")
        assert text.endswith("\n\n## After\nmore\n")
        assert "old" not in text
    # All that is there is done; results of other settings are refused.
    done = run(root, results)
    assert "0 to train" in done.stdout
    rows_of_others = [json.loads(line) for line in lines]
    rows_of_others[0]["identity"]["steps"] = 9
    results.write_text("".join(json.dumps(row) + "\n" for row in rows_of_others))
    refused = run(root, results)
    assert refused.returncode == 1
    assert "with other settings (steps)" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where a run on a GPU fails")
@pytest.mark.slow
def test_a_run_that_fails_is_named_and_has_no_result(root: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    failed = run(root, results, "--only", "[full]", "--accelerator", "gpu")
    assert failed.returncode == 1
    assert "FAILED: full, iid, K = 4, seed 0: site " in failed.stderr
    assert "1 failed, 1 left" in failed.stdout
    assert not results.exists()


def test_without_time_nothing_is_started(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    assert load("quality").run(root, results, "tiny", seconds=0, accelerator="cpu") == 0
    assert "0 runs trained" in capsys.readouterr().out
    assert not results.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"lanes": 0}, "lanes = 0"), ({"only": ["ghost_3"]}, "only"), ({"seeds": [7]}, "Choose among"),
     ({"splits": ["domain"]}, "splits")],
)  # fmt: skip
def test_settings_that_no_run_has_are_refused(root: str, tmp_path: Path, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load("quality").run(root, tmp_path / "results.jsonl", "tiny", accelerator="cpu", **setting)


def row(arm: str, seed: int, bits: tuple[float, float], loss: float) -> dict[str, Any]:
    quality = {"bits_per_byte/a": bits[0], "bits_per_byte/b": bits[1], "loss": loss, "routing_necessity_nats": 1.0}
    return {"study": "paper", "run": ["iid", 32, arm, seed], "domains": ["a", "b"], "quality": quality,
            "sent_bytes": {"dense": 2**20, "expert": 2**21}, "device": "cpu", "torch": "x",
            "identity": {"corpus": "0123456789abcdef"}}  # fmt: skip


def test_the_table_compares_seed_by_seed(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    rows = [row("full", 0, (1.5, 2.5), 1.0), row("full", 1, (2.0, 2.4), 1.0), row("partitioned_2", 0, (2.0, 2.4), 1.1),
            row("partitioned_2", 1, (2.0, 2.4), 1.0), row("partitioned_2", 2, (9.0, 9.0), 1.0)]  # fmt: skip
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = load("quality").tables(load("quality").Results(results))
    assert "| full | 2.1000 | 0.1414 | 2 |  |  |  |  | 1.00 |  | 3 |" in text
    # 2.2 against 2.0 and 2.2 against 2.2; e^0.1 against 1 and 1; the paper has 112.00 against 103.91.
    assert "| partitioned_2 | 4.4667 | 3.9260 | 3 | +5.0% |  | +5.3% | +7.8% | 1.00 |  | 3 |" in text
    assert "Not run: partitioned_1, ghost_2, ghost_1, shadow4_2, shadow4_1." in text


def test_the_frontier_has_the_most_bytes_first(tmp_path: Path) -> None:
    quality, study = load("quality"), load("quality_runs").STUDIES["paper"]
    total = parameter_counts(study.model(300)).total
    found = []
    for arm, k, bits, n_bytes in (("full+lean", 32, 2.2, 2**20), ("full", 64, 2.1, 2**30), ("synchronous", 32, 2.0, 0)):
        one = row(arm, 0, (bits, bits), 1.0) | {"sent_bytes": {"dense": n_bytes}, "resident_parameters": total}
        found.append(one | {"run": ["iid", k, arm, 0]})
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(one) + "\n" for one in found))
    lines = quality.frontier(study, quality.Results(results).of("paper"))[4:-1]
    assert [line.split(" | ")[0] for line in lines] == ["| synchronous", "| full", "| full+lean"]
    gradients = study.steps * 4 * total * 2 * 3 / 4
    assert f"| +5.0% | +0.0% | 1.0 | {gradients / 2**30:,.0f} |" in lines[1]
    assert f"| {gradients / 2**30:,.1f} |  |" in lines[0]
    assert quality.frontier(study, {}) == []


def test_studies_hold_what_the_page_says() -> None:
    runs = load("quality_runs")
    sizes = {name: study.model(8192) for name, study in runs.STUDIES.items()}
    counts = {name: parameter_counts(model).total for name, model in sizes.items()}
    assert 16e6 < counts["16m"] < 17e6
    assert counts["80m"] > 4 * counts["16m"]
    study = runs.STUDIES["16m"]
    assert study.tokens == 37_748_736
    every = list(study.runs())
    assert len(every) == len(set(every)) == 3 * (2 * 9 + 1)
    for item in every:
        if item.arm != "synchronous":
            settings = runs.strategy_settings(item.arm, study.sites, item.local_steps)
            assert settings["inner_moments"] == "average"
            assert settings["local_steps"] == 32
    shadow = runs.strategy_settings("shadow2_1", 4, 32)
    assert (shadow["routing"], shadow["shadow_bits"], shadow["overlap"]) == ("shadow", 2, 1)
