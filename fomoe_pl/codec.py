"""Numbers as bytes: casts, and low-bit integers in groups that share a scale.

A codec works on the last axis; each row of it becomes a fixed number of bytes, so an expert's matrix has its place
among others'. The same numbers give the same bits on every device. All that is used is exact or correctly rounded
there: no division by a constant, which some devices turn into a product with its inverse, and no numbers so small that
a device might take them for zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Numbers that share a scale."""
SCALE_BYTES = 2
SMALLEST = 2.0**-100
"""A group in which nothing is as large decodes to zeros."""

GroupBits = Literal[2, 4, 8]


class Codec(Protocol):
    """Turns rows of numbers into rows of bytes and back."""

    def nbytes(self, numel: int) -> int:
        """Return the bytes of a row of `numel` numbers."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Encode rows.

        Args:
            values: Numbers (..., n), of a floating type.

        Returns:
            uint8 (..., nbytes(n)), contiguous.
        """
        ...

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode rows.

        Args:
            data: uint8 (..., nbytes(numel)).
            numel: Numbers n of a row.
            dtype: Of the result. What was encoded is computed in float32 and then rounded once.

        Returns:
            Numbers (..., n); with a cast to the type that is asked for, a view of the data.
        """
        ...


@dataclass(frozen=True)
class Cast:
    """Numbers as they are in some type, rounded to it.

    Attributes:
        dtype: That type: float32, bfloat16 or float16.
    """

    dtype: torch.dtype

    def nbytes(self, numel: int) -> int:
        """As of `Codec`."""
        return numel * self.dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        """As of `Codec`."""
        return values.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Codec`."""
        return _as_type(data[..., : self.nbytes(numel)], self.dtype).to(dtype)


@dataclass(frozen=True)
class Groups:
    """Symmetric integers in groups of `GROUP` numbers, each with a scale in bfloat16.

    A number is level · scale. Of 8 and 4 bits the levels are the whole numbers up to ±127 and ±7, the nearest one, and
    of two as near ones the even one. Of 2 bits they are ±1/2 and ±3/2. The scale is the group's largest magnitude over
    the highest level, rounded. A group of zeros, or of numbers below `SMALLEST`, decodes to zeros; one with a number
    that is not finite decodes to numbers none of which is finite.

    A row is first the levels of all its groups, then their scales. A level is its floor in two's complement; of less
    than 8 bits several share a byte, the first in its lowest bits. The last group is filled up with zeros.

    Attributes:
        bits: Of a level: 8, 4 or 2.
    """

    bits: GroupBits

    def nbytes(self, numel: int) -> int:
        """As of `Codec`."""
        return math.ceil(numel / GROUP) * (GROUP * self.bits // 8 + SCALE_BYTES)

    @property
    def highest(self) -> float:
        """The highest level."""
        return 1.5 if self.bits == 2 else 2.0 ** (self.bits - 1) - 1

    def encode(self, values: Tensor) -> Tensor:
        """As of `Codec`."""
        numel = values.shape[-1]
        x_GN = F.pad(values.float(), (0, -numel % GROUP)).unflatten(-1, (-1, GROUP))
        largest_G1 = x_GN.abs().amax(dim=-1, keepdim=True)
        usable_G1 = (largest_G1 >= SMALLEST) & (largest_G1 < math.inf)  # neither holds of what is not a number
        scale_G1 = (largest_G1 * (1 / self.highest)).to(torch.bfloat16)
        scale_G1 = torch.where(usable_G1, scale_G1, torch.where(largest_G1 < SMALLEST, 0.0, math.inf))
        levels_GN = torch.where(usable_G1, x_GN / scale_G1.float(), 0.0)
        levels_GN = levels_GN.floor().clamp(-2, 1) if self.bits == 2 else levels_GN.round()
        if self.bits > 2:  # a scale may have been rounded down
            levels_GN = levels_GN.clamp(-self.highest, self.highest)
        levels_GN = levels_GN.to(torch.int8).view(torch.uint8)
        if self.bits < 8:
            parts = (levels_GN & (1 << self.bits) - 1).unflatten(-1, (-1, 8 // self.bits)).unbind(-1)
            levels_GN = parts[0]
            for i, part in enumerate(parts[1:], start=1):
                levels_GN = levels_GN | (part << i * self.bits)
        scales = scale_G1.to(torch.bfloat16).squeeze(-1).contiguous().view(torch.uint8)
        return torch.cat((levels_GN.flatten(-2), scales), dim=-1)

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Codec`."""
        n_groups = math.ceil(numel / GROUP)
        split = n_groups * GROUP * self.bits // 8
        codes, half = data[..., :split], 1 << self.bits - 1
        scale_G1 = _as_type(data[..., split : self.nbytes(numel)], torch.bfloat16).float().unsqueeze(-1)
        if self.bits < 8:
            parts = [codes >> shift & (1 << self.bits) - 1 for shift in range(0, 8, self.bits)]
            codes = torch.stack(parts, dim=-1).flatten(-2)
        levels = (codes ^ half).float() - (half - 0.5 if self.bits == 2 else half)
        values = levels.unflatten(-1, (n_groups, GROUP)).mul_(scale_G1).flatten(-2)
        return values[..., :numel].to(dtype)


@dataclass(frozen=True)
class Root:
    """The square roots of numbers, none of them negative, in another codec.

    Second moments range over many orders of magnitude within a group: their roots range over half as many.

    Attributes:
        codec: Of the roots.
    """

    codec: Codec

    def nbytes(self, numel: int) -> int:
        """As of `Codec`."""
        return self.codec.nbytes(numel)

    def encode(self, values: Tensor) -> Tensor:
        """As of `Codec`."""
        return self.codec.encode(values.float().sqrt())

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Codec`."""
        return self.codec.decode(data, numel).square().to(dtype)


def codec_of(bits: int) -> Codec:
    """Return the codec that keeps a number in so many bits: 32 (float32), 16 (bfloat16), or groups of 8, 4 or 2.

    Raises:
        KeyError: For another number.
    """
    codecs: dict[int, Codec] = {
        32: Cast(torch.float32), 16: Cast(torch.bfloat16), 8: Groups(8), 4: Groups(4), 2: Groups(2)
    }  # fmt: skip
    return codecs[bits]


def _as_type(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as numbers, in place where they lie on that type's boundaries."""
    places = (data.storage_offset(), *data.stride()[:-1])
    if any(place % dtype.itemsize for place in places) or data.stride(-1) != 1:
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)
