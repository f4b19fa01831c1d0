"""How sites stop together when one of them was sent a signal."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from fomoe_pl.federation.loss import listener, sites_watched
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.checks import StopAt
from fomoe_pl.strategies.signals import end_children


class StopsTogether(SiteStrategy):
    """Mixin of strategies with rounds: all sites stop at the same place, save there, and end.

    Attributes:
        stop_at: `round`, where the control message of the round says that somebody was sent a signal: nothing more is
            sent. `step`, where he says so at once, through the store that the processes met through: all stop after
            the first local step that none of them has passed yet. Without traffic between rounds some sites may be
            ahead of others; those that are behind take the missing steps first.
        stopping: whether the round that has ended was the last.
    """

    stop_at: StopAt = "round"
    stopping = False
    _asked_after = -1
    launcher: Any

    def note_signal(self, number: int) -> None:
        """Note a signal, inside of it, and pass it on to the processes that this one started."""
        self._signal = number  # not Lightning's own flag, which would end this site alone
        end_children(self.launcher)

    def stop_if_asked(self) -> None:
        """End all sites once one was sent a signal; callbacks have seen the batch."""
        if self.stopping or (self.stop_at == "step" and self._stops_here()):
            raise SIGTERMException

    def _stops_here(self) -> bool:
        step, listens = self.optimizer_steps, listener()
        if step == self._asked_after:  # a micro-batch without an optimizer step
            return False
        self._asked_after = step
        if listens is None:  # one site
            return self._signal is not None
        with sites_watched(self.topology):
            if self._signal is not None:
                listens.ask_to_stop()
            return listens.stops_after(step)
