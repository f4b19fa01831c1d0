"""What the planner works with: settings, plans that fit, and settings that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from fomoe_pl.costs.memory import RankMemory
from fomoe_pl.federation.settings import FORMATS, OuterPlace, WireFormat
from fomoe_pl.model.config import Checkpointing
from fomoe_pl.model.residency import Routing
from fomoe_pl.planner.quality import Measurement
from fomoe_pl.planner.request import Layout, Method, Wire


class Saving(NamedTuple):
    """How memory is saved, and at what price.

    Attributes:
        checkpointing: Which activations are recomputed: costs time in each step.
        outer_state: Where anchors and outer momentum live: on the host they cross the bus twice a round.
    """

    checkpointing: Checkpointing = "none"
    outer_state: OuterPlace = "device"


@dataclass(frozen=True)
class RunLength:
    """How long a run is, and how often it is validated and saved: at the end, and at the ends of rounds before.

    Attributes:
        steps: Optimizer steps.
        every: Steps between validations; the last one is at the end.
    """

    steps: int
    every: int

    @property
    def validations(self) -> int:
        """Number of validations."""
        return self.steps // self.every

    @classmethod
    def of(cls, asked: int, local_steps: int, validations: int) -> RunLength:
        """Whole rounds, and equally many between validations: as asked, or a little more.

        Args:
            asked: Steps that the tokens take.
            local_steps: K.
            validations: About how many; the number that lengthens the run least is taken, half as many more
                or fewer at most.
        """
        if asked <= local_steps:
            return cls(asked, asked)
        rounds = math.ceil(asked / local_steps)
        numbers = range(min(validations, rounds) // 2 + 1, min(3 * validations // 2, rounds) + 1)
        best = min(numbers, key=lambda n: (-(-rounds // n) * n, abs(n - validations)))
        every = -(-rounds // best) * local_steps
        return cls(best * every, every)


@dataclass(frozen=True)
class Choice:
    """A setting, before it is known whether it fits."""

    model: str
    layout: Layout
    sites: int
    overlap: int
    method: Method
    routing: Routing
    wire_dtype: Wire
    local_steps: int
    moments_every: int = 1
    fragments: int = 1
    delay: int = 0
    router_every: int | None = None
    capacities: tuple[int, ...] | None = None

    @property
    def wire_codec(self) -> WireFormat | None:
        """Of the changes of matrices, with error feedback; None casts them."""
        return cast(WireFormat, self.wire_dtype) if self.wire_dtype in FORMATS else None

    @property
    def moments_codec(self) -> WireFormat | None:
        """Of averaged moments of matrices."""
        return "int8" if self.wire_codec and self.averages_moments else None

    @property
    def cast_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of what is not coded."""
        return "bfloat16" if self.wire_dtype == "bfloat16" else "float32"

    @property
    def averages_moments(self) -> bool:
        """Whether rounds average the inner moments."""
        return self.method == "local_adamw"


@dataclass(frozen=True)
class Plan:
    """A setting that fits, and what it takes.

    Attributes:
        choice: The setting.
        place_of: For each site of the federation the index of its place.
        ranks: Devices of a site at each place, which train its model together.
        held_experts: Of a layer, by a site at each place, the most where they differ.
        batches: Sequences of a micro-batch of one device of each place.
        accumulate: Micro-batches of a local step.
        val_batch: Sequences of a validation batch of a site.
        saving: How memory is saved.
        global_batch: Sequences of a step, all sites together: what was asked, or a little more.
        length: Optimizer steps and validations.
        tokens: Of the run.
        memory: Of a device of each place, by part.
        sent_per_round: Bytes that leave the busiest place in a round (DDP: in a step), the mean over rounds with and
            without moments, as the ledger's wire column counts them: with the ring's factor, without frames.
        sent_per_validation: The same for a validation of the global model.
        sent_per_save: The same for a checkpoint, as far as it crosses links between sites.
        sent_in_all: The same for the run.
        checkpoint: Bytes on disk, see `checkpoint_bytes`.
        step_seconds: Of the slowest site.
        inside_seconds: Of it, on that site, what its devices send each other.
        round_seconds: Of a round's synchronisation (DDP: a step's), the same mean.
        waiting_seconds: Of it what sites wait for, the rest travels while they compute.
        validation_seconds: Of a validation of the global model.
        save_seconds: Of a save, what crosses links.
        hours: Of the run, validations and saves included.
        price: Of all places for these hours; None if a price is missing.
        quality: A measurement, or None: not measured.
    """

    choice: Choice
    place_of: tuple[int, ...]
    ranks: tuple[int, ...]
    held_experts: tuple[int, ...]
    batches: tuple[int, ...]
    accumulate: int
    val_batch: int
    saving: Saving
    global_batch: int
    length: RunLength
    tokens: int
    memory: tuple[RankMemory, ...]
    sent_per_round: float
    sent_per_validation: float
    sent_per_save: float
    sent_in_all: float
    checkpoint: dict[str, int]
    step_seconds: float
    inside_seconds: float
    round_seconds: float
    waiting_seconds: float
    validation_seconds: float
    save_seconds: float
    hours: float
    price: float | None
    quality: Measurement | None

    @property
    def held_bytes(self) -> tuple[int, ...]:
        """Peak of a device of each place."""
        return tuple(memory.peak for memory in self.memory)

    @property
    def on_host(self) -> int:
        """Most bytes of a device's outer state in the host's memory."""
        return max(memory.on_host for memory in self.memory)

    @property
    def site_batches(self) -> tuple[int, ...]:
        """Sequences of a micro-batch of each site of the federation."""
        return tuple(self.ranks[place] * self.batches[place] for place in self.place_of)

    @property
    def why_not_today(self) -> str | None:
        """Why `fomoe fit` cannot run it today; None if it can."""
        if self.choice.layout == "sharded" and len(set(self.ranks)) > 1:
            return "needs as many devices at each site: `inside: shard` has no others yet"
        return None


@dataclass(frozen=True)
class Refusal:
    """Settings that do not fit, or make no sense.

    Attributes:
        model: File of the model.
        layout: How devices are used.
        methods: Of these settings.
        overlaps: Sites that hold each expert.
        reason: Which memory overflows where and what would fit, or what does not divide.
    """

    model: str
    layout: Layout
    methods: tuple[Method, ...]
    overlaps: tuple[int, ...]
    reason: str
