"""What `bench_model.py` writes: a row for each contestant, tables in Markdown, and what the targets say of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from fomoe_pl.costs.memory import GIB
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import flops_by_part

MFU_TARGET, HF_TARGET, MEMORY_TARGET_GIB = 0.5, 1.6, 20.0
SHADOW_SPEED, SHADOW_MEMORY = 1.05, 1.1
SKIP_SHARE, HALF_TARGET, PORTABLE_TARGET = 0.9, 1.16, 1.5


def model_flops(config: ModelConfig, sequence_length: int, live_picks: float | None) -> float:
    """FLOPs of a token's training step, forward and backward: every matrix product that the model asks for.

    6 for each parameter that multiplies a token, and attention over the causal half of the square of positions.
    Nothing is counted twice that is computed twice, and the embedding lookup is not counted.

    Args:
        config: The architecture.
        sequence_length: Positions S of a sequence.
        live_picks: Mean number of routed experts that ran for a token and layer; `top_k` for the nominal count, None
            for a model without router and experts.
    """
    parts = flops_by_part(config, sequence_length, executed_picks=live_picks)
    experts = 0.0 if live_picks is None else parts.router + parts.experts
    return 3 * (parts.projections + parts.scores / 2 + experts + parts.output)


@dataclass(kw_only=True)
class Row:
    """What was measured of one contestant.

    Attributes:
        case: The model.
        variant: The build, a name in `VARIANTS`.
        fraction: Resident experts over all: "1", "1/2", ..., "0".
        resident: Resident experts of a layer.
        tokens: Of a step.
        seconds: Of a step, block by block.
        ratios: Tokens/s over the reference's, block by block: of blocks that ran one after the other.
        flops: Of a token, executed (see `model_flops`).
        nominal_flops: Of a token of the whole model.
        peak_flops: FLOP/s of a large matrix product on this device.
        peak_bytes: Most device memory, without the other contestant's; 0 on a CPU.
        build_seconds: To make the model on its device.
        warmup_seconds: Of the steps before the first block, compilation included.
        compiled_late: Graphs that were compiled while blocks were timed: there should be none.
        ghost_fraction: Measured share of skipped picks; None if there are no experts, or it is not ours.
        loss: What the last step minimised, nats a token, the router's losses included.
        note: What else to know, or why there are no figures.
    """

    case: str
    variant: str
    fraction: str = "1"
    resident: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    flops: float = 0.0
    nominal_flops: float = 0.0
    peak_flops: float = 0.0
    peak_bytes: int = 0
    build_seconds: float = 0.0
    warmup_seconds: float = 0.0
    compiled_late: int = 0
    ghost_fraction: float | None = None
    loss: float | None = None
    note: str = ""

    @property
    def step_seconds(self) -> float:
        """Median of the blocks."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """At the median."""
        return self.tokens / self.step_seconds

    @property
    def speed(self) -> float:
        """Median of the ratios to the reference; 1 for the reference itself."""
        return statistics.median(self.ratios) if self.ratios else 1.0

    def mfu(self, flops: float) -> float:
        """Share of the device's matrix peak, for these FLOPs of a token."""
        return flops * self.tokens_per_second / self.peak_flops

    def cells(self) -> list[str]:
        """The row of the table."""
        head = [self.case, self.variant, self.fraction]
        if not self.seconds:
            return [*head, *[""] * (len(COLUMNS) - len(head) - 1), self.note]
        late = f"{self.compiled_late} graphs compiled while timed" if self.compiled_late else ""
        note = "; ".join(filter(None, (self.note, late)))
        low, high = self.tokens / max(self.seconds), self.tokens / min(self.seconds)
        return [
            *head,
            f"{self.tokens_per_second:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{1e3 * self.step_seconds:.2f}",
            f"{self.speed:.3f}",
            f"{self.mfu(self.flops):.3f}",
            f"{self.mfu(self.nominal_flops):.3f}",
            f"{self.peak_bytes / GIB:.2f}" if self.peak_bytes else "",
            f"{self.build_seconds:.1f} + {self.warmup_seconds:.1f}",
            "" if self.ghost_fraction is None else f"{self.ghost_fraction:.4f}",
            note,
        ]


COLUMNS = (
    "model", "variant", "resident", "tokens/s, median", "range", "step (ms)", "speed over reference", "MFU executed",
    "MFU nominal", "peak memory (GiB)", "build + warm-up (s)", "ghost fraction", "note",
)  # fmt: skip


@dataclass(kw_only=True)
class SiteRow:
    """How one site of several, or a full replica, fared in training.

    Attributes:
        what: Which of them.
        predicted_bytes: Peak memory by the system model.
        peak_bytes: Measured; None if it did not run.
        tokens_per_second: Of local steps, median.
        round_seconds: Of an outer step with its copies, median.
        losses: Of the last steps of the first and the last round.
        out_of_memory: Whether that is why it did not train.
        note: What stood in for what, or the error.
    """

    what: str
    predicted_bytes: int
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    round_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    out_of_memory: bool = False
    note: str = ""

    def cells(self) -> list[str]:
        """The row of the table."""
        trained = self.tokens_per_second is not None
        return [
            self.what,
            "trains" if trained else "does not train",
            f"{self.predicted_bytes / GIB:.1f}",
            "" if self.peak_bytes is None else f"{self.peak_bytes / GIB:.1f}",
            f"{self.tokens_per_second:,.0f}" if self.tokens_per_second is not None else "",
            f"{self.round_seconds:.2f}" if self.round_seconds is not None else "",
            " to ".join(f"{loss:.3f}" for loss in self.losses),
            self.note,
        ]


SITE_COLUMNS = (
    "who", "result", "memory by formula (GiB)", "peak memory (GiB)", "tokens/s of local steps", "round (s)", "loss",
    "note",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A target and what was measured.

    Attributes:
        case: The model.
        what: The target in words.
        measured: The figure.
        bound: What it must reach.
        at_most: Whether the figure must stay below the bound instead.
    """

    case: str
    what: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def cells(self) -> list[str]:
        """The row of the table."""
        sign = "≤" if self.at_most else "≥"
        return [
            self.case,
            self.what,
            f"{self.measured:.3f}",
            f"{sign} {self.bound:.3f}",
            "met" if self.met else "MISSED",
        ]


TARGET_COLUMNS = ("model", "target", "measured", "bound", "")


def targets(rows: Sequence[Row], *, on_gpu: bool) -> list[Target]:
    """The targets for which there are rows.

    Args:
        rows: Of all cases; each case's ratios are over one reference, which is whole.
        on_gpu: Whether they are of a GPU; on a CPU the target is not to be slower than Hugging Face's eager OLMoE.
    """
    found: list[Target] = []
    for case in dict.fromkeys(row.case for row in rows):
        of = {(row.variant, row.fraction): row for row in rows if row.case == case and row.seconds}
        if on_gpu:
            found += _speed_targets(case, of)
        else:
            found += [
                Target(case, f"as fast as {name}", 1 / row.speed, 1.0)
                for (name, _), row in of.items()
                if name in ("hf_eager", "hf_loop")
            ]
    return found


def _speed_targets(case: str, of: dict[tuple[str, str], Row]) -> list[Target]:
    ours = of.get(("ours", "1"))
    if ours is None:
        return []
    found = []
    if case == "olmoe-1.3b":
        found.append(Target(case, "MFU, all resident", ours.mfu(ours.flops), MFU_TARGET))
        found += [
            Target(case, f"tokens/s over {name}'s", 1 / row.speed, HF_TARGET)
            for (name, _), row in of.items()
            if name.startswith("hf_") and name.endswith("compiled")
        ]
        for name, how in (
            ("ours", ""), ("ours_saving", ", experts checkpointed"), ("ours_least", ", blocks checkpointed"),
        ):  # fmt: skip
            if row := of.get((name, "1")):
                what = f"memory, all resident{how} (GiB)"
                found.append(Target(case, what, row.peak_bytes / GIB, MEMORY_TARGET_GIB, at_most=True))
        found += _skip_targets(case, of)
        found += _shadow_targets(case, of)
    half = of.get(("ours", "1/2"))
    if case == "fomoe-153m" and half is not None:
        found.append(Target(case, "half resident, over our whole model", half.speed, HALF_TARGET))
        found += [
            Target(case, f"or half resident, over {name}", half.speed / row.speed, PORTABLE_TARGET)
            for (name, fraction), row in of.items()
            if name.startswith("grouped") and fraction == "1/2"
        ]
    return found


def _shadow_targets(case: str, of: dict[tuple[str, str], Row]) -> list[Target]:
    """Copies of half of the experts against the whole model's speed and the memory without copies."""
    copies, ghosts = of.get(("ours_shadow", "1/2")), of.get(("ours", "1/2"))
    if copies is None:
        return []
    found = [Target(case, "half resident, half copied, over our whole model", copies.speed, SHADOW_SPEED)]
    if ghosts is not None and ghosts.peak_bytes:
        share = copies.peak_bytes / ghosts.peak_bytes
        found.append(Target(case, "memory with copies over that with ghosts", share, SHADOW_MEMORY, at_most=True))
    return found


def _skip_targets(case: str, of: dict[tuple[str, str], Row]) -> list[Target]:
    """Speed-ups against 0.9 / (1 - f·g), f being the experts' share of a step of the whole model."""
    ours = {Fraction(fraction): row for (name, fraction), row in of.items() if name == "ours"}
    if 0 not in ours or 1 not in ours:
        return []
    share = 1 - 1 / ours[Fraction(0)].speed
    found = []
    slower = 1.0
    for fraction in sorted((f for f in ours if 0 < f < 1), reverse=True):
        row = ours[fraction]
        assert row.ghost_fraction is not None, "our rows have a ghost fraction"
        bound = SKIP_SHARE / (1 - share * row.ghost_fraction)
        found.append(Target(case, f"speed-up at {fraction} resident, f = {share:.3f}", row.speed, bound))
        found.append(Target(case, f"speed-up at {fraction} not below that with more experts", row.speed, slower))
        slower = row.speed
    return found
