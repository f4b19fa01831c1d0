"""All sums of a validation of the global model, as one vector."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_pl.metrics.flat import FlatSumMetric
from fomoe_pl.metrics.language import LanguageModelMetric
from fomoe_pl.metrics.specialisation import DomainLoad
from fomoe_pl.model.losses import IGNORED

ROUTING_NECESSITY, OWN_VIEW_GAP = "routing_necessity_nats", "own_view_gap_nats"


class OtherViews(FlatSumMetric):
    """Loss of the same text under random routing, and under the sites' own views, less that of the global model.

    - `routing_necessity_nats`: random routing takes the gates of the learned picks, but experts drawn evenly. It
      alone tells of experts that have become interchangeable: near 0, learned routing is worth nothing
      (after CASSANDRA's Chorus study; formula with gates kept is this project's).
    - `own_view_gap_nats`: a site's own view skips what is not resident (ghost routing), computes it with its
      copies (shadow) or chooses among its residents (partitioned); mean of the sites.
    """

    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("nats", (3,))
        self.add_sum("tokens", ())

    def update(self, learned_BS: Tensor, random_BS: Tensor, own_BS: Tensor, targets_BS: Tensor) -> None:
        """Add one batch: each token's cross entropy in nats, 0 where the target is ignored, and the targets."""
        self.nats = self.nats + torch.stack([losses.double().sum() for losses in (learned_BS, random_BS, own_BS)])
        self.tokens = self.tokens + (targets_BS != IGNORED).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return both, 0-dim float64; NaN while nothing was added."""
        learned, random, own = self.nats / self.tokens
        return {ROUTING_NECESSITY: random - learned, OWN_VIEW_GAP: own - learned}


class ValidationMetrics:
    """Quality, loads by domain, and other views, whose sums go to the other sites in one message.

    Args:
        domains: Names of the domains.
        n_layers: Number of MoE layers L.
        n_experts: Number of routed experts E of a layer.
        device: Where sums are kept.
    """

    def __init__(self, domains: Sequence[str], n_layers: int, n_experts: int, device: torch.device | str) -> None:
        self.language = LanguageModelMetric(domains).to(device)
        self.loads = DomainLoad(n_layers, len(domains), n_experts).to(device)
        self.views = OtherViews().to(device)
        self._all: tuple[FlatSumMetric, ...] = (self.language, self.loads, self.views)

    def states(self) -> Tensor:
        """All sums as one flat float64 vector."""
        return torch.cat([metric.states() for metric in self._all])

    def load_states(self, flat: Tensor) -> None:
        """Replace all sums."""
        sizes = [metric.states().numel() for metric in self._all]
        for metric, part in zip(self._all, flat.split(sizes), strict=True):
            metric.load_states(part)

    def compute(self, *, with_views: bool) -> dict[str, Tensor]:
        """Return all values; those of other views only if they were taken."""
        views = self.views.compute() if with_views else {}
        return {**self.language.compute(), **self.loads.compute(), **views}
