"""Losses: next-token cross entropy in chunks, and the router's auxiliary losses.

Shapes: N tokens, C tokens of one chunk, D model, V vocabulary, E experts, L layers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import compute_dtype
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.router import RoutingStats

IGNORED = -100
"""Target of a token that does not count."""


def chunk_rows(vocab_size: int, max_bytes: int) -> int:
    """Return how many tokens' float32 logits fit into ``max_bytes``; at least one."""
    return max(1, max_bytes // (4 * vocab_size))


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield (hidden, targets, is counted, float32 logits) of one chunk after the other, in the compute type."""
    rows = chunk_rows(weight_VD.shape[0], max_bytes)
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        counted_C = targets_C != IGNORED
        logits_CV = (hidden_CD @ weight_VD.t()).float()
        yield hidden_CD, targets_C.where(counted_C, 0), counted_C, logits_CV


def _nll_and_softmax(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target) (C,) and the softmax, which takes the place of the logits in memory."""
    picked_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
    max_C1 = logits_CV.amax(dim=1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    sum_C1 = exp_CV.sum(dim=1, keepdim=True)
    return (sum_C1.log() + max_C1).squeeze(1) - picked_C, exp_CV.div_(sum_C1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of hidden @ weight.T; gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Tensor:
        dtype = compute_dtype(hidden_ND)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND)
        # Over many chunks a bfloat16 sum would lose the small ones.
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        cast_VD = weight_VD.to(dtype)
        start = 0
        with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
            for hidden_CD, targets_C, counted_C, logits_CV in _chunks(
                hidden_ND.to(dtype), cast_VD, targets_N, max_bytes
            ):
                nll_C, d_logits_CV = _nll_and_softmax(logits_CV, targets_C)
                total += nll_C.where(counted_C, 0).sum()
                d_logits_CV.scatter_add_(1, targets_C[:, None], -torch.ones_like(nll_C)[:, None])
                d_logits_CV = d_logits_CV.mul_(counted_C[:, None]).to(dtype)
                d_hidden_ND[start : start + len(targets_C)] = d_logits_CV @ cast_VD
                d_weight_VD += d_logits_CV.t() @ hidden_CD
                start += len(targets_C)
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        return d_hidden_ND * grads[0].to(d_hidden_ND.dtype), (d_weight_VD * grads[0]).to(ctx.weight_dtype), None, None


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Tensor:
    """Return the mean cross entropy over the tokens that count, without ever holding all logits.

    The gradients with respect to ``hidden`` and ``weight`` are made in the forward pass, so that no chunk's logits are
    made twice.

    Args:
        hidden_ND: Final hidden states (N,D).
        weight_VD: Output matrix (V,D).
        targets_N: Next tokens, int64 (N,); ``-100`` does not count.
        max_bytes: Upper bound of one float32 chunk of logits, in bytes.

    Returns:
        Scalar, float32, in nats; 0 if no token counts.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, max_bytes)
    return total / (targets_N != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Tensor:
    """Return each token's cross entropy, float32 (N,), in nats, 0 where it does not count; without gradient.

    Args:
        hidden_ND: Final hidden states (N,D).
        weight_VD: Output matrix (V,D).
        targets_N: Next tokens, int64 (N,); ``-100`` does not count.
        max_bytes: Upper bound of one float32 chunk of logits, in bytes.
    """
    dtype = compute_dtype(hidden_ND)
    losses = []
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        for _, targets_C, counted_C, logits_CV in _chunks(
            hidden_ND.to(dtype), weight_VD.to(dtype), targets_N, max_bytes
        ):
            losses.append(_nll_and_softmax(logits_CV, targets_C)[0].where(counted_C, 0))
    return torch.cat(losses)


def balance_loss(stats: RoutingStats, n_scored: int) -> Tensor:
    """Return n·Σ f_i·P_i of one layer, 1 when routing is uniform (Switch, arXiv 2101.03961, eq. 4).

    f_i is expert i's share of all picks, without gradient; P_i its mean normalised score. Ghosts' picks count.

    Args:
        stats: What the router did.
        n_scored: The denominator n: all experts E in ghost mode, the residents R in partitioned mode.
    """
    return n_scored * (stats.load_E / stats.picks * stats.importance_E).sum()


class AuxiliaryLoss(NamedTuple):
    """Auxiliary losses, float32 scalars.

    Attributes:
        balance: Mean over layers of the load-balance loss, unweighted.
        z: Mean over layers of the router z-loss, unweighted.
        total: What is added to the cross entropy: both, weighted as configured.
    """

    balance: Tensor
    z: Tensor
    total: Tensor


def auxiliary_loss(stats: list[RoutingStats], config: ModelConfig, residency: Residency) -> AuxiliaryLoss:
    """Return the router's losses over all layers.

    Args:
        stats: One entry a layer.
        config: Gives the weights; the balance loss has weight 0 unless ``balance`` is ``aux_loss``.
        residency: Gives the number of scored experts of each layer.
    """
    balance = torch.stack([balance_loss(layer, residency.n_scored(i, config)) for i, layer in enumerate(stats)]).mean()
    z = torch.stack([layer.z for layer in stats]).mean()
    weight = config.aux_loss_weight if config.balance == "aux_loss" else 0.0
    return AuxiliaryLoss(balance, z, weight * balance + config.z_loss_weight * z)
