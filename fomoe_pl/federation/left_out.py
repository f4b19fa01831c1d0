"""Which sites give nothing to an average: known when it begins, or told by a message that travels with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class LeftOut:
    """Sites whose weight in averages is zero.

    Args:
        known: Those that are known; with `told`, of this site alone whether it is one.
        told: Gives flags of all sites (M,), not zero where one is left out, when they are there.
    """

    def __init__(self, known: frozenset[int] = frozenset(), told: Callable[[], Tensor] | None = None) -> None:
        self.known, self._told = known, told

    @property
    def is_told(self) -> bool:
        """Whether others than this site may turn out to be left out."""
        return self._told is not None

    def takes(self, sites: tuple[int, ...], device: torch.device) -> Tensor:
        """Which of some sites are in the average, bool (g,)."""
        if self._told is None:
            return torch.tensor([site not in self.known for site in sites], device=device)
        return self._told().to(device)[list(sites)] == 0

    def sum(
        self, rows: Iterable[Tensor], sites: tuple[int, ...], weights: Sequence[float] | None = None
    ) -> Tensor:  # fmt: skip
        """Add the rows of the sites that are in the average, in the order of sites; the rows are of the sites.

        Args:
            rows: Of the sites.
            sites: Which.
            weights: Of all sites, by which rows are multiplied; None for even ones.
        """
        total: Tensor | None = None
        taken: Tensor | None = None
        for i, (site, row) in enumerate(zip(sites, rows, strict=True)):
            if weights is not None:
                row = row * weights[site]
            if total is None:
                total, taken = torch.zeros_like(row), None if self._told is None else self.takes(sites, row.device)
            if taken is not None:
                total += torch.where(taken[i], row, 0.0)  # nobody on the host may know yet
            elif site not in self.known:
                total += row
        assert total is not None
        return total

    def number(
        self, sites: tuple[int, ...], device: torch.device, weights: Sequence[float] | None = None
    ) -> Tensor:  # fmt: skip
        """How many of some sites are in the average, or the sum of their weights.

        It is a tensor, by which all devices divide alike: by a number a GPU multiplies with its inverse, and a site on
        a CPU would get other bits.
        """
        of = [1.0 if weights is None else weights[site] for site in sites]
        if self._told is None:
            taken = math.fsum(weight for site, weight in zip(sites, of, strict=True) if site not in self.known)
            return torch.full((), taken, dtype=torch.float32, device=device)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for takes, weight in zip(self.takes(sites, device), of, strict=True):  # in one order on all devices
            total += takes * weight
        return total
