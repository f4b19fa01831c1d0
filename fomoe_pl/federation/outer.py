"""Outer rules: what a round does to the anchor once the pseudo-gradient is averaged. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fomoe_pl.errors import check_range


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
        check_range(f"{key}.lr", self.lr, "1.0 for averaging, 0.7 for DiLoCo", above=0)
        check_range(f"{key}.momentum", self.momentum, "0.9 for DiLoCo", least=0, below=1)

    def __str__(self) -> str:
        """`average 1.0`, or `nesterov 0.7/0.9`."""
        return f"{self.rule} {self.lr}" + (f"/{self.momentum}" if self.has_momentum else "")

    @property
    def has_momentum(self) -> bool:
        """Whether the rule keeps a momentum buffer beside the anchor."""
        return self.rule == "nesterov"


def outer_steps_(
    rule: OuterRule,
    anchors: list[Tensor],
    deltas: list[Tensor],
    momenta: list[Tensor] | None,
    *,
    freeze_if_zero: bool,
) -> None:
    """One outer step of several values in place, in float32.

    Args:
        rule: the outer rule.
        anchors: last agreed values, any shapes, on one device.
        deltas: averaged pseudo-gradients, anchor - mean of the holders, of the same shapes.
        momenta: momentum buffers for `nesterov`, of the same shapes, else None.
        freeze_if_zero: values are rows, of one expert each. Leave anchor and momentum of a row untouched whose whole
            pseudo-gradient is zero: an expert that nobody trained must not coast on old momentum.
    """
    if momenta is None:
        torch._foreach_sub_(anchors, deltas, alpha=rule.lr)
        return
    if not freeze_if_zero:
        torch._foreach_mul_(momenta, rule.momentum)
        torch._foreach_add_(momenta, deltas)
        steps = torch._foreach_mul(momenta, rule.momentum)
        torch._foreach_add_(steps, deltas)
    else:
        # Factors on the device instead of an `if`: the host does not wait.
        active = [delta.flatten(1).any(dim=1).view(-1, *[1] * (delta.dim() - 1)) for delta in deltas]
        torch._foreach_mul_(momenta, [torch.where(rows, rule.momentum, 1.0) for rows in active])
        torch._foreach_add_(momenta, deltas)
        steps = torch._foreach_mul(momenta, [torch.where(rows, rule.momentum, 0.0) for rows in active])
        torch._foreach_add_(steps, deltas)  # of what is frozen both are zero
    torch._foreach_sub_(anchors, steps, alpha=rule.lr)
