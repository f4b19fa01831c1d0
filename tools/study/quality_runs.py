"""What `quality.py` compares: named studies, their runs, and one run on one rank."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, NamedTuple, cast, get_args

import lightning.pytorch as L
import torch
import torch.distributed as dist

from fomoe_pl.data import FoMoEData
from fomoe_pl.data.partition import SplitKind
from fomoe_pl.federation.ledger import KINDS
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.strategies import REGISTERED, FederatedStrategy, SingleSiteStrategy
from fomoe_pl.strategies.base import SiteStrategy

PRECISION: Literal["bf16-mixed"] = "bf16-mixed"
CLIP_NORM = 1.0
FULL, SYNCHRONOUS = "full", "synchronous"
SITE_TIMEOUT = timedelta(minutes=5)
SHUFFLE_SEQUENCES = 1024  # else a site sees few documents of a domain in a round, and equal data is not equal


class Run(NamedTuple):
    """One training run of a study; with the study's name it is what a result is found by.

    Attributes:
        split: How the sites' data differs.
        local_steps: K.
        arm: What is compared: `full`, `synchronous`, or ROUTING_OVERLAP such as `ghost_2`; `shadow4` is shadow routing
            with copies of 4 bits. What is added after a `+` is of `WAYS`, or `diloco` with the outer learning rate.
        seed: Of initial weights and of the order of the data.
    """

    split: SplitKind
    local_steps: int
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.split}, K = {self.local_steps}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One model and recipe, and the runs that are compared.

    Attributes:
        architecture: Fields of ModelConfig but for the vocabulary, which is the corpus's.
        optimizer: Inner optimizer and schedule.
        steps: Optimizer steps of each site.
        batch_size: Sequences of a step of one site B.
        sequence_length: Tokens of a sequence S.
        val_sequences: Sequences that the global model is validated on at the end.
        arms: As for `Run`, the most wanted first.
        sites: M.
        local_steps: Values of K.
        splits: Divisions of the data over sites.
        seeds: All seeds.
    """

    architecture: dict[str, Any]
    optimizer: OptimizerConfig
    steps: int
    batch_size: int
    sequence_length: int
    val_sequences: int
    arms: tuple[str, ...]
    sites: int = 4
    local_steps: tuple[int, ...] = (32,)
    splits: tuple[SplitKind, ...] = ("iid", "domain")
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def tokens(self) -> int:
        """Tokens that all sites train on in a run."""
        return self.steps * self.batch_size * self.sequence_length * self.sites

    def model(self, vocab_size: int) -> ModelConfig:
        """The architecture."""
        return ModelConfig(vocab_size=vocab_size, **self.architecture)

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed: a table of one seed is complete before the next begins.

        Synchronous training has no rounds and sees all sites' data in every step: it is one run of a seed.
        """
        for seed in self.seeds:
            for place, (local_steps, split) in enumerate((k, s) for k in self.local_steps for s in self.splits):
                for arm in self.arms:
                    if arm != SYNCHRONOUS or place == 0:
                        yield Run(split, local_steps, arm, seed)

    def identity(self, corpus: str) -> dict[str, Any]:
        """What a result depends on beside its run, as JSON has it.

        Settings that are not the study's own keep their defaults and are left out: a setting that a later version
        adds does not make results strangers to each other.
        """
        numbers = ("architecture", "steps", "batch_size", "sequence_length", "val_sequences", "sites")
        found = {name: getattr(self, name) for name in numbers}
        found["optimizer"] = {field.name: getattr(self.optimizer, field.name) for field in fields(self.optimizer)
                              if getattr(self.optimizer, field.name) != field.default}  # fmt: skip
        found |= {"corpus": corpus, "precision": PRECISION, "clip_norm": CLIP_NORM,
                  "shuffle_sequences": SHUFFLE_SEQUENCES}  # fmt: skip
        return cast(dict[str, Any], json.loads(json.dumps(found)))


_PARTIAL = ("shadow4_2", "ghost_2", "partitioned_2", "shadow4_1", "ghost_1", "partitioned_1", "shadow2_2", "shadow2_1")
_SMALL: dict[str, Any] = {
    "d_model": 256, "n_layers": 6, "n_heads": 4, "n_experts": 16, "top_k": 2, "d_expert": 256, "base_width": 256,
    "base_depth": 6,
}  # fmt: skip
_STEPS = 1536
_COOLED = OptimizerConfig(lr=3e-3, warmup_steps=96, cooldown_steps=_STEPS // 5)
STUDIES = {
    "16m": Study(
        architecture=_SMALL, optimizer=_COOLED, steps=_STEPS, batch_size=24, sequence_length=256, val_sequences=1536,
        arms=(FULL, *_PARTIAL, SYNCHRONOUS),
    ),
    # Twice as long. At some step the model learns to copy from its context, and its loss falls; in `16m` the step at
    # which a run does so, 700 to 1,500, decides its rank.
    "16m_long": Study(
        architecture=_SMALL, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=96, cooldown_steps=2 * _STEPS // 5),
        steps=2 * _STEPS, batch_size=24, sequence_length=256, val_sequences=1536, local_steps=(32, 8, 128),
        arms=(FULL, "shadow4_2", "shadow4_1", "ghost_2", "partitioned_2", "shadow2_2", SYNCHRONOUS, "full+lean",
              "shadow4_2+lean", "shadow4_1+lean", "shadow4_2+overlapped", "full+topk",
              *(f"full+diloco{lr}" for lr in (0.1, 0.2, 0.4, 0.7, 1.0))),
    ),
    # Five times as large. CompleteP carries the learning rate over from the small one.
    "80m": Study(
        architecture={**_SMALL, "d_model": 512, "n_layers": 8, "n_heads": 8, "d_expert": 512}, optimizer=_COOLED,
        steps=_STEPS, batch_size=24, sequence_length=256, val_sequences=1536,
        arms=(FULL, "shadow4_2", "ghost_2", "partitioned_2", "shadow4_1", SYNCHRONOUS), seeds=(0,),
    ),
    # The shape of the paper's small proxy, its rate, warm-up and number of steps, with the corpus's vocabulary.
    "paper": Study(
        architecture={"d_model": 256, "n_layers": 4, "n_heads": 4, "n_experts": 8, "top_k": 2, "d_expert": 128},
        optimizer=OptimizerConfig(lr=0.01, warmup_steps=160), steps=640, batch_size=64, sequence_length=256,
        val_sequences=1536, local_steps=(32, 64, 128), splits=("iid",), seeds=(0,),
        arms=(FULL, "partitioned_2", "partitioned_1", "ghost_2", "ghost_1", "shadow4_2", "shadow4_1"),
    ),
    # To try the tool itself on a CPU.
    "tiny": Study(
        architecture={"d_model": 64, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 64},
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2), steps=8, batch_size=2, sequence_length=16, val_sequences=12,
        arms=(FULL, "ghost_1", "partitioned_1", "shadow4_1", SYNCHRONOUS, "shadow4_1+lean", "full+diloco0.4"), sites=2,
        local_steps=(4,), splits=("iid",),
        seeds=(0, 1),
    ),
}  # fmt: skip


_LEAN = {"wire_codec": "int4", "error_feedback": True, "moments_codec": "int8"}
WAYS: dict[str, dict[str, Any]] = {
    "lean": _LEAN,
    "overlapped": _LEAN | {"fragments": 4, "delay": 1},
    "topk": {"wire_codec": "topk", "error_feedback": True, "moments_codec": "int8"},
}
"""What an arm may add after a `+`: formats of what is sent, and whether it travels while sites compute."""


def strategy_settings(arm: str, sites: int, local_steps: int) -> dict[str, Any]:
    """Arguments of FederatedStrategy: LocalAdamW's, with the arm's overlap, routing and way of sending.

    Args:
        arm: As for `Run`, but not `synchronous`.
        sites: M.
        local_steps: K.
    """
    arm, _, way = arm.partition("+")
    settings = REGISTERED["local_adamw"][2] | {"local_steps": local_steps, "routing": "ghost"}
    if way.startswith("diloco"):
        settings |= {"outer": Nesterov(float(way.removeprefix("diloco")), 0.9), "inner_moments": "keep"}
    elif way:
        settings |= WAYS[way]
    if arm == FULL:
        return settings
    found = re.fullmatch(r"(ghost|partitioned|shadow)(\d*)_(\d+)", arm)
    assert found is not None, f"{arm} is no arm"
    routing, bits, overlap = found.groups()
    return settings | {"routing": routing, "overlap": int(overlap)} | ({"shadow_bits": int(bits)} if bits else {})


def is_available(arm: str) -> bool:
    """Whether this version has the arm's routing."""
    return arm == SYNCHRONOUS or strategy_settings(arm, 2, 1)["routing"] in get_args(Routing)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how all runs of a study train.

    Attributes:
        study: The study.
        root: Prepared corpus.
        folder: An empty one, for the stores through which sites meet.
        accelerator: Gpu, which all sites share, or cpu.
        compile_blocks: As for FoMoEModule.
        num_workers: As for FoMoEData.
    """

    study: Study
    root: str
    folder: str
    accelerator: str
    compile_blocks: bool
    num_workers: int


class Told(L.Callback):
    """Says how far a run is, four times.

    Args:
        label: Which run.
        steps: Of the run.
    """

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.began = label, time.perf_counter()
        self.marks = {steps * quarter // 4 for quarter in range(1, 5)}

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Say it."""
        if trainer.global_step in self.marks and trainer.is_global_zero:
            seconds = time.perf_counter() - self.began
            print(f"  {self.label}: step {trainer.global_step} after {seconds:.1f} s", flush=True)


def train(place: Place, run: Run, rank: int, store: str) -> dict[str, Any]:
    """Train one run on this rank and validate the global model.

    Args:
        place: where.
        run: which.
        rank: This process's.
        store: File through which the ranks of this run meet; nobody has used it before.

    Returns:
        What there is to report, the same on all ranks but for bytes; nothing on ranks that the run does not need.
    """
    study, alone = place.study, run.arm == SYNCHRONOUS
    if alone and rank:
        return {}
    gpu = place.accelerator == "gpu"
    gc.collect()  # the last run's model: Trainer and callbacks refer to each other
    if gpu:
        torch.cuda.set_device(0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if place.compile_blocks:
        torch._dynamo.reset()  # it counts recompilations over all runs of a process
    strategy: SiteStrategy
    if alone:
        # One process takes the batches of all sites: the gradient is that which data parallelism would average.
        strategy = SingleSiteStrategy()
    else:
        settings = strategy_settings(run.arm, study.sites, run.local_steps)
        settings |= {"sites": study.sites, "share_device": True} if gpu else {}
        strategy = cast(Any, FederatedStrategy)(**settings, timeout_seconds=SITE_TIMEOUT.total_seconds())
        meeting = dist.FileStore(store, study.sites)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=study.sites, timeout=SITE_TIMEOUT)
    data = FoMoEData(
        place.root, sequence_length=study.sequence_length, batch_size=study.batch_size * (study.sites if alone else 1),
        val_batch_size=2 * study.batch_size, val_sequences=study.val_sequences, num_workers=place.num_workers,
        shuffle_sequences=SHUFFLE_SEQUENCES, split=run.split, seed=run.seed,
    )  # fmt: skip
    module = FoMoEModule(
        study.model(data.vocab_size), study.optimizer, seed=run.seed, compile_blocks=place.compile_blocks
    )
    module.measure_other_views()  # in the one validation, at the end
    told = Told(str(run), study.steps)
    trainer = L.Trainer(
        accelerator=place.accelerator, devices=1 if gpu or alone else study.sites, strategy=strategy,
        precision=PRECISION, max_steps=study.steps, max_epochs=-1, gradient_clip_val=CLIP_NORM,
        val_check_interval=study.steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        log_every_n_steps=study.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=place.folder, callbacks=[told],
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.global_step != study.steps:  # a signal ends runs early
        raise RuntimeError(f"the run ended after {trainer.global_step} of {study.steps} steps")
    quality = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()
               if name.startswith("val/")}  # fmt: skip
    return {
        "quality": quality,
        "domains": data.domains,
        "round_seconds": strategy.sync_seconds,
        "sent_bytes": {kind: strategy.ledger.wire(kind) for kind in KINDS},
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "resident_parameters": sum(p.numel() for p in module.parameters()),
        "skipped_steps": module.skipped_steps,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def serve(connection: Any, rank: int, place: Place) -> None:
    """Be one site of one run after the other, until nobody asks any more: Python and kernels are loaded once.

    Args:
        connection: Gives (run, store), takes what `train` returns, or the text of an error.
        rank: Of this site.
        place: As for `train`.
    """
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    while True:
        try:
            run, store = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = train(place, run, rank, store)
        except Exception:
            connection.send(traceback.format_exc())
            return
        connection.send(answer)
