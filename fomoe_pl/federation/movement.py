"""How far a round moved what: norms of pseudo-gradients, dense and of each expert, on this site."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Watched = Callable[..., AbstractContextManager[None]]
OWN, MEAN, AGREED, OWN_NORM = range(4)


class Movement:
    """Squares of the norms of this site's pseudo-gradients, of their means, and of the values they started from.

    Norms stay on their device until `sums` reads them all at once: a read for each would make the host wait for each.

    Args:
        n_layers: Layers L.
        n_experts: Experts of a layer, E.
        watched: What is done inside it is charged to watching, not to the round; with `wait`, whether the device is
            waited for.

    Attributes:
        active: whether the next round is measured.
    """

    def __init__(self, n_layers: int, n_experts: int, watched: Watched | None = None) -> None:
        self.active = True
        self.watched: Watched = watched or (lambda **_: nullcontext())
        self._shape = (n_layers, n_experts, 4)
        self._noted: list[tuple[int, int | None, Sequence[int], Tensor]] = []

    def start(self) -> None:
        """Forget the last round."""
        self._noted.clear()

    def add(self, which: int, layer: int | None, experts: Sequence[int], values: Tensor) -> None:
        """Note a tensor.

        Args:
            which: `OWN`, `MEAN` or `AGREED`.
            layer: of the experts; None for a dense tensor.
            experts: whose rows they are, one after the other.
            values: float32.
        """
        rows = values.reshape(1 if layer is None else len(experts), -1)
        self._noted.append((which, layer, experts, torch.linalg.vector_norm(rows, dim=1)))

    def sums(self) -> tuple[Tensor, Tensor]:
        """Squares summed over tensors: of what is dense (4,), and of each expert (L,E,4), zero for those not here.

        At `OWN_NORM` stands the root of what is at `OWN`: sites add up both.

        float64, on the CPU.
        """
        dense, expert_LE4 = torch.zeros(4, dtype=torch.float64), torch.zeros(self._shape, dtype=torch.float64)
        norms = torch.cat([norms for *_, norms in self._noted]).cpu().double().square()
        sizes = [len(norms) for *_, norms in self._noted]
        for (which, layer, experts, _), squares in zip(self._noted, norms.split(sizes), strict=True):
            if layer is None:
                dense[which] += squares[0]
            else:
                expert_LE4[layer, list(experts), which] += squares
        for sums in (dense, expert_LE4):
            sums[..., OWN_NORM] = sums[..., OWN].sqrt()
        return dense, expert_LE4
