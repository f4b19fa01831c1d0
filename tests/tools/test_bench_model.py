"""`tools/benchmarks/bench_model.py`: one small run on the CPU, and the parts that make its figures."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.sizes import active_parameters
from tests.tools import load

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_run_writes_consistent_tables(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "tools/benchmarks/bench_model.py")]
    command += ["--device", "cpu", "--output", str(tmp_path)]
    command += ["--variants", "hf_loop", "ours_eager", "grouped", "--fractions", "1", "1/2", "0", "--warmup", "1"]
    command += ["--batch_size", "2", "--sequence_length", "16", "--steps", "1", "--block_seconds", "0"]
    command += ["--blocks", "3", "--seconds", "60", "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench_model.json").read_text())
    assert (results["device"], results["commit"]) == ("cpu", "abc")
    rows = {(row["variant"], row["fraction"]): row for row in results["rows"]}
    expected = [
        ("ours_eager", "1"),
        ("hf_loop", "1"),
        ("ours_eager", "1/2"),
        ("ours_eager", "0"),
        ("grouped", "1"),
        ("grouped", "1/2"),
    ]
    assert list(rows) == expected
    assert all(row["seconds"] and row["loss"] > 4 for row in rows.values()), rows
    table = (tmp_path / "bench_model.md").read_text().splitlines()
    for (variant, fraction), row in rows.items():
        cells = next(line for line in table if line.startswith(f"| tiny | {variant} | {fraction} |")).split(" | ")
        assert cells[3] == f"{32 / statistics.median(row['seconds']):,.0f}"
        speed = statistics.median(row["ratios"]) if row["ratios"] else 1.0
        assert cells[6] == f"{speed:.3f}"
        mfu = row["flops"] * 32 / statistics.median(row["seconds"]) / row["peak_flops"]
        assert cells[7] == f"{mfu:.3f}"
    reference = rows.pop(("ours_eager", "1"))
    # The reference has a block for each block of the others, and those before they came.
    assert len(reference["seconds"]) == 3 * 6
    assert reference["ratios"] == []
    for k, row in enumerate(rows.values(), start=1):
        neighbours = reference["seconds"][3 * k : 3 * k + 3]
        assert row["ratios"] == [own / theirs for own, theirs in zip(neighbours, row["seconds"], strict=True)]
    assert (
        reference["flops"]
        == reference["nominal_flops"]
        > rows["ours_eager", "1/2"]["flops"]
        > rows["ours_eager", "0"]["flops"]
    )
    assert 0.2 < rows["ours_eager", "1/2"]["ghost_fraction"] < 0.8
    [target] = results["targets"]
    assert target["measured"] == pytest.approx(1 / statistics.median(rows["hf_loop", "1"]["ratios"]))
    assert target["met"] == (target["measured"] >= 1)


def test_flops_are_six_for_each_active_parameter_and_causal_attention() -> None:
    config, rows = load("harness").architecture("olmoe-1.3b"), load("model_rows")
    matrices = active_parameters(config) - config.vocab_size * config.d_model  # the embedding is looked up
    norms = config.d_model * (4 * config.n_layers + 1)
    attention = 12 * config.n_layers * config.d_model * 2048 / 2
    assert rows.model_flops(config, 2048, 8) == 6 * (matrices - norms) + attention
    assert round(rows.model_flops(config, 2048, 8) / 1e9, 2) == 1.67
    expert = 3 * config.d_model * config.d_expert * config.n_layers
    assert rows.model_flops(config, 2048, 8) - rows.model_flops(config, 2048, 6) == 6 * 2 * expert
    without = 8 * expert + config.n_layers * config.n_experts * config.d_model
    assert rows.model_flops(config, 2048, 8) - rows.model_flops(config, 2048, None) == 6 * without


def made_rows(case: str, **speeds: float) -> list[Any]:
    """Rows with steps of 0.1 s over the speed, named `ours_2` for ours with half the experts."""
    rows = []
    for name, speed in speeds.items():
        variant, _, part = name.rpartition("_")
        fraction = Fraction(1, int(part)) if part != "0" else Fraction(0)
        ghosts = float(1 - fraction) if fraction and variant == "ours" else None
        rows.append(
            load("model_rows").Row(
                case=case, variant=variant, fraction=str(fraction), tokens=100, seconds=[0.1 / speed], ratios=[speed],
                flops=5.0, nominal_flops=5.0, peak_flops=1e4, ghost_fraction=ghosts, peak_bytes=20 * 2**30,
            )
        )  # fmt: skip
    return rows


def verdicts(rows: list[Any], *, on_gpu: bool = True) -> dict[str, tuple[float, float, bool]]:
    found = load("model_rows").targets(rows, on_gpu=on_gpu)
    return {target.what: (round(target.measured, 6), round(target.bound, 6), target.met) for target in found}


def test_targets_of_model_r() -> None:
    speeds = {"ours_1": 1.0, "hf_compiled_1": 0.5, "hf_eager_1": 0.2, "ours_2": 1.2, "ours_4": 1.5, "ours_0": 2.0}
    assert verdicts(made_rows("olmoe-1.3b", **speeds)) == {
        "MFU, all resident": (0.5, 0.5, True),
        "tokens/s over hf_compiled's": (2.0, 1.6, True),
        "memory, all resident (GiB)": (20.0, 20.0, True),
        "speed-up at 1/2 resident, f = 0.500": (1.2, 1.2, True),
        "speed-up at 1/2 not below that with more experts": (1.2, 1.0, True),
        "speed-up at 1/4 resident, f = 0.500": (1.5, 1.44, True),
        "speed-up at 1/4 not below that with more experts": (1.5, 1.2, True),
    }  # fmt: skip
    copied = [*made_rows("olmoe-1.3b", ours_1=1.0, ours_2=1.2), *made_rows("olmoe-1.3b", ours_shadow_2=1.04)]
    copied[2].peak_bytes *= 1.2
    assert list(verdicts(copied).items())[-2:] == [
        ("half resident, half copied, over our whole model", (1.04, 1.05, False)),
        ("memory with copies over that with ghosts", (1.2, 1.1, False)),
    ]
    large = [replace(row, peak_bytes=21 * 2**30) for row in made_rows("olmoe-1.3b", ours_1=1.0)]
    assert verdicts(large)["memory, all resident (GiB)"] == (21.0, 20.0, False)
    saving = [*large, *made_rows("olmoe-1.3b", ours_saving_1=0.9)]
    assert verdicts(saving)["memory, all resident, experts checkpointed (GiB)"] == (20.0, 20.0, True)
    worse = verdicts(made_rows("olmoe-1.3b", **{**speeds, "hf_compiled_1": 0.7, "ours_2": 1.1, "ours_4": 1.05}))
    assert [met for _, _, met in worse.values()] == [True, False, True, False, True, False, False]


def test_targets_of_the_preset_and_of_a_cpu() -> None:
    speeds = {"ours_1": 1.0, "ours_2": 1.1, "grouped_1": 0.5, "grouped_2": 0.7, "grouped_compiled_2": 0.8}
    assert verdicts(made_rows("fomoe-153m", **speeds)) == {
        "half resident, over our whole model": (1.1, 1.16, False),
        "or half resident, over grouped": (1.571429, 1.5, True),
        "or half resident, over grouped_compiled": (1.375, 1.5, False),
    }
    cpu = made_rows("tiny", ours_eager_1=1.0, hf_eager_1=1.25, hf_loop_1=0.8)
    assert verdicts(cpu, on_gpu=False) == {
        "as fast as hf_eager": (0.8, 1.0, False),
        "as fast as hf_loop": (1.25, 1.0, True),
    }


def test_what_did_not_run_has_a_row_and_no_verdict() -> None:
    rows = made_rows("olmoe-1.3b", ours_1=1.0, hf_compiled_1=0.5)
    rows[1] = replace(rows[1], seconds=[], note="too little memory")
    assert rows[1].cells()[-1] == "too little memory"
    assert len(rows[1].cells()) == len(load("model_rows").COLUMNS) == len(rows[0].cells())
    assert not any("hf_compiled" in what for what in verdicts(rows))


def tiny() -> tuple[Any, Any]:
    """The case, at an even smaller batch, and its batches."""
    match = load("model_match")
    case = match.Case(load("bench_model").tiny_olmoe(), 2, 16)
    return case, match.random_batches(case, CPU)


def test_without_experts_blocks_are_attention_alone() -> None:
    case, batches = tiny()
    contestants = load("model_contestants")
    eager = contestants.Ours("grouped", compiled=False)
    none = contestants.build_ours(case.config, CPU, eager, Fraction(0), autocast=False)
    half = contestants.build_ours(case.config, CPU, eager, Fraction(1, 2), autocast=False)
    names = [name for name, _ in none.model.named_parameters()]
    assert not any("moe" in name for name in names)
    assert set(names) == {name for name, _ in half.model.named_parameters() if "moe" not in name}
    none.step(batches[0])
    assert none.ghost_fraction() is None
    assert half.resident == case.config.n_experts // 2
    with pytest.raises(ConfigError, match=r"divisor of the 8 experts"):
        contestants.residency_of(case.config, Fraction(1, 3))


def test_copies_compute_what_ghosts_skip() -> None:
    case, batches = tiny()
    contestants, bench, match = load("model_contestants"), load("bench_model"), load("model_match")
    eager = contestants.Ours("grouped", compiled=False, shadow_bits=4)
    half = contestants.build_ours(case.config, CPU, eager, Fraction(1, 2), autocast=False)
    half.step(batches[0])
    assert half.copying
    assert len(half.model.shadow_tensors()) == 2 * case.config.n_layers
    assert 0.2 < half.ghost_fraction() < 0.8
    met = bench.order(["ours", "ours_shadow"], [Fraction(1), Fraction(1, 2)], case.config)
    assert met == [("ours", Fraction(1, 2)), ("ours_shadow", Fraction(1, 2))]
    contestants.VARIANTS["copies"] = eager
    rows: list[Any] = []
    timer = match.Timer(batches, CPU, steps=1, block_seconds=0.0, warmup=1)
    game = match.Match("c", case, timer, rows.append, 1e9, blocks=1, deadline=float("inf"))
    try:
        game.meet("ours_eager", Fraction(1))
        game.meet("copies", Fraction(1, 2))
    finally:
        del contestants.VARIANTS["copies"]
    whole, copied = rows
    assert 2 / 3 * whole.flops < copied.flops < whole.flops


def test_a_site_trains_with_its_own_values_for_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    site, contestants = load("model_site"), load("model_contestants")
    case, batches = tiny()
    build = contestants.Ours("grouped", compiled=False)
    monkeypatch.setattr(contestants, "LEARNING_RATE", 1e-3)
    built = []
    monkeypatch.setattr(site, "build_ours", lambda *a, **k: built.append(contestants.build_ours(*a, **k)) or built[-1])
    row = site.measure(case.config, CPU, build, site.RANKS[0], batches)
    assert built[0].resident == case.config.n_experts // site.SITES
    assert row.tokens_per_second > 0
    assert row.round_seconds > 0
    assert row.losses[1] < row.losses[0]
    copied = site.measure(case.config, CPU, build, site.RANKS[1], batches)
    assert built[1].copying
    assert copied.round_seconds > 0
    assert copied.predicted_bytes > row.predicted_bytes

    def too_large(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to | allocate")

    monkeypatch.setattr(site, "build_ours", too_large)
    replicas = [site.measure(case.config, CPU, build, rank, batches) for rank in site.RANKS[2:]]
    assert all("out of memory" in r.note and r.tokens_per_second is None for r in replicas)
    assert replicas[0].predicted_bytes > max(row.predicted_bytes, replicas[1].predicted_bytes)
    assert site.site_target([row, copied, *replicas]).startswith("met")
    assert site.site_target([row, copied, replicas[0], row]).startswith("MISSED")
    monkeypatch.setattr(site, "build_ours", None)  # something else that fails
    broken = site.measure(case.config, CPU, build, site.RANKS[2], batches)
    assert "TypeError" in broken.note
    assert site.site_target([row, copied, broken, replicas[1]]).startswith("MISSED")
    assert len(row.cells()) == len(load("model_rows").SITE_COLUMNS)


def test_the_mirror_gives_back_what_it_gets() -> None:
    sites = load("model_site").SITES
    wire = load("model_site").MirrorTransport(Topology(sites, 1, 0), [], Ledger(), device=CPU)
    mine = [torch.tensor([1.0, 2.0]), torch.tensor([5.0])]
    assert wire.average("dense", wire.everyone, 3, lambda: mine).wait().tolist() == [1.0, 2.0, 5.0]
    assert wire.ledger.payload("dense") == 12


def test_memory_and_late_compilation_are_each_contestants_own(monkeypatch: pytest.MonkeyPatch) -> None:
    match, rows = load("model_match"), load("model_rows")
    graphs = iter([5, 7])
    monkeypatch.setattr(match, "_graphs", lambda: next(graphs))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 900)
    taken: list[Any] = []
    timer = match.Timer(["a", "b"], torch.device("cuda", 0), steps=3, block_seconds=0.0, warmup=1)
    row = rows.Row(case="c", variant="v")
    seconds = timer.block(SimpleNamespace(step=taken.append), row, 3, held_by_other=250)
    assert taken == ["a", "b", "a"]
    assert row.peak_bytes == 650
    assert row.compiled_late == 2
    assert row.seconds == [seconds]
