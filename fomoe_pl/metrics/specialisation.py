"""Which experts a domain's tokens go to."""

import math

import torch
from torch import Tensor

from fomoe_pl.metrics.flat import FlatSumMetric
from fomoe_pl.metrics.routing import load_entropy, max_violation, starved_experts


def domain_information(load_LNE: Tensor) -> Tensor:
    """Mutual information between domain and expert in bits: what one pick tells of the text's domain.

    Domains count equally, whatever their number of tokens, so the bound is log2 of their number. Counts of T picks
    overestimate it by about (N - 1)(E - 1) / (2 T ln 2) bits (Miller 1955).

    Args:
        load_LNE: Picks of each expert by domain; L layers, N domains, E experts.

    Returns:
        float64 (L,): 0 = every domain uses the experts alike. Domains without picks are left out; NaN without any.
    """
    picks_LN1 = load_LNE.double().sum(dim=2, keepdim=True)
    present_LN1 = picks_LN1 > 0
    n_L11 = present_LN1.sum(dim=1, keepdim=True)
    given_LNE = load_LNE / picks_LN1.clamp(min=1)  # p(expert | domain)
    overall_L1E = (given_LNE * present_LN1).sum(dim=1, keepdim=True) / n_L11
    ratio_LNE = torch.where(given_LNE > 0, given_LNE / overall_L1E, 1)
    nats_L = (torch.xlogy(given_LNE, ratio_LNE) / n_L11).sum(dim=(1, 2))
    return nats_L / math.log(2)


class DomainLoad(FlatSumMetric):
    """Loads of a model's experts by the domain of the text.

    Args:
        n_layers: Number of MoE layers L.
        n_domains: Number of domains N.
        n_experts: Number of routed experts E of a layer.
    """

    load_LNE: Tensor

    def __init__(self, n_layers: int, n_domains: int, n_experts: int) -> None:
        super().__init__()
        self.add_sum("load_LNE", (n_layers, n_domains, n_experts))

    def update(self, layer: int, picks_TK: Tensor, domain_T: Tensor) -> None:
        """Add the picks of one layer.

        Args:
            layer: Which.
            picks_TK: Expert ids, int64.
            domain_T: Index of each token's domain, int64; -1 for tokens that do not count.
        """
        _, n_domains, n_experts = self.load_LNE.shape
        cell_TK = torch.where(domain_T[:, None] < 0, n_domains * n_experts, domain_T[:, None] * n_experts + picks_TK)
        # Integers: their sum does not depend on a GPU's order of additions.
        counts = torch.zeros(n_domains * n_experts + 1, dtype=torch.int64, device=picks_TK.device)
        counts.scatter_add_(0, cell_TK.flatten(), torch.ones_like(cell_TK.flatten()))
        load_LNE = self.load_LNE.clone()
        load_LNE[layer] += counts[:-1].view(n_domains, n_experts)
        self.load_LNE = load_LNE

    def compute(self) -> dict[str, Tensor]:
        """Return `domain_information_bits` and the load's `load_entropy`, `max_violation`, `starved_experts`.

        Each as the mean of the layers and as `<name>/layer_<ii>`, 0-dim float64 on the CPU.
        """
        load_LNE = self.load_LNE.cpu()
        load_LE = load_LNE.sum(dim=1)
        scored_LE = torch.ones_like(load_LE, dtype=torch.bool)
        statistics = {
            "domain_information_bits": domain_information(load_LNE),
            "load_entropy": load_entropy(load_LE, scored_LE),
            "max_violation": max_violation(load_LE, scored_LE),
            "starved_experts": starved_experts(load_LE, scored_LE),
        }
        values = {name: value_L.mean() for name, value_L in statistics.items()}
        for name, value_L in statistics.items():
            values |= {f"{name}/layer_{layer:02d}": value for layer, value in enumerate(value_L)}
        return values
