"""All that is used of Lightning beyond its public names, so that an update of it is tried against this file alone.

Nothing else may import or override a private name of Lightning's; a test looks for that, and another for the names.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _set_num_threads_if_needed,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states, reset_seed
from lightning.pytorch import __version__ as lightning_version
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _WorkerOutput
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from fomoe_pl.errors import ConfigError

random_states, set_random_states = _collect_rng_states, _set_rng_states
move_optimizers = _optimizers_to_device

# -- what a run knows ---------------------------------------------------------------------------------------------


def save_as_newest(callback: ModelCheckpoint, trainer: Any) -> None:
    """Have a callback without a metric save under its own name, as if its interval had ended here."""
    candidates = callback._monitor_candidates(trainer)
    callback._save_topk_checkpoint(trainer, candidates)
    callback._save_last_checkpoint(trainer, candidates)


def requested_devices(trainer: Any) -> Any:
    """`trainer.devices` as it was given."""
    return trainer._accelerator_connector._devices_flag


class OwnClock(Timer):
    """Lightning's timer without a question to all processes after every step: the next round's message tells them.

    Each process looks at its own clock, after a step: one that went on alone would wait for the others for ever.
    """

    @property
    def state_key(self) -> str:
        """As of the one that it stands for."""
        return Timer.__qualname__

    @classmethod
    def of(cls, timer: Timer) -> OwnClock:
        """The same limit."""
        own = cls()
        vars(own).update(vars(timer))
        return own

    def on_fit_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: a time that is over already is seen after the first step."""

    def _check_time_remaining(self, trainer: Any) -> None:
        remaining = self.time_remaining()
        if remaining is not None and remaining <= 0:
            trainer.should_stop = True


def validation_seconds(trainer: Any) -> float | None:
    """`trainer.val_check_interval` where it was given as a time; None where it counts micro-batches."""
    return cast(float | None, trainer._val_check_time_interval)


def epoch_is_over(trainer: Any) -> bool:
    """Whether the epoch has had its batches."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def may_stop_early(trainer: Any) -> bool:
    """Whether Lightning's `min_steps` and `min_epochs` allow an end."""
    return bool(trainer.fit_loop._can_stop_early)


def given_version(logger: Logger) -> int | str | None:
    """A logger's version, if it was given: `version` itself makes one up, and some loggers ask a server for it."""
    return logger._version if isinstance(logger, (TensorBoardLogger, CSVLogger)) else None


class NoCheckpoint(dict[str, Any]):
    """What a strategy gives Lightning for a path with nothing behind it: the run starts from scratch.

    Lightning wants a version in what it loads, and asks whether there is anything in it before it uses more.
    """

    def __init__(self) -> None:
        super().__init__({"pytorch-lightning_version": lightning_version})

    def __bool__(self) -> bool:
        """Nothing."""
        return False


# -- signals ------------------------------------------------------------------------------------------------------


def replace_signal_handling(trainer: Any, note: Callable[[int], None]) -> None:
    """Let signals only be noted; the strategy passes them on with the round's statistics.

    Lightning broadcasts one number over the world before every batch, and again when a SIGTERM arrives: a round trip
    over the WAN each step. For SLURM's SIGUSR1 it saves inside the signal, in the middle of whatever collective a site
    is in.

    Args:
        trainer: the Trainer, before it registers its handlers.
        note: called inside the signal, with its number.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    trainer._signal_connector._sigterm_notifier_fn = lambda number, _: note(number)
    trainer._signal_connector._slurm_sigusr_handler_fn = lambda number, _: note(number)
    _note_interrupt(note)


def _note_interrupt(note: Callable[[int], None]) -> None:
    """Let the first Ctrl-C be noted; the second ends the process at once, as it would without this."""
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupted(number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note(number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


# -- processes ----------------------------------------------------------------------------------------------------


class PatientLauncher(_SubprocessScriptLauncher):
    """Lightning's, but its observer of the processes that rank 0 starts waits until collectives have timed out.

    Every five seconds it would look for one that has died, and kill rank 0 with all others before a collective fails
    and the sites can say which of them is gone.

    Args:
        cluster_environment: as of Lightning's.
        num_processes: of this machine.
        num_nodes: machines.
        seconds: after which a collective that does not complete raises.
    """

    def __init__(self, cluster_environment: Any, num_processes: int, num_nodes: int, seconds: float) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._patience = max(5, int(seconds))

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes of this machine, unless a launcher has, then call the function."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._call_children_scripts()
            _ChildProcessObserver(os.getpid(), self.procs, sleep_period=self._patience).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class NotebookLauncher(_MultiProcessingLauncher):
    """The processes of this machine as forks of a notebook's, which has no script that could be started again.

    The Trainer gets back how the run ended, its metrics and the path of its best checkpoint. Weights stay in
    checkpoints: no process has those of all experts.

    Args:
        strategy: Whose processes they are.
    """

    def __init__(self, strategy: ParallelStrategy) -> None:
        super().__init__(strategy, start_method="fork")
        self._told: Any = None

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call the function in all processes.

        Raises:
            ConfigError: As one of the processes raised it.
            ProcessException: For any other error of a process, with its traceback.
        """
        self._told = mp.get_context("fork").SimpleQueue()
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessException:
            if self._told.empty():
                raise
            raise self._told.get() from None

    def _wrapping_function(self, process_idx: int, *args: Any, **kwargs: Any) -> None:
        torch.set_num_threads(1)  # OpenMP's threads are the notebook's, and do not follow into a fork
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            super()._wrapping_function(process_idx, *args, **kwargs)
        except ConfigError as error:
            self._told.put(error)
            raise

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        if self._strategy.local_rank:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        return _WorkerOutput(best, None, trainer.state, results, self.get_extra_results(trainer))


def end_children(launcher: Any) -> None:
    """Send SIGTERM to the processes that this one started, if any."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM)


def group_settings(strategy: Any) -> tuple[str, timedelta]:
    """Backend and timeout of a strategy's process group, of `SiteProcesses` and of Lightning's `DDPStrategy` alike."""
    return strategy._get_process_group_backend(), strategy._timeout


class SiteProcesses(ParallelStrategy):
    """One process for each rank, as Lightning's DDPStrategy without its wrapper: gradients stay on their rank.

    Args:
        parallel_devices: this machine's devices, one for each rank; None is the Trainer's.
        backend: of the process group; None is `nccl` on GPUs and `gloo` on CPUs.
        timeout: after which a collective that does not complete raises.
    """

    is_distributed = True
    num_nodes = 1

    def __init__(self, parallel_devices: list[torch.device] | None, backend: str | None, timeout: timedelta) -> None:
        super().__init__(parallel_devices=parallel_devices)
        self._process_group_backend, self._timeout = backend, timeout

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if _IS_INTERACTIVE and not self.cluster_environment.creates_processes_externally:
            self._launcher: Any = NotebookLauncher(self)
            return
        seconds = self._timeout.total_seconds()
        self._launcher = PatientLauncher(self.cluster_environment, self.num_processes, self.num_nodes, seconds)

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks of this machine."""
        return len(self.parallel_devices or ())

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How a sampler shares data out to all ranks."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """Backend as it was given, or as it was chosen by device."""
        return self._process_group_backend

    @property
    def timeout(self) -> timedelta:
        """After which a collective that does not complete raises."""
        return self._timeout

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def set_world_ranks(self) -> None:
        """Number the ranks, machine by machine."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """The accelerator's environment, then the process group."""
        super().setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Draw the random numbers that all ranks start with; the group is there already."""
        reset_seed()
        self._process_group_backend = self._get_process_group_backend()

    def model_to_device(self) -> None:
        """Move the model to this rank's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.root_device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all."""
        objects = [obj]
        if dist.is_initialized():
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor over all ranks."""
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)


class HookedDDP(DDPStrategy):
    """Lightning's DDP with public names for what a strategy of ours does otherwise."""

    def wrap(self, model: torch.nn.Module) -> DistributedDataParallel:
        """Wrap the model, as Lightning does."""
        return super()._setup_model(model)

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        return self.wrap(model)

    def register_hook(self, model: DistributedDataParallel) -> None:
        """Register what gradients go through."""
        raise NotImplementedError

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.register_hook(self.model)


def set_device(strategy: SingleDeviceStrategy, device: torch.device) -> None:
    """Have a strategy of one process use another device than it was made with."""
    strategy._root_device = device


# -- command line -------------------------------------------------------------------------------------------------


class PlainCLI(LightningCLI):
    """A command line that takes over no settings from a checkpoint, which here is a folder."""

    def _parse_ckpt_path(self) -> None:
        """Nothing: settings of a checkpoint are compared with the configured ones."""
