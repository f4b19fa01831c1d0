"""The commands under tools/ that have no tests of their own elsewhere, at tiny sizes."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median

import pytest
import torch

from fomoe_pl.federation.settings import FORMATS
from tests.tools import load

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_bench_step_trains_both_loops_alike(tmp_path: Path) -> None:
    architecture = ["vocab_size=65", "d_model=32", "n_layers=2", "n_heads=2", "n_experts=4", "top_k=2", "d_expert=16"]
    command = [sys.executable, str(ROOT / "tools/benchmarks/bench_step.py")]
    command += ["--output", str(tmp_path), "--accelerator", "cpu"]
    command += ["--batch_size", "2", "--sequence_length", "16", "--warmup", "2", "--steps", "3", "--blocks", "2"]
    command += [f"--model.architecture.{setting}" for setting in architecture]
    # A process of its own: it joins and leaves a process group, which a test process cannot do twice on one port.
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench_step.json").read_text())
    for variant in ("callbacks", "bare"):
        trainer_loss, plain_loss = results[variant]["last_losses"]
        assert trainer_loss == plain_loss
        assert len(results[variant]["trainer_tokens_per_second"]) == len(results[variant]["plain_tokens_per_second"])
        assert len(results[variant]["plain_tokens_per_second"]) == 2
    # The report is a callback's: only one of the two variants has them.
    assert [path.parent.name for path in tmp_path.rglob("report.json")] == ["callbacks"]
    page = (tmp_path / "bench_step.md").read_text()
    assert page in done.stdout
    for fact in ("commit", "device", "torch", "command", "blocks"):
        assert f"| {fact} | {results[fact]} |" in page


def test_median_of_pairs_and_peaks() -> None:
    blocks = load("bench_step").Blocks()
    blocks.add(tokens=100, seconds=2.0, peak_bytes=7)
    blocks.add(tokens=100, seconds=4.0, peak_bytes=5)
    assert (blocks.tokens_per_second, blocks.peak_bytes) == ([50.0, 25.0], 7)


def test_waits_are_counted_by_step_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_step")
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    alternate = bench.Alternate(None, warmup=1, steps=1, blocks=1, tokens=1)
    alternate._count_waits(0)
    for step in range(1, bench.LOG_EVERY + 2):
        for _ in range(2 if step == 3 else 0):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        alternate._count_waits(step)
    assert alternate.waits_of_steps == [2 if step == 2 else 0 for step in range(bench.LOG_EVERY)]
    assert [(place.split(":")[0], n) for place, n in alternate.waits.items()] == [("test_benchmarks.py", 2)]
    assert modes == ["warn", "default"]


def test_bench_codec_times_every_format(tmp_path: Path) -> None:
    bench, threads = load("bench_codec"), torch.get_num_threads()
    bench.bench(mib=1, rows=2, repeats=1, seconds=0, output=str(tmp_path))
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "bench_codec.json").read_text())["GB_per_second"]
    assert set(FORMATS) < set(found)
    for name, speed in found.items():
        assert 0 < speed["both"][0] < min(speed["encode"][0], speed["decode"][0]), name


@pytest.mark.parametrize("script", ["gpu_four_sites", "gpu_routing"])
def test_scripts_are_valid_shell_and_executable(script: str) -> None:
    path = ROOT / f"tools/benchmarks/{script}.sh"
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.slow
def test_bench_gpus_compares_runs_on_several_ranks(root: str, tmp_path: Path) -> None:
    architecture = ["vocab_size=257", "d_model=16", "n_layers=2", "n_heads=2", "n_experts=4", "top_k=2", "d_expert=8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tools/benchmarks/bench_gpus.py"), "--root", root, "--output", str(tmp_path)]
    command += ["--accelerator", "cpu", "--batch_size", "2", "--sequence_length", "16", "--local_steps", "4"]
    command += ["--rounds", "2", "--repeats", "2", "--num_workers", "0", "--gloo", "[local_adamw]"]
    command += ["--only", "[single,ddp,local_adamw,fomoe_2,fomoe_random_1]", "--save", "[fomoe_random_1]"]
    command += [f"--model.architecture.{setting}" for setting in architecture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench_gpus.json").read_text())
    rows = {row["variant"]: row for row in results["summary"]}
    assert set(rows) == {"single", "ddp", "local_adamw", "fomoe_2", "fomoe_random_1"}
    assert all(row["ledger_is_formula"] for row in rows.values())
    # Full replicas of FoMoE are LocalAdamW; the loss that all agree on is not that of other variants.
    assert rows["fomoe_2"]["val_loss"] == rows["local_adamw"]["val_loss"]
    assert len({row["val_loss"] for row in rows.values()}) == 4
    # All experts together in one process give what the sites computed.
    assert rows["fomoe_random_1"]["saved_val_loss"] == pytest.approx(rows["fomoe_random_1"]["val_loss"], rel=1e-5)
    assert not list(tmp_path.glob("*.ckpt"))
    # On a CPU both backends are gloo, and a run is repeated to the bit.
    assert {found["largest"] for found in results["loss_distances"].values()} == {0.0}
    assert len(results["scaling_efficiency"]["local_adamw"]["pairs"]) == 2


@pytest.mark.slow
def test_bench_round_measures_each_wire_and_place(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tools/benchmarks/bench_round.py"), "--model", "tiny", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--rounds", "2", "--wires", "gloo"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench_round.json").read_text())["rows"]
    assert [(row["wire"], row["outer_state"], row["overlap"]) for row in rows] == [
        ("gloo", state, overlap) for overlap in (1, 2) for state in ("device", "host")
    ]
    for row in rows:
        assert min(row["round_seconds"] + row["averages_seconds"]) > 0
        assert len(row["round_seconds"]) == 2
        if not torch.cuda.is_available():
            assert row["bus_bytes"] == [0, 0]
            assert row["ratio"] == median(row["round_seconds"]) / median(row["averages_seconds"])
    assert rows[0]["parameters"] < rows[2]["parameters"]
    assert (tmp_path / "bench_round.md").read_text().count("\n| gloo | ") == len(rows) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": False, "on_host": False, "by_host": False}, (0, 0)),
        ({"momentum": True, "on_host": False, "by_host": True}, (2 * 7, 2 * 7)),
        ({"momentum": False, "on_host": True, "by_host": False}, (4 * 10, 4 * 10)),
        ({"momentum": True, "on_host": True, "by_host": True}, (8 * 10 + 2 * 7, 8 * 10 + 2 * 7)),
    ],
)
def test_bytes_of_a_round_over_the_bus(options: dict[str, bool], expected: tuple[int, int]) -> None:
    assert load("bench_round").bus_bytes(10, 7, 2, **options) == expected


def test_a_ledger_that_differs_from_the_formula_is_seen() -> None:
    runs = load("gpu_runs")
    seen = {
        "local_seconds": [], "round_seconds": [], "losses": [], "val_loss": 0.0, "payload": {"dense": 3},
        "wire": {"dense": 4}, "peak_mib": 0.0, "resident": 1,
    }  # fmt: skip
    assert runs.Seen(**seen, expected={"dense": [3, 4]}).ledger_is_formula
    assert not runs.Seen(**seen, expected={"dense": [3, 5]}).ledger_is_formula


def test_losses_are_compared_rank_by_rank() -> None:
    a, b = ([{"losses": losses} for losses in ranks] for ranks in ([[1.0, 2.0], [3.0]], [[1.25, 2.0], [1.0, 9.0]]))
    assert load("bench_gpus").distance(a, b) == {"median": 0.25, "mean": 0.75, "largest": 2.0}


@pytest.mark.slow
def test_bench_watching_times_rounds_by_kind(root: str, tmp_path: Path) -> None:
    architecture = ["vocab_size=257", "d_model=16", "n_layers=2", "n_heads=2", "n_experts=4", "top_k=2", "d_expert=8"]
    command = [sys.executable, str(ROOT / "tools/benchmarks/bench_watching.py")]
    command += ["--output", str(tmp_path), "--accelerator", "cpu"]
    command += ["--data", root, "--batch_size", "2", "--sequence_length", "16", "--local_steps", "2"]
    command += ["--seconds", "0", *(f"--model.architecture.{setting}" for setting in architecture)]
    # A process of its own: it joins and leaves a process group.
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "bench_watching.md").read_text()
    assert text in done.stdout
    assert "2 alone, 1 watched, 1 looked" in text  # one cycle of four, after the warm-up
    shares = dict(re.findall(r"\| (watching it: more|a drawing|all together).*?([+-][\d.]+)%", text))
    total = float(shares["watching it: more"]) + float(shares["a drawing"])
    assert float(shares["all together"]) == pytest.approx(total, abs=0.02)
    assert float(shares["a drawing"]) > 0


@pytest.mark.slow
def test_bench_saving_measures_both_ways_and_resumes(root: str, tmp_path: Path) -> None:
    architecture = ["vocab_size=257", "d_model=16", "n_layers=2", "n_heads=2", "n_experts=4", "top_k=2", "d_expert=8"]
    command = [sys.executable, str(ROOT / "tools/benchmarks/bench_saving.py")]
    command += ["--data", root, "--output", str(tmp_path)]
    command += ["--accelerator", "cpu", "--sites", "2", "--overlap", "1", "--batch_size", "2", "--local_steps", "2"]
    command += ["--sequence_length", "16", "--pairs", "2", *(f"--model.architecture.{s}" for s in architecture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench_saving.json").read_text())
    assert {kind: len(found["stall"]) for kind, found in results["saving"].items()} == {"async": 2, "sync": 2}
    assert len(results["saving"]["async"]["seconds_of_writing"]) == 2
    # Float32 and headers; the outer momentum is as large.
    assert 4 < results["disk"]["weights"] / results["parameters"] < 8
    assert results["disk"]["outer momentum"] == pytest.approx(results["disk"]["weights"], rel=0.01)
    assert 0 < results["starting"]["of this, reading the checkpoint"] < max(results["starting"].values())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bench_saving.json", "bench_saving.md"]


def test_bench_prepare_has_the_same_text_for_both(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load("bench_prepare")
    documents = list(tool.documents(str(source), 0.02, None))
    assert 20_000 <= sum(len(text.encode()) for text in documents) < 21_000
    assert len(set(documents)) == len(documents)
    assert {len(text) for text in tool.documents(str(source), 0.02, 3)} == {3000}
    (tmp_path / "text.txt").write_text("\x1e".join(documents))
    tokenizer = tool.train_bpe(documents, 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.serialized)
    monkeypatch.setattr(sys, "argv", ["-c", *(str(tmp_path / name) for name in ("text.txt", "out", "tokenizer.json"))])
    told = []
    for contestant in (tool.PREPARE, tool.ALONE):
        exec(tool.CPU + contestant, {})
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert told[0]["tokens"] == told[1]["tokens"] > 1000
    assert min(one[key] for one in told for key in ("seconds", "cpu")) > 0
    measured = tool.measured("print('{\"n\": 1}'); import time; held = b'x' * 50_000_000; time.sleep(0.4)")
    assert measured["n"] == 1
    assert measured["peak_mb"] > 50
