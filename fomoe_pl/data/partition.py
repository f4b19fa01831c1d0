"""Who reads what: training shards and mixture weights of every site and worker. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fomoe_pl.errors import ConfigError

SplitKind = Literal["iid", "domain", "dirichlet"]
_MAX_ALPHA = 1e9  # mixtures are equal long before; far above it the draws overflow


@dataclass(frozen=True)
class DomainSize:
    """Training data of one domain: its name, its number of shards and its tokens."""

    name: str
    shards: int
    tokens: int


@dataclass(frozen=True)
class StreamPlan:
    """What one worker of one site reads.

    Attributes:
        domains: Indices of the domains it reads.
        weights: Probability of each of them for a sequence; they sum to 1.
        shards: For each of them, the numbers of the shards that it alone reads.
    """

    domains: tuple[int, ...]
    weights: tuple[float, ...]
    shards: tuple[tuple[int, ...], ...]


def partition(
    domains: Sequence[DomainSize],
    n_sites: int,
    n_workers: int,
    split: SplitKind = "iid",
    dirichlet_alpha: float = 0.3,
    seed: int = 0,
    *,
    weights: Mapping[str, float] | None = None,
    mixtures: Sequence[Sequence[float]] | None = None,
) -> list[list[StreamPlan]]:
    """Divide the training shards over sites and workers so that no two of them read the same shard.

    Args:
        domains: The domains, in the order of the domain indices.
        n_sites: Number of sites, M.
        n_workers: Workers of each site.
        split: `iid`: every site reads a share of every domain, mixed by the domains' tokens. `domain`: domains are
            dealt to sites in turn; with more sites than domains, sites share a domain and divide its shards.
            `dirichlet`: shards as for `iid`, each site's mixture is drawn from a symmetric Dirichlet distribution
            (Hsu et al. 2019, arXiv 1909.06335, section 3, with domains in the place of classes).
        dirichlet_alpha: Concentration: small values give each site few domains, large ones equal shares of all.
        seed: Seed of the Dirichlet draws.
        weights: Share of each domain in a mixture, by name, in the place of its tokens; of those that a site reads they
            are scaled to sum 1. A domain of weight 0 is not read.
        mixtures: For the Dirichlet split, mixtures that were drawn for more sites and domains than these: a row for
            each site, with the share of each domain.

    Returns:
        `plans[site][worker]`.

    Raises:
        ConfigError: A domain has fewer shards than readers, nothing is left for a site to read, or the concentration is
            not positive.
    """
    check_alpha(dirichlet_alpha)
    trained = [i for i, size in enumerate(domains) if size.shards and (weights is None or weights[size.name] > 0)]
    readers = {domain: _readers(i, len(trained), n_sites, split) for i, domain in enumerate(trained)}
    for domain, sites in readers.items():
        if domains[domain].shards < len(sites) * n_workers:
            raise _too_few_shards(domains[domain], len(sites), n_workers)
    if split == "dirichlet" and mixtures is None:
        mixtures = draw_mixtures(len(trained), n_sites, dirichlet_alpha, seed)
    plans: list[list[StreamPlan]] = []
    for site in range(n_sites):
        read = [domain for domain, sites in readers.items() if site in sites]
        shares: Sequence[float] = [domains[domain].tokens for domain in read]
        if weights is not None:
            shares = [weights[domains[domain].name] for domain in read]
        drawn = mixtures[site] if mixtures is not None else [share / sum(shares) for share in shares]
        plans.append([])
        for worker in range(n_workers):
            shards = []
            for domain in read:
                own = readers[domain].index(site) * n_workers + worker
                shards.append(tuple(range(own, domains[domain].shards, len(readers[domain]) * n_workers)))
            plans[-1].append(StreamPlan(tuple(read), tuple(drawn), tuple(shards)))
    return plans


def check_alpha(dirichlet_alpha: float) -> None:
    """Refuse a concentration that cannot be drawn from.

    Raises:
        ConfigError: Stating the range.
    """
    if not 0 < dirichlet_alpha <= _MAX_ALPHA:
        raise ConfigError("data.dirichlet_alpha", dirichlet_alpha, f"must be above 0 and at most {_MAX_ALPHA:g}",
                          "Common values: 0.1, 0.3, 1, 10")  # fmt: skip


def draw_mixtures(n_domains: int, n_sites: int, dirichlet_alpha: float, seed: int) -> list[list[float]]:
    """Mixtures of the Dirichlet split: for each site the share of each domain."""
    concentrations = [dirichlet_alpha] * n_domains
    drawn: list[list[float]] = np.random.default_rng([seed, n_sites]).dirichlet(concentrations, n_sites).tolist()
    return drawn


def _readers(domain: int, n_domains: int, n_sites: int, split: SplitKind) -> list[int]:
    """The sites that read a domain."""
    if split != "domain":
        return list(range(n_sites))
    if n_domains >= n_sites:
        return [domain % n_sites]
    return list(range(domain, n_sites, n_domains))


def _too_few_shards(domain: DomainSize, n_sites: int, n_workers: int) -> ConfigError:
    needed = n_sites * n_workers
    fewer = "fewer sites" if domain.shards < n_sites else f"data.num_workers of at most {domain.shards // n_sites}"
    return ConfigError(
        "data.num_workers",
        n_workers,
        f"domain {domain.name!r} has {domain.shards} training shards, "
        f"but {n_sites} sites x {n_workers} readers a site need {needed}",
        f"Use {fewer}, or prepare the corpus again with --shards_per_domain {needed} or more",
    )
