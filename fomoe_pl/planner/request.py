"""The planner's request, as in a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fomoe_pl.costs.activations import Precision
from fomoe_pl.costs.network import Backend, Links
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError, check_choice, check_range
from fomoe_pl.federation.settings import OuterPlace
from fomoe_pl.files import check_local
from fomoe_pl.model.residency import Routing, Shadow, ShadowBits

Method = Literal["local_adamw", "diloco", "local_sgd", "ddp"]
Layout = Literal["one", "each", "replicated", "sharded"]
Shares = Literal["even", "speed"]
Capacities = Literal["even", "memory"]
Wire = Literal["float32", "bfloat16", "int8", "int4", "topk"]
LAYOUTS = {
    "one": "one device of each site",
    "each": "every device a site of its own",
    "replicated": "a site's devices have its whole model each and share its batch",
    "sharded": "a site's devices share its model and its batch",
}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A request to the planner.

    Attributes:
        models: Files with `model.architecture`, as in configs/model.
        sites: The places; see `Site`.
        tokens: Tokens of the whole run, all sites together; rounded up to whole rounds, and to as many rounds between
            any two validations.
        global_batch: Sequences of a step, all sites together, split into the largest micro-batches that fit. What does
            not divide among sites and their devices is rounded up, by 5% at most.
        rounding: Share by which a step may have more or fewer sequences besides, for larger micro-batches: a device's
            43 sequences are one micro-batch or 43; with 0.03 also two of 22.
        shares: How sites share a step: `even`, or by `speed`, so that unlike devices take as long for it as whole
            sequences allow; averages are then weighted by tokens. The faster of those named is taken. Data parallelism
            has even ones.
        sequence_length: Tokens of a sequence.
        local_steps: Values of K to consider.
        overlaps: Sites that hold each expert; null is all that divide.
        capacities: Experts that each site holds: `even`, and by `memory` where sites have room for unlike numbers of
            them; plans of both are told.
        routings: Routing modes to consider, `partitioned` too; for full replicas, which have no absent experts, the
            first of them.
        shadow_bits: Bits of a number in a copy of an absent expert, with `shadow` routing: 2, 4, 8 or 16.
        shadow_refresh: Rounds between two refreshes of the copies.
        methods: `local_adamw` averages parameters and moments, `diloco` has an outer momentum, `local_sgd` averages
            parameters, `ddp` averages gradients in every step.
        wire_dtypes: Of averaged values on the wire: `float32`, `bfloat16`, or `int8`, `int4` and `topk`, in which
            sites' changes are coded with error feedback, and averaged moments in int8 (norms, routers and biases in
            float32).
        moments_every: Rounds between two averages of the moments, with `local_adamw`.
        fragments: Numbers of parts of the model that take turns in a round, where K and the layers allow them.
        delays: Local steps that a site takes while an average is on its way, where they are below K / fragments: what a
            fragment's average takes longer than them is waiting.
        router_every: Local steps between two averages of routers within a round, where it divides K and is below it;
            null is none.
        layouts: `one` device per site; `each` device a site of its own; `replicated`: a site's devices train one model
            together and have all of it; `sharded`: each has slices of it, which `fomoe fit` runs where all sites have
            as many devices.
        outer_states: Where anchors and outer momentum may live. The `host` is taken where memory is short and that is
            faster than what else saves memory; whether it has as much free is not checked.
        precision: Of the Trainer; decides memory, what DDP sends, and which peak counts.
        headroom: Share of a device's memory that stays free for the driver's context, communicators and fragments: an
            assumption, not a measurement.
        evaluation_window: Validation batches that go through a layer together; a validation sends absent experts once
            a window.
        val_sequences: Most sequences of a validation, over all sites. Its seconds and bytes are in the hours and GiB.
        validations: About how often a run validates the global model and saves it; the last time is at the end.
        checkpoint_copies: Sites that store each expert, where sites have disks of their own: what the holders send
            others in each save counts. null: a folder that all have.
        checkpoint_over_link: Whether that folder is beyond the sites' links: what a site writes then crosses its link
            in each save, which nothing hides. false: each site reaches it without.
        bucket_mib: Size of one communication buffer, MiB; each pays the latency, and is copied while another one
            travels.
        mtu: Largest packet of the links between sites, bytes.
        copy_seconds_per_byte: Measured: seconds per wire byte spent before and after its collective; overlapped with
            the link where there are several buffers. `tools/network/shaped_links.py` gives this and the next two.
        transport_seconds_per_byte: Measured: what the host takes to send a wire byte; the slower of host and link
            counts.
        host_seconds_per_byte: measured: what the host takes for a wire byte while the link waits, with gloo.
        coding_seconds_per_byte: Measured: what coding and decoding takes for a byte of float32; on one core 0.7e-9 in
            int4 and 1.06e-9 in int8, on a GPU next to nothing.
        backend: What carries the averages between sites, `gloo` or `nccl`: they wait for latencies differently.
        round_overhead_seconds: measured: overhead of every round.
        data_root: Prepared corpus for the written file.
        accelerator: Of the written file: gpu, or cpu to try it out.
    """

    models: list[str]
    sites: list[Site]
    tokens: float
    global_batch: int = 1024
    rounding: float = 0.0
    shares: list[Shares] = field(default_factory=lambda: ["even", "speed"])
    sequence_length: int = 2048
    local_steps: list[int] = field(default_factory=lambda: [32])
    overlaps: list[int] | None = None
    capacities: list[Capacities] = field(default_factory=lambda: ["even", "memory"])
    routings: list[Routing] = field(default_factory=lambda: ["ghost", "shadow"])
    shadow_bits: ShadowBits = 4
    shadow_refresh: int = 1
    methods: list[Method] = field(default_factory=lambda: ["local_adamw", "diloco", "ddp"])
    wire_dtypes: list[Wire] = field(default_factory=lambda: ["float32", "bfloat16"])
    moments_every: list[int] = field(default_factory=lambda: [1])
    fragments: list[int] = field(default_factory=lambda: [1])
    delays: list[int] = field(default_factory=lambda: [0])
    router_every: int | None = None
    layouts: list[Layout] = field(default_factory=lambda: ["one", "each", "replicated", "sharded"])
    outer_states: list[OuterPlace] = field(default_factory=lambda: ["device", "host"])
    precision: Precision = "bf16-mixed"
    headroom: float = 0.08
    evaluation_window: int = 64
    val_sequences: int = 512
    validations: int = 10
    checkpoint_copies: int | None = None
    checkpoint_over_link: bool = False
    bucket_mib: int = 64
    mtu: int = 1500
    copy_seconds_per_byte: float = 0.0
    transport_seconds_per_byte: float = 0.0
    host_seconds_per_byte: float = 0.0
    coding_seconds_per_byte: float = 0.0
    backend: Backend = "gloo"
    round_overhead_seconds: float = 0.0
    data_root: str = "runs/data/sample"
    accelerator: Literal["gpu", "cpu"] = "gpu"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: For empty lists, sizes below 1, and an overlap above the number of sites.
        """
        for name in ("models", "sites", "local_steps", "routings", "methods", "wire_dtypes", "moments_every", "layouts",
                     "outer_states", "fragments", "delays", "shares", "capacities"):  # fmt: skip
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "must not be empty", "give at least one")
        if self.overlaps is not None and not self.overlaps:
            raise ConfigError("overlaps", self.overlaps, "must not be empty", "give at least one, or null for all")
        for name in ("tokens", "global_batch", "sequence_length", "evaluation_window", "val_sequences", "validations",
                     "bucket_mib", "shadow_refresh", "checkpoint_copies"):  # fmt: skip
            check_range(name, getattr(self, name), "give a positive one", above=0)
        check_range("mtu", self.mtu, "1500 is Ethernet's", least=68, most=65535)  # IPv4's least and largest
        for name in ("copy_seconds_per_byte", "transport_seconds_per_byte", "host_seconds_per_byte",
                     "coding_seconds_per_byte", "round_overhead_seconds"):  # fmt: skip
            check_range(name, getattr(self, name), "0 adds nothing", least=0)
        check_range("rounding", self.rounding, "it is a share of the batch, such as 0.03", least=0, below=1)
        if self.checkpoint_over_link and self.checkpoint_copies is not None:
            rule = "is of one folder that all sites have, and checkpoint_copies of disks of their own"
            raise ConfigError("checkpoint_over_link", True, rule, "leave one of them out")
        check_range("headroom", self.headroom, "it is a share of the memory, such as 0.08", least=0, below=1)
        for k in self.local_steps:
            check_range("local_steps", k, "K is in optimizer steps: give 32, say", least=1)
        for rounds in self.moments_every:
            check_range("moments_every", rounds, "it is in rounds: give 4, say", least=1)
        for n in self.fragments:
            check_range("fragments", n, "1 is the whole model at once", least=1)
        for delay in self.delays:
            check_range("delays", delay, "it is in steps, and 0 waits", least=0)
        if not any(delay < k // n for k in self.local_steps for n in self.fragments if k % n == 0
                   for delay in self.delays):  # fmt: skip
            rule = "fit no K of local_steps: fragments must divide it, and delays be below K / fragments"
            raise ConfigError("fragments", self.fragments, rule, "add 1, and 0 to delays")
        check_range("router_every", self.router_every, "it is in local steps: type 8, say", least=1)
        if (every := self.router_every) and not any(every < k and k % every == 0 for k in self.local_steps):
            rule = "divides no K of local_steps and is below it"
            raise ConfigError("router_every", every, rule, "type half of one, say, or leave it out")
        for wire in self.wire_dtypes:
            check_choice("wire_dtypes", wire, Wire)
        check_choice("shadow_bits", self.shadow_bits, ShadowBits)
        most = max(sum(s.devices for s in self.sites) if "each" in self.layouts else 0, len(self.sites))
        if any(not 1 <= o <= most for o in self.overlaps or ()):
            raise ConfigError("overlaps", self.overlaps, f"must be between 1 and the number of sites ({most})",
                              "leave it out for all that divide")  # fmt: skip
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise ConfigError("sites", names, "have names of their own", "give each site a `name`")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("models", self.models, "names a file twice", "name each once")
        for site in self.sites:
            site.peak_flops(self.precision)
        for path in (*self.models, self.data_root):
            check_local("models" if path in self.models else "data_root", path)
        self.links(self.layouts[0])

    @property
    def shadow(self) -> Shadow:
        """How copies of absent experts are kept."""
        return Shadow(self.shadow_bits)

    def place_of(self, layout: Layout) -> tuple[int, ...]:
        """For each site of the federation the index of its place."""
        each = layout == "each"
        return tuple(i for i, site in enumerate(self.sites) for _ in range(site.devices if each else 1))

    def links(self, layout: Layout) -> Links:
        """How the sites of the federation are joined."""
        return Links(
            tuple(self.sites), self.place_of(layout), copy_seconds_per_byte=self.copy_seconds_per_byte,
            transport_seconds_per_byte=self.transport_seconds_per_byte,
            host_seconds_per_byte=self.host_seconds_per_byte, coding_seconds_per_byte=self.coding_seconds_per_byte,
            backend=self.backend,
            round_overhead_seconds=self.round_overhead_seconds, bucket_bytes=self.bucket_mib * 2**20, mtu=self.mtu,
        )  # fmt: skip
