"""The planner: which settings a federation can run, what each takes, and why the others cannot."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, get_args

from fomoe_pl.costs.memory import GIB, Load, RankMemory, rank_memory
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
from fomoe_pl.costs.time import run_seconds, step_seconds, step_work, validation_work, waiting_seconds
from fomoe_pl.federation.placement import shares, valid_overlaps
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.settings import FORMATS, OuterPlace
from fomoe_pl.model.config import Checkpointing, ModelConfig
from fomoe_pl.model.residency import Routing
from fomoe_pl.planner.choices import Choice, Plan, Refusal, RunLength, Saving, divisions
from fomoe_pl.planner.quality import measured_quality
from fomoe_pl.planner.request import Layout, Method, PlanRequest

MOST_ROUNDING = 0.05
"""Share by which a step may be larger than asked, so that all sites have the same batch."""
PARTS_TOLD = 3


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
        self._averages = cache(self._averages_of)
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
        asked = self.request.global_batch
        least = m * -(-asked // m)
        if least > asked * (1 + MOST_ROUNDING):
            reason = (f"a step of {asked} sequences cannot be shared equally by {m} sites: {least} at least; "
                    f"nearest that can: {' or '.join(str(n) for n in (least - m, least) if n)}")  # fmt: skip
            return [], [*refusals, Refusal(self.name, layout, methods, tuple(valid), reason)]
        plans: list[Plan] = []
        misfits: dict[Method, list[Misfit]] = {}
        for method in methods if valid else ():
            if untried := self._untried(method, layout, m, valid):
                refusals.append(Refusal(self.name, layout, (method,), (m,), untried))
                continue
            for overlap in valid:
                found = [self._plan(choice) for choice in self._choices(layout, m, overlap, method)]
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
        if method == "ddp" and layout == "sharded":
            return "data parallelism between sites that share their model is not modelled"
        if method == "ddp" and m not in overlaps:
            return f"data parallelism is of full replicas: it needs the overlap {m}"
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
        )  # fmt: skip

    def _routers_of(self, choice: Choice) -> list[list[Collective]]:
        """Of each average of routers within a round, the message of who is left out among them."""
        schedule = RoundSchedule.parse(choice.local_steps, choice.fragments, choice.delay, choice.router_every)
        found = []
        for step in range(1, choice.local_steps + 1) if choice.router_every else ():
            if layers := router_layers(schedule, step, self.config.n_layers):
                held = held_when_fixed(self.config, choice.sites, choice.overlap, layers)
                found.append([
                    left_out_collective(choice.sites),
                    *router_collectives(
                        self.config, held, len(layers), n_sites=choice.sites, routing=choice.routing,
                        wire_dtype=choice.cast_dtype,
                    ),
                ])  # fmt: skip
        return found

    def _resident(self, choice: Choice) -> int:
        return max(shares(self.config.n_experts, choice.sites, choice.overlap))

    def _savings(self, choice: Choice) -> list[Saving]:
        """Ways to save memory, least saving first: of equally fast ones the first is taken."""
        asked = self.request.outer_states if choice.method != "ddp" else ["device"]
        places = [place for place in get_args(OuterPlace) if place in asked]
        return [Saving(checkpointing, place) for checkpointing in get_args(Checkpointing) for place in places]

    def _asked(self, choice: Choice, division: tuple[int, int], saving: Saving) -> tuple[ModelConfig, Load]:
        """What a device works on with micro-batches of this size, and of this number."""
        request, (batch, accumulate) = self.request, division
        method: Literal["rounds", "ddp", "single"] = "rounds"
        if choice.method == "ddp":
            method = "ddp" if choice.sites > 1 else "single"
        whole_steps = method != "ddp" and accumulate == 1  # one backward pass, without hooks of DDP
        load = Load(
            precision=request.precision, batch_size=batch, sequence_length=request.sequence_length,
            method=method, outer_momentum=choice.method == "diloco",
            wire_dtype=choice.cast_dtype, wire_codec=choice.wire_codec, moments_codec=choice.moments_codec,
            error_feedback=choice.wire_codec is not None, holders=(choice.overlap, choice.sites),
            bucket_bytes=request.bucket_mib * 2**20, val_batch_size=batch,
            evaluation_window=min(request.evaluation_window, self._validation_batches(choice, batch)),
            accumulate=accumulate, recorded=whole_steps and self.cuda_graphs,
            bf16_gradients=whole_steps and self.bf16_gradients,
            fragments=choice.fragments, delay=choice.delay, averaged_moments=2 if choice.averages_moments else 0,
            state_on_host=saving.outer_state == "host", kernels=all(site.kernels for site in request.sites),
        )  # fmt: skip
        return replace(self.config, activation_checkpointing=saving.checkpointing), load

    def _validation_batches(self, choice: Choice, batch: int) -> int:
        return -(-self._own_validation(choice) // batch)

    def _own_validation(self, choice: Choice) -> int:
        """Validation sequences of a site."""
        return -(-self.request.val_sequences // choice.sites)

    def _memory(self, choice: Choice, division: tuple[int, int], saving: Saving) -> tuple[RankMemory, ...]:
        config, load = self._asked(choice, division, saving)

        @cache
        def on_one_of(devices: int) -> RankMemory:
            return rank_memory(
                config, load, n_resident=self._resident(choice), routing=choice.routing, shards=devices,
                shadow=self.request.shadow,
            )  # fmt: skip

        sharded = choice.layout == "sharded"
        return tuple(on_one_of(site.devices if sharded else 1) for site in self.request.sites)

    def _usable(self, place: int) -> float:
        return (1 - self.request.headroom) * self.request.sites[place].memory_bytes

    def _overflow(self, memory: Sequence[RankMemory]) -> list[int]:
        return [i for i, own in enumerate(memory) if own.peak > self._usable(i)]

    def _plan(self, choice: Choice) -> Plan | Misfit:
        request = self.request
        local = -(-request.global_batch // choice.sites)
        if choice.layout == "sharded":
            # Every device has a part of its site's batch; the site of most devices has the smallest ones.
            local = -(-local // max(site.devices for site in request.sites))
        ways = divisions(local)
        savings, found = self._savings(choice), list[Plan]()
        for saving in savings:

            def fits(way: tuple[int, int], saving: Saving = saving) -> bool:
                return not self._overflow(self._memory(choice, way, saving))

            # Smaller batches take less, but the first one keeps no gradients between micro-batches.
            first = 0 if fits(ways[0]) else bisect_left(ways, x=True, lo=1, key=fits)
            if first < len(ways):
                found.append(self._cost(choice, ways[first], saving))
        if found:
            return min(found, key=lambda plan: plan.hours)
        unfit = [
            Misfit(choice, way[0], self._memory(choice, way, saving))
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
            f"{self._without(choice, over)}"
        )

    def _without(self, choice: Choice, over: Sequence[int]) -> str:
        """Whether this method fits the other sites alone."""
        rest = [site for i, site in enumerate(self.request.sites) if i not in over]
        if not rest or len(rest) == len(self.request.sites):
            return ""
        alone = replace(self.request, sites=rest, layouts=[choice.layout], methods=[choice.method], overlaps=None,
                        wire_dtypes=[choice.wire_dtype])  # fmt: skip
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
            yield from (self._plan(choice) for choice in list(self._choices(layout, m, overlap, method))[:1])

    # -- what fits ------------------------------------------------------------------------------------------------

    def _cost(self, choice: Choice, division: tuple[int, int], saving: Saving) -> Plan:
        request, batch = self.request, division[0]
        config, load = self._asked(choice, division, saving)
        memory = self._memory(choice, division, saving)
        work = step_work(config, load, n_resident=self._resident(choice), routing=choice.routing, shadow=request.shadow)
        accumulate = [division[1]] * len(request.sites)
        global_batch = choice.sites * batch * division[1]
        shards = [1] * len(request.sites)
        if choice.layout == "sharded":
            # The site with the fewest devices has the most micro-batches to go through.
            local = -(-request.global_batch // choice.sites)
            accumulate = [-(-local // (site.devices * batch)) for site in request.sites]
            shards = [site.devices for site in request.sites]
            # Sites of as many devices each have whole micro-batches, as `fomoe fit` reads them.
            even = len(set(shards)) == 1
            global_batch = choice.sites * (accumulate[0] * batch * shards[0] if even else local)
        seconds = max(n * step_seconds(work, site) for n, site in zip(accumulate, request.sites, strict=True))
        k = choice.local_steps
        asked = math.ceil(request.tokens / (global_batch * request.sequence_length))
        length = RunLength.of(asked, k, request.validations)
        links = request.links(choice.layout)
        parts = self._averages(replace(choice, local_steps=1, moments_every=1, delay=0))
        calls = [call for part in parts for call in part]
        changes = [call for call in calls if call.kind != "moments"]
        rounds = -(-length.steps // k)
        due = rounds // choice.moments_every / rounds  # share of rounds that average moments, if any do
        control = [] if choice.method == "ddp" else control_collectives(choice.sites)

        def mean(of: Callable[[Sequence[Collective]], float]) -> float:
            """Over the run's rounds."""
            return of(calls) if due == 1 else due * of(calls) + (1 - due) * of(changes)

        def waiting(kinds: Callable[[Collective], bool]) -> float:
            """What the average of each fragment takes longer than the steps that hide it."""
            found = [links.round_seconds([*filter(kinds, part), *control]) for part in parts]
            return waiting_seconds(found, delay=choice.delay, seconds_per_step=seconds)

        def all_kinds(call: Collective) -> bool:
            return True

        def no_moments(call: Collective) -> bool:
            return call.kind != "moments"

        waited = waiting(all_kinds) if due == 1 else due * waiting(all_kinds) + (1 - due) * waiting(no_moments)
        round_seconds = mean(lambda some: links.round_seconds([*some, *control]))
        sent = mean(lambda some: max(links.sent_by_place(some)))
        # State on the host is fetched and stored, both ways at once, while averages travel.
        bus = max(own.on_host / (site.host_gbps * 1e9) for own, site in zip(memory, request.sites, strict=True))
        if bus:
            more = max(0.0, bus - links.round_seconds(changes))
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
        windows = -(-self._validation_batches(choice, batch) // request.evaluation_window)
        gathered = 0.0 if choice.method == "ddp" else evaluation_bytes(
            self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
            param_dtype=self.param_dtype, windows=windows,
        )  # fmt: skip
        validation = max(
            step_seconds(validation_work(config, load, sequences=-(-self._own_validation(choice) // n)), site)
            for site, n in zip(request.sites, shards, strict=True)
        ) + links.exchange_seconds(gathered, messages=windows * self.config.n_layers)
        stored = 0.0
        if request.checkpoint_copies is not None and choice.method != "ddp":
            stored = stored_elsewhere_bytes(
                self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
                copies=min(request.checkpoint_copies, choice.sites), slots=choice.method == "diloco",
            )  # fmt: skip
            validation += links.exchange_seconds(stored, messages=1)
        sent_validating = max(links.leaving(gathered), default=0.0) + max(links.leaving(stored), default=0.0)
        run = run_seconds(steps=length.steps, local_steps=k, seconds_per_step=seconds, seconds_per_round=waited)
        hours = (run + length.validations * validation) / 3600
        prices = [site.price_per_hour for site in request.sites]
        return Plan(
            choice=choice, shards=tuple(shards), batch_size=batch, accumulate=max(accumulate), saving=saving,
            global_batch=global_batch, length=length, tokens=length.steps * global_batch * request.sequence_length,
            memory=memory, sent_per_round=sent,
            sent_per_validation=sent_validating,
            sent_in_all=rounds * sent + length.validations * sent_validating,
            checkpoint=checkpoint_bytes(
                self.config, n_sites=choice.sites, overlap=choice.overlap, routing=choice.routing,
                param_dtype=self.param_dtype, momentum=choice.method == "diloco", rounds=choice.method != "ddp",
                error_feedback=choice.wire_codec is not None,
            ),
            step_seconds=seconds, round_seconds=round_seconds, waiting_seconds=waited,
            validation_seconds=validation, hours=hours,
            price=None if None in prices else hours * sum(p for p in prices if p is not None),
            quality=measured_quality(
                method=choice.method, routing=choice.routing, sites=choice.sites, overlap=choice.overlap,
                local_steps=k, wire_dtype=choice.wire_dtype, moments_every=choice.moments_every,
                shadow_bits=request.shadow_bits, shadow_refresh=request.shadow_refresh,
                turns=choice.fragments > 1 or choice.delay > 0 or choice.router_every is not None,
            ),
        )  # fmt: skip
