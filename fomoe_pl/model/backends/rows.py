"""Triton kernels over one row of numbers for each token: choosing experts, and the cross entropy of logits.

Shapes: T tokens, N scored experts, K experts chosen for each token, C tokens of a chunk, V vocabulary, W the vocabulary
rounded up.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from fomoe_pl.model.backends.tuning import up_to_power

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LONG_ROW = 100_000  # logits of a token from which on the loss takes larger blocks
TOKENS = 16  # that one program chooses experts for


@torch.library.custom_op("fomoe::choose_experts", mutates_args=())
def choose_experts(scores_TN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the K largest scores' places, int64 (T,K), the largest first, and how often each is among them.

    Of equal scores the first counts as larger, and a NaN as smaller than all: places are always K different ones.

    Args:
        scores_TN: float32.
        top_k: K, at most N.

    Returns:
        The places, and int32 (B,N): a row of counts for each program, to be added up.
    """
    n_tokens, n_scored = scores_TN.shape
    n_blocks = triton.cdiv(n_tokens, TOKENS)
    chosen_TK = torch.empty(n_tokens, top_k, dtype=torch.int64, device=scores_TN.device)
    counts_BN = torch.empty(n_blocks, n_scored, dtype=torch.int32, device=scores_TN.device)
    padded = up_to_power(n_scored, 2)
    _choose[(n_blocks,)](scores_TN.contiguous(), chosen_TK, counts_BN, n_tokens, n_scored,
                         K=top_k, BT=TOKENS, NP=padded, num_warps=4)  # fmt: skip
    return chosen_TK, counts_BN


@choose_experts.register_fake
def _(scores_TN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    n_tokens, n_scored = scores_TN.shape
    counts_BN = scores_TN.new_empty((n_tokens + TOKENS - 1) // TOKENS, n_scored, dtype=torch.int32)
    return scores_TN.new_empty(n_tokens, top_k, dtype=torch.int64), counts_BN


def _choose_kernel(scores_TN, chosen_TK, counts_BN, T, N, K: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr):
    """Take the largest of BT rows K times, each time without those that are taken."""
    t_T = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n_N = tl.arange(0, NP)
    inside = (t_T < T)[:, None] & (n_N < N)[None, :]
    scores = tl.load(scores_TN + t_T[:, None] * N + n_N[None, :], mask=inside, other=0.0)
    # What is not a number comes last of all experts, but before what is padding or taken.
    scores = tl.where(scores > -3e38, scores, -3e38)
    scores = tl.where((n_N < N)[None, :], scores, -float("inf"))
    counts = tl.zeros([BT, NP], tl.int32)
    for k in range(K):
        largest_T = tl.max(scores, axis=1)
        at_T = tl.min(tl.where(scores == largest_T[:, None], n_N[None, :], NP), axis=1)
        tl.store(chosen_TK + t_T * K + k, at_T.to(tl.int64), mask=t_T < T)
        taken = n_N[None, :] == at_T[:, None]
        scores = tl.where(taken, -float("inf"), scores)
        counts += (taken & inside).to(tl.int32)
    tl.store(counts_BN + tl.program_id(0) * N + n_N, tl.sum(counts, axis=0), mask=n_N < N)


def cross_entropy(logits_CW: Tensor, targets_C: Tensor, vocab_size: int, *, with_gradient: bool) -> Tensor:
    """Return the cross entropies, float32 (C,), 0 where a target does not count.

    Args:
        logits_CW: Logits, contiguous (C,W); columns from V on are padding.
        targets_C: Next tokens, int64 (C,); -100 does not count.
        vocab_size: V.
        with_gradient: Put the gradient of the losses' sum in the logits' place.
    """
    n_rows, width = logits_CW.shape
    losses_C = torch.empty(n_rows, dtype=torch.float32, device=logits_CW.device)
    # Of a longer row less stays in a cache until it is read again, and fewer rows at a time leave more for each.
    block = min(up_to_power(width), 8192 if width < LONG_ROW else 16384)
    _cross_entropy[(n_rows,)](
        logits_CW, targets_C, losses_C, vocab_size, width, IGNORED=-100, GRADIENT=with_gradient, BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return losses_C


def _cross_entropy_kernel(
    logits_CW, targets_C, losses_C, V, W, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a row's cross entropy, and with GRADIENT its gradient in the logits' place; zeros where not counted.

    One program a row, read twice: for the sum of exponentials, each lane with a maximum of its own until the end, and
    for the gradient. The second time most of the row is still in a cache. Columns from V on are padding.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_C + row)
    counted = target != IGNORED
    logits = logits_CW + row * W
    at = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    log_total = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    chosen = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses_C + row, tl.where(counted, log_total - chosen, 0.0))
    if GRADIENT:
        # All threads must have read the target's logit before one of them overwrites it.
        tl.debug_barrier()
        for start in range(0, W, BLOCK):
            column = start + at
            x = tl.load(logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counted, gradient, 0.0).to(logits_CW.dtype.element_ty)
            tl.store(logits + column, gradient, mask=column < W)


if triton is not None:
    _choose, _cross_entropy = triton.jit(_choose_kernel), triton.jit(_cross_entropy_kernel)
