"""The planner: which settings a federation can run, what each takes, and why the others cannot."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from fomoe_pl.costs.memory import GIB, Load, RankMemory, rank_memory
from fomoe_pl.costs.network import Links
from fomoe_pl.costs.quality import Measurement, penalty
from fomoe_pl.costs.request import RUNS_TODAY, Layout, Method, PlanRequest
from fomoe_pl.costs.rounds import (
    Collective,
    checkpoint_bytes,
    ddp_collectives,
    evaluation_bytes,
    round_collectives,
)
from fomoe_pl.costs.time import run_seconds, step_seconds, step_work
from fomoe_pl.federation.placement import valid_overlaps
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing

MOST_ROUNDING = 0.05
"""Share by which a step may be larger than asked, so that all sites have the same batch."""
MORE_FOR_LARGER_BATCHES = 0.02
"""Share of it that may be spent on larger micro-batches."""


def divisions(sequences: int) -> list[tuple[int, int]]:
    """(micro-batch, number of them) for a site's sequences of a step, or a little more; largest batch first."""
    found: dict[int, int] = {}
    for accumulate in range(1, sequences + 1):
        batch = -(-sequences // accumulate)
        if batch * accumulate <= sequences * (1 + MORE_FOR_LARGER_BATCHES):
            found.setdefault(batch, accumulate)
    return list(found.items())


@dataclass(frozen=True)
class Choice:
    """A setting, before it is known whether it fits."""

    model: str
    layout: Layout
    sites: int
    overlap: int
    method: Method
    routing: Routing
    wire_dtype: Literal["float32", "bfloat16"]
    local_steps: int


@dataclass(frozen=True)
class Plan:
    """A setting that fits, and what it takes.

    Attributes:
        choice: the setting.
        batch_size: sequences of a micro-batch of one device.
        accumulate: micro-batches of a local step.
        checkpointing: whether activations are recomputed.
        global_batch: sequences of a step, all sites together: what was asked, or a little more.
        steps: optimizer steps; the last round may be shorter than the others.
        tokens: of the run.
        memory: of a rank of each place, by part; equal but for sharding.
        held_bytes: peak of a device of each place.
        sent_per_round: payload bytes that leave the busiest place in a round.
        sent_per_validation: mean payload bytes that a site sends for a validation of the global model in one window.
        checkpoint: bytes on disk of the global model, and of each site's own file.
        step_seconds: of the slowest site.
        round_seconds: of a round's synchronisation.
        hours: of the run.
        price: of all places for so long; None if a price is missing.
        quality: a measurement, 0.0 for the reference itself, or None: not measured.
    """

    choice: Choice
    batch_size: int
    accumulate: int
    checkpointing: bool
    global_batch: int
    steps: int
    tokens: int
    memory: RankMemory
    held_bytes: tuple[float, ...]
    sent_per_round: float
    sent_per_validation: float
    checkpoint: dict[str, int]
    step_seconds: float
    round_seconds: float
    hours: float
    price: float | None
    quality: Measurement | float | None

    @property
    def why_not_today(self) -> str | None:
        """Why `fomoe fit` cannot run it today; None if it can."""
        return RUNS_TODAY[self.choice.layout]


@dataclass(frozen=True)
class Refusal:
    """A setting that does not fit.

    Attributes:
        model: file of the model.
        layout: how devices are used.
        overlaps: sites that hold each expert.
        reason: which memory overflows where, or what does not divide.
    """

    model: str
    layout: Layout
    overlaps: tuple[int, ...]
    reason: str


class Planner:
    """Plans for one model.

    Args:
        name: how tables call the model.
        config: its architecture.
        request: what is asked.
    """

    def __init__(self, name: str, config: ModelConfig, request: PlanRequest) -> None:
        self.name, self.config, self.request = name, config, request
        self._averages = lru_cache(maxsize=None)(self._averages_of)

    @cached_property
    def results(self) -> tuple[list[Plan], list[Refusal]]:
        """Plans, fastest first, and refusals."""
        plans: list[Plan] = []
        refusals: list[Refusal] = []
        for layout in self.request.layouts:
            if layout != "one" and "one" in self.request.layouts and all(s.devices == 1 for s in self.request.sites):
                continue  # the same as `one`
            m = len(self.request.place_of(layout))
            overlaps = [o for o in self.request.overlaps or range(1, m + 1) if o <= m]
            valid = [o for o in valid_overlaps(self.config.n_experts, m) if o in overlaps]
            odd = [o for o in overlaps if o not in valid]
            if odd:
                told = f"{self.config.n_experts} experts × overlap must be divisible by {m} sites"
                refusals.append(Refusal(self.name, layout, tuple(odd), told))
            asked = self.request.global_batch
            least = m * -(-asked // m)
            if least > asked * (1 + MOST_ROUNDING):
                told = (f"a step of {asked} sequences cannot be shared equally by {m} sites: {least} at least; "
                        f"nearest that can: {' or '.join(str(n) for n in (least - m, least) if n)}")  # fmt: skip
                refusals.append(Refusal(self.name, layout, tuple(valid), told))
                continue
            for overlap in valid:
                found = [self._plan(choice) for choice in self._choices(layout, m, overlap)]
                plans += [plan for plan in found if isinstance(plan, Plan)]
                unfit = [plan for plan in found if isinstance(plan, Refusal)]
                if unfit and len(unfit) == len(found):
                    refusals.append(unfit[0])
        return sorted(plans, key=lambda plan: plan.hours), refusals

    def _choices(self, layout: Layout, m: int, overlap: int) -> Iterator[Choice]:
        for method in self.request.methods:
            for wire_dtype in self.request.wire_dtypes:
                if method == "ddp":
                    if overlap == m and wire_dtype == "float32" and layout != "sharded":
                        yield Choice(self.name, layout, m, overlap, method, "ghost", wire_dtype, 1)
                    continue
                for routing in self.request.routings:
                    for k in self.request.local_steps:
                        yield Choice(self.name, layout, m, overlap, method, routing, wire_dtype, k)

    def _averages_of(self, choice: Choice) -> list[Collective]:
        if choice.method == "ddp":
            return ddp_collectives(self.config, choice.sites)
        return round_collectives(
            self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            wire_dtype=choice.wire_dtype, inner_moments="average" if choice.method == "local_adamw" else "keep",
        )  # fmt: skip

    def _memory(self, choice: Choice, batch: int, checkpointing: bool) -> RankMemory:
        load = Load(
            precision=self.request.precision, batch_size=batch, sequence_length=self.request.sequence_length,
            method="ddp" if choice.method == "ddp" else "rounds", outer_momentum=choice.method == "diloco",
            wire_dtype=choice.wire_dtype, val_batch_size=batch, evaluation_window=self.request.evaluation_window,
        )  # fmt: skip
        config = replace(self.config, activation_checkpointing=checkpointing)
        resident = self.config.n_experts * choice.overlap // choice.sites
        return rank_memory(config, load, n_resident=resident, routing=choice.routing)

    def _held(self, memory: RankMemory, choice: Choice) -> tuple[float, ...]:
        """Peak of a device of each place. Sharding spreads what lasts and the gradients over a site's devices."""
        shared = memory.lasting - memory.library + memory.gradients
        devices = [site.devices if choice.layout == "sharded" else 1 for site in self.request.sites]
        return tuple(memory.peak - shared + shared / n for n in devices)

    def _overflow(self, held: tuple[float, ...]) -> list[int]:
        room = 1 - self.request.headroom
        return [i for i, site in enumerate(self.request.sites) if held[i] > room * site.memory_bytes]

    def _plan(self, choice: Choice) -> Plan | Refusal:
        request = self.request
        local = -(-request.global_batch // choice.sites)
        if choice.layout == "sharded":
            # Every device has a part of its site's batch; the site of most devices has the smallest ones.
            local = -(-local // max(site.devices for site in request.sites))
        ways = divisions(local)
        for checkpointing in (False, True):

            def fits(way: tuple[int, int], checkpointing: bool = checkpointing) -> bool:
                return not self._overflow(self._held(self._memory(choice, way[0], checkpointing), choice))

            first = bisect_left(ways, x=True, key=fits)  # smaller batches take less
            if first < len(ways):
                memory = self._memory(choice, ways[first][0], checkpointing)
                return self._cost(choice, ways[first], checkpointing, memory, self._held(memory, choice))
        return self._refuse(choice, self._memory(choice, 1, checkpointing=True))

    def _refuse(self, choice: Choice, memory: RankMemory) -> Refusal:
        held = self._held(memory, choice)
        part, size = memory.largest()
        where = "; ".join(
            f"{site.name}: {held[i] / GIB:.1f} GiB on a device of {site.memory_gib:g}"
            for i, site in enumerate(self.request.sites)
            if i in self._overflow(held)
        )
        moment = max(memory.moments_of_peak, key=memory.moments_of_peak.__getitem__)
        reason = (f"{where}, with one sequence a batch and activation checkpointing; peak at the {moment}, "
                  f"largest part {part} {size / GIB:.1f} GiB")  # fmt: skip
        return Refusal(self.name, choice.layout, (choice.overlap,), reason)

    def _cost(
        self,
        choice: Choice,
        division: tuple[int, int],
        checkpointing: bool,
        memory: RankMemory,
        held: tuple[float, ...],
    ) -> Plan:
        request, batch = self.request, division[0]
        config = replace(self.config, activation_checkpointing=checkpointing)
        resident = self.config.n_experts * choice.overlap // choice.sites
        load = Load(precision=request.precision, batch_size=batch, sequence_length=request.sequence_length)
        work = step_work(config, load, n_resident=resident, routing=choice.routing)
        accumulate = [division[1]] * len(request.sites)
        global_batch = choice.sites * batch * division[1]
        if choice.layout == "sharded":
            # The site with the fewest devices has the most micro-batches to go through.
            local = -(-request.global_batch // choice.sites)
            accumulate = [-(-local // (site.devices * batch)) for site in request.sites]
            global_batch = choice.sites * local
        seconds = max(n * step_seconds(work, site) for n, site in zip(accumulate, request.sites, strict=True))
        k = choice.local_steps
        steps = math.ceil(request.tokens / (global_batch * request.sequence_length))
        links = Links(tuple(request.sites), request.place_of(choice.layout))
        calls = self._averages(replace(choice, local_steps=1))
        round_seconds = links.round_seconds(calls)
        hours = (
            run_seconds(steps=steps, local_steps=k, seconds_per_step=seconds, seconds_per_round=round_seconds) / 3600
        )
        prices = [site.price_per_hour for site in request.sites]
        return Plan(
            choice=choice, batch_size=batch, accumulate=max(accumulate), checkpointing=checkpointing,
            global_batch=global_batch, steps=steps, tokens=steps * global_batch * request.sequence_length,
            memory=memory, held_bytes=held, sent_per_round=max(links.sent_by_place(calls), default=0.0),
            sent_per_validation=evaluation_bytes(
                self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
                param_dtype="bfloat16" if request.precision == "bf16-true" else "float32",
            ),
            checkpoint=checkpoint_bytes(
                self.config, n_sites=choice.sites, overlap=choice.overlap, momentum=choice.method == "diloco"
            ),
            step_seconds=seconds, round_seconds=round_seconds, hours=hours,
            price=None if None in prices else hours * sum(p for p in prices if p is not None),
            quality=penalty(method=choice.method, routing=choice.routing, sites=choice.sites, overlap=choice.overlap,
                            local_steps=k, wire_dtype=choice.wire_dtype),
        )  # fmt: skip
