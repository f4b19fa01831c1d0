"""Who is who: sites, ranks, and the groups that collectives run in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Position of this rank in the federation.

    Ranks are numbered site by site, so that `rank = site * ranks_per_site + local_rank`.

    Attributes:
        n_sites: Number of sites M.
        ranks_per_site: Ranks inside one site.
        rank: This process's global rank.
    """

    n_sites: int
    ranks_per_site: int
    rank: int

    @property
    def site(self) -> int:
        """Index of this rank's site, 0 <= site < n_sites."""
        return self.rank // self.ranks_per_site

    @property
    def local_rank(self) -> int:
        """Index of this rank inside its site."""
        return self.rank % self.ranks_per_site

    @property
    def world_size(self) -> int:
        """Number of ranks of all sites."""
        return self.n_sites * self.ranks_per_site

    def peers(self, sites: tuple[int, ...], local_rank: int) -> tuple[int, ...]:
        """Global ranks of the given sites at one place inside them: they average with each other."""
        return tuple(site * self.ranks_per_site + local_rank for site in sites)
