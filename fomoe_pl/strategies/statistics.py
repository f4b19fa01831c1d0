"""What sites tell each other with every round, in one small message."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SiteReport(NamedTuple):
    """One site's round: steps that it skipped, whether it has nothing to give, its losses, whether the run is to end.

    `left_out`: it took no step at all, or has values that are not finite. `stop`: it was sent a signal. `ends`: one of
    its callbacks wants the run to end. `save_failed`, `saved`: whether it knows that the checkpoint that is being
    written cannot be completed, and that it is complete (site 0).
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
    """The same of all sites, equal on each of them; `train_loss` is the mean of the finite losses."""

    skipped: list[int]
    left_out: frozenset[int]
    train_loss: float
    stop: bool
    ends: bool
    save_failed: bool
    saved: bool

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged."""
        return {
            "train_loss": self.train_loss,
            "skipped_steps": float(sum(self.skipped)),
            "left_out_sites": float(len(self.left_out)),
        }


def share(report: SiteReport, site: int, n_sites: int, total: Callable[[Tensor], Tensor]) -> SharedReport:
    """Tell all sites of each other: 2 M + 5 numbers in float64.

    Args:
        report: this site's.
        site: its index.
        n_sites: number of sites M.
        total: sums a tensor over all sites.
    """
    per_site = torch.zeros(2, n_sites, dtype=torch.float64)
    per_site[0, site], per_site[1, site] = report.skipped, float(report.left_out)
    # One number for both: a signal weighs more than all sites' wishes.
    stop = report.stop * (n_sites + 1) + report.ends
    summands = [report.loss_sum, report.loss_count, stop, report.save_failed, report.saved]
    values = total(torch.cat([per_site.flatten(), torch.tensor(summands, dtype=torch.float64)]))
    skipped, left_out = values[: 2 * n_sites].view(2, n_sites)
    loss_sum, loss_count, stop, save_failed, saved = values[2 * n_sites :].tolist()
    return SharedReport(
        [int(n) for n in skipped.tolist()],
        frozenset(left_out.nonzero().flatten().tolist()),
        loss_sum / loss_count if loss_count else float("nan"),
        stop > n_sites,
        stop > 0,
        save_failed > 0,
        saved > 0,
    )
