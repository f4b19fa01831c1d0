"""One Lightning strategy for all low-communication methods: its settings make it local SGD, DiLoCo or FoMoE."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fomoe_pl.checkpoint.content import FederatedContent
from fomoe_pl.checkpoint.disks import check_roots
from fomoe_pl.checkpoint.format import read_manifest
from fomoe_pl.checkpoint.own_disks import PartsContent
from fomoe_pl.data.module import FoMoEData
from fomoe_pl.errors import ConfigError, check_choice, check_names, check_range
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inside import Inside
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.liveness import raise_if_lost, sites_watched
from fomoe_pl.federation.placement import Placement, in_one_place
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.federation.shadow import Copies
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from fomoe_pl.files import SITE, OfSites
from fomoe_pl.lightning_internals import SiteProcesses, end_children, move_optimizers, replace_signal_handling
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parallel import check_shares, gather_root, hold_gathered, reshard, shard
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.slices import take_gradients
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.checks import DDP_ARGUMENTS, check_arguments, check_processes, ranks_on_hosts
from fomoe_pl.strategies.rounds import Rounds
from fomoe_pl.strategies.stopping import StopAt, StopsTogether
from fomoe_pl.training.elastic import check_min_sites

Between = Literal["gloo", "nccl"]


class FederatedStrategy(SiteStrategy, SiteProcesses):
    """Periodic averaging between sites, each holding some of the experts (FoMoE, arXiv 2606.19025).

    Between rounds nothing crosses sites. After K optimizer steps the dense parameters are averaged over all sites,
    each expert over its holders, and the outer rule is applied.

    Args:
        share_device: Put all sites of this machine on its first GPU (over gloo); the Trainer then has `devices: 1`.
        async_save: Write checkpoints while training goes on, from a copy in host memory.
        timeout_seconds: After which a collective that does not complete raises.
        stop_at: Where a signal ends the run: after its `round`, or after the next local `step` of all sites.
        checkpoint_root: Where sites have no file system in common, the folder or the URL at which each stores its part
            of checkpoints: a template such as `/disk/{site}` or `s3://bucket/run/{site}`, or a mapping from sites to
            folders and URLs. A folder without `{site}` is for machines that have the same path each. URLs need the
            library of their protocol: the extra `remote` has those of S3 and GCS. None: all write into one folder.
        between: By what sites reach each other: `gloo` (TCP) or `nccl`; None is `nccl` on GPUs and `gloo` on CPUs. The
            ranks of a site use NCCL among each other on GPUs, whatever is between sites.
        parallel_devices: This machine's devices, one for each rank; None is the Trainer's.
        **settings: As for `fomoe_pl.federation.settings.FederationConfig`.

    Attributes:
        settings: The federation's settings.
        rounds: Ends its rounds.
        inside: The ranks of this site, once they have met.

    Raises:
        ConfigError: For settings that cannot work.
    """

    has_rounds = True
    settings: FederationConfig
    inside: Inside

    def __init__(
        self,
        *,
        share_device: bool = False,
        async_save: bool = True,
        timeout_seconds: float = 1800.0,
        stop_at: StopAt = "round",
        checkpoint_root: OfSites | None = None,
        between: Between | None = None,
        parallel_devices: list[torch.device] | None = None,
        **settings: Any,
    ) -> None:
        check_arguments(settings, DDP_ARGUMENTS)
        check_names(settings, [field.name for field in fields(FederationConfig)])
        if checkpoint_root is not None and settings.get("copies") is None:
            settings["copies"] = 1
        self.settings = FederationConfig(**settings)
        self.checkpoint_root = checkpoint_root
        self._check_disks()
        check_choice("stop_at", stop_at, StopAt)
        if between is not None:
            check_choice("between", between, Between)
        # 20 days: in milliseconds a timeout has to fit 32 bits.
        check_range("timeout_seconds", timeout_seconds, "1800 is the default", above=0, most=20 * 24 * 3600)
        if share_device:
            if self.settings.sites is None:
                raise ConfigError("sites", None, "must be given when sites share a device", "for example 4")
            between = "gloo"
            ranks = self.settings.ranks_per_site
            n_processes = self.settings.sites * ranks if isinstance(ranks, int) else sum(ranks)
            parallel_devices = [torch.device("cuda:0")] * n_processes
        super().__init__(parallel_devices, between, timedelta(seconds=timeout_seconds))
        stops = StopsTogether(self, stop_at, lambda: end_children(self.launcher))
        self._counted = Ledger()
        self.init_site(async_save, FederatedContent if checkpoint_root is None else PartsContent, stops)
        if isinstance(self.content, PartsContent) and checkpoint_root is not None:
            self.content.root = checkpoint_root
        self.rounds = Rounds(self, self.settings, stops, self.placed)
        self.sees_loads, self.moves_experts = self.settings.policy.sees_loads, self.settings.policy.moves
        self.share_device, self.wire_dtype = share_device, self.settings.wire_dtype

    def _check_disks(self) -> None:
        copies = self.settings.copies
        if self.checkpoint_root is not None and self.settings.most_ranks > 1:
            rule = "is of sites of one rank: those of several may be on machines with a disk each"
            raise ConfigError("checkpoint_root", str(self.checkpoint_root), rule, "leave it out, and give all sites "
                              "one file system")  # fmt: skip
        if self.checkpoint_root is None and copies is not None:
            rule = "is on how many sites' own disks each expert is stored, and the sites have none"
            raise ConfigError("copies", copies, rule, "give checkpoint_root too, or leave it out")
        if self.checkpoint_root is None:
            return
        check_roots(self.checkpoint_root)
        roots = [self.checkpoint_root] if isinstance(self.checkpoint_root, str) else [*self.checkpoint_root.values()]
        if self.settings.min_sites is not None and (len(set(roots)) > 1 or any(SITE in root for root in roots)):
            rule = "sites get other numbers when machines are gone, and would look for their parts in other places"
            raise ConfigError("checkpoint_root", str(self.checkpoint_root), rule, "name the folder alike on all "
                              "machines, such as /disk/fomoe, or leave out min_sites")  # fmt: skip

    def check_run(self, trainer: Any, module: Any, data: Any, *, fitting: bool) -> None:
        """As for all strategies; on a disk of its own a site tells checkpoints apart by their names alone."""
        super().check_run(trainer, module, data, fitting=fitting)
        if self.checkpoint_root is None:
            return
        if isinstance(self.checkpoint_root, str) and SITE not in self.checkpoint_root and trainer.num_devices > 1:
            rule = f"is one folder for {trainer.num_devices} sites of a machine"
            raise ConfigError("checkpoint_root", self.checkpoint_root, rule, f"put {SITE} into it")
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        places = {str(callback.dirpath) for callback in saving}
        if len(places) > 1 or any("/" in (callback.filename or "") for callback in saving):
            rule = "checkpoints of several folders would lie in one of a site's own, under their names alone"
            raise ConfigError("checkpoint_root", str(self.checkpoint_root), rule, "give all ModelCheckpoints one "
                              "dirpath, and no / in a filename")  # fmt: skip
        if any(callback.save_last == "link" for callback in saving):
            rule = "is a link in the ModelCheckpoint's folder, and checkpoints are on disks of the sites' own"
            raise ConfigError(
                "save_last", "link", rule, "type true, or leave it out: --ckpt_path auto finds the newest"
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As for all strategies; how far sites with disks of their own have come shows when they have met."""
        state = super().load_checkpoint(checkpoint_path, weights_only)
        if self.pace is not None and self.checkpoint_root is not None:
            steps = read_manifest(Path(state["folder"]))["optimizer_steps"] if state else 0
            self.pace.go_on(steps, state["tokens_of_all_sites"] if state else 0, self.trainer)
        return state

    # -- who holds what -------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """This rank's place in the federation."""
        settings = self.settings
        return Topology(settings.n_sites_of(self.world_size), settings.ranks_per_site, self.global_rank)

    def check(self, config: ModelConfig, n_processes: int, num_nodes: int = 1) -> int:
        """Check the settings against the model and the processes of all machines, before any is started.

        Returns:
            Number of sites.

        Raises:
            ConfigError: Naming the setting, the rule and what would be valid.
        """
        sites, min_sites = self.settings.sites, self.settings.min_sites
        if min_sites is not None and self.pace is None:
            rule = "only `fomoe fit` finds out how many sites there are"
            raise ConfigError("min_sites", min_sites, rule, "leave it out, or start the run with fomoe fit")
        if min_sites is not None and self.pace is not None:
            check_min_sites(min_sites, self.pace, num_nodes, self.settings.overlap, config.n_experts)
            sites = None if sites == self.pace.planned_sites else sites
        ranks = self.settings.ranks_per_site
        n_sites = check_processes(sites, ranks, n_processes, num_nodes, share_device=self.share_device)
        self.settings.check(config.n_experts, n_sites, config.top_k)
        self.settings.check_fragments(config.n_layers)
        if self.settings.inside == "shard":
            check_shares(config, self.settings.routing, self.settings.most_ranks)
        return n_sites

    def placed(self, config: ModelConfig) -> Placement:
        """Where experts are after the last time that they were placed."""
        n_sites = self.topology.n_sites
        return self.settings.place(config.n_layers, config.n_experts, n_sites, self.redraws, self.loads_at_draw)

    @property
    def batch_sizes(self) -> tuple[int, ...] | None:
        """Sequences of a micro-batch of each site; None where all have as many, or data that does not tell."""
        data = self.trainer.datamodule
        return data.batch_sizes(self.topology.n_sites) if isinstance(data, FoMoEData) else None

    def tokens_of_all(self, tokens: int) -> int:
        """Tokens that all sites take while this one takes so many."""
        sizes = self.batch_sizes
        return super().tokens_of_all(tokens) if sizes is None else tokens * sum(sizes) // sizes[self.topology.site]

    def residency(self, config: ModelConfig) -> Residency:
        """The experts that this site holds."""
        return self.settings.residency(self.placed(config).residents(self.topology.site))

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_distributed(self) -> None:
        """Join the world; several sites on one GPU must not bind it to the group (gloo cannot make sub-groups then)."""
        # NCCL's errors free the GPU and are raised where their collective is waited for: all waits between sites are on
        # the host. Data parallelism waits on the GPU, and would go on with what is no average: there torch ends the
        # process, as it does by default.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        super().setup_distributed()
        if self.share_device:
            dist.distributed_c10d._get_default_group().bound_device_id = None

    def setup(self, trainer: Any) -> None:
        """Prepare model and optimizer without wrapping; make the groups, once, and the anchors."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._join_site()
        if fitting:
            self.content.open()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            move_optimizers(self.optimizers, self.root_device)
            replace_signal_handling(trainer, self.stops.note)
        config = self.transformer.config
        n, settings = self.topology.n_sites, self.settings
        gloo = dist.get_backend() == "gloo"
        transport = Transport(
            self.topology,
            settings.holder_sets(config.n_layers, config.n_experts, n),
            self.ledger,
            device=torch.device("cpu") if gloo else self.root_device,
            dtype=settings.wire_dtype,
            bucket_bytes=settings.bucket_mib * 2**20,
            timeout=self.timeout,
            home=self.root_device,
            inside=self.inside,
            slices=self.slices is not None,
            weights=self.batch_sizes if settings.weighting == "tokens" else None,
            overlapped=settings.delay > 0,
        )
        self.rounds.reset()
        self.federation = Federation(
            self.content.layout(), self.placed(config), transport, outer=settings.rule,
            inner_moments=settings.inner_moments, codec=settings.codec, moments_codec=settings.codec_of_moments,
            error_feedback=settings.error_feedback, feedback_decay=settings.feedback_decay,
            state_on_host=settings.outer_state == "host",
            copies=copies_of(self.transformer), joined=None if self.slices is None else self.joined,
        )  # fmt: skip
        rank_zero_info(self.describe())
        if settings.places is not None:
            alone = in_one_place(self.federation.placement, settings.places)
            rank_zero_info(f"{alone} of {config.n_layers * config.n_experts} experts live in one place only")

    def _join_site(self) -> None:
        """Meet the other ranks of this site, and share its model out among them."""
        gloo = self.root_device.type == "cpu" or self.share_device  # NCCL refuses two ranks on one GPU
        device, backend = (torch.device("cpu"), "gloo") if gloo else (self.root_device, "nccl")
        self.inside = Inside(self.topology, device, backend, self.timeout)
        if self.topology.world_size > self.topology.n_sites:
            told, warning = ranks_on_hosts(self.topology, self.texts_of_ranks(socket.gethostname()))
            rank_zero_info(told)
            if warning:
                rank_zero_warn(warning)
        if self.settings.inside == "shard":
            assert self.inside.group is not None
            mesh = DeviceMesh.from_group(self.inside.group, self.root_device.type)
            mixed = str(self.precision_plugin.precision) == "bf16-mixed"
            self.slices = shard(self.transformer, mesh, self.topology.place, torch.bfloat16 if mixed else None)

    def copy_age(self) -> int | None:
        """Of the copies that the last round had."""
        if self.federation is None or self.federation.copies is None:
            return None
        return self.settings.age_of_copies(max(self.rounds_done - 1, 0))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The federation's settings, plain values."""
        found = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        found |= {"outer": self.settings.rule, "overlap": self.settings.overlap_of(self.topology.n_sites)}
        plain = {name: v if isinstance(v, (str, int, float, type(None))) else str(v) for name, v in found.items()}
        return super().hyperparameters | plain

    def describe(self) -> str:
        """One line that says which method this is."""
        return self.settings.describe(self.topology.n_sites)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One local step."""
        raise_if_lost(self.topology)
        with sites_watched(self.topology):  # the ranks of a site may be gathering its layers
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The K-th step ends the round."""
        ended = self.rounds.end_step(optimizer)
        if self.slices is not None and ended:
            reshard(self.transformer)  # if an observer has looked at the agreed values
            self.ledger_of_site()

    def land(self) -> dict[str, Any]:
        """Wait for averages that are on their way, and apply none of them; what a resumed run goes on with."""
        return self.rounds.land()

    def go_on_with(self, landed: dict[str, Any]) -> None:
        """Take up what `land` gave."""
        self.rounds.go_on(landed, self.optimizers[0])

    def sum_in_site(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks of this site."""
        return self.inside.sum(values)

    def gathered_in_site(self, values: Tensor) -> list[Tensor]:
        """Flat tensors of the site's ranks, which may be of different lengths, on the CPU; a collective call."""
        n_ranks = self.topology.n_ranks
        lengths = self.inside.joined(torch.tensor([values.numel()]), 0, n_ranks).tolist()
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        whole = self.inside.joined(padded, 0, n_ranks * len(padded)).cpu().view(n_ranks, -1)
        return [row[:length].clone() for row, length in zip(whole, lengths, strict=True)]

    def ledger_of_site(self) -> Ledger:
        """Bytes that this site sent so far, on its first rank; all of its ranks call it together."""
        if self.slices is not None:
            self._counted = self.ledger.summed(self.inside.sum, self.topology.world_size)
        return self.counted

    @property
    def counted(self) -> Ledger:
        """What `ledger_of_site` gave last, of which no other rank is asked: at rounds' ends and after validations."""
        return self.ledger if self.slices is None else self._counted

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Loads of the site's ranks together: they train one model."""
        return self.inside.sum(loads_LE)

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients over the ranks of this site."""
        if self.inside.group is None:
            return
        raise_if_lost(self.topology)
        if self.slices is not None:  # FSDP has averaged them in the backward pass
            take_gradients(self.transformer)
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.inside.average_(grads)

    @property
    def total_of_slices(self) -> Callable[[Tensor], Tensor] | None:
        """Adds a number over the ranks of this site, if they have slices of its model; else None."""
        return None if self.slices is None else self.inside.sum

    def joined(self, name: str, values: Tensor) -> Tensor:
        """A whole tensor, of which this rank may have a slice; all ranks of the site call it together."""
        if self.slices is None or name not in self.slices.cut:
            return values
        return self.inside.joined(values, *self.slices.cut[name])

    # -- validation of the agreed model ---------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """In mid-round the agreed values stand in for the local ones; what is on its way arrives first."""
        if self.federation is None:
            return
        self.land()
        if self.optimizer_steps > 0 and not self.rounds.agreed_here:
            self.federation.enter_global()
        if self.slices is not None:
            reshard(self.transformer)
            gather_root(self.transformer)

    def on_validation_end(self) -> None:
        """Back to the local values."""
        if self.federation is not None:
            self.federation.leave_global()
        if self.slices is not None:
            reshard(self.transformer)
        self.ledger_of_site()
        super().on_validation_end()

    @contextmanager
    def all_experts_of(self, layer: int) -> Iterator[None]:
        """Make all E experts of one layer live on this site while the context lasts; all sites enter it together."""
        assert self.federation is not None
        model = self.transformer
        if model.residency.is_full(model.config):
            yield
            return
        prefix, block = f"layers.{layer}.moe.", model.layers[layer]
        gathered = self.federation.gather(layer)
        tensors = {name.removeprefix(prefix): self.joined(name, t) for name, t in gathered.items()}
        if self.slices is not None:
            hold_gathered(block, hold=True)
        with block.moe.with_all_experts(tensors):
            yield
        if self.slices is not None:
            hold_gathered(block, hold=False)

    # -- control traffic, counted ---------------------------------------------------------------------------------

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all ranks of all sites, counted."""
        assert self.federation is not None
        return self.federation.transport.sum(cast(Kind, kind), self.sum_in_site(values))

    # -- the end --------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """As for all strategies; then end the processes that this one started: they would train on alone."""
        super().on_exception(exception)
        end_children(self.launcher)


def copies_of(model: Transformer) -> Copies | None:
    """A model's copies of experts that are not here, by the names of what they are copies of; None without any."""
    buffers = dict(model.named_buffers())
    found = {name.replace(".shadow.", ".experts."): buffers[name] for name in model.shadow_tensors()}

    @contextmanager
    def refreshing() -> Iterator[dict[str, Tensor]]:
        with model.refreshing() as fresh:
            yield {name.replace(".shadow.", ".experts."): tensor for name, tensor in fresh.items()}

    return Copies(found, model.residency.shadow.codec, refreshing) if found else None
