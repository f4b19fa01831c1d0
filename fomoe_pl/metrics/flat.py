"""A metric whose whole state is one vector of sums."""

from abc import ABC
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class FlatSumMetric(Metric, ABC):
    """A metric whose states are float64 sums that several ranks add up as one flat vector.

    torchmetrics would reduce each state in a collective of its own, which the ledger does not see. So its
    synchronisation is off here (`sync_on_compute=False`), and the owner of the process groups does::

        flat = metric.states()
        all_reduce(flat)           # sum
        metric.load_states(flat)
        values = metric.compute()  # the same on every rank
        metric.reset()             # or the next reduction counts this one again

    Without `load_states` the values are those of this rank alone. Sums are kept in float64 because float32 stops
    counting tokens at 2**24, and stay so when a module around the metric is cast to a lower precision.
    """

    def __init__(self) -> None:
        # A cached result would be this rank's, also after load_states.
        super().__init__(sync_on_compute=False, compute_with_cache=False)

    def add_sum(self, name: str, shape: Sequence[int]) -> None:
        """Register the state `name`: float64 zeros of `shape`, summed over ranks."""
        self.add_state(name, torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")

    def states(self) -> Tensor:
        """Return a copy of all sums as one flat float64 vector, in the order of their registration."""
        return torch.cat([self._sum(name).reshape(-1) for name in self.metric_state])

    def load_states(self, flat: Tensor) -> None:
        """Replace all sums by `flat`, a float64 vector laid out like the one of :meth:`states`."""
        names = list(self.metric_state)
        parts = flat.split([self._sum(name).numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            setattr(self, name, part.view_as(self._sum(name)).clone())
        self._update_count = max(1, self._update_count)  # otherwise torchmetrics warns that nothing was added

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        # torchmetrics lets `parent.bfloat16()` pass but not `parent.to(torch.bfloat16)`, which is what Lightning's
        # bf16-true calls. So only a move to another device is applied.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, exclude_state)

    def _sum(self, name: str) -> Tensor:
        state: Tensor = getattr(self, name)
        return state
