"""What a rank does about signals, and about the traffic that Lightning makes for them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script


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


def observe_children_every(seconds: float) -> None:
    """Let Lightning's observer of the processes that rank 0 starts wait until collectives have timed out.

    Every five seconds it would look for one that has died, and kill rank 0 with all others before a collective fails
    and the sites can say which of them is gone. The names are private ones of Lightning; a test looks for them.

    Args:
        seconds: after which a collective that does not complete raises.
    """

    def observe(child_processes: list[Any]) -> None:
        fabric_launcher._ChildProcessObserver(os.getpid(), child_processes, sleep_period=max(5, int(seconds))).start()

    subprocess_script._launch_process_observer = observe


def end_children(launcher: Any) -> None:
    """Send SIGTERM to the processes that this one started, if any."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM)
