"""One Lightning strategy for all low-communication methods: its settings make it local SGD, DiLoCo or FoMoE."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.federation.ledger import Kind
from fomoe_pl.federation.loss import raise_if_lost
from fomoe_pl.federation.outer import OuterRule
from fomoe_pl.federation.outer_state import OuterPlace
from fomoe_pl.federation.placement import Placement, PlacementKind, all_arcs, check_placement, place
from fomoe_pl.federation.report import SiteReport, share
from fomoe_pl.federation.rounds import Federation, InnerMoments
from fomoe_pl.federation.schedule import RoundSchedule
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.wire import Wire, WireDtype
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency, Routing
from fomoe_pl.strategies.checks import StopAt, check_processes, check_settings, check_skipped
from fomoe_pl.strategies.elastic import check_min_sites
from fomoe_pl.strategies.evaluation import GlobalValidation
from fomoe_pl.strategies.global_state import GlobalState
from fomoe_pl.strategies.signals import end_children, observe_children_every, replace_signal_handling
from fomoe_pl.strategies.stopping import StopsTogether


class FederatedStrategy(StopsTogether, GlobalValidation, GlobalState, DDPStrategy):
    """Periodic averaging between sites, each holding some of the experts (FoMoE, arXiv 2606.19025).

    Between rounds nothing crosses sites. After K optimizer steps the dense parameters are averaged over all sites,
    each expert over its holders, and the outer rule is applied.

    Args:
        sites: number of sites M; None is the world size.
        ranks_per_site: ranks inside a site; only 1 works so far.
        overlap: sites that hold each expert, 1..M; None is M, a full replica.
        routing: what happens to picks of experts that are not here: `ghost` skips them, `partitioned` routes among
            the residents only.
        placement: `fixed`, or `random` with experts redrawn every `reshuffle_rounds` rounds.
        reshuffle_rounds: T, rounds between two random placements.
        placement_seed: seed of the random placement.
        local_steps: K, optimizer steps of a round, or a schedule {first step: K} such as {0: 1, 64: 32}.
        outer: outer rule.
        inner_moments: what a round does to the inner optimizer's moments: keep, reset or average them.
        wire_dtype: dtype of averaged values on the wire; anchors and outer state are always float32.
        bucket_mib: size of a communication buffer, MiB; one travels while another is read or written.
        outer_state: where anchors and outer momentum live between rounds: on the `device`, or on the `host`, which
            saves a GPU 4 to 8 bytes a parameter, and takes twice as many over its bus in a round.
        share_device: put all sites of this machine on its first GPU (over gloo); the Trainer then has `devices: 1`.
        check_agreement: compare a hash of each dense tensor of all sites, and of each expert of its holders, after
            every round (always done before saving).
        async_save: write checkpoints while training goes on, from a copy in host memory.
        timeout_seconds: after which a collective that does not complete raises.
        min_sites: fewest sites that a run under torchrun goes on with when machines are gone; None is all of them.
        stop_at: where a signal ends the run: after its `round`, or after the next local `step` of all sites.
        **kwargs: as for Lightning's `DDPStrategy`.

    Raises:
        ConfigError: for settings that cannot work.
    """

    has_rounds = True

    def __init__(
        self,
        sites: int | None = None,
        ranks_per_site: int = 1,
        overlap: int | None = None,
        routing: Routing = "ghost",
        placement: PlacementKind = "fixed",
        reshuffle_rounds: int = 1,
        placement_seed: int = 0,
        local_steps: int | dict[int, int] = 32,
        outer: OuterRule = OuterRule(),  # noqa: B008  frozen
        inner_moments: InnerMoments = "keep",
        wire_dtype: WireDtype = "float32",
        bucket_mib: int = 64,
        outer_state: OuterPlace = "device",
        share_device: bool = False,
        check_agreement: bool = False,
        async_save: bool = True,
        timeout_seconds: float = 1800.0,
        min_sites: int | None = None,
        stop_at: StopAt = "round",
        **kwargs: Any,
    ) -> None:
        check_settings(
            wire_dtype=wire_dtype,
            inner_moments=inner_moments,
            outer_state=outer_state,
            routing=routing,
            placement=placement,
            stop_at=stop_at,
            timeout_seconds=timeout_seconds,
            sites=sites,
            ranks_per_site=ranks_per_site,
            reshuffle_rounds=reshuffle_rounds,
            bucket_mib=bucket_mib,
            share_device=share_device,
            overlap=overlap,
            min_sites=min_sites,
            placement_seed=placement_seed,
        )
        self.schedule = RoundSchedule.parse(local_steps)
        if share_device:
            devices = [torch.device("cuda:0")] * (sites or 1)
            kwargs |= {"parallel_devices": devices, "process_group_backend": "gloo"}
        super().__init__(timeout=timedelta(seconds=timeout_seconds), **kwargs)
        self.init_site(async_save)
        self._sites, self._overlap = sites, overlap
        self.min_sites, self.stop_at = min_sites, stop_at
        self.routing, self.placement_kind = routing, placement
        self.reshuffle_rounds, self.placement_seed = reshuffle_rounds, placement_seed
        self.outer, self.inner_moments = outer, inner_moments
        self.wire_dtype, self.bucket_mib, self.check_agreement = wire_dtype, bucket_mib, check_agreement
        self.share_device, self.outer_state = share_device, outer_state
        self._skipped_of_sites: list[int] = []

    # -- who holds what -------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """This rank's place in the federation."""
        return Topology(self.world_size, 1, self.global_rank)

    def overlap(self, n_sites: int) -> int:
        """Sites that hold each expert; all, where there are no longer as many."""
        if self._overlap is None or (self.min_sites is not None and self._overlap > n_sites):
            return n_sites
        return self._overlap

    def check(self, config: ModelConfig, n_processes: int, num_nodes: int = 1) -> None:
        """Check the settings against the model and the processes of all machines, before any is started.

        Raises:
            ConfigError: naming the setting, the rule and what would be valid.
        """
        sites = self._sites
        if self.min_sites is not None and self.pace is not None:
            check_min_sites(self.min_sites, self.pace, num_nodes, self._overlap, config.n_experts)
            sites = None if sites == self.pace.planned_sites else sites
        n_sites = check_processes(sites, n_processes, num_nodes, share_device=self.share_device)
        check_placement(config.n_experts, n_sites, self.overlap(n_sites))

    def placed(self, config: ModelConfig, redraws: int) -> Placement:
        """The placement after it was redrawn `redraws` times."""
        n = self.world_size
        return place(
            self.placement_kind, n_layers=config.n_layers, n_experts=config.n_experts, n_sites=n,
            overlap=self.overlap(n), seed=self.placement_seed, epoch=redraws,
        )  # fmt: skip

    def residency(self, config: ModelConfig) -> Residency:
        """The experts that this site holds."""
        return Residency(self.routing, self.placed(config, self.redraws).residents(self.topology.site))

    # -- setting up -----------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        observe_children_every(self._timeout.total_seconds())  # type: ignore[union-attr]

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
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            replace_signal_handling(trainer, self.note_signal)
        self._last_step = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        n = self.topology.n_sites
        gloo = dist.get_backend() == "gloo"
        wire = Wire(
            self.topology,
            all_arcs(config.n_experts, config.n_layers, n, self.overlap(n)),
            self.ledger,
            device=torch.device("cpu") if gloo else self.root_device,
            dtype=self.wire_dtype,
            bucket_bytes=self.bucket_mib * 2**20,
            timeout=self._timeout,
            home=self.root_device,
        )
        self.federation = Federation(
            self.layout(), self.placed(config, self.redraws), wire,
            outer=self.outer, inner_moments=self.inner_moments, state_on_host=self.outer_state == "host",
        )  # fmt: skip
        module = cast(Any, self.lightning_module)
        module.expert_source = self.all_experts_of
        rank_zero_info(self.describe())

    def describe(self) -> str:
        """One line that says which method this is."""
        n = self.topology.n_sites
        return (
            f"{n} sites, each expert on {self.overlap(n)} ({self.placement_kind}), {self.routing} routing, "
            f"rounds of {self.schedule} local steps, outer rule {self.outer}, moments: {self.inner_moments}"
        )

    # -- rounds ---------------------------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One local step; the K-th ends the round. Counted here because accumulation calls it once a step."""
        raise_if_lost(self.topology)
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.optimizer_steps += 1
        if self.schedule.is_round_end(self.optimizer_steps, self._last_step):
            self._wait_for_device()  # else the queue of local work would be charged to the round
            start, watched = time.perf_counter(), self.watch_seconds
            self._end_round(optimizer)
            self.sync_seconds += time.perf_counter() - start - (self.watch_seconds - watched)
        return output

    def _end_round(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.federation is not None
        self.ask_observers(lambda observer: observer.before_synchronization())
        left_out = self._share_statistics()
        self.federation.synchronize(optimizer, left_out)
        self.rounds_done += 1
        self.ask_observers(lambda observer: observer.after_synchronization())
        self.share_observations()
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        due = self.placement_kind == "random" and self.rounds_done % self.reshuffle_rounds == 0
        if due and self.optimizer_steps != self._last_step:
            self.redraws += 1
            new = self.placed(config, self.redraws)
            self.federation.migrate(new, optimizer)
            residency = Residency(self.routing, new.residents(self.topology.site))
            self.transformer.set_residency(residency)  # type: ignore[operator]
        if self.check_agreement:
            self.federation.check_agreement()

    def _share_statistics(self) -> frozenset[int]:
        """One small message a round, before the averages; returns the sites that have nothing to give to them."""
        assert self.federation is not None
        module, n_sites = cast(Any, self.lightning_module), self.topology.n_sites
        skipped, steps = module.count_skipped()
        left_out = skipped == steps or not self.federation.is_finite()
        loss_sum, loss_count = module.pop_round_losses()
        own = SiteReport(skipped, left_out, loss_sum, loss_count, self._signal is not None, *self.save_flags())
        shared = share(own, self.topology.site, n_sites, lambda values: self.sum_over_sites(values, "control"))
        self.conclude_save(failed=shared.save_failed, complete=shared.saved)
        before = self._skipped_of_sites or [0] * n_sites
        self._skipped_of_sites = [old + new for old, new in zip(before, shared.skipped, strict=True)]
        check_skipped(self._skipped_of_sites, module.max_skipped_steps)
        if shared.left_out and self.is_global_zero:
            sites = ", ".join(map(str, sorted(shared.left_out)))
            told = f"round {self.rounds_done + 1} is without site {sites}: its gradients or values are not finite"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)
        self.round_stats, self.stopping = shared.numbers, shared.stop
        return shared.left_out

    # -- control traffic, counted ---------------------------------------------------------------------------------

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all sites, counted."""
        assert self.federation is not None
        return self.federation.wire.sum(cast(Kind, kind), values)

    # -- the end --------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """As for all strategies; then end the processes that this one started: they would train on alone."""
        super().on_exception(exception)
        end_children(self.launcher)
