"""Cost of saving: stall of training, seconds of writing, size on disk, time to resume. Sites of one machine.

    python tools/benchmarks/bench_saving.py -c configs/model/fomoe-153m.yaml --data runs/data/sample \
      --output runs/bench_saving

Every round ends with a save, written in turns while training goes on and while it waits; what the last save has left to
write is waited for first and reported separately. Then all processes restart and resume. The first save of each kind
is a warm-up. On a GPU all sites share the first one, over gloo. Writes `bench_saving.json` and `bench_saving.md`; the
corpus gives text alone, its vocabulary may be smaller than the model's.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed as dist
from harness import BARE, SITE_TIMEOUT, Report, markdown, middle, now, read

from fomoe_pl.checkpoint.format import of_slot, read_manifest
from fomoe_pl.data import FoMoEData
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.files import write_whole
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import FederatedStrategy

PHASE, STARTED = "FOMOE_BENCH_PHASE", "FOMOE_BENCH_STARTED"  # set for the processes that this one starts
LOADING = ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict")
CHECKPOINT = "saved.ckpt"
WARMUP = 2
MB = 1e6


class Clock(L.Callback):
    """Saves at the end of every round, in turns in both ways, and notes times.

    Args:
        path: Checkpoint; None for no saves.
        local_steps: K.
    """

    def __init__(self, path: Path | None, local_steps: int) -> None:
        self.path, self.local_steps = path, local_steps
        self.first_step = 0.0
        self.saves: list[dict[str, Any]] = []
        self._last_end = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Time since the processes were started, after the first step; then the saves."""
        if not self.first_step:
            now()
            self.first_step = time.time() - float(os.environ[STARTED])
        if self.path is None or trainer.global_step % self.local_steps:
            return
        strategy: Any = trainer.strategy
        start = now()
        strategy.checkpoints.settle()
        if self.saves:
            self.saves[-1] |= {
                "seconds_of_writing": strategy.checkpoints.write_seconds, "left_to_write": now() - start,
                "round_after": start - self._last_end,
            }  # fmt: skip
        strategy.checkpoints.async_save = len(self.saves) % 2 == 0
        start = now()
        trainer.save_checkpoint(self.path)
        self._last_end = now()
        self.saves.append({"async": strategy.checkpoints.async_save, "stall": self._last_end - start})


def timed(seconds: dict[str, float], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose seconds are noted under its name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seconds[name] = time.perf_counter() - start
        return result

    return call


def work(phase: str, architecture: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One site of one phase, `train` or `resume`."""
    folder, sites, gpu = Path(settings["output"]), settings["sites"], settings["accelerator"] == "gpu"
    saves = WARMUP + 2 * settings["pairs"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // sites))
    rank = int(os.environ["LOCAL_RANK"])
    store = dist.FileStore(str(folder / f"store-{phase}"), sites)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=sites, timeout=SITE_TIMEOUT)
    outer = Nesterov(0.7) if settings["outer"] == "nesterov" else Average()
    strategy = FederatedStrategy(
        sites=sites, overlap=settings["overlap"], local_steps=settings["local_steps"], outer=outer, share_device=gpu
    )
    seconds: dict[str, float] = {}
    for name in LOADING:
        setattr(strategy, name, timed(seconds, name, getattr(strategy, name)))
    train = phase == "train"
    rounds = saves if train else saves + 1
    clock = Clock(folder / CHECKPOINT if train else None, settings["local_steps"])
    trainer = L.Trainer(
        accelerator=settings["accelerator"], devices=1 if gpu else sites, strategy=strategy,
        precision="bf16-mixed" if gpu else "32-true", max_steps=rounds * settings["local_steps"], limit_val_batches=0,
        check_val_every_n_epoch=None, log_every_n_steps=10, default_root_dir=folder, callbacks=[clock], **BARE,
    )  # fmt: skip
    corpus = FoMoEData(settings["data"], settings["sequence_length"], settings["batch_size"])
    path = None if train else folder / CHECKPOINT
    trainer.fit(FoMoEModule(architecture), corpus, ckpt_path=path, weights_only=False)
    return {
        "first_step": clock.first_step, "loading": sum(seconds.values()), "saves": clock.saves[WARMUP:],
        "first_saves": clock.saves[:WARMUP], "saves_failed": strategy.checkpoints.saves_failed,
        "peak_host_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB,
    }  # fmt: skip


def launch(phase: str, settings: Mapping[str, Any], arguments: list[str]) -> list[dict[str, Any]]:
    """Start all sites of a phase with this command line; what each has found."""
    folder, sites = Path(settings["output"]), settings["sites"]
    (folder / f"store-{phase}").unlink(missing_ok=True)
    processes = []
    for rank in range(sites):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(sites), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, PHASE: phase, STARTED: str(time.time())}
        processes.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{phase}: the sites ended with {codes}")
    return [json.loads((folder / f"{phase}-{rank}.json").read_text()) for rank in range(sites)]


def slowest(sites: list[dict[str, Any]], key: str, *, asynchronous: bool) -> list[float]:
    """A figure of each save of one kind, of the site that took longest; the last save has no round after it."""
    rows = zip(*(site["saves"] for site in sites), strict=True)
    return [max(save[key] for save in row) for row in rows if row[0]["async"] == asynchronous and key in row[0]]


def disk(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint by what they are."""
    sizes = {"weights": 0, "outer momentum": 0, "sites' own state": 0, "trainer": 0}
    for name, about in read_manifest(folder)["files"].items():
        own, momentum = name.startswith("site-"), name.startswith(of_slot("momentum"))
        kind = "sites' own state" if own else "trainer" if name == "trainer.pt" else "weights"
        sizes["outer momentum" if momentum else kind] += about["bytes"]
    return sizes


def tables(results: Mapping[str, Any]) -> list[str]:
    """Of the page."""
    n_parameters, first = results["parameters"], [f"{seconds:.3f}" for seconds in results["first_stalls"]]
    saves = [
        [name, *(middle(results["saving"][kind][key]) for kind in ("async", "sync"))]
        for key, name in (
            ("stall", "training stands still"), ("seconds_of_writing", "from the start of writing to the end"),
            ("left_to_write", "left to write at the next round's end"), ("round_after", "the round after it"),
        )
    ]  # fmt: skip
    sizes = {**results["disk"], "all": sum(results["disk"].values())}
    return [
        f"{n_parameters:,} parameters. Median (range) over the saves of each kind, of the slowest site.",
        markdown(("figure (s)", "while training goes on", "while it waits"), [*saves, ["the first save", *first]]),
        markdown(("on disk", "MB", "bytes a parameter"),
                 [[name, f"{size / MB:,.1f}", f"{size / n_parameters:.2f}"] for name, size in sizes.items()]),
        markdown(("to the first step (s)", "slowest site"),
                 [[name, f"{seconds:.2f}"] for name, seconds in results["starting"].items()]),
        f"Peak host memory of a site: {results['peak_host_MB']:,.0f} MB.",
    ]  # fmt: skip


def bench(
    architecture: ModelConfig,
    data: str,
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    sites: int = 4,
    overlap: int = 2,
    outer: Literal["nesterov", "average"] = "nesterov",
    batch_size: int = 8,
    sequence_length: int = 1024,
    local_steps: int = 8,
    pairs: int = 5,
    keep: bool = False,
) -> None:
    """Measure, print and write `bench_saving.json` and `bench_saving.md`.

    Args:
        architecture: The model.
        data: Folder of a prepared corpus.
        output: Folder for results and the checkpoint: the disk that is measured.
        accelerator: Gpu or cpu.
        sites: Processes M.
        overlap: Sites that hold each expert.
        outer: Outer rule; `nesterov` has a momentum to save.
        batch_size: Sequences of a site's step B.
        sequence_length: Tokens of a sequence S.
        local_steps: Steps of a round K, at whose end a save is.
        pairs: Saves of each kind that count.
        keep: Whether the checkpoint stays.
    """
    settings = {name: value for name, value in locals().items() if name != "architecture"}
    folder, arguments = Path(output), sys.argv[1:]
    phase = os.environ.get(PHASE)
    if phase is not None:
        found = work(phase, architecture, settings)
        write_whole(folder / f"{phase}-{os.environ['LOCAL_RANK']}.json", json.dumps(found))
        return
    folder.mkdir(parents=True, exist_ok=True)
    trained, resumed = launch("train", settings, arguments), launch("resume", settings, arguments)
    if any(site["saves_failed"] for site in trained):
        raise SystemExit("some checkpoints were not written")
    keys = ("stall", "seconds_of_writing", "left_to_write", "round_after")
    results = {
        "parameters": parameter_counts(architecture).total,
        "saving": {
            kind: {key: slowest(trained, key, asynchronous=kind == "async") for key in keys}
            for kind in ("async", "sync")
        },
        "first_stalls": [max(site["first_saves"][i]["stall"] for site in trained) for i in range(WARMUP)],
        "disk": disk(folder / CHECKPOINT),
        "starting": {
            "from scratch, since the process was started": max(site["first_step"] for site in trained),
            "resumed, since the process was started": max(site["first_step"] for site in resumed),
            "of this, reading the checkpoint": max(site["loading"] for site in resumed),
        },
        "peak_host_MB": max(site["peak_host_MB"] for site in trained),
    }
    print(Report(folder, "bench_saving", accelerator, {"settings": settings}).write(results, *tables(results)))
    if not keep:
        shutil.rmtree(folder / CHECKPOINT)
    for name in ("train", "resume"):
        for path in (folder / f"store-{name}", *(folder / f"{name}-{rank}.json" for rank in range(sites))):
            path.unlink(missing_ok=True)


def main() -> None:
    """Read the command line and measure."""
    _, architecture, settings = read("What saving and resuming cost.", bench, None)
    bench(architecture, **settings)


if __name__ == "__main__":
    main()
