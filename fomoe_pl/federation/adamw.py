"""AdamW of one large tensor in one pass over memory, with the factor that clips its gradient.

torch's fused AdamW takes such a factor too, but writes the scaled gradient back; scaling it beforehand reads and writes
it once more. Here 28 bytes a parameter are moved, and nothing else: of one with a bfloat16 gradient 26, and 28 again
where a bfloat16 copy of it is written on the way (`model/copies.py`). A tensor is large where a launch of its own does
not matter.

Shapes: N numbers of a parameter.
"""

# mypy: ignore-errors
from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = None
    INTERPRETED = False

LARGE = 2**18
"""Numbers of a tensor from which on it has a launch of its own: some 3 us of an H100's memory."""
BLOCK = 2048


def takes(param: Tensor) -> bool:
    """Whether the kernel updates this parameter."""
    if triton is None or param.dtype != torch.float32 or param.numel() < LARGE or not param.is_contiguous():
        return False
    return param.is_cuda and _has_kernels(param.device)


@lru_cache  # of each parameter in each step the question would cost milliseconds
def _has_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def step(
    param: Tensor, copy: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    steps: Tensor, factor: Tensor, found_inf: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update a parameter and its moments in place, as `torch.optim.AdamW` does with the gradient `factor * grad`.

    Args:
        param: float32, contiguous.
        copy: Of another type, becomes what the parameter is then; None for none.
        grad: Its gradient, of any type, which stays.
        exp_avg: First moment, like the parameter.
        exp_avg_sq: Second moment.
        steps: float32 (), steps including this one.
        factor: float32 (), by which the gradient is scaled.
        found_inf: float32 (); not zero: nothing is done.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: decoupled.
    """
    n = param.numel()
    _step[(triton.cdiv(n, BLOCK),)](
        param, param if copy is None else copy, grad.contiguous(), exp_avg, exp_avg_sq, steps, factor, found_inf, n,
        # Triton takes float32: what is left of a beta near 1 would have lost most of its digits there.
        lr, betas[1], *(1 - beta for beta in betas), *(math.log2(beta) if beta else -math.inf for beta in betas),
        eps, weight_decay,
        COPIED=copy is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _update(
    p_N, copy_N, g_N, m_N, v_N, steps, factor, found_inf, N, lr, beta2, rest1, rest2, log2_beta1, log2_beta2, eps,
    weight_decay, COPIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK numbers: eight a thread, in loads of 16 bytes."""
    if tl.load(found_inf) != 0.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    # In float64, once a program: 1 - beta^steps of a beta near 1 would have few digits left in float32.
    done = tl.load(steps).to(tl.float64)
    correction1 = (1.0 - tl.exp2(done * log2_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp2(done * log2_beta2)).to(tl.float32)
    g = tl.load(g_N + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    p = tl.load(p_N + at, mask=inside, other=0.0) * (1.0 - lr * weight_decay)
    m = tl.load(m_N + at, mask=inside, other=0.0)
    v = tl.load(v_N + at, mask=inside, other=0.0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p -= lr / correction1 * m / (tl.sqrt_rn(v) / tl.sqrt_rn(correction2) + eps)
    tl.store(p_N + at, p, mask=inside)
    tl.store(m_N + at, m, mask=inside)
    tl.store(v_N + at, v, mask=inside)
    if COPIED:
        tl.store(copy_N + at, p.to(copy_N.dtype.element_ty), mask=inside)


_step = triton.jit(_update) if triton is not None else None
