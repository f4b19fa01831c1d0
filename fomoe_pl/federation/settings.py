"""The settings of a federation, each named once: strategy, costs, planner and checkpoints read them from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from fomoe_pl.codec import Codec, Groups, TopK
from fomoe_pl.errors import ConfigError, check_choice, check_range, check_seed
from fomoe_pl.federation.outer import Average, OuterRule
from fomoe_pl.federation.placement import (
    Placement,
    PlacementKind,
    PlacementPolicy,
    all_holder_sets,
    place,
    policy_of,
    shares,
)
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.model.residency import Residency, Routing, Shadow, ShadowBits

InnerMoments = Literal["keep", "reset", "average"]
OuterPlace = Literal["device", "host"]
Sharing = Literal["replicate", "shard"]
Weighting = Literal["tokens", "even"]
WireDtype = Literal["float32", "bfloat16", "float16"]
WireFormat = Literal["int8", "int4", "topk"]
FORMATS: dict[str, Codec] = {"int8": Groups(8), "int4": Groups(4), "topk": TopK()}
"""Integers in groups of 64 that share a scale; the 64 largest of each 4096 numbers."""


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """What sites agree on, when, and how: periodic averaging with partial replicas (FoMoE, arXiv 2606.19025).

    Attributes:
        sites: Number of sites M; None is the world size.
        ranks_per_site: Ranks of a site, which train one model together: each has a part of the site's batch, and
            their gradients are averaged in every step. One number for all sites, or one for each such as [8, 4].
        inside: What each of them has of the site's model: all of it (`replicate`), or a slice of each tensor, gathered
            layer by layer while it computes (`shard`, FSDP2).
        overlap: Sites that hold each expert, 1..M; None is M, a full replica.
        capacities: Experts of a layer that each site holds, one number a site such as [16, 8, 8]: together E x overlap,
            none above E. None is as equal as can be: 32 experts on 3 sites are 11, 11 and 10.
        places: Of each site a name of the place that it is in, such as [eu, eu, us]. Sites of one place fail together,
            so an expert's holders are spread over places as far as overlap and capacities allow. None: each site is a
            place.
        routing: What happens to picks of experts that are not here: `ghost` skips them, `partitioned` routes among
            the residents only, `shadow` computes them with frozen low-bit copies.
        placement: `fixed`, `random` with experts placed again every `reshuffle_rounds` rounds, or your own subclass of
            `fomoe_pl.federation.placement.PlacementPolicy`.
        reshuffle_rounds: T, rounds between two placements of a policy that moves experts.
        placement_seed: Seed of the random placement.
        local_steps: K, optimizer steps of a round, or a schedule {first step: K} such as {0: 1, 64: 32}.
        fragments: Parts of the model that take turns, one every K / fragments steps, each once in a round: what is
            outside layers (embedding, head, last norm) is the first, layers are dealt out to the others. 1 is all at
            once. At most the number of layers and one; must divide K.
        delay: Local steps that a site takes while an average is on its way, below K / fragments; 0 waits for it. The
            average is of the values before these steps.
        alpha: Share of the site's own values in what it goes on from, 0 to 1: alpha · own + (1 − alpha) · agreed. 0
            takes the agreed ones alone. Anchors are never mixed.
        weighting: What sites weigh in averages: the `tokens` of a step of theirs (`data.batch_size`), or all the same,
            `even`.
        router_every: Local steps between two averages of routers, balance biases included, within a round; divides K.
            Sites go on from the mean; anchors, the outer rule and moments wait for the round. A few small messages
            more: weigh them against the link's latency. With `routing: partitioned` not beside a `delay`. None: with
            rounds alone.
        outer: Outer rule, one of `fomoe_pl.federation.outer` or your own subclass of its `OuterRule`; None is
            `Average`.
        inner_moments: What a round does to the inner optimizer's moments: keep, reset or average them.
        moments_every: Rounds between two averages of the moments; [1, 4] averages the second ones, which change slowly,
            in every fourth round. Moments that are not due stay the site's own.
        wire_dtype: dtype on the wire of averaged values that are not coded; anchors and outer state are always float32.
        wire_codec: How the sites' changes are coded on the wire: `int8` or `int4`, groups of 64 that share a scale;
            `topk`, the 64 largest of each 4096 numbers in 12 bits for their places and 2 for themselves, which needs
            `error_feedback` and suits an outer rule without momentum; another `fomoe_pl.codec.TopK`; or your own
            `fomoe_pl.codec.Codec`. None is a cast to `wire_dtype`, which routers, norms and biases always are.
        error_feedback: Add what coding has lost of a change to the site's next one; 4 bytes for each coded value of the
            site. Refused without `wire_codec`.
        feedback_decay: Share of what was lost that is added, above 0 to 1; 0.95 is usual with `topk`.
        moments_codec: The same of averaged moments: `int8`, the second as their square roots. 4 bits are refused: runs
            diverged.
        bucket_mib: Size of a communication buffer, MiB; one travels while another is read or written.
        outer_state: Where anchors and the outer rule's state live between rounds: on the `device`, or on the `host`,
            which saves a GPU 4 to 8 bytes a parameter, and takes twice as many over its bus in a round.
        check_agreement: Compare a hash of each dense tensor of all sites, and of each expert of its holders, after
            every round (always done before saving).
        shadow_bits: Bits of a number in a copy of an absent expert, with `shadow` routing: 2, 4, 8, 16 (32 for tests).
            With another routing this and the next two are refused, unless they are the defaults.
        shadow_refresh: Rounds between two refreshes of the copies; they are refreshed too when experts have moved.
        shadow_input_gradient: Whether tokens get gradients through copies; false saves those products of the backward
            pass. Gates get theirs either way.
        min_sites: Fewest sites that a run under torchrun goes on with when machines are gone; None is all of them.
            Steps and learning rates then follow the planned tokens.
        copies: With `checkpoint_root`, on how many sites' disks each expert is stored, 1..M; None is 1 there. Copies up
            to the overlap cost no traffic.

    Raises:
        ConfigError: For settings that cannot work, naming the field, the rule and what would be valid.
    """

    sites: int | None = None
    ranks_per_site: int | tuple[int, ...] = 1
    inside: Sharing = "replicate"
    overlap: int | None = None
    capacities: tuple[int, ...] | None = None
    places: tuple[str, ...] | None = None
    routing: Routing = "ghost"
    placement: PlacementKind | PlacementPolicy = "fixed"
    reshuffle_rounds: int = 1
    placement_seed: int = 0
    local_steps: int | dict[int, int] = 32
    fragments: int = 1
    delay: int = 0
    alpha: float = 0.0
    router_every: int | None = None
    weighting: Weighting = "tokens"
    outer: OuterRule | None = None
    inner_moments: InnerMoments = "keep"
    moments_every: int | tuple[int, int] = 1
    wire_dtype: WireDtype = "float32"
    wire_codec: Codec | WireFormat | None = None
    error_feedback: bool = False
    feedback_decay: float = 1.0
    moments_codec: WireFormat | None = None
    bucket_mib: int = 64
    outer_state: OuterPlace = "device"
    check_agreement: bool = False
    shadow_bits: ShadowBits = 4
    shadow_refresh: int = 1
    shadow_input_gradient: bool = True
    min_sites: int | None = None
    copies: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model or processes."""
        for name, choices in (
            ("routing", Routing), ("inner_moments", InnerMoments), ("wire_dtype", WireDtype),
            ("outer_state", OuterPlace), ("inside", Sharing), ("weighting", Weighting),
            ("shadow_bits", ShadowBits),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        if self.min_sites is not None and (self.capacities or self.places):
            rule = "with capacities or places of each site the number of sites cannot change by itself"
            raise ConfigError("min_sites", self.min_sites, rule, "leave it out, or leave those out")
        for name in (
            "sites", "overlap", "min_sites", "copies", "reshuffle_rounds", "bucket_mib",
            "shadow_refresh",
        ):  # fmt: skip
            check_range(name, getattr(self, name), "type 1 or more", least=1)
        check_seed("placement_seed", self.placement_seed)
        for field in fields(self) if self.routing != "shadow" else ():
            if field.name.startswith("shadow_") and (value := getattr(self, field.name)) != field.default:
                rule = f"has no effect with routing {self.routing}, which has no copies of absent experts"
                raise ConfigError(field.name, value, rule, "leave it out, or set routing to shadow")
        if self.wire_dtype == "float16" and self.inner_moments == "average":
            rule = "AdamW's second moments are mostly below float16's smallest number, and without them steps explode"
            raise ConfigError("wire_dtype", self.wire_dtype, rule, "type bfloat16 or float32, or inner_moments keep")
        self._check_ranks()
        self._check_formats()
        check_range("alpha", self.alpha, "0 takes the agreed values alone", least=0, most=1)
        self.schedule, self.policy  # noqa: B018  both check themselves
        if self.router_every is not None and self.delay and self.routing == "partitioned":
            rule = "averages routers' rows with their experts' holders, which may be busy with an average on its way"
            raise ConfigError("router_every", self.router_every, rule, "leave it out, or type delay 0 or routing ghost")
        if self.takes_turns and self.policy.moves and self.reshuffle_rounds == 1:
            rule = "experts move after each round, whose averages then have to be there, of all fragments at once"
            name, value = ("fragments", self.fragments) if self.fragments > 1 else ("delay", self.delay)
            raise ConfigError(name, value, rule, "leave it out, or type a larger reshuffle_rounds")

    def _check_ranks(self) -> None:
        given = self.ranks_per_site
        numbers = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for number in numbers or (0,):
            check_range("ranks_per_site", number, "type 1 or more, or a number for each site", least=1)
        if self.inside == "shard" and max(numbers) == 1:
            rule = "shares a site's model out among its ranks, and there is one"
            raise ConfigError("inside", self.inside, rule, "type replicate, or ranks_per_site 2 or more")
        if self.inside == "shard" and len(set(numbers)) > 1:
            rule = f"needs as many ranks in each site, not {list(numbers)}: ranks average their slices with each other"
            raise ConfigError("inside", self.inside, rule, "type replicate, or one number of ranks for all sites")
        if not isinstance(given, int) and self.sites not in (None, len(numbers)):
            rule = f"gives {len(numbers)} numbers for {self.sites} sites"
            raise ConfigError("ranks_per_site", list(given), rule, "give one for each site, or one for all")
        if not isinstance(given, int) and self.min_sites is not None:
            rule = "with ranks of each site the number of sites cannot change by itself"
            raise ConfigError("min_sites", self.min_sites, rule, "leave it out, or type one number of ranks")

    def n_sites_of(self, n_processes: int) -> int:
        """Sites that so many processes make."""
        given = self.ranks_per_site
        return n_processes // given if isinstance(given, int) else len(given)

    @property
    def most_ranks(self) -> int:
        """Ranks of the largest site."""
        return self.ranks_per_site if isinstance(self.ranks_per_site, int) else max(self.ranks_per_site)

    def _check_formats(self) -> None:
        if isinstance(self.wire_codec, str):
            check_choice("wire_codec", self.wire_codec, WireFormat)
        if self.error_feedback and self.wire_codec is None:
            rule = "has no effect without wire_codec: a cast loses too little to be made up for"
            raise ConfigError("error_feedback", True, rule, "leave it out, or type wire_codec int4")
        if self.wire_codec is not None and getattr(self.codec, "is_sparse", False) and not self.error_feedback:
            rule = "leaves out most of a change, which would be lost without error feedback"
            raise ConfigError("wire_codec", self.wire_codec, rule, "set error_feedback to true, or type int4")
        check_range("feedback_decay", self.feedback_decay, "1 adds all that was lost", above=0, most=1)
        if self.feedback_decay != 1 and not self.error_feedback:
            rule = "has no effect without error_feedback"
            raise ConfigError(
                "feedback_decay", self.feedback_decay, rule, "leave it out, or set error_feedback to true"
            )
        if self.moments_codec in ("int4", "topk"):
            rule = "averages of moments in so few bits make runs diverge"
            raise ConfigError("moments_codec", self.moments_codec, rule, "type int8")
        if self.moments_codec is not None:
            check_choice("moments_codec", self.moments_codec, WireFormat)
        for period in self.periods:
            check_range("moments_every", period, "it is in rounds: type 1 or more", least=1)
        for name, value, default in (
            ("moments_codec", self.moments_codec, None), ("moments_every", self.periods, (1, 1))
        ):  # fmt: skip
            if value != default and self.inner_moments != "average":
                rule = f"has no effect with inner_moments {self.inner_moments}"
                raise ConfigError(name, getattr(self, name), rule, "leave it out, or set inner_moments to average")

    @property
    def codec(self) -> Codec | None:
        """Of the sites' changes."""
        return FORMATS[self.wire_codec] if isinstance(self.wire_codec, str) else self.wire_codec

    @property
    def codec_of_moments(self) -> Codec | None:
        """Of averaged moments; second ones are coded as their roots."""
        return None if self.moments_codec is None else FORMATS[self.moments_codec]

    @property
    def periods(self) -> tuple[int, int]:
        """Rounds between two averages of the first and of the second moments."""
        every = self.moments_every
        return every if isinstance(every, tuple) else (every, every)

    def moments_due(self, rounds: int) -> tuple[bool, bool]:
        """Whether the round that is number `rounds`, counting from 1, averages first and second moments."""
        first, second = self.periods
        return rounds % first == 0, rounds % second == 0

    @cached_property
    def schedule(self) -> RoundSchedule:
        """When rounds end."""
        return RoundSchedule.parse(self.local_steps, self.fragments, self.delay, self.router_every)

    @property
    def takes_turns(self) -> bool:
        """Whether there is more to a round than one average of everything, waited for, at its end."""
        return self.fragments > 1 or self.delay > 0

    def closes(self, rounds: int, step: int, last_step: int | None) -> bool:
        """Whether the step that ends a round leaves nothing on its way, nor any fragment's turn to come.

        With the run's last step, and where experts move, all that is on its way is applied, and all fragments are
        averaged at once.

        Args:
            rounds: That have ended with it.
            step: Optimizer steps taken.
            last_step: The run's planned last step.
        """
        return step == last_step or not self.takes_turns or self.moves_after(rounds)

    @cached_property
    def policy(self) -> PlacementPolicy:
        """Where experts are."""
        return policy_of(self.placement, self.placement_seed)

    @cached_property
    def rule(self) -> OuterRule:
        """The outer rule."""
        return Average() if self.outer is None else self.outer

    def overlap_of(self, n_sites: int) -> int:
        """Sites that hold each expert; all, where there are no longer as many."""
        if self.overlap is None or (self.min_sites is not None and self.overlap > n_sites):
            return n_sites
        return self.overlap

    def copies_of(self, n_sites: int) -> int:
        """Own disks on which each expert is stored; all, where there are no longer as many."""
        return min(self.copies or 1, n_sites)

    def check_fragments(self, n_layers: int) -> None:
        """Check that there are no more fragments than layers and what is outside of them.

        Raises:
            ConfigError: Naming the most that would work.
        """
        rule = f"the model has {n_layers} layers, and what is outside of them is a fragment too"
        check_range("fragments", self.fragments, rule, most=n_layers + 1)

    def check(self, n_experts: int, n_sites: int, top_k: int = 1) -> None:
        """Check the settings against the model's experts and the sites that there are.

        Raises:
            ConfigError: Naming the overlaps or capacities that would work.
        """
        of_sites = shares(n_experts, n_sites, self.overlap_of(n_sites), self.capacities)
        fewest, picked = min(of_sites), min(top_k, max(of_sites))
        # Where all sites have as few, all tokens pick as few: the paper's min(k, R).
        if self.routing == "partitioned" and fewest < picked:
            rule = f"leaves a site {fewest} experts of a layer, and with partitioned routing other sites pick {picked}"
            name, value = ("overlap", self.overlap) if self.capacities is None else ("capacities", self.capacities)
            raise ConfigError(name, value, rule, f"give each site {picked} or more, or type routing ghost")
        if self.places is not None and len(self.places) != n_sites:
            rule = f"there are {n_sites} sites"
            raise ConfigError("places", list(self.places), rule, "give the place of each of them")
        if self.min_sites is None:
            check_range("copies", self.copies, f"there are {n_sites} sites", most=n_sites)

    def place(
        self, n_layers: int, n_experts: int, n_sites: int, draw: int = 0, loads: Sequence[Sequence[float]] | None = None
    ) -> Placement:
        """The placement after experts have been placed `draw` times; see `fomoe_pl.federation.placement.place`."""
        return place(
            self.policy, n_layers=n_layers, n_experts=n_experts, n_sites=n_sites, overlap=self.overlap_of(n_sites),
            draw=draw, loads=loads, capacities=self.capacities, places=self.places,
        )  # fmt: skip

    def holder_sets(self, n_layers: int, n_experts: int, n_sites: int) -> list[tuple[int, ...]]:
        """Every holder set that there may be, whatever is drawn."""
        return all_holder_sets(
            n_experts, n_layers, n_sites, self.overlap_of(n_sites), capacities=self.capacities, places=self.places
        )

    def residency(self, experts: tuple[tuple[int, ...], ...]) -> Residency:
        """What the model of a site is, that holds these experts of each layer."""
        return Residency(self.routing, experts, self.shadow)

    @property
    def shadow(self) -> Shadow:
        """How copies of absent experts are kept and used."""
        return Shadow(self.shadow_bits, self.shadow_input_gradient)

    def refreshes_after(self, rounds: int, *, moved: bool) -> bool:
        """Whether copies of absent experts are refreshed after so many rounds have ended.

        Args:
            rounds: That have ended.
            moved: Whether experts have just moved, so that some sites lack others than before.
        """
        return self.routing == "shadow" and (moved or rounds % self.shadow_refresh == 0)

    def age_of_copies(self, rounds: int) -> int:
        """Rounds between the last refresh of the copies and the end of so many rounds, after which they may be due.

        At the start they are new: sites pack what they draw.
        """
        refreshes = (n for n in range(rounds, 0, -1) if self.refreshes_after(n, moved=self.moves_after(n)))
        return rounds - next(refreshes, 0)

    def moves_after(self, rounds: int) -> bool:
        """Whether experts are placed again after so many rounds have ended."""
        return self.policy.moves and rounds % self.reshuffle_rounds == 0

    def identity(self, n_sites: int) -> dict[str, Any]:
        """What a site's own state depends on: a run with the same identity resumes bit for bit."""
        drawn = {"placement_seed": self.placement_seed, "reshuffle_rounds": self.reshuffle_rounds}
        unlike = {"capacities": self.capacities, "places": self.places}
        copied = {"shadow_bits": self.shadow_bits, "shadow_refresh": self.shadow_refresh}
        return {
            "overlap": self.overlap_of(n_sites), "routing": self.routing, "placement": str(self.policy),
            "outer.rule": str(self.rule).split()[0], **(drawn if self.policy.moves else {}),
            **{name: list(values) for name, values in unlike.items() if values is not None},
            **(copied if self.routing == "shadow" else {}),
        }  # fmt: skip

    def describe(self, n_sites: int) -> str:
        """One line that says which method this is."""
        routing = f"{self.routing} ({self.shadow_bits} bits)" if self.routing == "shadow" else self.routing
        return (
            f"{n_sites} sites, each expert on {self.overlap_of(n_sites)} ({self.policy}), {routing} routing, "
            f"rounds of {self.schedule} local steps{self._turns_told()}, outer rule {self.rule}, "
            f"moments: {self._moments_told()}{self._formats_told()}"
        )

    def _turns_told(self) -> str:
        told = f" in {self.fragments} fragments" if self.fragments > 1 else ""
        told += f", applied {self.delay} steps later" if self.delay else ""
        told += f", routers every {self.router_every}" if self.router_every else ""
        return told + (f" (alpha {self.alpha:g})" if self.alpha else "")

    def _moments_told(self) -> str:
        every = self.moments_every
        told = "" if self.periods == (1, 1) else f" every {every if isinstance(every, int) else list(every)} rounds"
        return f"{self.inner_moments}{told}{'' if self.moments_codec is None else f' in {self.moments_codec}'}"

    def _formats_told(self) -> str:
        if self.wire_codec is None:
            return ""
        name = self.wire_codec if isinstance(self.wire_codec, str) else type(self.wire_codec).__name__
        return f", changes in {name}{' with error feedback' if self.error_feedback else ''}"
