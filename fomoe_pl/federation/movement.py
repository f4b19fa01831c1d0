"""How far a round moved what: norms of pseudo-gradients, dense and of each expert, on this site."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Watched = Callable[..., AbstractContextManager[None]]
OWN, MEAN, AGREED, OWN_NORM = range(4)


PENDING_BYTES = 64 * 2**20
"""Most bytes of tensors whose norms are still to be taken: they stay in memory until then."""


class Movement:
    """Squares of the norms of this site's pseudo-gradients, of their means, and of the values they started from.

    Norms are taken of many tensors at once, because each operation costs more than such a norm, and stay on their
    device until `sums` reads them all at once: a read for each would make the host wait for each.

    Args:
        n_layers: Layers L.
        n_experts: Experts of a layer, E.
        watched: What is done inside it is charged to watching, not to the round; with `wait`, whether the device is
            waited for.
        total: Adds numbers over the ranks of this site, if each has slices of all tensors.

    Attributes:
        active: Whether the next round is measured.
    """

    def __init__(
        self, n_layers: int, n_experts: int, watched: Watched | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.active = True
        self._total = total
        self.watched: Watched = watched or (lambda **_: nullcontext())
        self._shape = (n_layers, n_experts, 4)
        self._places: list[int] = []
        self._norms: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._pending_bytes = 0

    def start(self) -> None:
        """Forget the last round."""
        self._places.clear()
        self._norms.clear()
        self._pending.clear()
        self._pending_bytes = 0

    def add(self, which: int, layer: int | None, experts: Sequence[int], values: Tensor) -> None:
        """Note a tensor, which must not change before `settle` is called, or `sums`.

        Args:
            which: `OWN`, `MEAN` or `AGREED`.
            layer: Of the experts; None for a dense tensor.
            experts: Whose rows they are, one after the other; of a single one also its row alone.
            values: float32.
        """
        if layer is None:
            self._places.append(which)
            self._pending.append(values)
        else:
            n_experts = self._shape[1]
            # Behind the four of what is dense.
            self._places += [4 * (1 + layer * n_experts + expert) + which for expert in experts]
            self._pending += [values] if len(experts) == 1 else values.unbind()
        self._pending_bytes += values.nbytes
        if self._pending_bytes >= PENDING_BYTES:
            self.settle()

    def settle(self) -> None:
        """Take the norms of what was noted since the last time."""
        if self._pending:
            self._norms += torch._foreach_norm(self._pending)
        self._pending.clear()
        self._pending_bytes = 0

    def sums(self) -> tuple[Tensor, Tensor]:
        """Squares summed over tensors: of what is dense (4,), and of each expert (L,E,4), zero for those not here.

        At `OWN_NORM` stands the root of what is at `OWN`: sites add up both.

        float64, on the CPU.
        """
        self.settle()
        sums = torch.zeros(4 + math.prod(self._shape), dtype=torch.float64)
        if self._norms:  # none, where a run goes on after they were taken
            squares = torch.stack(self._norms).cpu().double().square()
            sums.index_add_(0, torch.tensor(self._places), squares)
        if self._total is not None:
            sums = self._total(sums)
        quadruples = sums.view(-1, 4)
        quadruples[:, OWN_NORM] = quadruples[:, OWN].sqrt()
        return quadruples[0], quadruples[1:].view(self._shape)
