"""Blocks of steps of two contestants in turn, and what is measured of them, for `bench_model.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import cycle

import torch
import torch._dynamo
from harness import in_turns, now, random_tokens
from model_contestants import VARIANTS, Batch, Contestant, HuggingFace, build, is_olmoe
from model_rows import Row, model_flops

from fomoe_pl.model.config import ModelConfig

DISTINCT_BATCHES = 4
PEAK_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        config: The architecture.
        batch_size: Sequences of a step.
        sequence_length: Tokens of a sequence.
    """

    config: ModelConfig
    batch_size: int
    sequence_length: int


def device_of(name: str) -> torch.device:
    """The first GPU for `cuda`, or the CPU."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def random_batches(case: Case, device: torch.device) -> list[Batch]:
    """A few batches of random tokens on the host, pinned for a GPU."""
    tokens = random_tokens(DISTINCT_BATCHES, case.config.vocab_size, case.batch_size, case.sequence_length)
    pairs = list(zip(*tokens, strict=True))
    return [(a.pin_memory(), b.pin_memory()) for a, b in pairs] if device.type == "cuda" else pairs


@dataclass
class Timer:
    """Times blocks of steps of contestants on the batches of a case.

    Attributes:
        batches: On the host, pinned for a GPU.
        device: Where contestants train.
        steps: Of a block, at least.
        block_seconds: Of a block, at least.
        warmup: Steps before the first block.
    """

    batches: list[Batch]
    device: torch.device
    steps: int
    block_seconds: float
    warmup: int

    def run(self, contestant: Contestant, steps: int) -> float:
        """Seconds of a number of steps."""
        start = now()
        for _, batch in zip(range(steps), cycle(self.batches), strict=False):
            contestant.step(batch)
        return now() - start

    def warm_up(self, contestant: Contestant, row: Row, held_by_other: int) -> int:
        """Take the first steps; returns how many steps a block has."""
        with self._peak(row, held_by_other):  # a recorded pass allocates while it is recorded, and no more
            row.warmup_seconds = self.run(contestant, self.warmup)
            once = self.run(contestant, 1)
        return max(self.steps, int(self.block_seconds / once) + 1)

    def block(self, contestant: Contestant, row: Row, steps: int, held_by_other: int) -> float:
        """Time a block, into the contestant's row; returns seconds a step."""
        graphs = _graphs()
        with self._peak(row, held_by_other):
            seconds = self.run(contestant, steps) / steps
        row.compiled_late += _graphs() - graphs
        row.seconds.append(seconds)
        return seconds

    @contextmanager
    def _peak(self, row: Row, held_by_other: int) -> Iterator[None]:
        """Keep the most memory in tensors that a row has seen."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.device.type == "cuda":
            row.peak_bytes = max(row.peak_bytes, torch.cuda.max_memory_allocated(self.device) - held_by_other)

    def allocated(self) -> int:
        """Device memory in tensors now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def _graphs() -> int:
    """How many graphs have been compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a large dense matrix product, bfloat16 on a GPU and float32 on a CPU: median of five timings."""
    size, dtype = PEAK_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(7):
        start = now()
        for _ in range(10):
            torch.mm(a, b, out=out)
        times.append((now() - start) / 10)
    return 2 * size**3 / sorted(times[2:])[2]


class Match:
    """One case: its reference, and one contestant after the other against it.

    Args:
        name: Of the case.
        case: Model and batch.
        timer: With the case's batches.
        add: Takes a row when it is there.
        peak: Matrix peak of the device, FLOP/s.
        blocks: Of each contestant.
        deadline: After which no contestant is made, on `time.monotonic`.
    """

    def __init__(
        self, name: str, case: Case, timer: Timer, add: Callable[[Row], None], peak: float, blocks: int, deadline: float
    ) -> None:
        self.name, self.case, self.timer, self.add = name, case, timer, add
        self.peak, self.blocks, self.deadline = peak, blocks, deadline
        self.reference: Contestant | None = None
        self.reference_row = Row(case=name, variant="")
        self.reference_steps = 0

    def meet(self, variant: str, fraction: Fraction) -> bool:
        """Measure a contestant; the first that runs becomes the reference. Whether it ran."""
        row = Row(case=self.name, variant=variant, fraction=str(fraction))
        if isinstance(VARIANTS[variant], HuggingFace) and not is_olmoe(self.case.config):
            return False
        if time.monotonic() > self.deadline:
            row.note = "not run: the time of this case was over"
        else:
            try:
                self._measure(row, fraction)
            except Exception as error:  # other versions, too little memory: the row says why, the others still run
                row.seconds, row.ratios = [], []
                row.note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".replace("|", "/")
        # Only now: an exception keeps the frames, and so the tensors, of what failed.
        gc.collect()
        if self.timer.device.type == "cuda":
            torch.cuda.empty_cache()
        if row is not self.reference_row:
            self.add(row)
        return bool(row.seconds)

    def _measure(self, row: Row, fraction: Fraction) -> None:
        timer, config = self.timer, self.case.config
        held_by_reference, start = timer.allocated(), now()
        contestant = build(row.variant, config, timer.device, fraction, autocast=timer.device.type == "cuda")
        row.build_seconds = now() - start
        row.resident, row.note = contestant.resident, contestant.note
        row.tokens, row.peak_flops = self.case.batch_size * self.case.sequence_length, self.peak
        steps = timer.warm_up(contestant, row, held_by_reference)
        held = timer.allocated() - held_by_reference
        blocks = {"theirs": partial(timer.block, contestant, row, steps, held_by_reference)}
        if self.reference is not None:
            blocks["own"] = partial(timer.block, self.reference, self.reference_row, self.reference_steps, held)
        found = in_turns(blocks, self.blocks)
        row.ratios = [own / theirs for own, theirs in zip(found.get("own", ()), found["theirs"], strict=False)]
        row.loss, row.ghost_fraction = contestant.loss(), contestant.ghost_fraction()
        length, live = self.case.sequence_length, 1 - (row.ghost_fraction or 0.0)
        row.nominal_flops = model_flops(config, length, config.top_k)
        row.flops = model_flops(config, length, config.top_k * live if row.resident else None)
        if contestant.copying:  # of copies the gradients of weights alone are not computed
            row.flops = (2 * row.nominal_flops + row.flops) / 3
        if self.reference is None:
            self.reference, self.reference_row, self.reference_steps = contestant, row, steps
            self.add(row)
