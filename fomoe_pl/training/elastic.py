"""Runs that go on with fewer sites than they were planned for, up to the planned number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import shares

KEY = "min_sites"


@dataclass
class Pace:
    """Progress of a local step in a run with another number of sites than planned.

    The plan is `planned` steps of all planned sites. A step of fewer sites reads fewer tokens, and is that share of a
    planned step. Learning rates follow the plan, so that a change of sites does not make them jump.

    Attributes:
        planned: Steps of the plan, `trainer.max_steps` as given.
        start: Local steps that a site has taken when this number of sites begins.
        tokens: Tokens of all sites until then.
        site_tokens: Tokens of one site's step.
        planned_sites: Sites of the plan.
        sites: Sites that are present.
    """

    planned: int
    start: int
    tokens: int
    site_tokens: int
    planned_sites: int
    sites: int

    def at(self, step: int) -> float:
        """Planned steps that `step` local steps amount to."""
        tokens = self.tokens + (step - self.start) * self.site_tokens * self.sites
        return tokens / (self.site_tokens * self.planned_sites)

    @property
    def last_step(self) -> int:
        """Local steps after which the planned tokens have been read: less than one step of all sites more."""
        left = self.planned * self.planned_sites * self.site_tokens - self.tokens
        return self.start + max(0, -(-left // (self.site_tokens * self.sites)))

    def go_on(self, start: int, tokens: int, trainer: Any) -> None:
        """Go on from a checkpoint, or from nothing: set the number of steps that the planned tokens take.

        Args:
            start: Local steps in it.
            tokens: Tokens of all sites in it.
            trainer: The Trainer that runs them.
        """
        self.start, self.tokens = start, tokens
        if trainer.max_steps > 0 and self.last_step != trainer.max_steps:
            rank_zero_info(f"{self.sites} of {self.planned_sites} sites: the planned tokens take until step "
                           f"{self.last_step}")  # fmt: skip
            trainer.fit_loop.epoch_loop.max_steps = self.last_step


def nodes_left(
    environment: Mapping[str, str], devices: Any, num_nodes: int, min_sites: int, ranks_per_site: int = 1
) -> int:
    """Machines of a run that torchrun has started, where they may be fewer than planned.

    Args:
        environment: Of this process; without torchrun's variables the planned number is returned.
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`, as planned.
        min_sites: The fewest sites that a run may go on with.
        ranks_per_site: Ranks of a site.

    Raises:
        ConfigError: If the processes that are left are too few.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return num_nodes
    world_size, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    if str(local) != str(devices) or world_size >= local * num_nodes:
        return num_nodes  # as planned, or refused as without this setting
    if world_size < min_sites * ranks_per_site:
        rule = f"only {world_size // ranks_per_site} of {local * num_nodes // ranks_per_site} sites are there"
        raise ConfigError(KEY, min_sites, rule, "start more machines, or give a smaller number")
    return world_size // local


def check_min_sites(min_sites: int, pace: Pace, num_nodes: int, overlap: int | None, n_experts: int) -> None:
    """Check all numbers of sites that a run may shrink to, so that it is not refused after a machine is lost.

    Args:
        min_sites: The fewest sites that the run may go on with.
        pace: With planned and present sites.
        num_nodes: Machines that are present.
        overlap: Sites that hold each expert, as planned; None is all of them.
        n_experts: Experts of a layer, E.

    Raises:
        ConfigError: If it is more than are planned, or if experts cannot be placed on one of the numbers of sites.
    """
    if pace.sites % num_nodes:
        rule = "with sites that are on several machines, one that is lost leaves no whole sites"
        raise ConfigError(KEY, min_sites, rule, "leave it out, or put whole sites on each machine")
    planned, per_node = pace.planned_sites, pace.sites // num_nodes
    if not 1 <= min_sites <= planned:
        rule = f"must be from 1 to the planned number of sites ({planned} = trainer.devices x num_nodes)"
        raise ConfigError(KEY, min_sites, rule, "give the fewest sites that the run may go on with")
    shares(n_experts, planned, overlap or planned)
    for sites in range(per_node, planned, per_node):
        held_by = min(overlap or sites, sites)
        if sites >= min_sites:
            shares(n_experts, sites, held_by)
