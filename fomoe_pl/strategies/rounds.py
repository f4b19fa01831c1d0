"""A round's end: what sites tell each other, the averages, and what follows from them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fomoe_pl.checkpoint.writing import Writing
from fomoe_pl.federation.federation import Due, Federation
from fomoe_pl.federation.flight import Arrived, Flight
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.report import (
    SharedReport,
    SiteReport,
    check_skipped,
    left_out_flags,
    message,
    share,
    shared,
    without_orders,
)
from fomoe_pl.federation.schedule import Turn
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.federation.shadow import Arriving
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.stopping import StopsTogether
from fomoe_pl.training.context import RoundModule


@dataclass(frozen=True)
class OnItsWay:
    """An average that has begun and is not applied yet.

    Attributes:
        turn: Whose it is.
        begun: Optimizer steps after which it began.
        due: Which moments it has.
        flight: The average.
        report: Waits for the sum of the sites' messages.
        saving: The save that these speak of.
    """

    turn: Turn
    begun: int
    due: Due
    flight: Flight
    report: Callable[[], Tensor]
    saving: Writing | None


class Rounds:
    """Ends the rounds of a strategy, and lets fragments take their turns; all sites do at the same step.

    Args:
        site: The strategy.
        settings: The federation's settings.
        stops: Where the run ends, which the control message decides.
        placed: Where experts are, now that they are placed again.
    """

    def __init__(
        self, site: SiteStrategy, settings: FederationConfig, stops: StopsTogether,
        placed: Callable[[ModelConfig], Placement],
    ) -> None:  # fmt: skip
        self._site, self._settings, self._stops, self._placed = site, settings, stops, placed
        self._skipped_of_sites: list[int] = []
        self._watched = False  # whether observers have seen the round begin to end
        self._on_its_way: OnItsWay | None = None
        self._copies: tuple[int, Arriving] | None = None  # with the steps after which they were sent

    def reset(self) -> None:
        """A run begins."""
        self._watched, self._on_its_way, self._copies = False, None, None

    @property
    def _federation(self) -> Federation:
        assert self._site.federation is not None
        return self._site.federation

    @property
    def last_step(self) -> int | None:
        """The step that ends the run, and with it its last round; None if that is not known."""
        steps: int = self._site.trainer.max_steps
        return steps if steps > 0 else None

    @property
    def agreed_here(self) -> bool:
        """Whether the step that was taken last has left the agreed values in the model."""
        step, settings = self._site.optimizer_steps, self._settings
        turn = settings.schedule.turn(step, self.last_step)
        if turn is None or not turn.ends_round:
            return False
        closes = settings.closes(self._site.rounds_done, step, self.last_step)
        return closes and (settings.alpha == 0 or settings.takes_turns)

    def end_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Begin and apply what is due after a step, on the clock of synchronisation; returns whether anything was."""
        site, step, delay = self._site, self._site.optimizer_steps, self._settings.delay
        turn = self._settings.schedule.turn(step, self.last_step)
        copies_due = self._copies is not None and step == self._copies[0] + delay
        average_due = self._on_its_way is not None and step == self._on_its_way.begun + delay
        routers_due = site.topology.n_sites > 1 and self._settings.schedule.routers_due(step, self.last_step)
        if turn is None and not copies_due and not average_due and not routers_due:
            return False
        site.wait_for_device()  # else the queue of local work would be charged to the round
        start, watched = time.perf_counter(), site.watch_seconds
        if turn is not None and turn.ends_round and self._settings.closes(site.rounds_done + 1, step, self.last_step):
            self._close(optimizer)
        else:
            if routers_due:
                self._average_routers(turn)
            if copies_due:
                self._put_copies()
            if average_due:
                self._apply(optimizer)
            if turn is not None:
                self._take_turn(optimizer, turn)
        site.sync_seconds += time.perf_counter() - start - (site.watch_seconds - watched)
        return True

    def _take_turn(self, optimizer: torch.optim.Optimizer, turn: Turn) -> None:
        settings = self._settings
        if settings.delay:
            self._begin(optimizer, turn)
            return
        self._watch_begin()
        left_out = self._restored(self._report(), optimizer)
        names = self._names(turn)
        flight = self._federation.begin(optimizer, LeftOut(left_out), due=self._due, names=names)
        self._federation.finish(flight, alpha=settings.alpha)
        if settings.refreshes_after(self._site.rounds_done + 1, moved=False):
            self._send_copies(names)
            self._put_copies()
        self._end_turn(turn)

    def _average_routers(self, turn: Turn | None) -> None:
        """Average all routers within a round, but those whose turn it is; who is left out travels beside them."""
        site, federation, topology = self._site, self._federation, self._site.topology
        names = federation.layout.routers - (frozenset() if turn is None else self._names(turn))
        if not names:
            return
        bad = torch.zeros(topology.n_sites)
        bad[topology.site] = not federation.is_finite(names)
        bad = site.sum_in_site(bad)  # on any of its ranks
        out = frozenset({topology.site} if bad[topology.site] else ())
        there, told = federation.transport.start_sum("control", bad.to(federation.transport.home), of_slices=True)
        federation.average_routers(names, LeftOut(out, there), lambda: frozenset(told().nonzero().flatten().tolist()))

    def _close(self, optimizer: torch.optim.Optimizer) -> None:
        """End a round with everything agreed, and nothing on its way."""
        site, settings, federation = self._site, self._settings, self._federation
        if self._on_its_way is not None:
            self._apply(optimizer, closes=True)
        self._put_copies()
        self._watch_begin()
        left_out = self._restored(self._report(), optimizer)
        alpha = 0.0 if settings.takes_turns else settings.alpha
        federation.finish(federation.begin(optimizer, LeftOut(left_out), due=self._due), alpha=alpha)
        self._end_round()
        moved = settings.moves_after(site.rounds_done) and not self._stops.ending
        if moved:
            self._place_again(optimizer)
        if settings.refreshes_after(site.rounds_done, moved=moved):
            federation.refresh_copies()
        if settings.check_agreement:
            federation.check_agreement()

    # -- averages that travel while the site computes ---------------------------------------------------------------

    def _begin(self, optimizer: torch.optim.Optimizer, turn: Turn) -> None:
        site, federation, n_sites = self._site, self._federation, self._site.topology.n_sites
        self._watch_begin()
        told = site.sum_in_site(message(self._own_report(), site.topology)).to(federation.transport.home)
        own = frozenset({site.topology.site} if left_out_flags(told, n_sites)[site.topology.site] else ())
        there, report = federation.transport.start_sum("control", told, of_slices=True)
        out = self._restored(own, optimizer)
        flight = federation.begin(
            optimizer, LeftOut(out, lambda: left_out_flags(there(), n_sites)), ahead=None, due=self._due,
            names=self._names(turn),
        )  # fmt: skip
        saving = site.checkpoints.saving
        self._on_its_way = OnItsWay(turn, site.optimizer_steps, self._due, flight, report, saving)

    def _apply(self, optimizer: torch.optim.Optimizer, *, closes: bool = False) -> None:
        """Apply the average that is on its way; `closes` if the round is closed at once, and sends all copies."""
        site, settings = self._site, self._settings
        on_its_way, self._on_its_way = self._on_its_way, None
        assert on_its_way is not None
        report = shared(on_its_way.report().cpu(), site.topology)
        self._take_note(report, same_save=on_its_way.saving is site.checkpoints.saving)
        self._federation.finish(on_its_way.flight, report.left_out, alpha=settings.alpha)
        if settings.refreshes_after(site.rounds_done + 1, moved=False) and not closes:
            self._put_copies()
            self._send_copies(on_its_way.flight.names)
        self._end_turn(on_its_way.turn)
        if report.ends and not closes and not report.stop:
            self._close(optimizer)

    def _send_copies(self, names: frozenset[str]) -> None:
        sent = self._federation.start_refresh(names)
        self._copies = None if sent is None else (self._site.optimizer_steps, sent)

    def _put_copies(self) -> None:
        if self._copies is not None:
            self._federation.finish_refresh(self._copies[1])
            self._copies = None

    def land(self) -> dict[str, Any]:
        """Wait for what is on its way, and apply none of it; what a resumed run goes on with."""
        found: dict[str, Any] = {}
        if (of := self._on_its_way) is not None:
            arrived = [tuple(one) for one in of.flight.land()]
            found["average"] = {
                "turn": tuple(of.turn), "begun": of.begun, "due": of.due, "arrived": arrived,
                "report": of.report().cpu(),
            }  # fmt: skip
        if self._copies is not None:
            found["copies"] = self._copies[0], self._copies[1].land()
        return found

    def go_on(self, landed: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take up what `land` gave."""
        site, federation, n_sites = self._site, self._federation, self._site.topology.n_sites
        if (of := landed.get("average")) is not None:
            told, turn = without_orders(of["report"]), Turn(*of["turn"])
            flags, home = left_out_flags(told, n_sites), federation.transport.home
            out = frozenset({site.topology.site} if flags[site.topology.site] else ())
            flight = federation.begin(
                optimizer, LeftOut(out, lambda: flags), ahead=None, due=of["due"], names=self._names(turn),
                arrived=[Arrived(mean.to(home), None if lost is None else lost.to(home))
                         for mean, lost in of["arrived"]],
            )  # fmt: skip
            self._on_its_way = OnItsWay(turn, of["begun"], of["due"], flight, lambda: told, None)
        if "copies" in landed:
            begun, arrived = landed["copies"]
            self._copies = begun, Arriving({layer: partial(arrived.__getitem__, layer) for layer in arrived})

    # -- what belongs to a turn and to a round ------------------------------------------------------------------------

    @property
    def _due(self) -> Due:
        return self._settings.moments_due(self._site.rounds_done + 1)

    def _names(self, turn: Turn) -> frozenset[str]:
        return self._federation.layout.fragment(turn.fragment, self._settings.fragments)

    def _restored(self, left_out: frozenset[int], optimizer: torch.optim.Optimizer) -> frozenset[int]:
        """Of values that are no numbers nothing waits for its fragment's turn."""
        own = self._site.topology.site in left_out
        if self._settings.takes_turns and own:
            bad = torch.tensor([float(not self._federation.is_finite())])
            if self._site.sum_in_site(bad).any():  # of slices on any rank
                self._federation.restore(optimizer)
        return left_out

    def _watch_begin(self) -> None:
        """Let observers look at the site's own values, before anything of the round is averaged."""
        if not self._watched:
            self._site.ask_observers(lambda observer: observer.before_synchronization())
            if self._federation.movement is not None:
                self._federation.movement.start()
            self._watched = True

    def _end_turn(self, turn: Turn) -> None:
        site, federation = self._site, self._federation
        if turn.ends_round:
            if site.observers:
                federation.enter_global()
            self._end_round()
            federation.leave_global()
        if self._settings.check_agreement:
            federation.check_agreement()

    def _end_round(self) -> None:
        self._site.rounds_done += 1
        self._site.ask_observers(lambda observer: observer.after_synchronization())
        self._site.share_observations()
        self._watched = False

    def _place_again(self, optimizer: torch.optim.Optimizer) -> None:
        """Experts go where the policy wants them next."""
        site = self._site
        assert site.federation is not None
        if self._settings.policy.sees_loads:
            loads_LE = cast(RoundModule, site.lightning_module).pop_loads().double()
            site.loads_at_draw = site.sum_over_sites(loads_LE, "control").tolist()
        site.redraws += 1
        new = self._placed(site.transformer.config)
        site.federation.adopt(new, optimizer)
        site.transformer.set_residency(self._settings.residency(new.residents(site.topology.site)))

    def _own_report(self) -> SiteReport:
        site, stops = self._site, self._stops
        module = cast(RoundModule, site.lightning_module)
        skipped, steps = module.count_skipped()
        left_out = skipped == steps or not self._federation.is_finite()
        return SiteReport(
            skipped, left_out, *module.pop_round_losses(), stops.signal is not None, stops.is_wanted_here(),
            *site.checkpoints.flags(),
        )  # fmt: skip

    def _report(self) -> frozenset[int]:
        """One small message, before the averages; returns the sites that have nothing to give to them."""
        site = self._site
        own = self._own_report()
        report = share(own, site.topology, lambda values: site.sum_over_sites(values, "control"))
        self._take_note(report)
        self._stops.ending = report.ends or site.optimizer_steps == self.last_step
        return report.left_out

    def _take_note(self, report: SharedReport, *, same_save: bool = True) -> None:
        """Do what a report says; of another save than the one that is being written it says nothing."""
        site, stops = self._site, self._stops
        if same_save:
            site.checkpoints.conclude(failed=report.save_failed, complete=report.saved)
        before = self._skipped_of_sites or [0] * len(report.skipped)
        self._skipped_of_sites = [old + new for old, new in zip(before, report.skipped, strict=True)]
        check_skipped(self._skipped_of_sites, cast(RoundModule, site.lightning_module).max_skipped_steps)
        if report.left_out and site.is_global_zero:
            sites = ", ".join(map(str, sorted(report.left_out)))
            told = f"round {site.rounds_done + 1} is without site {sites}: its gradients or values are not finite"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)
        site.round_stats, stops.stopping, stops.is_wanted = report.numbers, report.stop, report.ends
