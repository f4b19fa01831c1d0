"""What sites report to each other before a round's averages, in one small message."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_pl.federation.topology import Topology

PER_SITE = ("skipped", "left_out")
"""Fields of a report that every site has a place of its own for."""
SUMMED = ("loss_sum", "loss_count", "stop", "save_failed", "saved")
"""Fields that are added over the sites."""


def report_numbers(n_sites: int) -> int:
    """How many float64 numbers the message of `share` has.

    Args:
        n_sites: Number of sites M.
    """
    return len(PER_SITE) * n_sites + len(SUMMED)


class SiteReport(NamedTuple):
    """One site's round: steps that it skipped, whether it has nothing to give, its losses, whether the run is to end.

    `left_out`: it took no step at all, or has values that are not finite. `stop`: it was sent a signal. `ends`: one of
    its callbacks wants the run to end. `save_failed`, `saved`: whether it knows that the checkpoint that is being
    written cannot be completed, and that it is complete (site 0), or with disks of their own that its part is written.
    """

    skipped: int
    left_out: bool
    loss_sum: float
    loss_count: float
    stop: bool
    ends: bool
    save_failed: bool
    saved: bool


class SharedReport(NamedTuple):
    """The same of all sites, equal on each of them; `train_loss` is the mean of the finite losses.

    `saved`: how many sites said so.
    """

    skipped: list[int]
    left_out: frozenset[int]
    train_loss: float
    stop: bool
    ends: bool
    save_failed: bool
    saved: int

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged."""
        return {
            "train_loss": self.train_loss,
            "skipped_steps": float(sum(self.skipped)),
            "left_out_sites": float(len(self.left_out)),
        }


def share(report: SiteReport, topology: Topology, total: Callable[[Tensor], Tensor]) -> SharedReport:
    """Tell all sites of each other: `report_numbers` numbers in float64.

    Args:
        report: This rank's. What all ranks of a site know alike, the first of them tells.
        topology: Its place.
        total: Sums a tensor over all ranks.
    """
    return shared(total(message(report, topology)), topology)


def message(report: SiteReport, topology: Topology) -> Tensor:
    """What a rank tells, to be added over all ranks; see `share`."""
    n_sites, site, n_ranks = topology.n_sites, topology.site, topology.world_size
    if not topology.leads:
        report = report._replace(skipped=0, saved=False)
    told = torch.zeros(report_numbers(n_sites), dtype=torch.float64)
    per_site, summed = told[: -len(SUMMED)].view(len(PER_SITE), n_sites), told[-len(SUMMED) :]
    per_site[:, site] = torch.tensor([float(getattr(report, name)) for name in PER_SITE])
    # One number for both: a signal weighs more than all ranks' wishes.
    stop = report.stop * (n_ranks + 1) + report.ends
    flags = (report.loss_sum, report.loss_count, stop, report.save_failed, report.saved)  # as in SUMMED
    summed.copy_(torch.tensor(flags, dtype=torch.float64))
    return told


def left_out_flags(total: Tensor, n_sites: int) -> Tensor:
    """Of the sum of the sites' messages which of them are left out (M,), not zero where one is."""
    return total[PER_SITE.index("left_out") * n_sites :][:n_sites]


def shared(total: Tensor, topology: Topology) -> SharedReport:
    """What the sum of the ranks' messages says."""
    n_sites, n_ranks = topology.n_sites, topology.world_size
    skipped, left_out = total[: -len(SUMMED)].view(len(PER_SITE), n_sites)
    loss_sum, loss_count, stop, save_failed, saved = total[-len(SUMMED) :].tolist()
    return SharedReport(
        [int(n) for n in skipped.tolist()],
        frozenset(left_out.nonzero().flatten().tolist()),
        loss_sum / loss_count if loss_count else float("nan"),
        stop > n_ranks,
        stop > 0,
        save_failed > 0,
        int(saved),
    )


def without_orders(total: Tensor) -> Tensor:
    """The same for a run that is resumed: whoever wanted it to stop, or was saving it, is gone."""
    kept = total.clone()
    kept[-len(SUMMED) + SUMMED.index("stop") :] = 0
    return kept


def check_skipped(of_sites: list[int], limit: int) -> None:
    """Stop a run that skips too many steps.

    Args:
        of_sites: Steps that each site has skipped since this process started.
        limit: Most of them together.

    Raises:
        RuntimeError: Naming the sites.
    """
    if sum(of_sites) > limit:
        named = ", ".join(f"site {site}: {n}" for site, n in enumerate(of_sites) if n)
        raise RuntimeError(f"{sum(of_sites)} optimizer steps had gradients that are not finite ({named}), more than "
                           f"model.max_skipped_steps = {limit}")  # fmt: skip
