"""What all strategies share: a place in the federation, a ledger, and one checkpoint format."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.loss import all_here, listen, sites_watched, stop_listening
from fomoe_pl.federation.movement import Movement
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.settings import WireDtype
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.strategies.checkpoints import CheckpointingStrategy
from fomoe_pl.strategies.elastic import Pace
from fomoe_pl.strategies.meeting import meet


class SiteStrategy(CheckpointingStrategy):
    """Mixin of this project's strategies; put it before the Lightning strategy in the bases.

    Attributes:
        sync_seconds: seconds spent between the end of the last local step and the next, over all rounds.
        round_stats: means over all sites of the last round (fixed keys; empty before the first round).
        has_rounds: whether sites agree in rounds, not in every step.
        observers: who looks at the ends of rounds; the same on all sites, in the same order.
        wire_dtype: dtype of averaged values on the wire.
        pace: of a run that may have fewer sites than planned.
        watch_seconds: seconds that observers and pictures took so far; no part of `sync_seconds`.
    """

    # With Lightning's own handling of signals data-parallel ranks may stop at different steps, and cannot save.
    saves_when_stopped = True
    has_rounds = False
    wire_dtype: WireDtype = "float32"
    federation: Federation | None = None
    pace: Pace | None = None

    def init_site(self, async_save: bool) -> None:
        """Set the counters; called by the constructors."""
        self.init_saving(async_save)
        self.ledger = Ledger()
        self.rounds_done = 0
        self.redraws = 0
        self.optimizer_steps = 0
        self.sync_seconds = 0.0
        self._rng_states = None
        self._signal: int | None = None
        self.round_stats: dict[str, float] = {}
        self.observers: list[RoundObserver] = []
        self.watch_seconds = 0.0

    def describe(self) -> str:
        """One line that says which method this is."""
        return f"{type(self).__name__}, {self.topology.n_sites} sites"

    def setup_distributed(self) -> None:
        """Meet the other processes, also those of a restarted run."""
        own: Any = self
        own.set_world_ranks()
        environment, device = own.cluster_environment, own.root_device
        meet(
            self.topology, environment.main_address, environment.main_port, own._get_process_group_backend(),
            own._timeout, None if device.type == "cpu" else device,
        )  # fmt: skip
        super().setup_distributed()  # type: ignore[misc]
        listen(self.topology)

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Expert loads (L, E) that the balance bias is updated from: this site's own unless gradients are shared."""
        return loads_LE

    # -- who watches ---------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, *, wait: bool = True) -> Iterator[None]:
        """Charge what is done inside to watching.

        Args:
            wait: for the device, before and after, so that what is queued is charged where it belongs.
        """
        if wait:
            self._wait_for_device()
        start = time.perf_counter()
        yield
        if wait:
            self._wait_for_device()
        self.watch_seconds += time.perf_counter() - start

    def _wait_for_device(self) -> None:
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
        config: ModelConfig = self.transformer.config  # type: ignore[assignment]
        self.federation.movement = Movement(config.n_layers, config.n_experts, self.watched)
        return self.federation.movement

    @property
    def placement(self) -> Placement | None:
        """Who holds what; None where every rank holds all."""
        return None if self.federation is None else self.federation.placement

    def agreed_bytes(self) -> int:
        """Bytes of anchors and of the outer rule's state on this rank's device."""
        kept = {} if self.federation is None else self.federation.state.slots
        return sum(t.nbytes for tensors in kept.values() for t in tensors.values() if t.device == self.root_device)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One step, after which gradients are freed: Lightning would keep them beside the next step's activations."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        optimizer.zero_grad()
        return output

    # -- Lightning's own traffic, counted ------------------------------------------------------------------------

    @property
    def _joined(self) -> bool:
        return dist.is_initialized() and dist.get_world_size() > 1

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """A barrier; a control call without payload."""
        if self._joined:
            self.ledger.send("control", 0)
            with sites_watched(self.topology):
                all_here(self.topology)
                super().barrier(*args, **kwargs)  # type: ignore[safe-super]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all (file names of checkpoints)."""
        if self._joined:
            self.ledger.send("control", len(pickle.dumps(obj)) if dist.get_rank() == src else 0)
        with sites_watched(self.topology):
            all_here(self.topology)
            return super().broadcast(obj, src)  # type: ignore[safe-super]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor over all ranks (decisions to stop or to save, metrics logged with `sync_dist`)."""
        if self._joined and isinstance(tensor, Tensor):
            self.ledger.send("control", 0)  # Lightning's barrier before it
            self.ledger.all_reduce("control", tensor.nbytes, dist.get_world_size())
        with sites_watched(self.topology):
            all_here(self.topology)
            return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]

    # -- the end --------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Save where a signal ends the run, and tell what to go on from."""
        if isinstance(exception, SIGTERMException) and self.saves_when_stopped:
            self._save_last("stopped")
            exception.args = (str(self.last_saved) if self.last_saved else None, self._signal or signal.SIGTERM)
            return
        if not isinstance(exception, KeyboardInterrupt):  # a second Ctrl-C waits for nothing
            self.leave_save()
        if isinstance(exception, SiteLostError):
            given = self.lightning_module.trainer.ckpt_path  # type: ignore[union-attr]
            found = self.last_saved or given  # nothing has been loaded yet where not all have met
            exception.checkpoint = str(found) if found else None

    def teardown(self) -> None:
        """Drop every group: without it gloo aborts at exit now and then."""
        stop_listening()  # else it would answer for a rank that is leaving
        if self.federation is not None:
            self.federation.transport.close()
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_train_end(self) -> None:
        """Save what a run of another length than planned would end without: its steps are no multiple of anything."""
        super().on_train_end()
        changed = self.pace is not None and self.pace.last_step != self.pace.planned
        if changed and self.lightning_module.trainer.checkpoint_callback is not None:  # type: ignore[union-attr]
            self._save_last("ended")

    def _save_last(self, name: str) -> None:
        self.settle_save()
        trainer: Any = self.lightning_module.trainer  # type: ignore[union-attr]
        if self.saved_at != self.optimizer_steps:
            callback = trainer.checkpoint_callback
            folder = callback.dirpath if callback is not None else Path(trainer.default_root_dir, "checkpoints")
            trainer.save_checkpoint(Path(folder, f"{name}.ckpt"))
