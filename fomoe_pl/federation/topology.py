"""Who is who: sites, ranks, and the groups that collectives run in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """Position of this rank in the federation.

    Ranks are numbered site by site: those of site 0 come first.

    Attributes:
        n_sites: Number of sites M.
        ranks_per_site: Ranks inside a site, one number for all sites or one for each.
        rank: This process's global rank.
    """

    n_sites: int
    ranks_per_site: int | tuple[int, ...]
    rank: int

    @cached_property
    def ranks(self) -> tuple[range, ...]:
        """Global ranks of each site."""
        numbers = self.ranks_per_site
        if isinstance(numbers, int):
            numbers = (numbers,) * self.n_sites
        return tuple(range(end - n, end) for n, end in zip(numbers, accumulate(numbers), strict=True))

    @property
    def world_size(self) -> int:
        """Number of ranks of all sites."""
        return self.ranks[-1].stop

    def site_of(self, rank: int) -> int:
        """Index of the site that a rank belongs to."""
        return next(site for site, ranks in enumerate(self.ranks) if rank in ranks)

    @cached_property
    def site(self) -> int:
        """Index of this rank's site, 0 <= site < n_sites."""
        return self.site_of(self.rank)

    @property
    def place(self) -> int:
        """Index of this rank inside its site."""
        return self.rank - self.ranks[self.site].start

    @property
    def n_ranks(self) -> int:
        """Ranks of this rank's site."""
        return len(self.ranks[self.site])

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its site, which speaks and writes for it."""
        return self.place == 0

    def own_part(self, values: Tensor, axis: int) -> Tensor:
        """This rank's part of what is cut among its site's ranks, as a view: equal ones, the last shorter or empty."""
        chunk = -(-values.shape[axis] // self.n_ranks)
        start = min(self.place * chunk, values.shape[axis])
        return values.narrow(axis, start, min(chunk, values.shape[axis] - start))

    def peers(self, sites: tuple[int, ...], place: int) -> tuple[int, ...]:
        """Global ranks of the given sites at one place inside them."""
        return tuple(self.ranks[site][place] for site in sites)
