"""How much routers' picks on the same text differ over time and between sites.

Shapes: L layers, T tokens, K picks of a token, E experts, M sites. Picks are expert ids; a token's are different ones.
"""

import torch
from torch import Tensor


def pick_overlap(first_LTK: Tensor, second_LTK: Tensor) -> Tensor:
    """Share of a token's picks that two routers have in common, mean of the tokens.

    1 minus this is the churn of one router between two moments. OLMoE (arXiv 2409.02060, section 5.1) calls the overlap
    with the last checkpoint's picks router saturation.

    Args:
        first_LTK: Picks; int64.
        second_LTK: Picks of the same tokens.

    Returns:
        float64 (L,): 1 = the same sets, 0 = no expert in common. NaN without tokens.
    """
    common_LTK = (first_LTK[..., :, None] == second_LTK[..., None, :]).any(dim=-1)
    return common_LTK.double().mean(dim=(1, 2))


def picked_by(picks_LTK: Tensor, n_experts: int) -> Tensor:
    """Return 1 where a token picked an expert and 0 elsewhere, int64 (L,T,E); added over sites, the sites that did."""
    layers, tokens, _ = picks_LTK.shape
    return torch.zeros(layers, tokens, n_experts, dtype=torch.int64).scatter_(2, picks_LTK.cpu(), 1)


def site_agreement(sites_LTE: Tensor, scorers_LE: Tensor) -> Tensor:
    """How likely another site that could pick an expert for a token did so, given that one site did.

    Where all sites score all experts it is the mean share of picks that two sites have in common. (This project's
    extension of the agreement used for one model over time.)

    Args:
        sites_LTE: Number of sites that picked an expert for a token.
        scorers_LE: Number of sites whose router has the expert.

    Returns:
        float64 (L,): 1 = all sites pick alike, (K/E) = as by chance. NaN where no two sites score the same expert.
    """
    sites_LTE = sites_LTE.double()
    agreeing_L = (sites_LTE * (sites_LTE - 1)).sum(dim=(1, 2))
    possible_L = (sites_LTE * (scorers_LE[:, None, :] - 1)).sum(dim=(1, 2))
    return agreeing_L / possible_L


def row_similarity(weight_LND: Tensor) -> Tensor:
    """Mean cosine between two different rows of a router: near 1, the router hardly tells experts apart.

    Args:
        weight_LND: Router rows of N experts.

    Returns:
        float64 (L,). NaN for a single row.
    """
    unit_LND = torch.nn.functional.normalize(weight_LND.double(), dim=2)
    n = weight_LND.shape[1]
    pairs_L = unit_LND.sum(dim=1).square().sum(dim=1) - unit_LND.square().sum(dim=(1, 2))
    return pairs_L / (n * (n - 1)) if n > 1 else torch.full_like(pairs_L, torch.nan)
