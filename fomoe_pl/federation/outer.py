"""Outer rules: what a round does to the anchor once the pseudo-gradient is averaged. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fomoe_pl.errors import ConfigError


@dataclass(frozen=True)
class OuterRule:
    """Outer optimizer of a round.

    Attributes:
        rule: `average` moves the anchor to the mean of the sites (local SGD, LocalAdamW); `nesterov` is
            `torch.optim.SGD(nesterov=True)` on the pseudo-gradient (DiLoCo, arXiv 2311.08105).
        lr: outer learning rate; 1.0 with `average`.
        momentum: outer momentum; only read by `nesterov`.
    """

    rule: Literal["average", "nesterov"] = "average"
    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse rates that cannot train.

        Raises:
            ConfigError: if lr <= 0 or momentum is outside [0, 1).
        """
        key = "trainer.strategy.init_args.outer"
        if self.lr <= 0:
            raise ConfigError(f"{key}.lr", self.lr, "must be positive", "1.0 for averaging, 0.7 for DiLoCo")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"{key}.momentum", self.momentum, "must be in [0, 1)", "0.9 for DiLoCo")

    def __str__(self) -> str:
        """`average 1.0`, or `nesterov 0.7/0.9`."""
        return f"{self.rule} {self.lr}" + (f"/{self.momentum}" if self.has_momentum else "")

    @property
    def has_momentum(self) -> bool:
        """Whether the rule keeps a momentum buffer beside the anchor."""
        return self.rule == "nesterov"


def outer_step_(
    rule: OuterRule, anchor: Tensor, delta: Tensor, momentum: Tensor | None, *, freeze_if_zero: bool
) -> None:
    """One outer step in place, in float32.

    Args:
        rule: the outer rule.
        anchor: last agreed values, any shape.
        delta: averaged pseudo-gradient, anchor - mean of the holders, same shape.
        momentum: momentum buffer for `nesterov`, same shape, else None.
        freeze_if_zero: leave anchor and momentum untouched where the whole pseudo-gradient is zero: an expert that
            nobody trained must not coast on old momentum.
    """
    if momentum is None:
        anchor.sub_(delta, alpha=rule.lr)
        return
    # A 0-dim tensor instead of an `if`: no host synchronisation on a GPU.
    active = (delta != 0).any() if freeze_if_zero else torch.ones((), dtype=torch.bool, device=delta.device)
    new_momentum = torch.where(active, momentum * rule.momentum + delta, momentum)
    step = torch.where(active, delta + rule.momentum * new_momentum, 0.0)
    momentum.copy_(new_momentum)
    anchor.sub_(step, alpha=rule.lr)
