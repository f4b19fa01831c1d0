"""What a rank does about signals, and about the traffic that Lightning makes for them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def replace_signal_handling(trainer: Any, note: Callable[[int], None]) -> None:
    """Let signals only be noted; the strategy passes them on with the round's statistics.

    Lightning broadcasts one number over the world before every batch, and again when a SIGTERM arrives: a round trip
    over the WAN each step. For SLURM's SIGUSR1 it saves inside the signal, in the middle of whatever collective a site
    is in. The names are private ones of Lightning; a test looks for them.

    Args:
        trainer: the Trainer, before it registers its handlers.
        note: called inside the signal, with its number.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    trainer._signal_connector._sigterm_notifier_fn = lambda number, _: note(number)
    trainer._signal_connector._slurm_sigusr_handler_fn = lambda number, _: note(number)
    note_interrupt(note)


def note_interrupt(note: Callable[[int], None]) -> None:
    """Let the first Ctrl-C be noted; the second ends the process at once, as it would without this."""
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupted(number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note(number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


class PatientLauncher(_SubprocessScriptLauncher):
    """Lightning's, but its observer of the processes that rank 0 starts waits until collectives have timed out.

    Every five seconds it would look for one that has died, and kill rank 0 with all others before a collective fails
    and the sites can say which of them is gone. The names are private ones of Lightning; a test looks for them.

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


def end_children(launcher: Any) -> None:
    """Send SIGTERM to the processes that this one started, if any."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM)
