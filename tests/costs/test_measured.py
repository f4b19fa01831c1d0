"""Memory and steps that were measured on GPUs, as the pages of docs/benchmarks have them, against the system model.

Two constants of the memory model are measurements themselves. They are read off two runs here, and those two runs check
nothing else; whatever checks the model was not used to set it.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fomoe_pl.costs.memory import DDP_COPIES, LIBRARY_BYTES, MIB, Load, rank_memory
from fomoe_pl.costs.plan_command import read_model
from fomoe_pl.costs.sites import Site
from fomoe_pl.costs.time import StepWork, calibration, step_seconds, step_work
from fomoe_pl.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"
SEVERAL = (PAGES / "several_gpus_h100_2026-11-25.md").read_text()
TOKENS = 8 * 2048


def model(name: str) -> ModelConfig:
    return read_model(str(ROOT / "configs/model" / f"{name}.yaml"))


def rows(part: str) -> dict[str, list[str]]:
    """Variant -> its other columns, of one part of the page."""
    section = SEVERAL.split(f"## {part}: ")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells if row[0] not in ("variant", "---")}


def number(text: str) -> float:
    return float(text.replace(",", ""))


def load_of(variant: str) -> Load:
    method = {"single": "rounds", "ddp": "ddp"}.get(variant, "rounds")  # a single site has anchors too
    return Load(batch_size=8, method=method, outer_momentum=variant == "diloco", val_batch_size=8,
                evaluation_window=16)  # type: ignore[arg-type]  # fmt: skip


def resident(config: ModelConfig, variant: str) -> int:
    return config.n_experts // 2 if variant.endswith("_1") else config.n_experts


CASES = [(part, name, variant) for part, name in (("A", "fomoe-153m"), ("B", "olmoe-1.3b")) for variant in rows(part)]


def compare(what: str, predicted: float, measured: float, unit: str) -> float:
    """Print both (`pytest -s`) and return their ratio."""
    print(f"\n{what} | {predicted:,.1f} | {measured:,.1f} {unit} | {predicted / measured:.4f}", end="")
    return predicted / measured


FITTED = (("A", "fomoe-153m", "single"), ("A", "fomoe-153m", "ddp"))


def test_constants_are_those_that_two_runs_show() -> None:
    """The library's workspace is what one run has beside all tensors, in whole blocks of cuBLAS of 32 MiB; DDP's copies
    are what another has more than that one, in gradients."""
    config = model("fomoe-153m")
    alone, shared = (number(rows(part)[variant][5]) * MIB for part, _, variant in FITTED)
    memory = rank_memory(config, load_of("single"), n_resident=config.n_experts)
    assert round((alone - (memory.peak - memory.library)) / (32 * MIB)) * 32 * MIB == LIBRARY_BYTES
    # DDP has no anchors, of as many bytes as the gradients.
    assert round((shared - alone + memory.anchors) / memory.gradients) == DDP_COPIES


@pytest.mark.parametrize(("part", "name", "variant"), [case for case in CASES if case not in FITTED])
def test_peaks_of_two_sites_within_one_percent(part: str, name: str, variant: str) -> None:
    config = model(name)
    routing = "partitioned" if "partitioned" in variant else "ghost"
    memory = rank_memory(config, load_of(variant), n_resident=resident(config, variant), routing=routing)  # type: ignore[arg-type]
    ratio = compare(f"{name} {variant}", memory.peak / MIB, number(rows(part)[variant][5]), "MiB")
    assert ratio == pytest.approx(1, abs=0.01)


def test_half_a_model_is_smaller_by_what_was_measured() -> None:
    """Differences of two peaks, in which neither constant is: 1.3B with half of the experts, and 153M."""
    for part, name in (("A", "fomoe-153m"), ("B", "olmoe-1.3b")):
        config = model(name)
        full, half = (
            rank_memory(config, load_of(v), n_resident=resident(config, v)).peak / MIB for v in ("fomoe_2", "fomoe_1")
        )
        measured = number(rows(part)["fomoe_2"][5]) - number(rows(part)["fomoe_1"][5])
        assert full - half == pytest.approx(measured, rel=0.01)


def test_the_peak_of_one_of_four_sites_that_share_a_gpu() -> None:
    page = (PAGES / "four_sites_one_gpu_h100_2026-11-25.md").read_text()
    measured = re.search(r"peak of tensors of site 0 \(MiB\) \| ([\d,]+)", page)
    assert measured is not None
    load = Load(batch_size=8, sequence_length=1024, wire_on_device=False, val_batch_size=8)
    memory = rank_memory(model("fomoe-153m"), load, n_resident=8)
    ratio = compare("fomoe-153m, overlap 2 of 4 on one GPU", memory.peak / MIB, number(measured[1]), "MiB")
    assert ratio == pytest.approx(1, abs=0.01)


def test_the_peak_of_the_54m_model_without_anything_else() -> None:
    """Its test frees gradients before the forward pass."""
    page = (PAGES / "gpu_checks_h100_2026-11-24.md").read_text()
    measured = re.search(r"two steps, peak of tensors \| ([\d.]+) GB", page)
    assert measured is not None
    memory = rank_memory(model("fomoe-54m"), Load(batch_size=8, method="single"), n_resident=8)
    ratio = compare("fomoe-54m alone", (memory.peak - memory.gradients) / 1e6, 1000 * float(measured[1]), "MB")
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("part", "name", "variant"), [case for case in CASES if case[2] not in ("ddp", "single")])
def test_steps_within_ten_percent_of_one_calibrating_run(part: str, name: str, variant: str) -> None:
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
    small, large = (step_work(config, Load(batch_size=b), n_resident=16) for b in (8, 16))
    factor = calibration(small, h100, TOKENS / number(rows("A")["single"][0]))
    measured = 2 * TOKENS / number(found[1])
    ratio = compare("fomoe-153m, 16 sequences", 1e3 * factor * large.seconds_at_peak(h100), 1e3 * measured, "ms")
    assert 1 < ratio < 1.15
