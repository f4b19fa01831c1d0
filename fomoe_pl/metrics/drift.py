"""How far the holders of an expert, and all sites in their dense tensors, moved apart in a round.

All are functions of sums of squares, which sites can add up: no site has to see another's parameters.
"""

import torch
from torch import Tensor


def relative_drift(own: Tensor, mean: Tensor, agreed: Tensor, holders: Tensor) -> Tensor:
    """Root mean square distance of the holders from their mean before averaging, over the norm of the agreed values.

    With pseudo-gradients d_h of H holders and their mean m: sqrt(sum |d_h|² / H - |m|²) / |agreed|.

    Args:
        own: Sum over the holders of |d_h|².
        mean: |m|².
        agreed: |agreed values|² that the round started from.
        holders: Number of holders H.

    Returns:
        Of the same shape: 0 = no drift. NaN for a single holder.
    """
    apart = torch.sqrt((own / holders - mean).clamp(min=0))
    return torch.where(holders > 1, apart / torch.sqrt(agreed), torch.nan)


def mean_cosine(own: Tensor, mean: Tensor, norms: Tensor, holders: Tensor) -> Tensor:
    """Cosine between the pseudo-gradients of two holders, mean of all pairs weighted by the product of their norms.

    (H² |m|² - sum |d_h|²) / ((sum |d_h|)² - sum |d_h|²); for equal norms it is the plain mean of the cosines.

    Args:
        own: Sum over the holders of |d_h|².
        mean: |m|², m the mean of the d_h.
        norms: Sum over the holders of |d_h|.
        holders: Number of holders H.

    Returns:
        Of the same shape: 1 = the same direction, 0 = unrelated, negative = against each other. NaN for a single
        holder, and where fewer than two moved.
    """
    pairs = holders.square() * mean - own
    weights = norms.square() - own
    # With a single one that moved, rounding leaves a small remainder.
    return torch.where((holders > 1) & (weights > 1e-9 * own), pairs / weights, torch.nan)
