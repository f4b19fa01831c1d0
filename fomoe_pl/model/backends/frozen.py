"""Packed copies of absent experts for the backends: unpacked a layer or an expert at a time, never kept.

Whoever multiplies them unpacks them once in the forward and once more in the backward pass, into memory that is free
again after the product. So all layers share what one layer needs.

Shapes: A copied experts, E experts of the layer, C × N an expert's input or output matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_pl import codec_kernels
from fomoe_pl.codec import GROUP, Groups, codec_of


class Frozen(NamedTuple):
    """A layer's copies, which get no gradients. The slot of the a-th is R + a.

    Attributes:
        w_in: Packed input matrices, uint8 (A, bytes of D·I numbers).
        w_out: Packed output matrices, uint8 (A, bytes of F·D numbers).
        bits: Of a number; see `codec.codec_of`.
        input_gradient: Whether tokens get gradients through them.
        slot_of_expert: Slots of the layer's experts, int64 (E,).
    """

    w_in: Tensor
    w_out: Tensor
    bits: int
    input_gradient: bool
    slot_of_expert: Tensor


@torch.library.custom_op("fomoe::unpack_copies", mutates_args=())
def unpack_copies(packed: Tensor, rows: int, columns: int, bits: int, dtype: torch.dtype, in_kernel: bool) -> Tensor:
    """Do what `unpack` does for matrices of rows × columns, as one operation in compiled code."""
    w_ACN = unpack(packed, torch.Size((rows, columns)), bits, dtype, in_kernel=in_kernel)
    return w_ACN.clone() if bits == 8 * dtype.itemsize else w_ACN  # an operation's result must not be a view


@unpack_copies.register_fake
def _(packed: Tensor, rows: int, columns: int, bits: int, dtype: torch.dtype, in_kernel: bool) -> Tensor:
    return packed.new_empty(len(packed), rows, columns, dtype=dtype)


def unpack(packed: Tensor, shape: torch.Size, bits: int, dtype: torch.dtype, *, in_kernel: bool) -> Tensor:
    """Return copies as matrices.

    Args:
        packed: Bytes of each, uint8 (A,·), or of one (·).
        shape: (C,N).
        bits: Of a number.
        dtype: Of the result.
        in_kernel: Whether Triton's kernel unpacks groups; it needs a GPU, or the interpreter.

    Returns:
        (A,C,N), or (C,N) of one; may be a view.
    """
    numel, codec = shape.numel(), codec_of(bits)
    if not isinstance(codec, Groups) or packed.dim() == 1:
        return codec.decode(packed, numel, dtype).view(*packed.shape[:-1], *shape)
    if in_kernel:
        return codec_kernels.decode(packed, numel, codec.bits, GROUP, dtype).view(len(packed), *shape)
    w_ACN = torch.empty(len(packed), *shape, dtype=dtype, device=packed.device)
    # Expert by expert: torch's operations have several times a result's memory in between.
    for w_CN, row in zip(w_ACN, packed, strict=True):
        w_CN.copy_(codec.decode(row, numel, dtype).view(shape))
    return w_ACN
