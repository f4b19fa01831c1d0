"""What a rank does about signals, and about the traffic that Lightning makes for them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def replace_signal_handling(trainer: Any, note: Callable[[], None]) -> None:
    """Let signals only be noted; the strategy passes them on with the round's statistics.

    Lightning broadcasts one number over the world before every batch, and again when a SIGTERM arrives: a round trip
    over the WAN each step. For SLURM's SIGUSR1 it saves inside the signal, in the middle of whatever collective a site
    is in. The names are private ones of Lightning; a test looks for them.

    Args:
        trainer: the Trainer, before it registers its handlers.
        note: called inside the signal.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    trainer._signal_connector._sigterm_notifier_fn = lambda *_: note()
    trainer._signal_connector._slurm_sigusr_handler_fn = lambda *_: note()


def end_children(launcher: Any) -> None:
    """Send SIGTERM to the processes that this one started, if any."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGTERM)
