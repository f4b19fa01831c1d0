"""Outer rules: what a round does to the anchor once the pseudo-gradient is averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomoe_pl.errors import ConfigError, check_range

Slots = Mapping[str, list[Tensor]]


class OuterRule(ABC):
    """Outer optimizer of a round; a subclass is one method and the names of what it keeps.

    Attributes:
        slots: Names of the state tensors that the rule keeps for each trained value, float32 and of its shape, zero at
            the start. They are saved, resumed, hashed and moved with their experts by these names; `anchor` is taken.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse names that files cannot have.

        Raises:
            ConfigError: If `slots` is no tuple of different identifiers, or takes the anchor's name.
        """
        super().__init_subclass__(**kwargs)
        slots = cls.slots
        named = isinstance(slots, tuple) and all(isinstance(slot, str) and slot.isidentifier() for slot in slots)
        if not named or len({*slots, "anchor", "average"}) < len(slots) + 2:
            rule = f"slots of {cls.__name__} must be a tuple of different names, other than anchor and average"
            raise ConfigError("outer", slots, rule, 'write slots = ("m", "v"), or ("m",) for one')

    def __str__(self) -> str:
        """How logs and the identity of a checkpoint name it; settings that may change on resume come after a space."""
        return type(self).__name__.lower()

    @abstractmethod
    def step_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        """One outer step of several values in place, in float32, on their device.

        Args:
            anchors: Last agreed values, any shapes.
            changes: Averaged pseudo-gradients, anchor - mean of the holders, of the same shapes; not to be changed.
            slots: Name -> state of each value, of the same shapes.
        """

    def step_rows_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        """As `step_`, of values whose rows are an expert each: rows without a change stay as they are, state included.

        An expert that nobody trained must not coast on old state. The default takes the step and puts such rows back;
        a rule may do better.
        """
        active = [rows_with_a_change(change) for change in changes]
        touched = [anchors, *slots.values()]
        before = [[value.clone() for value in values] for values in touched]
        self.step_(anchors, changes, slots)
        for values, olds in zip(touched, before, strict=True):
            for value, old, rows in zip(values, olds, active, strict=True):
                value.copy_(torch.where(rows, value, old))


def rows_with_a_change(change: Tensor) -> Tensor:
    """Which rows of a pseudo-gradient (R, ...) are not all zero; bool (R, 1, ...), on its device."""
    return change.flatten(1).any(dim=1).view(-1, *[1] * (change.dim() - 1))


class Average(OuterRule):
    """Moves the anchor to the mean of the sites (local SGD, LocalAdamW).

    Args:
        lr: Outer learning rate; 1.0 is the mean itself.

    Raises:
        ConfigError: If lr <= 0.
    """

    def __init__(self, lr: float = 1.0) -> None:
        check_range("outer.lr", lr, "1.0 is plain averaging", above=0)
        self.lr = lr

    def __str__(self) -> str:
        return f"average {self.lr}"

    def step_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        """Anchor - lr x change."""
        torch._foreach_sub_(anchors, changes, alpha=self.lr)

    step_rows_ = step_  # without a change nothing moves


class Nesterov(OuterRule):
    """`torch.optim.SGD(nesterov=True)` on the pseudo-gradient (DiLoCo, arXiv 2311.08105).

    Args:
        lr: Outer learning rate.
        momentum: Outer momentum.

    Raises:
        ConfigError: If lr <= 0 or momentum is outside [0, 1).
    """

    slots = ("momentum",)

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        check_range("outer.lr", lr, "0.7 for DiLoCo", above=0)
        check_range("outer.momentum", momentum, "0.9 for DiLoCo", least=0, below=1)
        self.lr, self.momentum = lr, momentum

    def __str__(self) -> str:
        return f"nesterov {self.lr}/{self.momentum}"

    def step_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        """Momentum first, then the anchor, as torch does it."""
        momenta = slots["momentum"]
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, changes)
        steps = torch._foreach_mul(momenta, self.momentum)
        torch._foreach_add_(steps, changes)
        torch._foreach_sub_(anchors, steps, alpha=self.lr)

    def step_rows_(self, anchors: list[Tensor], changes: list[Tensor], slots: Slots) -> None:
        """As `step_`, by factors on the device: the host does not wait, and nothing is copied."""
        momenta = slots["momentum"]
        active = [rows_with_a_change(change) for change in changes]
        torch._foreach_mul_(momenta, [torch.where(rows, self.momentum, 1.0) for rows in active])
        torch._foreach_add_(momenta, changes)
        steps = torch._foreach_mul(momenta, [torch.where(rows, self.momentum, 0.0) for rows in active])
        torch._foreach_add_(steps, changes)  # of what is frozen both are zero
        torch._foreach_sub_(anchors, steps, alpha=self.lr)
