"""The sites of a memory check, for `check_costs.py`: cases, and processes that train them and read their peaks."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from harness import BARE, CLIP_NORM, architecture, drawn_on_device, random_tokens
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.utils.data import DataLoader, Dataset

from fomoe_pl.costs.activations import Precision
from fomoe_pl.costs.memory import Load, RankMemory, rank_memory
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.settings import OuterPlace, Sharing
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, Shadow, ShadowBits
from fomoe_pl.module import Batch, FoMoEModule
from fomoe_pl.strategies import FederatedStrategy

K, ROUNDS = 2, 2
ROW, NEXT = "ROW ", "NEXT"
"""What lines of a site's output begin with: a result; a case has ended, or the sites have met."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        model: Name of a file in configs/model.
        architecture: Fields of the model that are replaced.
        overlap: Sites that hold each expert; None for all.
        sites: Number of sites M; of a `memory` case each rank is a process, with a GPU of its own unless `host_wire`.
        ranks: Ranks of a site.
        inside: What they share of it.
        batch_size: Sequences of a micro-batch of a rank.
        sequence_length: Tokens of a sequence.
        precision: The Trainer's.
        outer: Rule of the outer step.
        evaluation_window: Validation batches that go through a layer together.
        host_wire: Wire buffers are on the host: all sites share the first GPU, over gloo.
        outer_state: Where anchors and outer momentum are.
        routing: What happens to picks of absent experts.
        shadow_bits: Of copies, with routing shadow.
    """

    model: str
    architecture: dict[str, Any] = field(default_factory=dict)
    overlap: int | None = None
    sites: int = 2
    ranks: int = 1
    inside: Sharing = "replicate"
    batch_size: int = 8
    sequence_length: int = 2048
    precision: Precision = "bf16-mixed"
    outer: str = "average"
    evaluation_window: int = 4
    host_wire: bool = False
    outer_state: OuterPlace = "device"
    routing: Routing = "ghost"
    shadow_bits: ShadowBits = 4

    def config(self) -> ModelConfig:
        """The architecture."""
        return architecture(self.model, **self.architecture)

    @property
    def processes(self) -> int:
        """Of all sites."""
        return self.sites * self.ranks

    def load(self) -> Load:
        """What the system model is told."""
        return Load(
            precision=self.precision, batch_size=self.batch_size, sequence_length=self.sequence_length,
            outer_momentum=self.outer == "nesterov", wire_on_device=not self.host_wire,
            val_batch_size=self.batch_size, evaluation_window=self.evaluation_window, bf16_gradients=True,
            state_on_host=self.outer_state == "host",
        )  # fmt: skip

    def resident(self) -> int:
        """Experts of each layer that a site holds."""
        return self.config().n_experts * (self.overlap or self.sites) // self.sites


class RandomTokens(Dataset[Batch]):
    """Batches of random tokens."""

    def __init__(self, config: ModelConfig, case: Case, length: int) -> None:
        [self.inputs], [self.targets] = random_tokens(1, config.vocab_size, case.batch_size, case.sequence_length)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        domain = torch.zeros(len(self.inputs), dtype=torch.int64)
        return {
            "inputs": self.inputs,
            "targets": self.targets,
            "bytes": torch.ones_like(self.targets),
            "domain": domain,
        }


class RandomData(L.LightningDataModule):
    """Random tokens to train and to validate on."""

    def __init__(self, config: ModelConfig, case: Case) -> None:
        super().__init__()
        self.config, self.case = config, case
        self.domains = ["random"]

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
    """Reads the peak before and after each round, tells how far it is, and leaves the group to the next case."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.peaks = {"steps": 0, "rounds": 0, "validation": 0}
        self.started = time.perf_counter()

    def note(self, part: str, told: str) -> None:
        """Enter a reading; a run that is stopped has said what it had done."""
        self.peaks[part] = max(self.peaks[part], read_peak())
        if self.is_global_zero:
            print(f"  {time.perf_counter() - self.started:.1f} s: {told}", flush=True)

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As ever, between two readings where a round ends."""
        if self.settings.schedule.turn(self.optimizer_steps, self.rounds.last_step) is None:
            return
        self.note("steps", f"{self.optimizer_steps} steps")
        super().end_step(optimizer)
        self.note("rounds", f"{self.rounds_done} rounds")

    def on_validation_start(self) -> None:
        """As ever, after a reading."""
        self.note("steps", "validation begins")
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """As ever, and a reading."""
        super().on_validation_end()
        self.note("validation", "validated")

    def teardown(self) -> None:
        """All but the end of the process group."""
        if self.federation is not None:
            self.federation.transport.close()
        L.strategies.ParallelStrategy.teardown(self)


def train_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Train a case, and compare peaks; every process calls it."""
    config = case.config()
    predicted = rank_memory(config, case.load(), n_resident=case.resident(), routing=case.routing,
                            shadow=Shadow(case.shadow_bits), shards=case.ranks if case.inside == "shard" else 1
                            )  # fmt: skip
    where: dict[str, Any] = {"parallel_devices": [device] * case.processes}
    if case.host_wire and device.type == "cuda":
        where = {"sites": case.sites, "share_device": True}
    strategy = WatchedStrategy(
        overlap=case.overlap or case.sites, local_steps=K, inner_moments="average",
        outer=Nesterov() if case.outer == "nesterov" else Average(), outer_state=case.outer_state,
        routing=case.routing, ranks_per_site=case.ranks, inside=case.inside,
        **({"shadow_bits": case.shadow_bits} if case.routing == "shadow" else {}), **where,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if "share_device" in where else case.processes,
        strategy=strategy, precision=case.precision, gradient_clip_val=CLIP_NORM, max_steps=K * ROUNDS,
        val_check_interval=K * ROUNDS, check_val_every_n_epoch=None, num_sanity_val_steps=0, **BARE,
    )  # fmt: skip
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    read_peak()
    # Of a recorded step the allocator shows nothing after the recording.
    module = FoMoEModule(config, evaluation_window=case.evaluation_window, cuda_graphs=False)
    trainer.fit(module, RandomData(config, case))
    strategy.peaks["validation"] = max(strategy.peaks["validation"], read_peak())
    peaks = {name: peak - before for name, peak in strategy.peaks.items()}  # what an earlier case has left is not of it
    return {"before": before, "peaks": peaks, **compared(predicted, peaks)}


def compared(predicted: RankMemory, peaks: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured bytes by the part of a run, and predicted parts."""
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


def be_a_site(cases: list[Case]) -> None:
    """Train all cases, one after the other, in a process of `measured`."""
    cuda, rank = torch.cuda.is_available(), int(os.environ["RANK"])
    shared = cases[0].host_wire
    device = torch.device("cuda", 0 if shared else rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dist.init_process_group("nccl" if cuda and not shared else "gloo")
    names = dist.new_group(backend="gloo")  # results go over the host: nothing of them is on the device
    for case in cases:
        if rank == 0:
            print(NEXT, flush=True)
        with drawn_on_device():
            result = train_case(case, device)
        gathered: list[Any] = [None] * case.processes
        dist.all_gather_object(gathered, result, group=names)
        if rank == 0:
            print(ROW + json.dumps({"case": asdict(case), "sites": gathered}), flush=True)
        del result
        gc.collect()  # Trainer and callbacks refer to each other
        if cuda:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


@contextlib.contextmanager
def processes(cases: list[Case], script: Path) -> Iterator[queue.Queue[str | None]]:
    """Start a process for each site; gives the lines that the first one prints, None at their end."""
    port = find_free_network_port()
    n = cases[0].processes
    told: queue.Queue[str | None] = queue.Queue()
    started: list[subprocess.Popen[str]] = []

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told.put(line.rstrip("\n"))
        told.put(None)

    try:
        for rank in range(n):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            command = [sys.executable, str(script), "site", "--case", *(json.dumps(asdict(case)) for case in cases)]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            started.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
        threading.Thread(target=read, args=(started[0],), daemon=True).start()
        yield told
    finally:
        patience = time.monotonic() + 3
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, patience - time.monotonic()))
            process.kill()  # in a collective it hears nothing else
            process.wait()


def measured(cases: list[Case], script: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Results of the cases, each as soon as it is known; one that fails or takes too long is a result as well.

    Args:
        cases: What to measure; neighbours of as many sites on the same wire share processes.
        script: `check_costs.py`, which starts sites.
        limit: Seconds that a case may take, and the start of processes.
    """
    waiting = list(cases)
    while waiting:
        first = waiting[0]
        alike = [(case.processes, case.host_wire) == (first.processes, first.host_wire) for case in waiting] + [False]
        own = waiting[: alike.index(False)]
        with processes(own, script) as told:
            deadline, last = time.monotonic() + limit, "starting"
            while own:
                try:
                    line = told.get(timeout=max(0.0, deadline - time.monotonic()))
                    problem = None if line is not None else "a site failed; its message is above"
                except queue.Empty:
                    line, problem = "", f"no result in {limit:g} s; last: {last}"
                if problem is None and line is not None and not line.startswith(ROW):
                    if line == NEXT:
                        deadline, last = time.monotonic() + limit, "case begun"
                    else:
                        last = line.strip()
                        print(line, flush=True)
                    continue
                waiting.pop(0)
                case = own.pop(0)
                if problem is not None or line is None:
                    yield {"case": asdict(case), "problem": problem}
                    break  # and restart with those that are left
                yield json.loads(line[len(ROW) :])
                deadline = time.monotonic() + limit


def end_on(number: int, frame: object) -> None:
    """Leave by the front door, so that sites are ended too."""
    raise SystemExit(128 + number)


def end_sites_with_this_process() -> None:
    """A signal that ends this process ends the sites that it has started."""
    signal.signal(signal.SIGTERM, end_on)
