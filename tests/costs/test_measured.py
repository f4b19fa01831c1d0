"""Memory and steps that were measured on GPUs, as the pages of docs/benchmarks have them, against the system model.

Two constants of the memory model are measurements themselves. They are read off runs here that check nothing else.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fomoe_pl.costs.memory import DDP_COPIES, LIBRARY_BYTES, MIB, Load, RankMemory, rank_memory
from fomoe_pl.costs.sites import Site
from fomoe_pl.costs.time import StepWork, calibration, inside_bytes, inside_seconds, step_seconds, step_work
from fomoe_pl.federation.settings import Sharing
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.planner.command import read_settings

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"
SEVERAL = (PAGES / "several_gpus_h100_2026-11-25.md").read_text()  # before there were kernels
KERNELS = (PAGES / "memory_and_steps_h100_2026-11-25.md").read_text()
TOKENS = 8 * 2048


def model(name: str) -> ModelConfig:
    """With chunks of about as many tokens as then, when 256 MiB of float32 logits were one."""
    file, _, layers = name.partition(", ")
    config = ModelConfig(**read_settings(str(ROOT / "configs/model" / f"{file}.yaml"))["architecture"])
    config = replace(config, loss_chunk_bytes=148 * MIB)
    return replace(config, n_layers=int(layers.split()[0])) if layers else config


def table(page: str, title: str) -> list[list[str]]:
    """Cells of the rows of a part of a page, without the heads."""
    section = page.split(f"## {title}")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    return [row for row in cells if row[0] not in ("variant", "run") and not row[0].startswith("---")]


def rows(part: str) -> dict[str, list[str]]:
    """Variant -> its other columns, of one part of the earlier page."""
    return {row[0]: row[1:] for row in table(SEVERAL, f"{part}: ")}


def number(text: str) -> float:
    return float(text.replace(",", ""))


def load_of(variant: str) -> Load:
    method = {"single": "rounds", "ddp": "ddp"}.get(variant, "rounds")  # a single site has anchors too
    return Load(batch_size=8, method=method, outer_momentum=variant == "diloco", val_batch_size=8,
                evaluation_window=16, kernels=False)  # type: ignore[arg-type]  # fmt: skip


def resident(config: ModelConfig, variant: str) -> int:
    return config.n_experts // 2 if variant.endswith("_1") else config.n_experts


CASES = [(part, name, variant) for part, name in (("A", "fomoe-153m"), ("B", "olmoe-1.3b")) for variant in rows(part)]


def compare(what: str, predicted: float, measured: float, unit: str) -> float:
    """Print both (`pytest -s`) and return their ratio."""
    print(f"\n{what} | {predicted:,.1f} | {measured:,.1f} {unit} | {predicted / measured:.4f}", end="")
    return predicted / measured


def predicted_peak(row: list[str]) -> RankMemory:
    name, sites, overlap, batch, outer, wire, _ = row
    config = model(name)
    load = Load(batch_size=int(batch), outer_momentum=outer == "nesterov", wire_on_device=wire == "device",
                val_batch_size=int(batch), evaluation_window=4)  # fmt: skip
    return rank_memory(config, load, n_resident=config.n_experts * int(overlap) // int(sites))


PEAKS = table(KERNELS, "Peak of tensors")
FITTED = ["fomoe-153m", "2", "1"]


def test_constants_are_those_that_runs_show() -> None:
    """The library's workspace is what a run has beside all tensors, in whole blocks of cuBLAS of 32 MiB; DDP's copies
    are what one has more than another that differs in nothing else, in gradients."""
    (fitted,) = (row for row in PEAKS if row[:3] == FITTED)
    memory = predicted_peak(fitted)
    beside = number(fitted[6]) * MIB - (memory.peak - memory.library)
    assert round(beside / (32 * MIB)) * 32 * MIB == LIBRARY_BYTES
    alone, shared = (number(rows("A")[variant][5]) * MIB for variant in ("single", "ddp"))
    memory = rank_memory(model("fomoe-153m"), load_of("single"), n_resident=16)
    # DDP has no anchors, of as many bytes as the gradients.
    assert round((shared - alone + memory.anchors) / memory.gradients) == DDP_COPIES


@pytest.mark.parametrize("row", [row for row in PEAKS if row[:3] != FITTED], ids=lambda row: " ".join(row[:5]))
def test_peaks_within_one_percent(row: list[str]) -> None:
    ratio = compare(" ".join(row[:6]), predicted_peak(row).peak / MIB, number(row[6]), "MiB")
    assert ratio == pytest.approx(1, abs=0.01)


STEPS = table(KERNELS, "Seconds of a step")


@pytest.mark.parametrize("row", STEPS, ids=lambda row: " ".join(row[:4]))
def test_steps_within_ten_percent_of_one_calibrating_run(row: list[str]) -> None:
    """The first run of each model calibrates; overlap, sites and batch vary."""
    config, h100 = model(row[0]), Site(accelerator="h100")

    def work(of: list[str]) -> StepWork:
        n_resident = config.n_experts * int(of[2]) // int(of[1])
        return step_work(config, Load(batch_size=int(of[3])), n_resident=n_resident)

    first = next(other for other in STEPS if other[0] == row[0])
    factor = calibration(work(first), h100, number(first[4]) / 1e3)
    predicted = 1e3 * step_seconds(work(row), replace(h100, step_factor=factor))
    ratio = compare(" ".join(row[:4]), predicted, number(row[4]), "ms")
    assert ratio == pytest.approx(1, abs=0.1 if row is not first else 1e-9)


@pytest.mark.parametrize(("part", "name", "variant"), [case for case in CASES if case[2] not in ("ddp", "single")])
def test_steps_of_the_portable_backend_within_ten_percent(part: str, name: str, variant: str) -> None:
    """The run of one site alone calibrates; overlap and routing vary."""
    config, h100 = model(name), Site(accelerator="h100")

    def work(which: str) -> StepWork:
        routing = "partitioned" if "partitioned" in which else "ghost"
        return step_work(config, load_of(which), n_resident=resident(config, which), routing=routing)  # type: ignore[arg-type]

    def measured(which: str) -> float:
        return TOKENS / number(rows(part)[which][0])

    factor = calibration(work("single"), h100, measured("single"))
    predicted = step_seconds(work(variant), replace(h100, step_factor=factor))
    ratio = compare(f"{name} {variant}", 1e3 * predicted, 1e3 * measured(variant), "ms")
    assert ratio == pytest.approx(1, abs=0.1)


def test_another_batch_is_missed_where_the_host_is_the_limit() -> None:
    """At 8 sequences of the 153M preset kernels are prepared hardly faster than they run: twice as many take less."""
    page = (PAGES / "step_h100_2026-11-25.md").read_text()
    found = re.search(r"bare \| ([\d,]+) \|", page)
    assert found is not None
    config, h100 = model("fomoe-153m"), Site(accelerator="h100")
    small, large = (step_work(config, Load(batch_size=b, kernels=False), n_resident=16) for b in (8, 16))
    factor = calibration(small, h100, TOKENS / number(rows("A")["single"][0]))
    measured = 2 * TOKENS / number(found[1])
    ratio = compare("fomoe-153m, 16 sequences", 1e3 * factor * large.seconds_at_peak(h100), 1e3 * measured, "ms")
    assert 1 < ratio < 1.15


@pytest.mark.parametrize(("inside", "most"), [("replicate", 1.15), ("shard", 1.6)])
def test_steps_of_two_ranks_are_not_twice_as_fast(inside: Sharing, most: float) -> None:
    """Hopeful: that their steps are not recorded, and what FSDP does on the host, is left out."""
    rows_of = table((PAGES / "sites_of_ranks_h200_2026-11-30.md").read_text(), "One site of two ranks")
    [alone] = (number(row[1]) for row in rows_of if row[0].startswith("one GPU"))
    [measured] = (number(row[2]) for row in rows_of if f"`{inside}`" in row[0])
    config = ModelConfig(**read_settings(str(ROOT / "configs/model/olmoe-1.3b.yaml"))["architecture"])
    load = Load(batch_size=8, bf16_gradients=True)
    sent = sum(inside_bytes(config, load, ranks=2, inside=inside, n_resident=config.n_experts))
    step = TOKENS / alone
    predicted = step / (step + inside_seconds(sent, Site(accelerator="h200")))
    ratio = compare(f"two ranks, {inside}", predicted, measured, "of one GPU's")
    assert 0.95 < ratio < most
