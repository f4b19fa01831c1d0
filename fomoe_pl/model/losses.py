"""Losses: next-token cross entropy in chunks, and the router's auxiliary losses.

Shapes: N tokens, C tokens of one chunk, D model, V vocabulary, W the vocabulary rounded up, E experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.model.backends import kernels
from fomoe_pl.model.backends import rows as row_kernels
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import compute_dtype
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.router import RoutingStats

IGNORED = -100
"""Target of a token that does not count."""
ROWS_STEP = 128
"""Chunk sizes are rounded down to this multiple, so that products have whole tiles."""


def chunk_rows(width: int, max_bytes: int, itemsize: int, in_kernel: bool) -> int:
    """Return how many tokens are in a chunk: as many as have their logits in `max_bytes`; at least one.

    Args:
        width: Logits of a token, W.
        max_bytes: Upper bound of a chunk.
        itemsize: Bytes of a number of the products' type.
        in_kernel: Whether our kernel makes the gradient in the logits' place. Elsewhere they become float32.
    """
    rows = max(1, max_bytes // ((itemsize if in_kernel else 4) * width))
    return rows // ROWS_STEP * ROWS_STEP or rows


def _output_matrix(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in the compute type, with rows of zeros up to a multiple of 8.

    Products with rows of an odd number of bfloat16 leave the tensor cores' fast paths, and FoMoE's vocabulary is odd.
    """
    missing = -weight_VD.shape[0] % 8
    return F.pad(weight_VD.to(dtype), (0, 0, 0, missing)) if missing else weight_VD.to(dtype)


def _log_probabilities(logits_CW: Tensor, vocab_size: int) -> Tensor:
    """Return float32 (C,W) of the vocabulary, -inf in the padding."""
    logits_CW[:, vocab_size:] = -torch.inf
    return logits_CW.log_softmax(dim=1, dtype=torch.float32)


def _cross_entropy(logits_CW: Tensor, targets_C: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return losses, float32 (C,), 0 where not counted, and the gradient (C,W), of no meaning where not counted."""
    counted_C = targets_C != IGNORED
    targets_C1 = targets_C.where(counted_C, 0)[:, None]
    log_p_CW = _log_probabilities(logits_CW, vocab_size)
    log_p_C1 = log_p_CW.gather(1, targets_C1)
    d_logits_CW = log_p_CW.exp_().to(logits_CW.dtype)
    # Less 1 at the target, before rounding.
    d_logits_CW.scatter_(1, targets_C1, log_p_C1.expm1().to(logits_CW.dtype))
    return -log_p_C1.squeeze(1).where(counted_C, 0), d_logits_CW


def _chunk_gradients(
    hidden_CD: Tensor, weight_WD: Tensor, targets_C: Tensor, vocab_size: int, d_weight_WD: Tensor, in_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Add a chunk's part to the weight's gradient; return its loss and its hidden states' gradient."""
    d_logits_CW = hidden_CD @ weight_WD.t()
    if in_kernel:
        losses_C = row_kernels.cross_entropy(d_logits_CW, targets_C, vocab_size, with_gradient=True)
    else:
        losses_C, d_logits_CW = _cross_entropy(d_logits_CW, targets_C, vocab_size)
    counted_C1 = (targets_C != IGNORED)[:, None]
    # Masked here, where a row has D elements instead of V.
    _add_product(d_weight_WD, d_logits_CW.t(), hidden_CD.where(counted_C1, 0))
    return losses_C.sum(), (d_logits_CW @ weight_WD).where(counted_C1, 0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 total; on a GPU inside the product, without a rounded one in memory."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of hidden @ weight.T; gradients are computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Tensor:
        dtype = compute_dtype(hidden_ND)
        vocab_size = weight_VD.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND)
        with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
            weight_WD = _output_matrix(weight_VD, dtype)
            # Over many chunks a bfloat16 sum would lose the small ones.
            d_weight_WD = torch.zeros_like(weight_WD, dtype=torch.float32)
            in_kernel = kernels.taken(hidden_ND.device, dtype)
            rows = chunk_rows(len(weight_WD), max_bytes, dtype.itemsize, in_kernel)
            chunks = zip(hidden_ND.to(dtype).split(rows), targets_N.split(rows), strict=True)
            for i, (hidden_CD, targets_C) in enumerate(chunks):
                chunk = (hidden_CD, weight_WD, targets_C, vocab_size)
                loss, d_hidden_ND[i * rows : (i + 1) * rows] = _chunk_gradients(*chunk, d_weight_WD, in_kernel)
                total += loss
        ctx.save_for_backward(d_hidden_ND, d_weight_WD[:vocab_size])
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        return d_hidden_ND * grads[0].to(d_hidden_ND.dtype), (d_weight_VD * grads[0]).to(ctx.weight_dtype), None, None


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, max_bytes: int) -> Tensor:
    """Return the mean cross entropy over the tokens that count, without ever holding all logits.

    The gradients with respect to `hidden` and `weight` are computed in the forward pass, so that no chunk's logits are
    computed twice.

    Args:
        hidden_ND: Final hidden states (N,D).
        weight_VD: Output matrix (V,D).
        targets_N: Next tokens, int64 (N,); `-100` does not count.
        max_bytes: Upper bound of a chunk of logits, as in `chunk_rows`.

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
        targets_N: Next tokens, int64 (N,); `-100` does not count.
        max_bytes: Upper bound of a chunk of logits, as in `chunk_rows`.
    """
    dtype = compute_dtype(hidden_ND)
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        weight_WD = _output_matrix(weight_VD, dtype)
        in_kernel = kernels.taken(hidden_ND.device, dtype)
        rows = chunk_rows(len(weight_WD), max_bytes, dtype.itemsize, in_kernel)
        chunks = zip(hidden_ND.to(dtype).split(rows), targets_N.split(rows), strict=True)
        return torch.cat([_chunk_losses(*chunk, weight_WD, len(weight_VD), in_kernel) for chunk in chunks])


def _chunk_losses(hidden_CD: Tensor, targets_C: Tensor, weight_WD: Tensor, vocab_size: int, in_kernel: bool) -> Tensor:
    """Return losses, float32 (C,); a chunk's logits are freed before the next one's are computed."""
    logits_CW = hidden_CD @ weight_WD.t()
    if in_kernel:
        return row_kernels.cross_entropy(logits_CW, targets_C, vocab_size, with_gradient=False)
    counted_C = targets_C != IGNORED
    log_p_CW = _log_probabilities(logits_CW, vocab_size)
    log_p_C1 = log_p_CW.gather(1, targets_C.where(counted_C, 0)[:, None])
    return -log_p_C1.squeeze(1).where(counted_C, 0)


def balance_loss(stats: RoutingStats, n_scored: int, share_E: Tensor | None = None) -> Tensor:
    """Return n·Σ f_i·P_i of one layer, 1 when routing is uniform (Switch, arXiv 2101.03961, eq. 4).

    f_i is expert i's share of all picks, without gradient; P_i its mean normalised score. Ghosts' picks count.

    Args:
        stats: What the router did.
        n_scored: The denominator n: all experts E in ghost mode, the residents R in partitioned mode.
        share_E: f of a larger batch, of which these tokens are a part; None is that of these tokens.
    """
    share_E = stats.load_E / stats.picks if share_E is None else share_E
    return n_scored * (share_E * stats.importance_E).sum()


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


def auxiliary_loss(
    stats: list[RoutingStats], config: ModelConfig, residency: Residency, shares_LE: Tensor | None = None
) -> AuxiliaryLoss:
    """Return the router's losses over all layers.

    Args:
        stats: One entry a layer.
        config: Gives the weights; the balance loss has weight 0 unless `balance` is `aux_loss`.
        residency: Gives the number of scored experts of each layer.
        shares_LE: As for `balance_loss`, of each layer.
    """
    shares = [None] * len(stats) if shares_LE is None else list(shares_LE)
    balance = torch.stack(
        [balance_loss(layer, residency.n_scored(i, config), shares[i]) for i, layer in enumerate(stats)]
    ).mean()
    z = torch.stack([layer.z for layer in stats]).mean()
    weight = config.aux_loss_weight if config.balance == "aux_loss" else 0.0
    return AuxiliaryLoss(balance, z, weight * balance + config.z_loss_weight * z)
