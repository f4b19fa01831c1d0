"""How sites stop together when one of them was sent a signal."""

from __future__ import annotations

from typing import Any

from fomoe_pl.federation.liveness import listener, sites_watched
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
        stopping: whether the round that has ended was the last, because somebody was sent a signal.
        ending: whether it was the last for another reason: the run has its steps, or a callback wants to end.
    """

    next_end = "the end of the next round, whose message tells all sites"

    stop_at: StopAt = "round"
    stopping = ending = False
    launcher: Any

    def note_signal(self, number: int) -> None:
        """Note a signal, inside of it, and pass it on to the processes that this one started."""
        self._signal = number  # not Lightning's own flag, which would end this site alone
        end_children(self.launcher)

    def may_end(self) -> bool:
        """Where a round has ended after whose message all sites know that somebody wants to end."""
        return self.ending and super().may_end()

    def _stops_here(self) -> bool:
        """Whether all sites end here because one was sent a signal."""
        if self.stopping or self.stop_at == "round":
            return self.stopping
        step, listens = self.optimizer_steps, listener()
        if listens is None:  # one site
            return self._signal is not None
        with sites_watched(self.topology):
            if self._signal is not None:
                listens.ask_to_stop()
            return listens.stops_after(step)
