"""Strategies on the GPUs of one host, one GPU a site, over NCCL: speed, rounds, bytes, memory, loss.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/bench_gpus.py -c configs/model/fomoe-153m.yaml \
      --root runs/data/sample_16384 --output runs/bench_gpus/153m

Every variant is a file of `configs/strategy` with the overlaps that the number of sites allows, trained by Lightning's
Trainer in the same processes, one after the other, from the same initial weights. `single` is the same model on one
GPU while the others are idle: it alternates with `local_adamw`, and the ratio of their local speeds is the scaling
efficiency. Variants named in `--gloo` run again over gloo, and their losses are compared step by step with NCCL's.
Checkpoints of variants named in `--save` are validated on one GPU. Ledgers are compared with the cost formula.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from gpu_runs import Job, Seen, alone, train, validate, variants
from harness import SITE_TIMEOUT, Report, markdown, read

from fomoe_pl.costs.memory import MIB
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.optimizer import OptimizerConfig


class Together:
    """Lets ranks wait for each other without a process group, which every run creates and destroys.

    Args:
        folder: Where ranks leave what they saw.
        rank: This rank.
        n: Number of ranks.
    """

    def __init__(self, folder: Path, rank: int, n: int) -> None:
        self.folder, self.rank, self.n = folder, rank, n
        # torchrun's own store.
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def run(self, label: str, ranks: Sequence[int], work: Callable[[], Seen]) -> list[dict[str, Any]]:
        """Do the work on some ranks and return what each of them saw, on every rank."""
        if self.rank in ranks:
            (self.folder / f"{label}-{self.rank}.json").write_text(json.dumps(asdict(work())))
        self.meet(label)
        return [json.loads((self.folder / f"{label}-{r}.json").read_text()) for r in ranks]

    def meet(self, label: str) -> None:
        """Wait until every rank is here."""
        self.store.set(f"{label}-{self.rank}", "here")
        self.store.wait([f"{label}-{r}" for r in range(self.n)], SITE_TIMEOUT)


def summary(job: Job, variant: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One variant's figures from what all its ranks saw (a repeated variant has several entries a rank)."""
    block_tokens = job.block * job.batch_size * job.sequence_length
    speed = statistics.median(block_tokens / s for run in runs for s in run["local_seconds"])
    rounds = [s for run in runs for s in (run["round_seconds"][1:] or run["round_seconds"])]
    round_seconds = statistics.median(rounds) if rounds else 0.0
    tokens = job.local_steps * job.batch_size * job.sequence_length
    return {
        "variant": variant,
        "local_tokens_per_second": None if variant == "ddp" else speed,  # its gradients cross in every step
        "with_sync_tokens_per_second": tokens / (tokens / speed + round_seconds),
        "round_seconds": round_seconds,
        "round_seconds_range": [min(rounds), max(rounds)] if rounds else None,
        "wire_mib_a_rank": max(sum(run["wire"].values()) for run in runs) / MIB,
        "ledger_is_formula": all(Seen(**run).ledger_is_formula for run in runs),
        "peak_mib_a_rank": max(run["peak_mib"] for run in runs),
        "resident_parameters": max(run["resident"] for run in runs),
        "train_loss": statistics.fmean(loss for run in runs for loss in run["losses"][-8:]),
        "val_loss": runs[0]["val_loss"],
        "saved_val_loss": next((run["saved_val_loss"] for run in runs if run["saved_val_loss"] is not None), None),
    }


def distance(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, mean and largest difference of two runs' losses, rank by rank and step by step, nats a token."""
    differences = [
        abs(x - y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one["losses"], other["losses"], strict=False)
    ]
    median, mean = statistics.median(differences), statistics.fmean(differences)
    return {"median": median, "mean": mean, "largest": max(differences)}


COLUMNS = ("variant", "local tokens/s a GPU", "with rounds tokens/s a GPU", "round (s)", "sent a rank (MiB)",
           "= formula", "peak a rank (MiB)", "resident parameters", "train loss", "val loss",
           "of the checkpoint on one GPU")  # fmt: skip


def cells(r: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        r["variant"],
        "" if r["local_tokens_per_second"] is None else f"{r['local_tokens_per_second']:,.0f}",
        f"{r['with_sync_tokens_per_second']:,.0f}", f"{r['round_seconds']:.3f}", f"{r['wire_mib_a_rank']:,.0f}",
        "yes" if r["ledger_is_formula"] else "NO", f"{r['peak_mib_a_rank']:,.0f}", f"{r['resident_parameters']:,}",
        f"{r['train_loss']:.4f}", f"{r['val_loss']:.5f}",
        "" if r["saved_val_loss"] is None else f"{r['saved_val_loss']:.5f}",
    ]  # fmt: skip


def bench(
    architecture: ModelConfig,
    root: str,
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    batch_size: int = 8,
    sequence_length: int = 2048,
    local_steps: int = 32,
    rounds: int = 3,
    repeats: int = 3,
    num_workers: int = 1,
    lr: float = 0.01,
    warmup_steps: int = 160,
    only: list[str] | None = None,
    gloo: list[str] | None = None,
    save: list[str] | None = None,
) -> dict[str, Any]:
    """Measure; rank 0 writes both files after every run and prints the page at the end.

    Args:
        architecture: The model.
        root: Prepared corpus with the model's vocabulary.
        output: Folder for results.
        accelerator: Gpu over NCCL, or cpu over gloo to try it out.
        batch_size: Sequences of a step of one site B.
        sequence_length: Tokens of a sequence S.
        local_steps: K.
        rounds: Rounds of a run.
        repeats: How often `single` and `local_adamw` alternate.
        num_workers: Processes that read data for each rank.
        lr: Peak learning rate; models without CompleteP want less.
        warmup_steps: Steps until there.
        only: Names of variants; null is all.
        gloo: Names of variants to train again over gloo, for the rounds that NCCL trained.
        save: Names of variants whose checkpoint is validated on one device.

    Returns:
        What was written.
    """
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(output)
    (folder / "stores").mkdir(parents=True, exist_ok=True)
    job = Job(
        architecture=architecture, root=root, output=folder, accelerator=accelerator, batch_size=batch_size,
        sequence_length=sequence_length, local_steps=local_steps, rounds=rounds, num_workers=num_workers,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=warmup_steps),
    )  # fmt: skip
    together = Together(folder, rank, n)
    known = variants(n, local_steps)
    chosen = [name for name in known if only is None or name in only]
    for name in (*(only or ()), *(gloo or ()), *(save or ())):
        if name not in known:
            raise SystemExit(f"{name} is no variant for {n} GPUs; there are {', '.join(known)}")
    alternating = [name for name in ("single", "local_adamw", "site_replicate", "site_shard") if name in chosen]
    order = alternating * repeats + [name for name in chosen if name not in alternating]
    settings = {"gpus": n, "batch_size": batch_size, "sequence_length": sequence_length, "local_steps": local_steps,
                "rounds": rounds, "lr": lr, "warmup_steps": warmup_steps}  # fmt: skip
    report = Report(folder, "bench_gpus", accelerator, settings) if rank == 0 else None
    results: dict[str, Any] = {"runs": {}, "gloo": {}}

    def one(name: str, label: str, backend: str, *, save: bool = False) -> list[dict[str, Any]]:
        def work() -> Seen:
            if name == "single":
                with alone():
                    return train(job, label, known[name], 0, 1, backend, save=False)
            return train(job, label, known[name], rank, n, backend, save=save)

        seen = together.run(label, [0] if name == "single" else range(n), work)
        if rank == 0:
            print(f"{label}: val loss {seen[0]['val_loss']:.5f}", flush=True)
        return seen

    for i, name in enumerate(order):
        saves = name in (save or ()) and name not in order[:i]
        label = f"{name}-{i}"
        seen = one(name, label, "nccl" if accelerator == "gpu" else "gloo", save=saves)
        if saves:
            if rank == 0:
                seen[0]["saved_val_loss"] = validate(job, label)
            together.meet(f"{label}-validated")
        results["runs"].setdefault(name, []).append(seen)
        if report is not None:
            report.write(results)
    for name in gloo or ():
        results["gloo"][name] = one(name, f"{name}-gloo", "gloo")
        if report is not None:
            report.write(results)
    if report is not None:
        print(report.write(results, *conclude(job, results)))
    return results


def conclude(job: Job, results: dict[str, Any]) -> list[str]:
    """Add ratios and distances to the results; the page's tables."""
    runs = results["runs"]
    rows = [summary(job, name, [seen for again in runs[name] for seen in again]) for name in runs]
    results["summary"] = rows
    tables = [markdown(COLUMNS, [cells(row) for row in rows])]
    for name in ("local_adamw", "site_replicate", "site_shard") if "single" in runs else ():
        pairs = zip(runs.get(name, ()), runs["single"], strict=False)
        ratios = [summary(job, "", a)["local_tokens_per_second"] / summary(job, "", b)["local_tokens_per_second"]
                  for a, b in pairs]  # fmt: skip
        if ratios:
            found = results.setdefault("scaling_efficiency", {})
            found[name] = {"median": statistics.median(ratios), "pairs": ratios}
            tables.append(f"{name}: local steps on all GPUs against one: {found[name]}")
    distances = {f"{name}: the same again": distance(*seen[:2]) for name, seen in runs.items() if len(seen) > 1}
    distances |= {
        f"{name}: gloo against nccl": distance(seen, runs[name][0])
        for name, seen in results["gloo"].items()
        if name in runs
    }
    results["loss_distances"] = distances
    return [*tables, *(f"{name}: losses differ by {found}" for name, found in distances.items())]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser, architecture, settings = read(
        "Strategies on the GPUs of one host; start it with torchrun.", bench, arguments
    )
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, one process for each GPU: torchrun --standalone --nproc-per-node 2 ...")
    bench(architecture, **settings)


if __name__ == "__main__":
    main()
