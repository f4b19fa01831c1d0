"""Many small counts in few numbers, for a message that sites add up."""

import math

import torch
from torch import Tensor


def pack_counts(counts: Tensor, most: int) -> Tensor:
    """Pack small counts into float64 numbers that can be added over sites: several digits of base `most` + 1 each.

    Args:
        counts: int64, any shape; a sum over all sites must not exceed `most`.
        most: Largest sum of a count, the number of sites.

    Returns:
        float64 (n,): exact, because a float64 holds integers up to 2**53.
    """
    n = digits(most)
    flat = torch.nn.functional.pad(counts.flatten(), (0, -counts.numel() % n)).view(-1, n)
    weights = (most + 1) ** torch.arange(n)
    return (flat * weights).sum(dim=1).double()


def unpack_counts(packed: Tensor, most: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_counts`, int64 of `shape`."""
    n = digits(most)
    weights = (most + 1) ** torch.arange(n)
    flat = packed.long()[:, None] // weights % (most + 1)
    return flat.flatten()[: math.prod(shape)].view(shape)


def digits(most: int) -> int:
    """Counts up to `most` that fit into one float64."""
    n = 1
    while (most + 1) ** (n + 1) <= 2**53:
        n += 1
    return n
