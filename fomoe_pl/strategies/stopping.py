"""Where a run ends: at a step's end, or where sites have rounds with a round that all know to be the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.checkpoint.content import Site
from fomoe_pl.federation.liveness import listener, sites_watched
from fomoe_pl.lightning_internals import epoch_is_over, may_stop_early

StopAt = Literal["round", "step"]


class Stops:
    """Ends a run with the step in which it was asked to.

    Args:
        site: The strategy that runs.

    Attributes:
        next_end: Where a run may end, in words.
        signal: Number of the signal that this rank was sent; None without.
        is_wanted: Whether something is known to want the run's end.
        together: Whether all sites have stopped at the same step, because of a signal.
    """

    next_end = "the end of the step"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.signal: int | None = None
        self.is_wanted = self.together = False

    def reset(self) -> None:
        """A run begins."""
        self.signal, self.is_wanted, self.together = None, False, False

    def note(self, number: int) -> None:
        """Note a signal, inside of it; not in Lightning's own flag, which would end this site alone."""
        self.signal = number

    def may_end(self) -> bool:
        """Whether the run may end here: nothing that was computed would be lost, and all sites know of it."""
        return not self.site.in_step

    def stops_here(self) -> bool:
        """Whether a signal ends the run after this step."""
        return self.signal is not None

    def is_wanted_here(self) -> bool:
        """Whether something on this rank wants the run to end, and Lightning's `min_steps` allow it."""
        return self.is_wanted or bool(self.site.trainer.should_stop and may_stop_early(self.site.trainer))

    def stop_if_asked(self) -> None:
        """End the run after this step if it was asked to and may.

        Raises:
            SIGTERMException: Where a signal ends it.
        """
        if self.stops_here():
            self.together = True
            raise SIGTERMException
        if self._is_complete():
            self.site.trainer.should_stop = True  # else Lightning would validate at its intervals alone

    def _is_complete(self) -> bool:
        """Whether the run has its planned steps, or epochs."""
        trainer = self.site.trainer
        last_epoch = 0 < trainer.max_epochs <= trainer.current_epoch + 1
        steps_done = 0 < trainer.max_steps <= self.site.optimizer_steps
        return bool(steps_done or (last_epoch and epoch_is_over(trainer)))

    def hold(self) -> None:
        """Let `trainer.should_stop` be true only where the run may end: Lightning ends it at once."""
        if self.is_wanted_here():
            if not self.is_wanted and not self.may_end():
                rank_zero_info(
                    f"asked to stop after step {self.site.optimizer_steps}: training goes on to {self.next_end}"
                )
            self.is_wanted = True
            self.site.trainer.should_stop = self.may_end()


class StopsTogether(Stops):
    """All sites stop at the same place, save there, and end.

    Args:
        site: The strategy that runs.
        stop_at: `round`, where the control message of the round says that somebody was sent a signal: nothing more is
            sent. `step`, where the site says so at once, through the store that the processes met through: all stop
            after the first local step that none of them has passed yet. Without traffic between rounds some sites may
            be ahead of others; those that are behind take the missing steps first.
        pass_on: Gives a signal to the processes that this one has started.

    Attributes:
        stopping: Whether the round that has ended was the last, because somebody was sent a signal.
        ending: Whether it was the last for another reason: the run has its steps, or a callback wants to end.
    """

    next_end = "the end of the next round, whose message tells all sites"

    def __init__(self, site: Site, stop_at: StopAt, pass_on: Callable[[], None]) -> None:
        super().__init__(site)
        self.stop_at, self._pass_on = stop_at, pass_on
        self.stopping = self.ending = False

    def note(self, number: int) -> None:
        """Note a signal, inside of it, and pass it on to the processes that this one started."""
        super().note(number)
        self._pass_on()

    def may_end(self) -> bool:
        """Where a round has ended after whose message all sites know that somebody wants to end."""
        return self.ending and super().may_end()

    def stops_here(self) -> bool:
        """Whether all sites end here because one was sent a signal."""
        if self.stopping or self.stop_at == "round":
            return self.stopping
        step, listens = self.site.optimizer_steps, listener()
        if listens is None:  # one site
            return self.signal is not None
        with sites_watched(self.site.topology):
            if self.signal is not None:
                listens.ask_to_stop()
            return listens.stops_after(step)
