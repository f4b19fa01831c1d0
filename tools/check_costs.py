"""The system model against a GPU: predicted and measured peak memory of each part of a run, and seconds of a step.

`torchrun --standalone --nproc_per_node 2 tools/check_costs.py memory --case '{"model": "fomoe-54m", "batch_size": 8}'`
`python tools/check_costs.py step --case '{"model": "fomoe-153m"}' '{"model": "fomoe-153m", "overlap": 1}'`

`memory` trains each case with the Trainer and FederatedStrategy, one process a site, for two rounds of two steps and a
validation of the global model, and reads `torch.cuda.max_memory_allocated` of the steps, of the rounds and of the
validation apart. `step` times local steps of one site of `sites`, in one process; the first case calibrates the others.
A case is JSON: `model` is a file of configs/model, `architecture` replaces fields of it; see `Case` for the rest.
Results are printed and written to the file `--output`, case after case.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fomoe_pl.costs.memory import GIB, Load, Precision, RankMemory, rank_memory
from fomoe_pl.costs.sites import Site
from fomoe_pl.costs.time import calibration, step_seconds, step_work
from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.federation.placement import place
from fomoe_pl.model import init
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import auxiliary_loss
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.module import Batch, FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer
from fomoe_pl.strategies import FederatedStrategy

ROOT = Path(__file__).parents[1]
K, ROUNDS = 2, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        model: name of a file in configs/model.
        architecture: fields of the model that are replaced.
        overlap: sites that hold each expert; None for all.
        sites: of a `step` case; a `memory` case has one for each process.
        batch_size: sequences of a micro-batch.
        sequence_length: tokens of a sequence.
        precision: the Trainer's.
        outer: rule of the outer step.
        evaluation_window: validation batches that go through a layer together.
        host_wire: wire buffers are on the host: processes share a GPU, over gloo.
    """

    model: str
    architecture: dict[str, Any] = field(default_factory=dict)
    overlap: int | None = None
    sites: int = 4
    batch_size: int = 8
    sequence_length: int = 2048
    precision: Precision = "bf16-mixed"
    outer: str = "average"
    evaluation_window: int = 4
    host_wire: bool = False

    def config(self) -> ModelConfig:
        """The architecture."""
        path = ROOT / "configs/model" / f"{self.model}.yaml"
        return ModelConfig(**yaml.safe_load(path.read_text())["model"]["architecture"] | self.architecture)

    def load(self) -> Load:
        """What the system model is told."""
        return Load(
            precision=self.precision, batch_size=self.batch_size, sequence_length=self.sequence_length,
            outer_momentum=self.outer == "nesterov", wire_on_device=not self.host_wire,
            val_batch_size=self.batch_size, evaluation_window=self.evaluation_window,
        )  # fmt: skip


def quick_draw(target: Tensor, rule: init.Rule, generator: torch.Generator) -> None:
    """Initial values drawn where they live: which they are does not matter here, and it is a hundred times faster."""
    target.normal_(rule.init_mean, rule.init_std)


class RandomTokens(Dataset[Batch]):
    """Batches of random tokens."""

    def __init__(self, config: ModelConfig, case: Case, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch_size, case.sequence_length + 1)
        self.tokens = torch.randint(config.vocab_size, shape, generator=generator)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        domain = torch.zeros(len(self.tokens), dtype=torch.int64)
        return {
            "inputs": self.tokens[:, :-1].contiguous(),
            "targets": self.tokens[:, 1:].contiguous(),
            "domain": domain,
        }


class RandomData(L.LightningDataModule):
    """Random tokens to train and to validate on."""

    def __init__(self, config: ModelConfig, case: Case) -> None:
        super().__init__()
        self.config, self.case = config, case
        self.domains = ["random"]
        self.token_bytes = torch.ones(config.vocab_size, dtype=torch.int64)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless enough."""
        return DataLoader(RandomTokens(self.config, self.case, 10_000), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """One window."""
        return DataLoader(RandomTokens(self.config, self.case, self.case.evaluation_window), batch_size=None)


def read_peak() -> int:
    """Peak bytes since the last reading."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


class WatchedStrategy(FederatedStrategy):
    """Reads the peak before and after each round, and leaves the process group to the next case."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.peaks = {"steps": 0, "rounds": 0, "validation": 0}

    def note(self, part: str) -> None:
        """Enter a reading."""
        self.peaks[part] = max(self.peaks[part], read_peak())

    def _end_round(self, optimizer: torch.optim.Optimizer) -> None:
        self.note("steps")
        super()._end_round(optimizer)
        self.note("rounds")

    def on_validation_start(self) -> None:
        """As ever, after a reading."""
        self.note("steps")
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """As ever, and a reading."""
        super().on_validation_end()
        self.note("validation")

    def teardown(self) -> None:
        """All but the end of the process group."""
        if self.federation is not None:
            self.federation.wire.close()
        L.strategies.ParallelStrategy.teardown(self)


def memory_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Train a case, and compare peaks; every process calls it."""
    config, n_sites = case.config(), dist.get_world_size()
    overlap = case.overlap or n_sites
    predicted = rank_memory(config, case.load(), n_resident=config.n_experts * overlap // n_sites)
    where: dict[str, Any] = {"parallel_devices": [device] * n_sites}
    if case.host_wire:
        where = {"sites": n_sites, "share_device": True}
    strategy = WatchedStrategy(
        overlap=overlap, local_steps=K, outer=OuterRule(case.outer), inner_moments="average", **where  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu", devices=1 if case.host_wire else n_sites,
        strategy=strategy, precision=case.precision, gradient_clip_val=1.0, max_steps=K * ROUNDS, max_epochs=-1,
        val_check_interval=K * ROUNDS, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    read_peak()
    trainer.fit(FoMoEModule(config, evaluation_window=case.evaluation_window), RandomData(config, case))
    strategy.note("validation")
    return {"case": asdict(case), "sites": n_sites, "before": before, "peaks": strategy.peaks, **compared(
        predicted, strategy.peaks)}  # fmt: skip


def compared(predicted: RankMemory, peaks: dict[str, int]) -> dict[str, Any]:
    """Predicted bytes beside measured ones, by the part of a run, and predicted parts."""
    moments = predicted.moments_of_peak
    expected = {
        "steps": max(moments["end of the forward pass"], moments["backward pass"]),
        "rounds": moments["averaging"],
        "validation": moments["global validation"],
    }
    measured = max(peaks.values())
    return {
        "predicted": expected,
        "parts": asdict(predicted),
        "predicted_over_measured": predicted.peak / measured if measured else None,
    }


def run_memory(cases: list[Case], output: Path) -> None:
    """All cases, in processes that a launcher has started."""
    cuda = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    shared = cases[0].host_wire
    device = torch.device("cuda", 0 if shared else local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda and not shared else "gloo")
    results = []
    for case in cases:
        result = memory_case(case, device)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result)
        results.append(gathered)
        if dist.get_rank() == 0:
            output.write_text(json.dumps(results, indent=1) + "\n")
            for site, r in enumerate(gathered):
                print(memory_row(site, r), flush=True)
        del result
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def memory_row(site: int, r: dict[str, Any]) -> str:
    """One site of one case in a line."""
    case = r["case"]
    ratio = r["predicted_over_measured"]
    names = ("steps", "rounds", "validation")
    parts = "  ".join(f"{name} {r['predicted'][name] / GIB:.2f}/{r['peaks'][name] / GIB:.2f}" for name in names)
    return (f"{case['model']} {case['architecture']} M={r['sites']} overlap={case['overlap']} B={case['batch_size']} "
            f"site {site}: predicted/measured GiB: {parts}; peak {ratio and f'{ratio:.3f}'}")  # fmt: skip


def time_steps(case: Case, device: torch.device, *, warmup: int = 3, blocks: int = 5, steps: int = 3) -> list[float]:
    """Seconds a step of the blocks of local steps of site 0, clipping and optimizer included."""
    config = case.config()
    overlap = case.overlap or case.sites
    placement = place(
        "fixed", n_layers=config.n_layers, n_experts=config.n_experts, n_sites=case.sites, overlap=overlap
    )
    model = Transformer(config, Residency("ghost", placement.residents(0)), device=device)
    optimizer = inner_optimizer(model, OptimizerConfig())
    batch = {name: t.to(device) for name, t in RandomTokens(config, case, 1)[0].items()}

    def run(n: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
                hidden, stats = model(batch["inputs"])
                loss = model.loss(hidden, batch["targets"]) + auxiliary_loss(stats, config, model.residency).total
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    run(warmup)
    return [run(steps) for _ in range(blocks)]


def run_step(cases: list[Case], output: Path, accelerator: str) -> None:
    """Time every case; the first gives the factor of all."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    site = Site(accelerator=accelerator)
    factor = None
    results = []
    for case in cases:
        config = case.config()
        n_resident = config.n_experts * (case.overlap or case.sites) // case.sites
        work = step_work(config, case.load(), n_resident=n_resident)
        seconds = time_steps(case, device)
        measured = statistics.median(seconds)
        factor = calibration(work, site, measured) if factor is None else factor
        predicted = step_seconds(work, replace(site, step_factor=factor))
        mfu = work.flops / measured / site.peak_flops
        results.append({"case": asdict(case), "resident": n_resident, "seconds": seconds, "median": measured,
                        "predicted": predicted, "factor": factor, "mfu": mfu, "work": asdict(work)})  # fmt: skip
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{case.model} {case.architecture} R={n_resident} B={case.batch_size}: {measured * 1e3:.1f} ms "
              f"({min(seconds) * 1e3:.1f}..{max(seconds) * 1e3:.1f}), predicted {predicted * 1e3:.1f}, "
              f"ratio {predicted / measured:.3f}, MFU {mfu:.3f}, factor {factor:.3f}", flush=True)  # fmt: skip
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["memory", "step"], help="peak memory, or seconds of a step")
    parser.add_argument("--case", nargs="+", required=True, help="cases in JSON")
    parser.add_argument("--output", type=Path, default=Path("runs/check_costs.json"), help="where results go")
    parser.add_argument("--accelerator", default="h100", help="row of the table of data sheets (step)")
    options = parser.parse_args(arguments)
    cases = [Case(**json.loads(text)) for text in options.case]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    init._draw = quick_draw
    if options.what == "memory":
        run_memory(cases, options.output)
    else:
        run_step(cases, options.output, options.accelerator)


if __name__ == "__main__":
    main()
