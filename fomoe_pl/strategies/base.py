"""What all strategies share: a place in the federation, a ledger, checkpoints of one format, and an end."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from fomoe_pl.checkpoint.content import Content, MidRound
from fomoe_pl.checkpoint.saving import Checkpointer, keep_from_saving_failures
from fomoe_pl.errors import ConfigError, SiteLostError
from fomoe_pl.federation.exchange import gather_texts
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.liveness import all_here, listen, sites_watched, stop_listening
from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.settings import FederationConfig, WireDtype
from fomoe_pl.federation.shadow import quantisation_errors
from fomoe_pl.federation.topology import Topology
from fomoe_pl.lightning_internals import group_settings
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.slices import Slices
from fomoe_pl.strategies.checks import (
    check_data,
    check_launched,
    check_module,
    check_position,
    check_precision,
    check_training,
)
from fomoe_pl.strategies.meeting import meet
from fomoe_pl.strategies.presence import Plain, shared_settings
from fomoe_pl.strategies.stopping import Stops
from fomoe_pl.training.context import SiteContext
from fomoe_pl.training.elastic import Pace


class SiteStrategy(Strategy):
    """Mixin of this project's strategies; put it before the Lightning strategy in the bases.

    Attributes:
        checkpoints: Writes and reads checkpoints.
        stops: Where the run ends.
        ledger: Bytes that this rank sent; see `ledger_of_site`.
        rounds_done: Rounds that have ended.
        redraws: How often experts have been placed again.
        loads_at_draw: Of each layer and expert, what a policy that sees loads saw last.
        sync_seconds: Seconds spent between the end of the last local step and the next, over all rounds.
        round_stats: Means over all sites of the last round (fixed keys; empty before the first round).
        has_rounds: Whether sites agree in rounds, not in every step.
        sees_loads: Whether the placement depends on how often experts were picked.
        moves_experts: Whether the placement changes while a run trains.
        observers: Who looks at the ends of rounds; the same on all sites, in the same order.
        wire_dtype: dtype of averaged values on the wire.
        settings: The federation's settings; None without rounds.
        slices: Of a site's tensors which part this rank has; None is the whole.
        pace: Of a run that may have fewer sites than planned.
        watch_seconds: Seconds that observers and pictures took so far; no part of `sync_seconds`.
    """

    # With Lightning's own handling of signals data-parallel ranks may stop at different steps, and cannot save.
    saves_when_stopped = True
    has_rounds = sees_loads = moves_experts = False
    wire_dtype: WireDtype = "float32"
    settings: FederationConfig | None = None
    federation: Federation | None = None
    slices: Slices | None = None
    pace: Pace | None = None

    def init_site(self, async_save: bool, content: type[Content] = Content, stops: Stops | None = None) -> None:
        """Set the counters, and what is not a strategy's own work; called by the constructors.

        Args:
            async_save: Whether checkpoints are written while training goes on.
            content: What they hold.
            stops: Where the run ends; None is after any step.
        """
        self.checkpoints = Checkpointer(content(self), async_save=async_save)
        self.stops = Stops(self) if stops is None else stops
        self.ledger = Ledger()
        self.rounds_done = 0
        self.redraws = 0
        self.loads_at_draw: list[list[float]] | None = None
        self.sync_seconds = 0.0
        self.round_stats: dict[str, float] = {}
        self.observers: list[RoundObserver] = []
        self.watch_seconds = 0.0
        self._step_is_ending = False
        self._open_micro_batches = 0

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def context(self) -> SiteContext:
        """What module, data and callbacks may ask."""
        return self

    @property
    def content(self) -> Content:
        """What checkpoints hold."""
        return self.checkpoints.content

    @property
    def save_seconds(self) -> float:
        """Seconds for which training stood still for saving so far."""
        return self.checkpoints.save_seconds

    @property
    def topology(self) -> Topology:
        """This rank's place; for data-parallel strategies every rank counts as a site."""
        raise NotImplementedError

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum a small tensor over all ranks of all sites, counted."""
        raise NotImplementedError

    @property
    def counted(self) -> Ledger:
        """What `ledger_of_site` gave last, of which no other rank is asked."""
        return self.ledger

    def ledger_of_site(self) -> Ledger:
        """Bytes that this site sent so far, on its first rank; all of its ranks call it together."""
        return self.ledger

    def sum_in_site(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks of this site: there is one."""
        return values

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients over the ranks of this site: there is one."""

    @property
    def total_of_slices(self) -> Callable[[Tensor], Tensor] | None:
        """Adds a number over the ranks of this site, if they have slices of its model; else None."""
        return None

    def joined(self, name: str, values: Tensor) -> Tensor:
        """A whole tensor, of which this rank may have a slice; all ranks of the site call it together."""
        return values

    def residency(self, config: ModelConfig) -> Residency:
        """Which experts the model on this rank holds."""
        return Residency.full(config)

    @property
    def trainer(self) -> Any:
        """The Trainer that runs."""
        return cast(Any, self.lightning_module).trainer

    @property
    def transformer(self) -> Transformer:
        """The model inside the LightningModule."""
        model = cast(Any, self.lightning_module).model
        assert isinstance(model, Transformer)
        return model

    @property
    def mid_round(self) -> MidRound:
        """What the LightningModule counts in a round."""
        return cast(MidRound, self.lightning_module)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the run has taken. Lightning counts them, once all that belongs to a step is done."""
        return int(self.trainer.global_step) + self._step_is_ending

    @property
    def in_step(self) -> bool:
        """Whether there are gradients of micro-batches that no optimizer step has used yet."""
        return self._open_micro_batches > 0

    @property
    def measures_sync(self) -> bool:
        """Whether the time of synchronisation is known: data parallelism hides it in the backward pass."""
        return self.has_rounds or self.topology.n_sites == 1

    def all_experts_of(self, layer: int) -> AbstractContextManager[None]:
        """Make all E experts of one layer live on this site: they are."""
        return nullcontext()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The method's settings by name, plain values."""
        return {"strategy": type(self).__name__}

    def describe(self) -> str:
        """One line that says which method this is."""
        return f"{type(self).__name__}, {self.topology.n_sites} sites"

    def tokens_of_all(self, tokens: int) -> int:
        """Tokens that all sites take while this one takes so many."""
        return tokens * self.topology.n_sites

    def check_run(self, trainer: Any, module: Any, data: Any, *, fitting: bool) -> None:
        """Check everything that can be seen before the processes meet.

        Args:
            trainer: The Trainer.
            module: The FoMoEModule.
            data: The datamodule, or None.
            fitting: Whether it trains; else it validates.

        Raises:
            ConfigError: Naming the setting, the rule and what would be valid.
        """
        check_module(module)
        check_precision(trainer.precision)
        environment = self.cluster_environment if isinstance(self, ParallelStrategy) else None
        if environment is not None and environment.creates_processes_externally:
            check_launched(trainer.num_devices, trainer.num_nodes, environment.world_size())
        n_processes = trainer.num_nodes * trainer.num_devices
        n_sites = self.check(module.config, n_processes, trainer.num_nodes)
        if fitting:
            check_training(trainer, federated=self.has_rounds)
        ranks = 1 if self.settings is None else self.settings.ranks_per_site
        check_data(trainer, data, module.config, n_sites, ranks, fitting=fitting)
        sizes = getattr(data, "batch_size", 1)
        if not self.has_rounds and not isinstance(sizes, int):
            rule = "is of sites with rounds, which weigh averages by tokens: else all gradients weigh the same"
            raise ConfigError("data.batch_size", sizes, rule, "type one number")

    def check(self, config: ModelConfig, n_processes: int, num_nodes: int = 1) -> int:
        """Check the strategy's own settings against the model and the processes of all machines.

        Returns:
            Number of sites.
        """
        return n_processes

    def setup_environment(self) -> None:
        """Check what a command line has checked already, for those that have none; then meet the others."""
        trainer = self.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.check_run(trainer, self.lightning_module, trainer.datamodule, fitting=fitting)
        self.stops.reset()
        self._open_micro_batches = 0
        if self.topology.world_size > 1:
            keep_from_saving_failures(trainer)
        super().setup_environment()

    def on_train_start(self) -> None:
        """A run goes on at the beginning of an optimizer step."""
        super().on_train_start()
        self.checkpoints.start_training()
        check_position(self.trainer)

    def on_train_end(self) -> None:
        """A run ends when a checkpoint of its last step is complete, where it saves checkpoints at all."""
        super().on_train_end()
        self.checkpoints.end_training()

    def setup_distributed(self) -> None:
        """Meet the other processes, also those of a restarted run."""
        own: Any = self
        own.set_world_ranks()
        environment, device = own.cluster_environment, own.root_device
        backend, timeout = group_settings(self)
        meet(
            self.topology, environment.main_address, environment.main_port, backend, timeout,
            None if device.type == "cpu" else device, self._shared_settings(),
        )  # fmt: skip
        super().setup_distributed()  # type: ignore[misc]
        listen(self.topology, beats="nccl" in backend or self._several_gpus_inside)

    @property
    def _several_gpus_inside(self) -> bool:
        return self.root_device.type == "cuda" and self.topology.world_size > self.topology.n_sites

    def _shared_settings(self) -> dict[str, Plain]:
        trainer: Any = self.trainer
        module, data = self.lightning_module, trainer.datamodule
        return shared_settings(trainer, module, data, self.settings, strategy=type(self).__name__)

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Expert loads (L, E) that the balance bias is updated from: this site's own unless gradients are shared."""
        return loads_LE

    def texts_of_sites(self, text: str) -> list[str]:
        """What each site tells the others, in the order of sites."""
        told = self.texts_of_ranks(text)
        return told if len(told) == 1 else [told[ranks.start] for ranks in self.topology.ranks]

    def texts_of_ranks(self, text: str) -> list[str]:
        """What each rank tells the others, in the order of ranks."""
        if not self._joined:
            return [text]
        device = self.root_device if "nccl" in dist.get_backend() else torch.device("cpu")
        with sites_watched(self.topology):
            all_here(self.topology)
            return gather_texts(text, device, self.ledger)

    # -- who watches ---------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, *, wait: bool = True) -> Iterator[None]:
        """Charge what is done inside to watching.

        Args:
            wait: For the device, before and after, so that what is queued is charged where it belongs.
        """
        if wait:
            self.wait_for_device()
        start = time.perf_counter()
        yield
        if wait:
            self.wait_for_device()
        self.watch_seconds += time.perf_counter() - start

    def wait_for_device(self) -> None:
        """Wait until a GPU has done all that is queued."""
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)

    def ask_observers(self, look: Callable[[RoundObserver], Any]) -> None:
        """Call each observer, in their order, on their own time."""
        if self.observers:
            with self.watched():
                for observer in self.observers:
                    look(observer)

    def share_observations(self) -> None:
        """Add all that observers count over the sites, in one message, which is sent for them: on their time too."""
        if not self.observers:
            return
        with self.watched():
            counted = [observer.statistics() for observer in self.observers]
            total = self.sum_over_sites(torch.cat(counted), "control")
            for observer, part in zip(self.observers, total.split([len(part) for part in counted]), strict=True):
                observer.receive(part)

    def watch_movement(self) -> Movement | None:
        """Have rounds fill a `Movement`; None where there are no rounds."""
        if self.federation is None:
            return None
        config = self.transformer.config
        self.federation.movement = Movement(config.n_layers, config.n_experts, self.watched, self.total_of_slices)
        return self.federation.movement

    def copy_errors(self) -> Tensor | None:
        """Of the agreed values, see `quantisation_errors`; None without copies."""
        of = self.federation
        if of is None or of.copies is None:
            return None
        return quantisation_errors(of.copies, of.layout, of.placement, of.site, of.owned_values)

    def copy_age(self) -> int | None:
        """Without rounds there are no copies."""
        return None

    @property
    def placement(self) -> Placement | None:
        """Who holds what; None where every rank holds all."""
        return None if self.federation is None else self.federation.placement

    def agreed_bytes(self) -> int:
        """Bytes of anchors, of the outer rule's state and of what coding has lost on this rank's device."""
        kept = {} if self.federation is None else self.federation.state.slots | self.federation.state.own
        return sum(t.nbytes for tensors in kept.values() for t in tensors.values() if t.device == self.root_device)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One step, after which gradients are freed: Lightning would keep them beside the next step's activations."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        optimizer.zero_grad()
        self._step_is_ending = True
        try:
            self.end_step(optimizer)
        finally:
            self._step_is_ending = False
        self._open_micro_batches = 0
        return output

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What belongs to an optimizer step beside the step itself; the step is counted already."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Note that there are gradients now."""
        super().post_backward(closure_loss)
        self._open_micro_batches += 1

    # -- where the run may end ------------------------------------------------------------------------------------

    def stop_if_asked(self) -> None:
        """End the run here if it was asked to and may; called after each micro-batch, once callbacks have seen it."""
        if not self.in_step:
            self.checkpoints.save_postponed()
            self.stops.stop_if_asked()
        self.hold_stop()

    def hold_stop(self) -> None:
        """Let `trainer.should_stop` be true only where the run may end: Lightning ends it at once."""
        self.stops.hold()

    def on_validation_end(self) -> None:
        """Callbacks such as EarlyStopping have looked at the validation."""
        super().on_validation_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.hold_stop()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether tensors are there only after `setup`."""
        return self.content.restored_after_setup

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the folder's own files, expert by expert."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See `Checkpointer.save`; every rank must call it."""
        self.checkpoints.save(checkpoint, filepath)

    def remove_checkpoint(self, filepath: Any) -> None:
        """See `Checkpointer.remove`."""
        self.checkpoints.remove(str(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state; weights are read by `load_model_state_dict`, only those of this site."""
        return self.content.load_trainer(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this site's weights from the folder."""
        self.content.load_weights(Path(checkpoint["folder"]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore inner optimizer, outer state and counters of this site, as far as they fit."""
        self.checkpoints.load_site(Path(checkpoint["folder"]), super().load_optimizer_state_dict)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch; the first of a resumed run goes on with the interrupted one's random numbers."""
        self.content.go_on()
        return super().training_step(*args, **kwargs)

    # -- Lightning's own traffic, counted ------------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Whether this rank has failed while the others go on: nothing may be sent to them."""
        failed = self.lightning_module is not None and self.trainer.state.status == TrainerStatus.INTERRUPTED
        return failed and not self.stops.together and self.topology.world_size > 1

    @property
    def _joined(self) -> bool:
        return dist.is_initialized() and dist.get_world_size() > 1 and not self.alone

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """A barrier; a control call without payload."""
        if self._joined:
            self.ledger.send("control", 0)
            with sites_watched(self.topology):
                all_here(self.topology)
                super().barrier(*args, **kwargs)  # type: ignore[safe-super]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all (file names of checkpoints)."""
        if not self._joined:
            return obj
        self.ledger.send("control", len(pickle.dumps(obj)) if dist.get_rank() == src else 0)
        with sites_watched(self.topology):
            all_here(self.topology)
            return super().broadcast(obj, src)  # type: ignore[safe-super]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor over all ranks (decisions to stop or to save, metrics logged with `sync_dist`)."""
        if not self._joined or not isinstance(tensor, Tensor):
            return tensor
        self.ledger.send("control", 0)  # Lightning's barrier before it
        self.ledger.all_reduce("control", tensor.nbytes, dist.get_world_size())
        with sites_watched(self.topology):
            all_here(self.topology)
            return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]

    # -- the end --------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Save where a signal ends the run, and tell what to go on from."""
        stopped = isinstance(exception, SIGTERMException)
        if stopped and self.saves_when_stopped and not self.alone:
            self.checkpoints.save_last("stopped")
        elif not isinstance(exception, KeyboardInterrupt):  # a second Ctrl-C waits for nothing
            self.checkpoints.leave()
        if stopped:
            last = self.checkpoints.last_saved
            exception.args = (str(last) if last else None, self.stops.signal or signal.SIGTERM)
        if isinstance(exception, SiteLostError):
            given = self.lightning_module.trainer.ckpt_path  # type: ignore[union-attr]
            found = self.checkpoints.last_saved or given  # nothing has been loaded yet where not all have met
            exception.checkpoint = str(found) if found else None

    def teardown(self) -> None:
        """Drop every group: without it gloo aborts at exit now and then."""
        module = self.lightning_module  # without a Trainer in a notebook's own process, which has met nobody
        good_end = (
            module is not None and dist.is_initialized() and module.trainer.state.status != TrainerStatus.INTERRUPTED
        )
        stop_listening(together=good_end)  # else it would answer for a rank that is leaving
        if self.federation is not None:
            self.federation.transport.close()
        super().teardown()
        self.content.close()
        if dist.is_initialized():
            dist.destroy_process_group()
