"""Triton kernels of codecs: integers in groups, read and written once; `codec.py` is the reference, bit for bit.

Shapes: G groups, N numbers of a group, B bytes of its levels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PROGRAM = 64  # groups that one program works on
SMALLEST_BITS = 27 << 23  # of 2^-100, see codec.SMALLEST


@lru_cache
def run_on(device: torch.device) -> bool:
    """Whether codecs use these kernels there."""
    if triton is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def encode(values: Tensor, bits: int, group: int, highest: float) -> Tensor:
    """Do what `codec.Groups.encode` does.

    Args:
        values: Numbers (..., n), of a floating type; at least one.
        bits: Of a level.
        group: Numbers that share a scale.
        highest: The highest level.

    Returns:
        uint8 (..., bytes of a row).
    """
    numel = values.shape[-1]
    rows = values.detach().reshape(-1, numel).contiguous()
    n_groups = math.ceil(numel / group)
    coded = values.new_empty(len(rows), n_groups * (group * bits // 8 + 2), dtype=torch.uint8)
    grid = (triton.cdiv(n_groups, PROGRAM), len(rows))
    with torch.cuda.device_of(rows):
        encode_groups[grid](
            rows, coded, n_groups, numel, 1 / highest,
            HIGHEST=highest, SMALLEST=SMALLEST_BITS, BITS=bits, GROUP=group, PROGRAM=PROGRAM,
        )  # fmt: skip
    return coded.view(*values.shape[:-1], coded.shape[1])


def decode(data: Tensor, numel: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Do what `codec.Groups.decode` does.

    Args:
        data: uint8 (..., bytes of a row, or more).
        numel: Numbers n of a row; at least one.
        bits: Of a level.
        group: Numbers that share a scale.
        dtype: Of the result.

    Returns:
        Numbers (..., n).
    """
    rows = data.reshape(-1, data.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    values = torch.empty(len(rows), numel, dtype=dtype, device=data.device)
    n_groups = math.ceil(numel / group)
    grid = (triton.cdiv(n_groups, PROGRAM), len(rows))
    with torch.cuda.device_of(rows):
        decode_groups[grid](
            rows, values, n_groups, numel, rows.stride(0), BITS=bits, GROUP=group, PROGRAM=PROGRAM
        )  # fmt: skip
    return values.view(*data.shape[:-1], numel)


if triton is not None:

    @triton.jit
    def encode_groups(  # type: ignore[no-untyped-def]
        values, coded, n_groups, n_numbers, step,
        HIGHEST: tl.constexpr, SMALLEST: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PROGRAM: tl.constexpr,
    ):  # fmt: skip
        """Levels and scales of PROGRAM groups of a row of numbers; `step` is the inverse of the highest level.

        Magnitudes are compared as whole numbers, in which order what is not a number is the largest. A number is
        rounded to the nearest whole one, and to the even one of two, by adding one in whose range only these exist.
        """
        BYTES: tl.constexpr = GROUP * BITS // 8
        INFINITY: tl.constexpr = 0x7F800000
        WHOLE: tl.constexpr = 12582912.0
        row = tl.program_id(1).to(tl.int64)
        first = tl.program_id(0).to(tl.int64) * PROGRAM
        values += row * n_numbers + first * GROUP
        coded += row * n_groups * (BYTES + 2)
        g_G = tl.arange(0, PROGRAM)
        live_G = first + g_G < n_groups
        at_GN = g_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x_GN = tl.load(values + at_GN, mask=first * GROUP + at_GN < n_numbers, other=0).to(tl.float32)
        largest_G = tl.max(x_GN.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        usable_G = (largest_G >= SMALLEST) & (largest_G < INFINITY)
        scale_G = (largest_G.to(tl.float32, bitcast=True) * step).to(tl.int32, bitcast=True)
        scale_G = (scale_G + 0x7FFF + ((scale_G >> 16) & 1)) >> 16
        told_G = tl.where(usable_G, scale_G, tl.where(largest_G < SMALLEST, 0, INFINITY >> 16))
        over_G = tl.where(usable_G, scale_G << 16, INFINITY).to(tl.float32, bitcast=True)
        level_GN = tl.div_rn(x_GN, tl.broadcast_to(over_G[:, None], PROGRAM, GROUP))
        level_GN = tl.where(level_GN == level_GN, level_GN, 0.0)  # infinities over infinity
        level_GN = tl.minimum(tl.maximum(level_GN, -2.0 if BITS == 2 else -HIGHEST), 1.0 if BITS == 2 else HIGHEST)
        if BITS == 2:
            code_GB = level_GN.to(tl.int32)  # towards zero; tl.floor takes the smallest numbers for zeros
            code_GB -= (code_GB.to(tl.float32) > level_GN).to(tl.int32)
        else:
            code_GB = ((level_GN + WHOLE) - WHOLE).to(tl.int32)
        code_GB &= (1 << BITS) - 1
        if BITS < 8:
            low, high = tl.split(tl.reshape(code_GB, (PROGRAM, GROUP // 2, 2)))
            code_GB = low | (high << BITS)
        if BITS == 2:
            low, high = tl.split(tl.reshape(code_GB, (PROGRAM, GROUP // 4, 2)))
            code_GB = low | (high << 4)
        at_GB = first * BYTES + g_G[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        tl.store(coded + at_GB, code_GB.to(tl.uint8), mask=live_G[:, None])
        at_G = coded + tl.cast(n_groups, tl.int64) * BYTES + (first + g_G) * 2
        tl.store(at_G, (told_G & 255).to(tl.uint8), mask=live_G)
        tl.store(at_G + 1, (told_G >> 8).to(tl.uint8), mask=live_G)

    @triton.jit
    def decode_groups(  # type: ignore[no-untyped-def]
        packed, w, n_groups, n_numbers, stride, BITS: tl.constexpr, GROUP: tl.constexpr, PROGRAM: tl.constexpr
    ):  # fmt: skip
        """w[row] = level · scale of each number of a row of bytes; rounded once.

        One program decodes PROGRAM groups of one row. The scale is put together of its bytes: nothing asks where in
        memory a row may begin.
        """
        BYTES: tl.constexpr = GROUP * BITS // 8
        HALF: tl.constexpr = 1 << (BITS - 1)
        number = tl.program_id(1).to(tl.int64)
        first = tl.program_id(0).to(tl.int64) * PROGRAM
        row = packed + number * stride
        g_G = tl.arange(0, PROGRAM)
        live_G = first + g_G < n_groups
        at_GB = first * BYTES + g_G[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        codes = tl.load(row + at_GB, mask=live_G[:, None], other=0).to(tl.int32)
        if BITS == 4:
            codes = tl.interleave(codes & 15, codes >> 4)
        if BITS == 2:
            even = tl.interleave(codes & 3, (codes >> 4) & 3)
            codes = tl.interleave(even, tl.interleave((codes >> 2) & 3, codes >> 6))
        at_G = row + tl.cast(n_groups, tl.int64) * BYTES + (first + g_G) * 2
        low_G = tl.load(at_G, mask=live_G, other=0).to(tl.int32)
        high_G = tl.load(at_G + 1, mask=live_G, other=0).to(tl.int32)
        scale_G = ((low_G << 16) | (high_G << 24)).to(tl.float32, bitcast=True)
        levels = (codes ^ HALF).to(tl.float32) - (HALF - 0.5 if BITS == 2 else HALF)
        at_GN = g_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        live_GN = first * GROUP + at_GN < n_numbers
        tl.store(
            w + number * n_numbers + first * GROUP + at_GN, (levels * scale_G[:, None]).to(w.dtype.element_ty),
            mask=live_GN,
        )  # fmt: skip
