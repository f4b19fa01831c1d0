"""The planner: which settings a federation can run, what each takes, and why the others cannot."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, NamedTuple, get_args

from fomoe_pl.costs.memory import GIB, Load, RankMemory, rank_memory
from fomoe_pl.costs.network import Links
from fomoe_pl.costs.rounds import (
    ITEMSIZE,
    Collective,
    checkpoint_bytes,
    control_collectives,
    ddp_collectives,
    evaluation_bytes,
    fragment_collectives,
    held_when_fixed,
    left_out_collective,
    refresh_bytes,
    router_collectives,
    router_layers,
    stored_elsewhere_bytes,
)
from fomoe_pl.costs.time import (
    inside_bytes,
    inside_seconds,
    run_seconds,
    step_seconds,
    step_work,
    validation_work,
    waiting_seconds,
)
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import shares, valid_overlaps
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.settings import FORMATS, OuterPlace, Sharing
from fomoe_pl.model.config import Checkpointing, ModelConfig
from fomoe_pl.model.parallel import check_shares
from fomoe_pl.model.residency import Routing
from fomoe_pl.planner.choices import Choice, Plan, Refusal, RunLength, Saving
from fomoe_pl.planner.division import Division, alike, capacities_by_room, equal_times
from fomoe_pl.planner.quality import measured_quality
from fomoe_pl.planner.request import Layout, Method, PlanRequest, Shares

MOST_ROUNDING = 0.05
"""Share by which a step may be larger than asked, so that sites and their devices have whole sequences."""
ALIKE = 0.01
"""Devices whose steps differ by a smaller share are taken for equally fast."""
PARTS_TOLD = 3
INSIDE: dict[Layout, Sharing] = {"replicated": "replicate", "sharded": "shard"}
"""Layouts whose sites have several devices, and what each of them has of the model."""


@dataclass(frozen=True)
class Misfit:
    """A setting that does not fit, with its smallest micro-batch and the memory on a device of each place."""

    choice: Choice
    batch_size: int
    memory: tuple[RankMemory, ...]

    @property
    def least(self) -> int:
        """Peak of the fullest device."""
        return max(memory.peak for memory in self.memory)


class _Sent(NamedTuple):
    """Of the averages of a round: seconds with its messages, those of each fragment, bytes, seconds without messages.

    Bytes are of the busiest place.
    """

    seconds: float
    of_fragments: tuple[float, ...]
    sent: float
    alone: float


class _Rounds(NamedTuple):
    """Of a round with averages of moments, and of one without."""

    whole: _Sent
    changes: _Sent


class Planner:
    """Plans for one model.

    Args:
        name: Of the model in tables.
        config: Its architecture.
        request: The request.
        cuda_graphs: Whether steps are recorded, from the model's file.
        bf16_gradients: Whether gradients of experts may be bfloat16, from the model's file.
    """

    def __init__(
        self, name: str, config: ModelConfig, request: PlanRequest, *, cuda_graphs: bool = True,
        bf16_gradients: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.config, self.request = name, config, request
        self.cuda_graphs, self.bf16_gradients = cuda_graphs, bf16_gradients
        self._averages, self._rounds = cache(self._averages_of), cache(self._rounds_of)
        self._speeds = cache(self._by_speed)
        self._config = cache(lambda saved: replace(config, activation_checkpointing=saved))
        self.param_dtype: Literal["float32", "bfloat16"] = "bfloat16" if request.precision == "bf16-true" else "float32"

    @cached_property
    def results(self) -> tuple[list[Plan], list[Refusal]]:
        """Plans, fastest first, and refusals."""
        plans: list[Plan] = []
        refusals: list[Refusal] = []
        for layout in self.request.layouts:
            if layout != "one" and "one" in self.request.layouts and all(s.devices == 1 for s in self.request.sites):
                continue  # the same as `one`
            found, refused = self._of_layout(layout)
            plans += found
            refusals += refused
        return sorted(plans, key=lambda plan: plan.hours), refusals

    def _of_layout(self, layout: Layout) -> tuple[list[Plan], list[Refusal]]:
        methods = tuple(self.request.methods)
        m = len(self.request.place_of(layout))
        overlaps = [o for o in self.request.overlaps or self._to_try(m) if o <= m]
        if not overlaps:
            reason = f"{m} sites: an overlap is 1 to {m}"
            return [], [Refusal(self.name, layout, methods, tuple(self.request.overlaps or ()), reason)]
        valid = [o for o in valid_overlaps(self.config.n_experts, m) if o in overlaps]
        refusals: list[Refusal] = []
        if odd := tuple(o for o in overlaps if o not in valid):
            reason = f"{self.config.n_experts} experts × overlap leave some of {m} sites without one"
            refusals.append(Refusal(self.name, layout, methods, odd, reason))
        if unshared := self._unshared(layout, m):
            return [], [*refusals, Refusal(self.name, layout, methods, tuple(valid), unshared)]
        plans: list[Plan] = []
        misfits: dict[Method, list[Misfit]] = {}
        for method in methods if valid else ():
            if untried := self._untried(method, layout, m, valid) or self._uncut(layout):
                refusals.append(Refusal(self.name, layout, (method,), (m,), untried))
                continue
            for overlap in valid:
                found = [plan for choice in self._choices(layout, m, overlap, method) for plan in self._tried(choice)]
                fitting = [plan for plan in found if isinstance(plan, Plan)]
                plans += fitting
                if found and not fitting:
                    unfit = [misfit for misfit in found if isinstance(misfit, Misfit)]
                    misfits.setdefault(method, []).append(min(unfit, key=lambda misfit: misfit.least))
        return plans, refusals + self._refusals(layout, misfits)

    def _to_try(self, m: int) -> list[int]:
        """Overlaps with which all sites have as many experts, or if none has but full replicas, all that there are."""
        even = [o for o in range(1, m + 1) if self.config.n_experts * o % m == 0]
        return even if len(even) > 1 else valid_overlaps(self.config.n_experts, m)

    @staticmethod
    def _untried(method: Method, layout: Layout, m: int, overlaps: Sequence[int]) -> str | None:
        """Why a method is not tried at all; None if it is."""
        if method == "ddp" and layout in ("replicated", "sharded"):
            return "data parallelism has no sites of several devices: layout each has every device in it"
        if method == "ddp" and m not in overlaps:
            return f"data parallelism is of full replicas: it needs the overlap {m}"
        return None

    def _uncut(self, layout: Layout) -> str | None:
        """Why devices of a site cannot share the model; None if they can."""
        for n in {site.devices for site in self.request.sites} if layout == "sharded" else ():
            try:
                check_shares(self.config, self.request.routings[0], n)
            except ConfigError as error:
                return str(error)
        return None

    def _choices(self, layout: Layout, m: int, overlap: int, method: Method) -> Iterator[Choice]:
        if method == "ddp":
            if overlap == m:  # gradients travel in their own dtype
                yield Choice(self.name, layout, m, overlap, method, "ghost", self.param_dtype, 1)
            return
        for wire_dtype in self.request.wire_dtypes:
            for routing in self.request.routings if overlap < m else self.request.routings[:1]:
                for k in self.request.local_steps:
                    choice = Choice(self.name, layout, m, overlap, method, routing, wire_dtype, k)
                    for rounds in self.request.moments_every if choice.averages_moments else (1,):
                        for fragments, delay in self._turns(k):
                            yield replace(choice, moments_every=rounds, fragments=fragments, delay=delay,
                                          router_every=self._router_every(k, delay, routing))  # fmt: skip

    def _router_every(self, local_steps: int, delay: int, routing: Routing) -> int | None:
        every = self.request.router_every
        if every is None or local_steps % every or every >= local_steps or (delay and routing == "partitioned"):
            return None
        return every

    def _turns(self, local_steps: int) -> Iterator[tuple[int, int]]:
        """Fragments and delays that rounds of so many steps, and the layers, allow."""
        for n in self.request.fragments:
            if local_steps % n == 0 and n <= self.config.n_layers + 1:
                for delay in self.request.delays:
                    if delay < local_steps // n:
                        yield n, delay

    def _averages_of(self, choice: Choice) -> list[list[Collective]]:
        """Of each fragment."""
        if choice.method == "ddp":
            return [ddp_collectives(self.config, choice.sites, ITEMSIZE[self.param_dtype])]
        return fragment_collectives(
            self.config, choice.fragments, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            wire_dtype=choice.cast_dtype, inner_moments="average" if choice.averages_moments else "keep",
            codec=FORMATS.get(choice.wire_codec or ""), moments_codec=FORMATS.get(choice.moments_codec or ""),
            capacities=choice.capacities,
        )  # fmt: skip

    def _routers_of(self, choice: Choice) -> list[list[Collective]]:
        """Of each average of routers within a round, the message of who is left out among them."""
        schedule = RoundSchedule.parse(choice.local_steps, choice.fragments, choice.delay, choice.router_every)
        found = []
        for step in range(1, choice.local_steps + 1) if choice.router_every else ():
            if layers := router_layers(schedule, step, self.config.n_layers):
                held = held_when_fixed(self.config, choice.sites, choice.overlap, layers, choice.capacities)
                found.append([
                    left_out_collective(choice.sites),
                    *router_collectives(
                        self.config, held, len(layers), n_sites=choice.sites, routing=choice.routing,
                        wire_dtype=choice.cast_dtype,
                    ),
                ])  # fmt: skip
        return found

    def _ranks(self, layout: Layout) -> tuple[int, ...]:
        """Devices of a site at each place."""
        return tuple(site.devices if layout in INSIDE else 1 for site in self.request.sites)

    def _devices(self, layout: Layout) -> tuple[int, ...]:
        """Devices at work at each place."""
        return tuple(1 if layout == "one" else site.devices for site in self.request.sites)

    def _residents(self, choice: Choice) -> tuple[int, ...]:
        """Experts of a layer that a site at each place holds, the most where its sites differ."""
        held = shares(self.config.n_experts, choice.sites, choice.overlap, choice.capacities)
        place_of = self.request.place_of(choice.layout)
        return tuple(
            max(n for n, at in zip(held, place_of, strict=True) if at == place)
            for place in range(len(self.request.sites))
        )

    def _savings(self, choice: Choice) -> list[Saving]:
        """Ways to save memory, least saving first: of equally fast ones the first is taken."""
        asked = self.request.outer_states if choice.method != "ddp" else ["device"]
        places = [place for place in get_args(OuterPlace) if place in asked]
        return [Saving(checkpointing, place) for checkpointing in get_args(Checkpointing) for place in places]

    def _load(self, choice: Choice, place: int, division: Division, saving: Saving) -> tuple[ModelConfig, Load]:
        """What a device of a place works on."""
        request, accumulate = self.request, division.accumulate
        ranks, config = self._ranks(choice.layout), self._config(saving.checkpointing)
        method: Literal["rounds", "ddp", "single"] = "rounds"
        if choice.method == "ddp":
            method = "ddp" if choice.sites > 1 else "single"
        whole_steps = method != "ddp" and accumulate == 1  # one backward pass, without hooks of DDP
        loads_added = ranks[place] > 1 and config.balance == "aux_loss"  # within a step, which cannot be recorded
        val_batch = self._val_batch(choice, division)
        load = Load(
            precision=request.precision, batch_size=division.batches[place], sequence_length=request.sequence_length,
            method=method, outer_momentum=choice.method == "diloco",
            wire_dtype=choice.cast_dtype, wire_codec=choice.wire_codec, moments_codec=choice.moments_codec,
            error_feedback=choice.wire_codec is not None, holders=(choice.overlap, choice.sites),
            bucket_bytes=request.bucket_mib * 2**20, val_batch_size=val_batch // ranks[place],
            evaluation_window=min(request.evaluation_window, -(-self._own_validation(choice) // val_batch)),
            accumulate=accumulate,
            recorded=whole_steps and self.cuda_graphs and choice.layout != "sharded" and not loads_added,
            bf16_gradients=whole_steps and self.bf16_gradients,
            fragments=choice.fragments, delay=choice.delay, averaged_moments=2 if choice.averages_moments else 0,
            state_on_host=saving.outer_state == "host", kernels=self._kernels,
        )  # fmt: skip
        return config, load

    @cached_property
    def _kernels(self) -> bool:
        return all(site.kernels for site in self.request.sites)

    def _val_batch(self, choice: Choice, division: Division) -> int:
        """Sequences of a validation batch, the same of all sites: the smallest site's micro-batch, which all divide."""
        ranks = self._ranks(choice.layout)
        unit = math.lcm(*ranks)
        return max(unit, min(n * batch for n, batch in zip(ranks, division.batches, strict=True)) // unit * unit)

    def _own_validation(self, choice: Choice) -> int:
        """Validation sequences of a site."""
        return -(-self.request.val_sequences // choice.sites)

    def _memory_at(
        self, choice: Choice, place: int, n_resident: int, division: Division, saving: Saving
    ) -> RankMemory:  # fmt: skip
        config, load = self._load(choice, place, division, saving)
        shards = self._ranks(choice.layout)[place] if choice.layout == "sharded" else 1
        return rank_memory(config, load, n_resident=n_resident, routing=choice.routing, shards=shards,
                           shadow=self.request.shadow)  # fmt: skip

    def _memory(self, choice: Choice, division: Division, saving: Saving) -> tuple[RankMemory, ...]:
        known: dict[tuple[int, int, int], RankMemory] = {}
        found = []
        of_places = zip(self._residents(choice), division.batches, self._ranks(choice.layout), strict=True)
        for place, alike_at in enumerate(of_places):
            if alike_at not in known:
                known[alike_at] = self._memory_at(choice, place, alike_at[0], division, saving)
            found.append(known[alike_at])
        return tuple(found)

    def _fits(self, choice: Choice, division: Division, saving: Saving) -> bool:
        """Whether no place overflows; those with the least memory are asked first."""
        residents, ranks, asked = self._residents(choice), self._ranks(choice.layout), set[tuple[int, int, int]]()
        for place in self._by_memory:
            alike_at = residents[place], division.batches[place], ranks[place]
            if alike_at in asked:
                continue  # one with no more memory has room
            asked.add(alike_at)
            if self._memory_at(choice, place, alike_at[0], division, saving).peak > self._usable(place):
                return False
        return True

    @cached_property
    def _by_memory(self) -> list[int]:
        """Places, those with the least memory first."""
        return sorted(range(len(self.request.sites)), key=self._usable)

    def _usable(self, place: int) -> float:
        return (1 - self.request.headroom) * self.request.sites[place].memory_bytes

    def _overflow(self, memory: Sequence[RankMemory]) -> list[int]:
        return [i for i, own in enumerate(memory) if own.peak > self._usable(i)]

    # -- how a step is shared out -----------------------------------------------------------------------------------

    def _unshared(self, layout: Layout, m: int) -> str | None:
        """Why a step cannot be shared out among the sites; None if it can."""
        asked, unit = self.request.global_batch, m * math.lcm(*self._ranks(layout))
        if any(self._ways(Choice(self.name, layout, m, m, "local_sgd", "ghost", "float32", 1), shares)
               for shares in self.request.shares):  # fmt: skip
            return None
        least = unit * -(-asked // unit)
        return (f"a step of {asked} sequences cannot be shared equally by {m} sites: {least} at least; "
                f"nearest that can: {' or '.join(str(n) for n in (least - unit, least) if n)}")  # fmt: skip

    def _ways(self, choice: Choice, shares: Shares) -> list[Division]:
        """Divisions of a step near the asked number of sequences; largest micro-batches first."""
        asked, rounding = self.request.global_batch, self.request.rounding
        if shares == "even":
            found = alike(asked, choice.sites, self._ranks(choice.layout), rounding)
        elif choice.method == "ddp":
            found = []
        else:  # what seconds of a step depend on
            found = self._speeds(Choice(choice.model, choice.layout, choice.sites, choice.overlap, "local_sgd",
                                        choice.routing, "float32", 1, capacities=choice.capacities))  # fmt: skip
        devices = self._devices(choice.layout)
        return [way for way in found if way.sequences(devices) <= asked * (1 + MOST_ROUNDING + rounding)]

    def _by_speed(self, choice: Choice) -> list[Division]:
        """Micro-batches in proportion to speed; none where devices of all places are as fast."""
        full = replace(choice, overlap=choice.sites, capacities=None)
        speeds = [seconds for _, seconds in self._seconds_of(full)]
        if choice.capacities is None and max(speeds) <= min(speeds) * (1 + ALIKE):
            return []
        fixed, each = zip(*self._seconds_of(choice), strict=True)
        devices, asked = self._devices(choice.layout), self.request.global_batch
        found: dict[tuple[int, ...], int] = {}
        for accumulate in range(1, asked // sum(devices) + 1):
            found.setdefault(equal_times(-(-asked // accumulate), devices, fixed, each), accumulate)
        return [Division(batches, accumulate) for batches, accumulate in found.items()]

    def _seconds_of(self, choice: Choice) -> list[tuple[float, float]]:
        """Of a device of each place: seconds of any micro-batch, and those of each of its sequences."""
        found = []
        for place in range(len(self.request.sites)):
            one, two = (
                self._step(choice, place, Division((n,) * len(self.request.sites), 1), Saving())[0] for n in (1, 2)
            )
            found.append((2 * one - two, two - one))
        return found

    def _step(self, choice: Choice, place: int, division: Division, saving: Saving) -> tuple[float, float]:
        """Seconds of a step at a place, and how many of them its devices send each other."""
        config, load = self._load(choice, place, division, saving)
        site, resident = self.request.sites[place], self._residents(choice)[place]
        work = step_work(config, load, n_resident=resident, routing=choice.routing, shadow=self.request.shadow)
        among, ranks = 0.0, self._ranks(choice.layout)[place]
        if ranks > 1:
            once, often = inside_bytes(
                config, load, ranks=ranks, inside=INSIDE[choice.layout], n_resident=resident, routing=choice.routing
            )
            among = inside_seconds(once + division.accumulate * often, site)
        return division.accumulate * step_seconds(work, site) + among, among

    # -- what fits ------------------------------------------------------------------------------------------------

    def _tried(self, choice: Choice) -> list[Plan | Misfit]:
        """With equal capacities, and with those by memory if they differ."""
        found = [self._plan(choice)] if "even" in self.request.capacities or choice.overlap == choice.sites else []
        if "memory" in self.request.capacities and (unlike := self._by_room(choice)) is not None:
            found.append(self._plan(unlike))
        return found or [self._plan(choice)]

    def _by_room(self, choice: Choice) -> Choice | None:
        """The same with capacities by memory; None where they are equal, or places do not have the room."""
        try:
            return self._with_rooms(choice)
        except ConfigError:
            return None

    def _with_rooms(self, choice: Choice) -> Choice | None:
        """Capacities by what places have room for with the smallest micro-batches and all that saves memory.

        Raises:
            ConfigError: If that does not do, with what is missing.
        """
        places, place_of = range(len(self.request.sites)), self.request.place_of(choice.layout)
        ways = [ways[-1] for some in self.request.shares if (ways := self._ways(choice, some))]
        if choice.overlap == choice.sites or len({self._room_of(place) for place in places}) == 1 or not ways:
            return None
        way, saving = min(ways, key=lambda way: max(way.batches)), self._savings(choice)[-1]
        rooms = [self._room(choice, place, way, saving) for place in places]
        held = capacities_by_room(
            [rooms[place] for place in place_of], [self.request.sites[place].name for place in place_of],
            n_experts=self.config.n_experts, overlap=choice.overlap,
        )  # fmt: skip
        too_few = choice.routing == "partitioned" and min(held) < min(self.config.top_k, max(held))
        return None if too_few or max(held) - min(held) <= 1 else replace(choice, capacities=held)

    def _room_of(self, place: int) -> tuple[float, int]:
        """What makes places alike in memory."""
        return self._usable(place), self.request.sites[place].devices

    def _room(self, choice: Choice, place: int, division: Division, saving: Saving) -> int:
        """Experts of a layer that a site at this place has room for."""
        held = range(1, self.config.n_experts + 1)
        usable = self._usable(place)
        return bisect_left(
            held, x=True, key=lambda n: self._memory_at(choice, place, n, division, saving).peak > usable
        )

    def _plan(self, choice: Choice) -> Plan | Misfit:
        savings, found = self._savings(choice), list[Plan]()
        of_shares = [ways for some in self.request.shares if (ways := self._ways(choice, some))]
        for ways in of_shares:
            for saving in savings:

                def fits(way: Division, saving: Saving = saving) -> bool:
                    return self._fits(choice, way, saving)

                # Smaller batches take less, but the first one keeps no gradients between micro-batches.
                first = 0 if fits(ways[0]) else bisect_left(ways, x=True, lo=1, key=fits)
                if first < len(ways):
                    found.append(self._cost(choice, ways[first], saving))
                if first == 0 and saving == savings[0]:
                    break  # nothing that saves memory is faster
        if found:
            return min(found, key=lambda plan: plan.hours)
        unfit = [
            Misfit(choice, max(way.batches), self._memory(choice, way, saving))
            for ways in of_shares
            for saving in savings
            for way in (ways[0], ways[-1])
        ]
        return min(unfit, key=lambda misfit: misfit.least)

    # -- what does not fit ----------------------------------------------------------------------------------------

    def _refusals(self, layout: Layout, misfits: dict[Method, list[Misfit]]) -> list[Refusal]:
        """One refusal for all methods with the same overlaps; the reason is that of the smallest setting."""
        groups: dict[tuple[int, ...], list[Method]] = {}
        for method, found in misfits.items():
            groups.setdefault(tuple(misfit.choice.overlap for misfit in found), []).append(method)
        return [
            Refusal(
                self.name, layout, tuple(methods), overlaps,
                self._why(min((misfits[method][0] for method in methods), key=lambda misfit: misfit.least)),
            )
            for overlaps, methods in groups.items()
        ]  # fmt: skip

    def _why(self, misfit: Misfit) -> str:
        choice, over = misfit.choice, self._overflow(misfit.memory)
        held = ", outer state on the host" if any(memory.on_host for memory in misfit.memory) else ""
        needed = "; ".join(
            f"{self.request.sites[i].name} needs {misfit.memory[i].peak / GIB:.2f} GiB a device, usable are "
            f"{self._usable(i) / GIB:.2f} of {self.request.sites[i].memory_gib:g}"
            for i in over
        )
        moment, parts = misfit.memory[over[0]].at_peak()
        largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in list(parts.items())[:PARTS_TOLD])
        fitting = max(misfit.memory[i].peak for i in over) / (1 - self.request.headroom) / GIB
        return (
            f"the smallest (overlap {choice.overlap}, {choice.method}, micro-batches of {misfit.batch_size}, "
            f"checkpointed{held}): {needed}. "
            f"Peak at the {moment}: {largest} GiB. Devices of {math.ceil(10 * fitting) / 10:g} GiB would do"
            f"{self._without(choice, over)}{self._missing(choice)}"
        )

    def _missing(self, choice: Choice) -> str:
        """What capacities by memory lack."""
        if "memory" in self.request.capacities:
            try:
                self._with_rooms(replace(choice, capacities=None))
            except ConfigError as error:
                return f"; with capacities by memory {error.rule}"
        return ""

    def _without(self, choice: Choice, over: Sequence[int]) -> str:
        """Whether this method fits the other sites alone."""
        rest = [site for i, site in enumerate(self.request.sites) if i not in over]
        if not rest or len(rest) == len(self.request.sites):
            return ""
        alone = replace(self.request, sites=rest, layouts=[choice.layout], methods=[choice.method], overlaps=None,
                        wire_dtypes=[choice.wire_dtype], rounding=0.9)  # fmt: skip  # memory alone is asked about
        of_rest = Planner(
            self.name, self.config, alone, cuda_graphs=self.cuda_graphs, bf16_gradients=self.bf16_gradients
        )
        if not any(isinstance(found, Plan) for found in of_rest.first_of_each_overlap):
            return ""
        names = " and ".join(self.request.sites[i].name for i in over)
        return f"; without {names} it fits"

    @property
    def first_of_each_overlap(self) -> Iterator[Plan | Misfit]:
        """A plan, or none, of each overlap of the first layout and method."""
        layout, method = self.request.layouts[0], self.request.methods[0]
        m = len(self.request.place_of(layout))
        for overlap in valid_overlaps(self.config.n_experts, m):
            first = next(self._choices(layout, m, overlap, method), None)
            if first is not None and any(self._ways(first, some) for some in self.request.shares):
                yield self._plan(first)

    # -- what it takes --------------------------------------------------------------------------------------------

    def _rounds_of(self, choice: Choice) -> _Rounds:
        """What rounds send, and how long that takes, whatever sites do meanwhile."""
        links = self.request.links(choice.layout)
        parts = self._averages(choice)
        calls = [call for part in parts for call in part]
        control = [] if choice.method == "ddp" else control_collectives(choice.sites)

        def of(calls: list[Collective], parts: list[list[Collective]]) -> _Sent:
            return _Sent(
                links.round_seconds([*calls, *control]), tuple(links.round_seconds([*p, *control]) for p in parts),
                max(links.sent_by_place(calls)), links.round_seconds(calls),
            )  # fmt: skip

        less = [[call for call in part if call.kind != "moments"] for part in parts]
        return _Rounds(of(calls, parts), of([call for part in less for call in part], less))

    def _cost(self, choice: Choice, division: Division, saving: Saving) -> Plan:
        request, places = self.request, range(len(self.request.sites))
        memory, ranks = self._memory(choice, division, saving), self._ranks(choice.layout)
        global_batch = division.sequences(self._devices(choice.layout))
        seconds, among = max(self._step(choice, place, division, saving) for place in places)
        k = choice.local_steps
        asked = math.ceil(request.tokens / (global_batch * request.sequence_length))
        length = RunLength.of(asked, k, request.validations)
        links = request.links(choice.layout)
        whole, changes = self._rounds(replace(choice, local_steps=1, moments_every=1, delay=0, router_every=None))
        rounds = -(-length.steps // k)
        due = rounds // choice.moments_every / rounds  # share of rounds that average moments, if any do

        def mean(of: Callable[[_Sent], float]) -> float:
            """Over the run's rounds."""
            return of(whole) if due == 1 else due * of(whole) + (1 - due) * of(changes)

        # What the average of each fragment takes longer than the steps that hide it.
        waited = mean(lambda some: waiting_seconds(some.of_fragments, delay=choice.delay, seconds_per_step=seconds))
        round_seconds, sent = mean(lambda some: some.seconds), mean(lambda some: some.sent)
        # State on the host is fetched and stored, both ways at once, while averages travel.
        bus = max(own.on_host / (site.host_gbps * 1e9) for own, site in zip(memory, request.sites, strict=True))
        if bus:
            more = max(0.0, bus - changes.alone)
            round_seconds, waited = round_seconds + more, waited + more
        if choice.routing == "shadow":
            copies = refresh_bytes(self.config, request.shadow, n_sites=choice.sites, overlap=choice.overlap)
            seconds_of_copies = links.exchange_seconds(copies, messages=self.config.n_layers)
            round_seconds += seconds_of_copies / request.shadow_refresh
            one = seconds_of_copies / max(1, choice.fragments - 1)  # each fragment but the first has copies
            hidden = waiting_seconds([one], delay=choice.delay, seconds_per_step=seconds) / one if one else 0.0
            waited += hidden * seconds_of_copies / request.shadow_refresh
            sent += max(links.leaving(copies)) / request.shadow_refresh
        for routers in self._routers_of(choice) if choice.sites > 1 else ():
            waited, round_seconds = (total + links.round_seconds(routers) for total in (waited, round_seconds))
            sent += max(links.sent_by_place(routers))
        validation, sent_validating = self._validation(choice, division, saving, links)
        checkpoint = checkpoint_bytes(
            self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            param_dtype=self.param_dtype, momentum=choice.method == "diloco", rounds=choice.method != "ddp",
            error_feedback=choice.wire_codec is not None, capacities=choice.capacities,
        )  # fmt: skip
        saving_seconds, sent_saving = self._save(choice, checkpoint, links)
        run = run_seconds(steps=length.steps, local_steps=k, seconds_per_step=seconds, seconds_per_round=waited)
        hours = (run + length.validations * (validation + saving_seconds)) / 3600
        prices = [site.price_per_hour for site in request.sites]
        of_sites = {n * batch for n, batch in zip(ranks, division.batches, strict=True)}
        unlike = choice.capacities is not None or len(of_sites) > 1
        return Plan(
            choice=choice, place_of=request.place_of(choice.layout), ranks=ranks,
            held_experts=self._residents(choice), batches=division.batches, accumulate=division.accumulate,
            val_batch=self._val_batch(choice, division), saving=saving,
            global_batch=global_batch, length=length, tokens=length.steps * global_batch * request.sequence_length,
            memory=memory, sent_per_round=sent,
            sent_per_validation=sent_validating, sent_per_save=sent_saving,
            sent_in_all=rounds * sent + length.validations * (sent_validating + sent_saving),
            checkpoint=checkpoint, step_seconds=seconds, inside_seconds=among,
            round_seconds=round_seconds, waiting_seconds=waited,
            validation_seconds=validation, save_seconds=saving_seconds, hours=hours,
            price=None if None in prices else hours * sum(p for p in prices if p is not None),
            quality=None if unlike else measured_quality(
                method=choice.method, routing=choice.routing, sites=choice.sites, overlap=choice.overlap,
                local_steps=k, wire_dtype=choice.wire_dtype, moments_every=choice.moments_every,
                shadow_bits=request.shadow_bits, shadow_refresh=request.shadow_refresh,
                turns=choice.fragments > 1 or choice.delay > 0 or choice.router_every is not None,
            ),
        )  # fmt: skip

    def _validation(self, choice: Choice, division: Division, saving: Saving, links: Links) -> tuple[float, float]:
        """Seconds of a validation of the global model, and bytes that leave the busiest place."""
        request, own = self.request, self._own_validation(choice)
        windows = -(-own // (self._val_batch(choice, division) * request.evaluation_window))
        gathered = 0.0 if choice.method == "ddp" else evaluation_bytes(
            self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            param_dtype=self.param_dtype, windows=windows,
        )  # fmt: skip
        seconds = max(
            step_seconds(validation_work(*self._load(choice, place, division, saving), sequences=-(-own // n)), site)
            for place, (site, n) in enumerate(zip(request.sites, self._ranks(choice.layout), strict=True))
        )
        seconds += links.exchange_seconds(gathered, messages=windows * self.config.n_layers)
        return seconds, max(links.leaving(gathered), default=0.0)

    def _save(self, choice: Choice, checkpoint: dict[str, int], links: Links) -> tuple[float, float]:
        """Seconds of what of a save crosses links, and bytes of it that leave the busiest place."""
        if self.request.checkpoint_over_link:
            if choice.method == "ddp":  # of which the first rank writes, and no other
                first = Links.between(self.request.sites[:1], mtu=self.request.mtu)
                return first.upload_seconds(checkpoint["total"]), checkpoint["total"]
            # The global model's files are dealt out to the sites.
            own = checkpoint["site"] + (checkpoint["model"] + checkpoint["momentum"]) / choice.sites
            return links.upload_seconds(own), max(links.uploaded(own))
        if self.request.checkpoint_copies is None or choice.method == "ddp":
            return 0.0, 0.0
        stored = stored_elsewhere_bytes(
            self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            copies=min(self.request.checkpoint_copies, choice.sites), slots=choice.method == "diloco",
        )  # fmt: skip
        return links.exchange_seconds(stored, messages=1), max(links.leaving(stored), default=0.0)
