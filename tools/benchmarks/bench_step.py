"""What Lightning costs a training step: FoMoEModule in a Trainer against a plain PyTorch loop.

`python tools/benchmarks/bench_step.py -c configs/model/fomoe-153m.yaml --output runs/bench_step`

Both train the same model from the same initial weights on the same batches, with the same loss, optimizer, clipping
and precision, in one process. Blocks of steps alternate: the Trainer pauses in a callback while the plain loop runs
its block. The Trainer's strategy is FederatedStrategy with one site whose round does not end before the run does. On
a GPU, waits of the host for the device are counted too (`torch.cuda.set_sync_debug_mode`), with where they happen.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from harness import BARE, CLIP_NORM, Report, markdown, now, random_tokens, read
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fomoe_pl.callbacks import (
    CommunicationMonitor,
    FoMoEProgressBar,
    RoutingStability,
    RunReport,
    ThroughputMonitor,
)
from fomoe_pl.costs.memory import MIB
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.module import Batch, FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer, inner_schedule
from fomoe_pl.strategies import FederatedStrategy

DISTINCT_BATCHES = 8
SEED = 0
LOG_EVERY = 10
WAIT_MESSAGE = "synchronizing CUDA operation"


class RandomBatches(Dataset[Batch]):
    """A few batches of random tokens, again and again.

    Args:
        vocab_size: Number of token ids V.
        batch_size: Sequences of a batch B.
        sequence_length: Tokens of a sequence S.
        length: How many batches there are, repetitions included.
    """

    def __init__(self, vocab_size: int, batch_size: int, sequence_length: int, length: int) -> None:
        self.domain = torch.zeros(batch_size, dtype=torch.int64)
        self.inputs, self.targets = random_tokens(DISTINCT_BATCHES, vocab_size, batch_size, sequence_length)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        i = index % DISTINCT_BATCHES
        return {"inputs": self.inputs[i], "targets": self.targets[i], "domain": self.domain}


class PlainLoop:
    """The loop that one would write without Lightning.

    Args:
        architecture: The model.
        batches: The data; pinned once.
        device: Where to train.
        max_steps: Steps of the whole run.
    """

    def __init__(self, architecture: ModelConfig, batches: RandomBatches, device: torch.device, max_steps: int) -> None:
        settings = OptimizerConfig()
        self.device = device
        self.model = Transformer(architecture, seed=SEED).to(device)
        self.optimizer = inner_optimizer(self.model, settings)
        self.schedule = inner_schedule(self.optimizer, settings, max_steps)
        ready = [batches[i] for i in range(DISTINCT_BATCHES)]
        if device.type == "cuda":
            ready = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in ready]
        self.batches: Iterator[Batch] = cycle(ready)

    def run(self, steps: int) -> Tensor:
        """Train; return what the last step minimised."""
        model, optimizer = self.model, self.optimizer
        # In the optimizer's order, as Lightning does: another order of summation would not give the same bits.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(steps):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(self.batches).items()}
            with torch.autocast(self.device.type, torch.bfloat16):
                total = training_pass(model, batch["inputs"], batch["targets"]).total
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            self.schedule.step()
        return total.detach()


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and optimizer state: what a pausing model keeps occupied."""
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Blocks:
    """What was measured of one of the two loops.

    Attributes:
        tokens_per_second: Of each block.
        peak_bytes: Most device memory in a block, without what the other loop keeps; 0 on a CPU.
    """

    tokens_per_second: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, tokens: int, seconds: float, peak_bytes: int) -> None:
        """Add a block."""
        self.tokens_per_second.append(tokens / seconds)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)


class Alternate(L.Callback):
    """Times blocks of the Trainer's steps and, between them, of the plain loop's. Must be the last callback.

    Args:
        plain: The other loop.
        warmup: Steps of both before the first block.
        steps: Steps of a block.
        blocks: Blocks of each.
        tokens: Tokens of a step.
    """

    def __init__(self, plain: PlainLoop, *, warmup: int, steps: int, blocks: int, tokens: int) -> None:
        self.plain = plain
        self.warmup, self.steps, self.blocks, self.tokens = warmup, steps, blocks, tokens
        self.of_trainer, self.of_plain = Blocks(), Blocks()
        self.losses: tuple[float, float] = (float("nan"), float("nan"))
        self.waits: Counter[str] = Counter()
        self.waits_of_steps: list[int] = []
        self._start = 0.0
        self._watch = ExitStack()
        self._caught: list[warnings.WarningMessage] = []

    @property
    def measured_steps(self) -> int:
        """Steps until the last block ends."""
        return self.warmup + self.steps * self.blocks

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        """End a block of the Trainer's, run one of the plain loop's, start the next."""
        step = trainer.global_step
        if step == self.warmup:
            self.plain.run(self.warmup)
            self._begin()
        elif self.warmup < step <= self.measured_steps and (step - self.warmup) % self.steps == 0:
            self._end(self.of_trainer, held_bytes(self.plain.model, self.plain.optimizer))
            self._begin()
            loss = self.plain.run(self.steps)
            # The site's anchors are as large as its parameters in float32.
            anchors = sum(4 * p.numel() for p in pl_module.parameters())
            self._end(self.of_plain, held_bytes(pl_module, trainer.optimizers[0]) + anchors)
            self.losses = (float(outputs["loss"]), float(loss))
            self._begin()
        if self.plain.device.type == "cuda" and step >= self.measured_steps:
            self._count_waits(step - self.measured_steps)

    def _count_waits(self, watched: int) -> None:
        """Called at the end of the last measured step (0 watched) and of each step after it."""
        if watched == 0:
            self._caught = self._watch.enter_context(host_waits())
        elif watched <= LOG_EVERY:
            waits = [w for w in self._caught if WAIT_MESSAGE in str(w.message)]
            self.waits_of_steps.append(len(waits))
            self.waits.update(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
            self._caught.clear()
        if watched == LOG_EVERY:
            self._watch.close()

    def _begin(self) -> None:
        self._start = now()
        if self.plain.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _end(self, blocks: Blocks, held_by_other: int) -> None:
        seconds = now() - self._start
        peak = torch.cuda.max_memory_allocated() - held_by_other if self.plain.device.type == "cuda" else 0
        blocks.add(self.tokens * self.steps, seconds, peak)


@contextmanager
def host_waits() -> Iterator[list[warnings.WarningMessage]]:
    """Collect one warning for each time that the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=f".*{WAIT_MESSAGE}")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measure(
    architecture: ModelConfig,
    output: Path,
    *,
    accelerator: str,
    with_callbacks: bool,
    batch_size: int,
    sequence_length: int,
    warmup: int,
    steps: int,
    blocks: int,
) -> dict[str, Any]:
    """Run both loops and return medians, ratio, memory, losses and waits."""
    gc.collect()  # the last variant's models: Trainer and callbacks refer to each other
    device = torch.device("cuda", 0) if accelerator == "gpu" else torch.device("cpu")
    # One more than is looked at: the last step ends the round, and waits.
    max_steps = warmup + steps * blocks + LOG_EVERY + 1
    batches = RandomBatches(architecture.vocab_size, batch_size, sequence_length, max_steps + 1)
    plain = PlainLoop(architecture, batches, device, max_steps)
    alternate = Alternate(plain, warmup=warmup, steps=steps, blocks=blocks, tokens=batch_size * sequence_length)
    # There is no text to probe with; tools/benchmarks/bench_watching.py measures that.
    observers: list[L.Callback] = [
        RoutingStability(probe_sequences=0), CommunicationMonitor(), ThroughputMonitor(), FoMoEProgressBar(),
        RunReport(),
    ]  # fmt: skip
    watched: dict[str, Any] = {}
    if with_callbacks:
        watched = {"enable_progress_bar": True, "logger": TensorBoardLogger(output, name="", version="")}
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, strategy=FederatedStrategy(sites=1, local_steps=max_steps),
        precision="bf16-mixed", gradient_clip_val=CLIP_NORM, max_steps=max_steps, limit_val_batches=0,
        use_distributed_sampler=False,  # it would shuffle: both loops take the batches in the same order
        log_every_n_steps=LOG_EVERY, default_root_dir=output,
        callbacks=[*(observers if with_callbacks else []), alternate], **BARE | watched,
    )  # fmt: skip
    # batch_size None: these are batches already.
    loader = DataLoader(batches, batch_size=None, pin_memory=device.type == "cuda")
    trainer.fit(FoMoEModule(architecture, seed=SEED, cuda_graphs=False), loader)  # as the plain loop runs
    ours, theirs = alternate.of_trainer, alternate.of_plain
    ratios = [a / b for a, b in zip(ours.tokens_per_second, theirs.tokens_per_second, strict=True)]
    return {
        "trainer_tokens_per_second": ours.tokens_per_second,
        "plain_tokens_per_second": theirs.tokens_per_second,
        "trainer_median": statistics.median(ours.tokens_per_second),
        "plain_median": statistics.median(theirs.tokens_per_second),
        "trainer_over_plain": statistics.median(ratios),
        "trainer_peak_mib": ours.peak_bytes / MIB,
        "plain_peak_mib": theirs.peak_bytes / MIB,
        "last_losses": alternate.losses,
        "waits_of_steps": alternate.waits_of_steps,
        "waits_where": dict(alternate.waits),
    }


def bench(
    architecture: ModelConfig,
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    batch_size: int = 16,
    sequence_length: int = 2048,
    warmup: int = 10,
    steps: int = 20,
    blocks: int = 5,
) -> dict[str, Any]:
    """Measure with all callbacks and logger, and with none; write and print a row after each.

    Args:
        architecture: The model.
        output: Folder for results and curves.
        accelerator: Gpu or cpu.
        batch_size: Sequences of a step B.
        sequence_length: Tokens of a sequence S.
        warmup: Steps before the first block.
        steps: Steps of a block.
        blocks: Blocks of each loop.

    Returns:
        By variant what was measured.
    """
    folder = Path(output)
    settings = {"batch_size": batch_size, "sequence_length": sequence_length, "steps": steps, "blocks": blocks}
    report = Report(folder, "bench_step", accelerator, settings)
    results: dict[str, Any] = {}
    for variant, with_callbacks in (("callbacks", True), ("bare", False)):
        results[variant] = measure(
            architecture, folder / variant, accelerator=accelerator, with_callbacks=with_callbacks,
            batch_size=batch_size, sequence_length=sequence_length, warmup=warmup, steps=steps, blocks=blocks,
        )  # fmt: skip
        print(report.write(results, *tables(results)), flush=True)
    return results


def tables(results: dict[str, Any]) -> list[str]:
    """A row for each variant; losses and waits."""
    columns = ("variant", "Trainer tokens/s", "plain tokens/s", "Trainer / plain", "Trainer MiB", "plain MiB")
    rows = [
        [variant, f"{r['trainer_median']:,.0f}", f"{r['plain_median']:,.0f}", f"{r['trainer_over_plain']:.4f}",
         f"{r['trainer_peak_mib']:,.0f}", f"{r['plain_peak_mib']:,.0f}"] for variant, r in results.items()
    ]  # fmt: skip
    seen = [f"{variant}: losses {r['last_losses']}, waits of steps {r['waits_of_steps']} {r['waits_where']}"
            for variant, r in results.items()]  # fmt: skip
    return [markdown(columns, rows), *seen]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and measure."""
    _, architecture, settings = read("Trainer against a plain loop, interleaved.", bench, arguments)
    bench(architecture, **settings)


if __name__ == "__main__":
    main()
