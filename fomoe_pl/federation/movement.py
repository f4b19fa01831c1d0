"""How far a round moved what: norms of pseudo-gradients, dense and of each expert, summed on this site."""

import torch
from torch import Tensor

OWN, MEAN, AGREED = range(3)


class Movement:
    """Squares of the norms of this site's pseudo-gradients, of their means, and of the values they started from.

    Args:
        n_layers: Layers L.
        n_experts: Experts of a layer, E.
        device: Where the sums are kept; nothing here waits for it.

    Attributes:
        dense: float64 (3,): own, mean, agreed.
        expert_LE: float64 (L,E,3): the same of each expert; zero for experts that are not here.
    """

    def __init__(self, n_layers: int, n_experts: int, device: torch.device) -> None:
        self.dense = torch.zeros(3, dtype=torch.float64, device=device)
        self.expert_LE = torch.zeros(n_layers, n_experts, 3, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Start a round."""
        self.dense.zero_()
        self.expert_LE.zero_()

    def add(self, where: tuple[int, int] | None, own: Tensor, mean: Tensor, agreed: Tensor) -> None:
        """Add one tensor.

        Args:
            where: (layer, expert), None for a dense one.
            own: This site's pseudo-gradient.
            mean: Mean over those who hold it.
            agreed: Agreed values before the outer step.
        """
        target = self.dense if where is None else self.expert_LE[where]
        # Norms in float32, sums of their squares in float64.
        norms = [torch.linalg.vector_norm(t) for t in (own, mean, agreed)]
        target += torch.stack(norms).to(target.device, torch.float64).square()
