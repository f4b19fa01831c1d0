"""One run of a strategy on this rank, for `bench_gpus.py`: variants, clocks, what is kept of a run."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
import torch.distributed as dist
from harness import BARE, CLIP_NORM, SITE_TIMEOUT, now

from fomoe_pl.costs.bytes import metric_bytes_of, predict_bytes
from fomoe_pl.costs.memory import MIB
from fomoe_pl.costs.rounds import ddp_collectives
from fomoe_pl.data import FoMoEData
from fomoe_pl.federation.ledger import KINDS, Kind, Ledger
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.strategies import REGISTERED, CountedDDPStrategy, FederatedStrategy, SingleSiteStrategy
from fomoe_pl.strategies.base import SiteStrategy

PREDICTED: tuple[Kind, ...] = ("dense", "expert", "moments", "migration", "evaluation")
BLOCKS_OF_ROUND = 4


def variants(n_sites: int, local_steps: int) -> dict[str, dict[str, Any]]:
    """Settings of FederatedStrategy by variant; those of `ddp` are empty. In `site_*` the GPUs are one site's ranks.

    Args:
        n_sites: Sites M, at least 2.
        local_steps: K.
    """

    def of(name: str, **changes: Any) -> dict[str, Any]:
        return {**REGISTERED[name][2], "local_steps": local_steps, **changes}

    partial = sorted({1, n_sites // 2})
    return {
        "single": of("local_adamw"),
        **{f"site_{inside}": of("local_adamw", ranks_per_site=n_sites, inside=inside)
           for inside in ("replicate", "shard")},
        "ddp": {}, "diloco": of("diloco"), "local_adamw": of("local_adamw"),
        **{f"fomoe_{overlap}": of("fomoe", overlap=overlap) for overlap in (*partial, n_sites)},
        **{f"fomoe_partitioned_{overlap}": of("fomoe_partitioned", overlap=overlap) for overlap in partial},
        # Experts are dealt again after every round: the most expensive case.
        **{f"fomoe_random_{overlap}": of("fomoe_random", overlap=overlap, reshuffle_rounds=1) for overlap in partial},
    }  # fmt: skip


class Clock(L.Callback):
    """Times blocks of local steps and rounds of one rank; the device is waited for at the ends of blocks only.

    Args:
        block: Steps of a block.
        save_to: Folder of a checkpoint to write at the end.
    """

    def __init__(self, block: int, save_to: Path | None = None) -> None:
        self.block = block
        self.save_to = save_to
        self.local_seconds: list[float] = []
        self.round_seconds: list[float] = []
        self.losses: list[torch.Tensor] = []
        self._last = (0.0, 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        """At the end of a block add its local seconds, and those of the round that ended with it."""
        self.losses.append(outputs["loss"].detach())
        if trainer.global_step % self.block:
            return
        time, synchronized = now(), cast(SiteStrategy, trainer.strategy).sync_seconds
        if trainer.global_step > self.block:  # the first block is warm-up
            in_round = synchronized - self._last[1]
            self.local_seconds.append(time - self._last[0] - in_round)
            if in_round:
                self.round_seconds.append(in_round)
        self._last = (time, synchronized)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if asked to."""
        if self.save_to is not None:
            trainer.save_checkpoint(self.save_to)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all variants have in common.

    Attributes:
        architecture: The model.
        root: Prepared corpus with the model's vocabulary.
        output: Folder of results, shared by the ranks.
        accelerator: Gpu, or cpu to try it out.
        batch_size: Sequences of a step of one site B.
        sequence_length: Tokens of a sequence S.
        local_steps: K.
        rounds: Rounds of a run.
        num_workers: Processes that read data for each rank.
        optimizer: Inner optimizer; without cool-down longer and shorter runs begin alike.
    """

    architecture: ModelConfig
    root: str
    output: Path
    accelerator: str
    batch_size: int
    sequence_length: int
    local_steps: int
    rounds: int
    num_workers: int
    optimizer: OptimizerConfig

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.local_steps * self.rounds

    @property
    def block(self) -> int:
        """Optimizer steps that are timed together."""
        return max(1, self.local_steps // BLOCKS_OF_ROUND)

    def checkpoint(self, label: str) -> Path:
        """Where a run is saved."""
        return self.output / f"{label}.ckpt"

    def data(self, n_ranks: int = 1) -> FoMoEData:
        """The corpus, divided again for each run; a site's ranks share its batch."""
        return FoMoEData(self.root, sequence_length=self.sequence_length, batch_size=self.batch_size * n_ranks,
                         val_sequences=16 * self.batch_size, num_workers=self.num_workers)  # fmt: skip

    def module(self) -> FoMoEModule:
        """The model before training."""
        return FoMoEModule(self.architecture, self.optimizer)


@dataclass(kw_only=True)
class Seen:
    """What one rank saw of a run.

    Attributes:
        local_seconds: Of blocks of K / 4 local steps, without rounds.
        round_seconds: Of rounds; the first may make connections.
        losses: Of each step, nats a token, the router's losses included.
        val_loss: Of the global model at the end, nats a token.
        payload: Bytes handed to collectives, by kind.
        wire: Bytes sent, by kind.
        expected: The cost formula's bytes by kind, payload and wire; None where there is no formula.
        peak_mib: Most device memory in tensors.
        resident: Parameters on this rank.
        saved_val_loss: Val_loss of the checkpoint on one device, if there was one.
    """

    local_seconds: list[float]
    round_seconds: list[float]
    losses: list[float]
    val_loss: float
    payload: dict[str, int]
    wire: dict[str, int]
    expected: dict[str, list[int]] | None
    peak_mib: float
    resident: int
    saved_val_loss: float | None = None

    @property
    def ledger_is_formula(self) -> bool:
        """Whether both counts of bytes agree, kind by kind."""
        return self.expected is None or all(
            pair == [self.payload[kind], self.wire[kind]] for kind, pair in self.expected.items()
        )


def expected_bytes(job: Job, settings: dict[str, Any], rank: int, n: int, n_domains: int) -> dict[str, list[int]]:
    """[payload, wire] by kind for one rank."""
    metric_bytes = metric_bytes_of(job.architecture, n_domains)
    if not settings:  # DDP
        [gradients] = ddp_collectives(job.architecture, n)
        formula = Ledger()
        formula.all_reduce(gradients.kind, job.steps * gradients.payload, n)
        return {"dense": [formula.payload("dense"), formula.wire("dense")]}
    if settings.get("ranks_per_site", 1) > 1:
        return {}  # of one site: nothing crosses
    formula = predict_bytes(
        job.architecture, FederationConfig(**settings), n_sites=n, site=rank, steps=job.steps,
        validations=(job.steps,), metric_bytes=metric_bytes,
    )  # fmt: skip
    return {kind: [formula.payload(kind), formula.wire(kind)] for kind in PREDICTED}


@contextmanager
def alone() -> Iterator[None]:
    """Make this process, of several, a launch of one."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    before = {name: os.environ[name] for name in names}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    try:
        yield
    finally:
        os.environ |= before


def train(job: Job, label: str, settings: dict[str, Any], rank: int, n: int, backend: str, *, save: bool) -> Seen:
    """One run of one variant on this rank, in a process group of its own."""
    gc.collect()  # the last run's model: Trainer and callbacks refer to each other
    if job.accelerator == "gpu":
        torch.cuda.set_device(rank)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    store = dist.FileStore(str(job.output / "stores" / label), n)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=SITE_TIMEOUT)
    clock = Clock(job.block, job.checkpoint(label) if save else None)
    federated = cast(Any, FederatedStrategy)
    strategy: SiteStrategy = (
        federated(**settings, timeout_seconds=SITE_TIMEOUT.total_seconds()) if settings else CountedDDPStrategy()
    )
    trainer = L.Trainer(
        accelerator=job.accelerator, devices=n, strategy=strategy, precision="bf16-mixed", max_steps=job.steps,
        gradient_clip_val=CLIP_NORM, val_check_interval=job.steps, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, log_every_n_steps=job.local_steps, default_root_dir=job.output, callbacks=[clock],
        **BARE,
    )  # fmt: skip
    module, data = job.module(), job.data(settings.get("ranks_per_site", 1))
    trainer.fit(module, data)
    peak = torch.cuda.max_memory_allocated() / MIB if job.accelerator == "gpu" else 0.0
    return Seen(
        local_seconds=clock.local_seconds, round_seconds=clock.round_seconds,
        losses=[float(loss) for loss in clock.losses], val_loss=float(trainer.callback_metrics["val/loss"]),
        payload={kind: strategy.ledger.payload(kind) for kind in KINDS},
        wire={kind: strategy.ledger.wire(kind) for kind in KINDS},
        expected=expected_bytes(job, settings, rank, n, len(data.domains)), peak_mib=peak,
        resident=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip


def validate(job: Job, label: str) -> float:
    """The saved global model's loss on one device."""
    with alone():
        trainer = L.Trainer(
            accelerator=job.accelerator, devices=1, strategy=SingleSiteStrategy(), precision="bf16-mixed",
            default_root_dir=job.output, **BARE,
        )  # fmt: skip
        folder = job.checkpoint(label)
        trainer.validate(job.module(), job.data(), ckpt_path=folder, weights_only=False, verbose=False)
    shutil.rmtree(folder)
    return float(trainer.callback_metrics["val/loss"])
