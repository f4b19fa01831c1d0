"""A round's end: what sites tell each other, the averages, and what follows from them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import cast

import torch

from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.report import SiteReport, check_skipped, share
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.stopping import StopsTogether
from fomoe_pl.training.context import RoundModule


class Rounds:
    """Ends the rounds of a strategy; all sites do at the same step.

    Args:
        site: The strategy.
        settings: The federation's.
        stops: Where the run ends, which the control message decides.
        placed: Where experts are, now that they are placed again.
    """

    def __init__(
        self, site: SiteStrategy, settings: FederationConfig, stops: StopsTogether,
        placed: Callable[[ModelConfig], Placement],
    ) -> None:  # fmt: skip
        self._site, self._settings, self._stops, self._placed = site, settings, stops, placed
        self._skipped_of_sites: list[int] = []

    @property
    def last_step(self) -> int | None:
        """The step that ends the run, and with it its last round; None if that is not known."""
        steps: int = self._site.trainer.max_steps
        return steps if steps > 0 else None

    @property
    def ends_here(self) -> bool:
        """Whether a round ends with the step that was taken last."""
        return self._settings.schedule.is_round_end(self._site.optimizer_steps, self.last_step)

    def end_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """End the round if it was its last step, on the clock of synchronisation; returns whether it was."""
        if not self.ends_here:
            return False
        site = self._site
        site.wait_for_device()  # else the queue of local work would be charged to the round
        start, watched = time.perf_counter(), site.watch_seconds
        self.end(optimizer)
        site.sync_seconds += time.perf_counter() - start - (site.watch_seconds - watched)
        return True

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """End a round."""
        site, settings, federation = self._site, self._settings, self._site.federation
        assert federation is not None
        site.ask_observers(lambda observer: observer.before_synchronization())
        left_out = self._report()
        federation.synchronize(optimizer, left_out, due=settings.moments_due(site.rounds_done + 1))
        site.rounds_done += 1
        site.ask_observers(lambda observer: observer.after_synchronization())
        site.share_observations()
        moved = settings.moves_after(site.rounds_done) and not self._stops.ending
        if moved:
            self._place_again(optimizer)
        if settings.refreshes_after(site.rounds_done, moved=moved):
            federation.refresh_copies()
        if settings.check_agreement:
            federation.check_agreement()

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

    def _report(self) -> frozenset[int]:
        """One small message a round, before the averages; returns the sites that have nothing to give to them."""
        site, stops, checkpoints = self._site, self._stops, self._site.checkpoints
        assert site.federation is not None
        module, n_sites = cast(RoundModule, site.lightning_module), site.topology.n_sites
        skipped, steps = module.count_skipped()
        left_out = skipped == steps or not site.federation.is_finite()
        own = SiteReport(
            skipped, left_out, *module.pop_round_losses(), stops.signal is not None, stops.is_wanted_here(),
            *checkpoints.flags(),
        )  # fmt: skip
        shared = share(own, site.topology, lambda values: site.sum_over_sites(values, "control"))
        checkpoints.conclude(failed=shared.save_failed, complete=shared.saved)
        before = self._skipped_of_sites or [0] * n_sites
        self._skipped_of_sites = [old + new for old, new in zip(before, shared.skipped, strict=True)]
        check_skipped(self._skipped_of_sites, module.max_skipped_steps)
        if shared.left_out and site.is_global_zero:
            sites = ", ".join(map(str, sorted(shared.left_out)))
            told = f"round {site.rounds_done + 1} is without site {sites}: its gradients or values are not finite"
            print(f"fomoe: {told}", file=sys.stderr, flush=True)
        site.round_stats, stops.stopping, stops.is_wanted = shared.numbers, shared.stop, shared.ends
        stops.ending = shared.ends or site.optimizer_steps == self.last_step
        return shared.left_out
