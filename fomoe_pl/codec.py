"""Numbers as bytes: casts, low-bit integers in groups that share a scale, and the largest numbers alone.

On GPUs that run Triton groups are coded in one pass (`codec_kernels.py`), else in torch's operations; the same bits.

A codec works on the last axis; each row of it becomes a fixed number of bytes, so an expert's matrix has its place
among others'. The same numbers give the same bits on every device. All that is used is exact or correctly rounded
there: no division by a constant, which some devices turn into a product with its inverse, and no numbers so small that
a device might take them for zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl import codec_kernels
from fomoe_pl.errors import ConfigError

GROUP = 64
"""Numbers that share a scale."""
SCALE_BYTES = 2
CHUNK = 4096
"""Numbers of which the largest are kept, where only these are."""
_GROUPS_CPU = 4096  # 1 MiB of float32
_CHUNKS_CPU = 64  # 512 KiB of float32
_ROWS = 16  # of a chunk, at most, in which its largest numbers are looked for column by column
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
        if values.numel() and codec_kernels.run_on(values.device):
            return codec_kernels.encode(values, self.bits, GROUP, self.highest)
        missing = -values.shape[-1] % GROUP
        flat = values.detach().float()
        flat = F.pad(flat, (0, missing)) if missing else flat
        x_GN = flat.unflatten(-1, (flat.shape[-1] // GROUP, GROUP))
        largest_G1 = torch.empty(*x_GN.shape[:-1], 1, dtype=torch.float32, device=values.device)
        for x, largest in _parts(x_GN, largest_G1):
            torch.amax(x.abs(), dim=-1, keepdim=True, out=largest)
        usable_G1 = (largest_G1 >= SMALLEST) & (largest_G1 < math.inf)  # neither holds of what is not a number
        scale_G1 = (largest_G1 * (1 / self.highest)).to(torch.bfloat16).float()
        told_G1 = torch.where(usable_G1, scale_G1, torch.where(largest_G1 < SMALLEST, 0.0, math.inf))
        over_G1 = torch.where(usable_G1, scale_G1, math.inf)
        careful = values.device.type != "cpu" or not usable_G1.all()
        n_levels = x_GN.shape[-2] * GROUP * self.bits // 8
        coded = torch.empty(*values.shape[:-1], n_levels + SCALE_BYTES * x_GN.shape[-2], dtype=torch.uint8,
                            device=values.device)  # fmt: skip
        coded[..., n_levels:] = told_G1.to(torch.bfloat16).view(torch.uint8).flatten(-2)
        levels = coded[..., :n_levels].unflatten(-1, (x_GN.shape[-2], GROUP * self.bits // 8))
        for x, over, level in _parts(x_GN, over_G1, levels):
            self._encode_levels(x, over, level, careful)
        return coded

    def _encode_levels(self, x_GN: Tensor, over_G1: Tensor, levels_GB: Tensor, careful: bool) -> None:
        levels_GN = x_GN / over_G1
        if careful:
            levels_GN.nan_to_num_(0.0)  # infinities over infinity
        if self.bits == 2:
            levels_GN.floor_().clamp_(-2, 1)
        else:
            levels_GN.round_().clamp_(-self.highest, self.highest)  # a scale may have been rounded down
        codes = levels_GN.to(torch.int8)
        # Neighbours are packed in a register, little-endian: as one number, they are shifted onto each other.
        if self.bits == 4:
            pair = codes.view(torch.int16)
            pair &= 0x0F0F
            pair |= pair >> 4
            codes = pair.view(torch.uint8)[..., ::2]
        elif self.bits == 2:
            four = codes.view(torch.int32)
            four &= 0x03030303
            four |= four >> 6
            four |= four >> 12
            codes = four.view(torch.uint8)[..., ::4]
        levels_GB.copy_(codes.view(torch.uint8))

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Codec`."""
        if data.numel() and codec_kernels.run_on(data.device):
            return codec_kernels.decode(data, numel, self.bits, GROUP, dtype)
        n_groups = math.ceil(numel / GROUP)
        split = n_groups * GROUP * self.bits // 8
        codes = data[..., :split].unflatten(-1, (n_groups, GROUP * self.bits // 8))
        scales = _as_type(data[..., split : self.nbytes(numel)], torch.bfloat16).unsqueeze(-1)
        values = torch.empty(*codes.shape[:-1], GROUP, dtype=torch.float32, device=data.device)
        for code, scale, value in _parts(codes, scales, values):
            self._decode_groups(code, scale, value)
        return values.flatten(-2)[..., :numel].to(dtype)

    def _decode_groups(self, codes_GB: Tensor, scales_G1: Tensor, values_GN: Tensor) -> None:
        codes = codes_GB
        if self.bits == 4:
            pair = codes.to(torch.int16)
            codes = ((pair | pair << 4) & 0x0F0F).view(torch.uint8)
        elif self.bits == 2:
            four = codes.to(torch.int32)
            four |= four << 12
            codes = ((four | four << 6) & 0x03030303).view(torch.uint8)
        levels = codes.view(torch.int8)
        if self.bits < 8:
            half = 1 << self.bits - 1
            levels = (levels ^ half) - half  # the sign's bit in all higher ones
        values_GN.copy_(levels)
        if self.bits == 2:
            values_GN += 0.5
        values_GN *= scales_G1.float()


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


@dataclass(frozen=True)
class TopK:
    """The largest numbers of each chunk of 4096, by magnitude; the others decode to zero (after arXiv 2508.15706).

    Of what is kept the place in its chunk takes 12 bits and the value 2: its sign, and which of two magnitudes it is
    nearer to, a quarter and three quarters of the way from the smallest to the largest that are kept; these two are
    in bfloat16. So most of the numbers' size is lost, and comes later with error feedback. Numbers below `SMALLEST`
    count as zeros. A chunk with a number that is not finite decodes to none that is.

    A row is for each chunk the places, two in three bytes, then the values, four in a byte, the first in the lowest
    bits, then both magnitudes. The last chunk is filled up with zeros. A chunk with fewer numbers that are not zero
    repeats its largest.

    Attributes:
        kept: Numbers of a chunk, a multiple of 4.
        is_sparse: A mean has more numbers that are not zero than what it is of, and is not coded once more.

    Raises:
        ConfigError: If `kept` is no multiple of 4 from 4 to 4096.
    """

    kept: int = 64
    is_sparse = True

    def __post_init__(self) -> None:
        """Validate."""
        if self.kept % 4 or not 4 <= self.kept <= CHUNK:
            rule = f"is how many of {CHUNK} numbers are kept, a multiple of 4"
            raise ConfigError("wire_codec.kept", self.kept, rule, "type 64, say")

    def nbytes(self, numel: int) -> int:
        """As of `Codec`."""
        return math.ceil(numel / CHUNK) * (self.kept * 14 // 8 + 2 * SCALE_BYTES)

    def encode(self, values: Tensor) -> Tensor:
        """As of `Codec`; of equally large numbers devices may keep others."""
        missing = -values.shape[-1] % CHUNK
        flat = values.detach().float()
        flat = F.pad(flat, (0, missing)) if missing else flat
        x_CN = flat.reshape(-1, CHUNK)
        part = _CHUNKS_CPU if values.device.type == "cpu" else max(1, len(x_CN))
        place_CK = torch.cat([self._largest(x.abs()) for x in x_CN.split(part)])
        return self._encode_kept(x_CN, place_CK).view(*values.shape[:-1], self.nbytes(flat.shape[-1]))

    def _largest(self, size_CN: Tensor) -> Tensor:
        """Places of the largest numbers of each chunk, in falling order.

        Written in rows, a chunk has them in as many columns, those with the largest maxima. To find these, and look on
        in them alone, takes less than to look at all numbers.
        """
        places: Tensor | None = None
        while (rows := min(_ROWS, size_CN.shape[-1] // (4 * self.kept))) > 1:
            rows = 1 << rows.bit_length() - 1
            columns = size_CN.shape[-1] // rows
            most = size_CN.unflatten(-1, (rows, columns)).amax(-2).topk(self.kept, dim=-1, sorted=False).indices
            starts = torch.arange(0, rows * columns, columns, device=size_CN.device)
            found = (most.unsqueeze(-2) + starts.unsqueeze(-1)).flatten(-2)
            size_CN = size_CN.gather(-1, found)
            places = found if places is None else places.gather(-1, found)
        found = size_CN.topk(self.kept, dim=-1).indices
        return found if places is None else places.gather(-1, found)

    def _encode_kept(self, x_CN: Tensor, place_CK: Tensor) -> Tensor:
        size_CK = x_CN.gather(-1, place_CK).abs()
        finite_C1 = size_CK[..., :1] < math.inf  # nor is it of what is not a number, which counts as the largest
        live_CK = (size_CK >= SMALLEST) & finite_C1
        place_CK = torch.where(live_CK, place_CK, torch.where(live_CK[..., :1], place_CK[..., :1], 0))
        kept_CK = x_CN.gather(-1, place_CK)
        size_CK = kept_CK.abs()
        largest_C1 = torch.where(live_CK[..., :1], size_CK[..., :1], 0.0)
        smallest_C1 = torch.where(live_CK, size_CK, math.inf).amin(-1, keepdim=True)
        ends = torch.cat([torch.where(live_CK[..., :1], smallest_C1, 0.0), largest_C1], -1)
        ends = ends.clamp(max=torch.finfo(torch.bfloat16).max)  # finite numbers stay finite
        ends = torch.where(finite_C1, ends, math.inf).to(torch.bfloat16)
        middle_C1 = (ends.float() * 0.5).sum(-1, keepdim=True)
        codes_CK = (kept_CK < 0).to(torch.int32) | (size_CK > middle_C1).to(torch.int32) << 1
        first, second = place_CK.to(torch.int32).unflatten(-1, (self.kept // 2, 2)).unbind(-1)
        places = torch.stack([first & 255, first >> 8 | (second & 15) << 4, second >> 4], -1).flatten(-2)
        four = codes_CK.unflatten(-1, (self.kept // 4, 4))
        packed = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
        return torch.cat([places.to(torch.uint8), packed.to(torch.uint8), ends.view(torch.uint8)], -1)

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Codec`."""
        n_chunks = math.ceil(numel / CHUNK)
        chunks = data[..., : self.nbytes(numel)].unflatten(-1, (n_chunks, self.nbytes(CHUNK)))
        places, packed, ends = chunks.split([self.kept * 3 // 2, self.kept // 4, 2 * SCALE_BYTES], -1)
        three = places.to(torch.int32).unflatten(-1, (self.kept // 2, 3))
        first, second = three[..., 0] | (three[..., 1] & 15) << 8, three[..., 1] >> 4 | three[..., 2] << 4
        place_CK = torch.stack([first, second], -1).flatten(-2)
        four = packed.to(torch.int32)
        codes_CK = torch.stack([four >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
        smallest_C1, largest_C1 = _as_type(ends, torch.bfloat16).float().split(1, -1)
        quarter_C1 = (largest_C1 - smallest_C1) * 0.25  # exact, so that fused products round like others
        size_CK = torch.where(codes_CK > 1, largest_C1 - quarter_C1, smallest_C1 + quarter_C1)
        value_CK = torch.where(codes_CK % 2 == 1, -size_CK, size_CK)
        values = torch.where(largest_C1 < math.inf, 0.0, math.nan).expand(*place_CK.shape[:-1], CHUNK)
        return values.scatter(-1, place_CK.long(), value_CK).flatten(-2)[..., :numel].to(dtype)


def codec_of(bits: int) -> Codec:
    """Return the codec that keeps a number in so many bits: 32 (float32), 16 (bfloat16), or groups of 8, 4 or 2.

    Raises:
        KeyError: For another number.
    """
    codecs: dict[int, Codec] = {
        32: Cast(torch.float32), 16: Cast(torch.bfloat16), 8: Groups(8), 4: Groups(4), 2: Groups(2)
    }  # fmt: skip
    return codecs[bits]


def _parts(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Cut tensors that have the same groups into parts, on a CPU so small that they stay in its cache."""
    if tensors[0].device.type != "cpu" or tensors[0].numel() <= 2 * GROUP * _GROUPS_CPU:
        yield tensors
        return
    for rows in zip(*(tensor.flatten(0, -3).unbind() if tensor.dim() > 2 else (tensor,) for tensor in tensors),
                    strict=True):  # fmt: skip
        yield from zip(*(row.split(_GROUPS_CPU) for row in rows), strict=True)


def _as_type(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as numbers, in place where they lie on that type's boundaries."""
    places = (data.storage_offset(), *data.stride()[:-1])
    if any(place % dtype.itemsize for place in places) or data.stride(-1) != 1:
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)
