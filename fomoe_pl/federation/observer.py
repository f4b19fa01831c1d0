"""Who watches rounds: what an observer may see, and how its numbers reach the other sites."""

import torch
from torch import Tensor


class RoundObserver:
    """Looks at a round's end from inside; every method may be left as it is.

    An observer sends nothing itself. What `statistics` returns is added over all sites in the round's one control
    message, counted there like everything else. All sites must have the same observers, in the same order.
    """

    def before_synchronization(self) -> None:
        """Look at the site's own values, before anything is averaged."""

    def after_synchronization(self) -> None:
        """Look at the agreed values."""

    def statistics(self) -> Tensor:
        """Numbers to add over all sites, flat float64, of the same length on all sites."""
        return torch.zeros(0, dtype=torch.float64)

    def receive(self, total: Tensor) -> None:
        """Take the sums over all sites of what `statistics` returned, on its device."""
