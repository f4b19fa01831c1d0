"""Codecs against a plain reference that goes number by number, and the bits that they write."""

import math
import struct
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl import codec_kernels
from fomoe_pl.codec import CHUNK, GROUP, SMALLEST, Cast, Codec, GroupBits, Groups, TopK, codec_of
from fomoe_pl.errors import ConfigError

GROUPED = [2, 4, 8]


def bfloat16_bits(value: float) -> int:
    """Of a float32, to the nearest, and to even of two as near ones."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def single(value: float) -> float:
    """A number rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]  # type: ignore[no-any-return]


def one_by_one(values: list[float], bits: int) -> tuple[bytes, list[float]]:
    """A row's bytes, and the numbers they stand for."""
    levels, scales, numbers = [], b"", []
    highest = 1.5 if bits == 2 else 2 ** (bits - 1) - 1
    for start in range(0, len(values), GROUP):
        group = values[start : start + GROUP]
        largest = max(abs(v) for v in group)
        scale_bits = bfloat16_bits(single(largest * single(1 / highest))) if largest >= SMALLEST else 0
        scale = struct.unpack("<f", struct.pack("<I", scale_bits << 16))[0]
        scales += struct.pack("<H", scale_bits)
        for v in [*group, *[0.0] * (GROUP - len(group))]:
            ratio = single(v / scale) if scale else 0.0
            level = max(-2, min(1, math.floor(ratio))) if bits == 2 else max(-highest, min(highest, round(ratio)))
            levels.append(level % 2**bits)
            numbers.append((level + 0.5 if bits == 2 else level) * scale)
    packed = bytearray()
    for start in range(0, len(levels), 8 // bits):
        packed.append(sum(level << i * bits for i, level in enumerate(levels[start : start + 8 // bits])))
    return bytes(packed) + scales, numbers[: len(values)]


def rows() -> Iterator[Tensor]:
    """Groups that are whole, cut and more than one; zeros, one number, ties, tiny and huge ones."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 63, 64, 65, 640, 1000):
        yield torch.randn(n, generator=generator) * 0.02
    yield torch.zeros(100)
    yield torch.full((70,), -3.7)
    yield torch.arange(-64, 64) / 2
    yield torch.tensor([2.0**-101, -(2.0**-110)])
    yield torch.tensor([2.0**-99, 2.0**-101, 0.0])
    yield torch.tensor([3e38, -3.3e38, 1.0])
    yield torch.tensor([1.0, -1e-40, 1e-40, -1e-45])


@pytest.mark.parametrize("bits", GROUPED)
def test_groups_are_the_reference_in_bytes_and_numbers(bits: int) -> None:
    codec = codec_of(bits)
    for row in rows():
        expected, numbers = one_by_one(row.tolist(), bits)
        found = codec.encode(row)
        assert found.dtype == torch.uint8
        assert len(found) == codec.nbytes(len(row)) == math.ceil(len(row) / GROUP) * (8 * bits + 2)
        assert bytes(found.tolist()) == expected
        assert codec.decode(found, len(row)).tolist() == [single(number) for number in numbers]


@pytest.mark.parametrize("bits", GROUPED)
def test_groups_are_no_farther_than_half_a_level(bits: int) -> None:
    values = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    error = (codec_of(bits).decode(codec_of(bits).encode(values), 256) - values).abs()
    largest = values.unflatten(1, (-1, GROUP)).abs().amax(-1)
    half = largest / (1.5 if bits == 2 else 2 ** (bits - 1) - 1) / 2
    # The scale is rounded by up to 1/256, which the highest level has to the full.
    assert (error.unflatten(1, (-1, GROUP)).amax(-1) <= half + largest / 256 * 1.01).all()


@pytest.mark.parametrize("bits", GROUPED)
def test_what_is_not_finite_spoils_its_group_alone(bits: int) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.ones(3 * GROUP)
        values[GROUP + 5] = bad
        found = codec_of(bits).decode(codec_of(bits).encode(values), 3 * GROUP).view(3, GROUP)
        assert not found[1].isfinite().any()
        torch.testing.assert_close(found[::2], torch.ones(2, GROUP), rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_rows_are_encoded_alone(bits: int) -> None:
    codec = codec_of(bits)
    values = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(2))
    found = codec.encode(values)
    assert found.shape == (3, 2, codec.nbytes(100))
    for i in range(3):
        for j in range(2):
            assert torch.equal(found[i, j], codec.encode(values[i, j]))
            assert torch.equal(codec.decode(found, 100)[i, j], codec.decode(found[i, j], 100))


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_bytes_may_lie_anywhere(bits: int) -> None:
    codec = codec_of(bits)
    data = codec.encode(torch.randn(2, 70, generator=torch.Generator().manual_seed(3)))
    buffer = torch.zeros(2, data.shape[1] + 5, dtype=torch.uint8)
    for start in range(4):
        buffer[:, start : start + data.shape[1]] = data
        assert torch.equal(codec.decode(buffer[:, start : start + data.shape[1]], 70), codec.decode(data, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_are_torchs(dtype: torch.dtype) -> None:
    values, codec = torch.tensor([[1.0, -0.0, math.inf], [1e-40, 65519.0, 1.00390625]]), Cast(dtype)
    data = codec.encode(values)
    assert data.shape == (2, codec.nbytes(3)) == (2, 3 * dtype.itemsize)
    assert torch.equal(codec.decode(data, 3), values.to(dtype).float())
    assert codec.decode(data, 3, dtype).data_ptr() == data.data_ptr()


@pytest.mark.parametrize("bits", GROUPED)
def test_results_are_rounded_once(bits: int) -> None:
    values = torch.randn(2, 200, generator=torch.Generator().manual_seed(4))
    codec = codec_of(bits)
    data = codec.encode(values)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(codec.decode(data, 200, dtype), codec.decode(data, 200).to(dtype))
        assert torch.equal(codec.encode(values.to(dtype)), codec.encode(values.to(dtype).float()))


def test_two_bits_keep_the_largest_number() -> None:
    row = torch.tensor([1.5, -1.5, 0.1, -0.1, 1.0, -1.0, 0.9])
    assert Groups(2).decode(Groups(2).encode(row), 7).tolist() == [1.5, -1.5, 0.5, -0.5, 1.5, -0.5, 0.5]


@pytest.mark.skipif(
    codec_kernels.triton is None or torch.cuda.is_available(), reason="needs triton, which interprets kernels on a CPU"
)
@pytest.mark.parametrize("bits", GROUPED)
def test_kernels_write_and_read_the_same_bits(bits: GroupBits) -> None:
    codec, generator = Groups(bits), torch.Generator().manual_seed(5)
    wide = torch.randn(3, 2, 4200, generator=generator) * torch.randn(3, 2, 4200, generator=generator).mul(15).exp()
    spoiled = torch.ones(3 * GROUP)
    spoiled[[5, GROUP + 5]] = torch.tensor([math.nan, -math.inf])
    for values in (*rows(), wide, spoiled, wide[0, :, :100].half(), wide[0, :, :100].t()):
        data, n = codec.encode(values), values.shape[-1]
        assert torch.equal(codec_kernels.encode(values, bits, GROUP, codec.highest), data)
        buffer = F.pad(data, (1, 2))[..., 1:]  # rows need not be next to each other, or begin anywhere
        found = codec_kernels.decode(buffer, n, bits, GROUP, torch.float32)
        torch.testing.assert_close(found, codec.decode(data, n), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_a_gpu_writes_and_reads_the_same_bits(bits: int) -> None:
    codec: Codec = codec_of(bits)
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(64, 4096, generator=generator) * torch.randn(64, 4096, generator=generator).mul(15).exp()
    for values in (*rows(), wide, torch.randn(256, 4096, generator=generator)):
        data = codec.encode(values)
        assert torch.equal(codec.encode(values.cuda()).cpu(), data)
        n = values.shape[-1]
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(codec.decode(data.cuda(), n, dtype).cpu(), codec.decode(data, n, dtype))


def largest_one_by_one(values: list[float], kept: int) -> tuple[bytes, list[float]]:
    """A row of the largest numbers of each chunk, and the numbers that it stands for."""
    data, numbers = b"", []
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        if not all(map(math.isfinite, chunk)):
            numbers += [math.nan] * len(chunk)
            data += b"?" * (kept * 14 // 8 + 4)
            continue
        order = sorted(range(len(chunk)), key=lambda i: -abs(chunk[i]))[:kept]
        live = [i for i in order if abs(chunk[i]) >= SMALLEST]
        places = live + (live[:1] or [0]) * (kept - len(live))
        bits = [bfloat16_bits(abs(chunk[live[end]])) if live else 0 for end in (-1, 0)]
        smallest, largest = (struct.unpack("<f", struct.pack("<I", end << 16))[0] for end in bits)
        decoded, codes = [0.0] * len(chunk), []
        for place in places:
            value = chunk[place]
            high = abs(value) > smallest * 0.5 + largest * 0.5
            codes.append((value < 0) + 2 * high)
            quarter = (largest - smallest) * 0.25
            size = single(largest - quarter if high else smallest + quarter)
            decoded[place] = -size if value < 0 else size
        triples = [(a | b << 12).to_bytes(3, "little") for a, b in zip(places[::2], places[1::2], strict=True)]
        fours = [sum(code << 2 * i for i, code in enumerate(codes[j : j + 4])) for j in range(0, kept, 4)]
        data += b"".join(triples) + bytes(fours) + struct.pack("<HH", *bits)
        numbers += decoded
    return data, numbers


@pytest.mark.parametrize("kept", [4, 64])
def test_the_largest_numbers_are_the_reference_in_bytes_and_numbers(kept: int) -> None:
    codec, generator = TopK(kept), torch.Generator().manual_seed(3)
    spread = torch.randn(CHUNK, generator=generator).pow(3)
    infinite = torch.randn(2 * CHUNK, generator=generator)
    infinite[5] = math.inf
    missing = torch.randn(100, generator=generator)
    missing[7] = math.nan
    rows = [
        *(torch.randn(n, generator=generator) * 1e-3 for n in (kept, 100, CHUNK, CHUNK + 1, 9000)), spread,
        torch.zeros(CHUNK + 3), torch.tensor([-2.5]), torch.tensor([0.0, 3.0, 0.0, -1.0, 2.0**-101]),
        infinite, missing, torch.tensor([3.4e38, -3.39e38, 1.0]),
    ]  # fmt: skip
    for row in rows:
        found = codec.encode(row)
        assert found.dtype == torch.uint8
        assert len(found) == codec.nbytes(len(row)) == math.ceil(len(row) / CHUNK) * (kept * 14 // 8 + 4)
        decoded = codec.decode(found, len(row))
        if row.isfinite().all() and row.abs().max() < 3.3e38:
            expected, numbers = largest_one_by_one(row.tolist(), kept)
            assert bytes(found.tolist()) == expected
            assert decoded.tolist() == numbers
        elif row.isfinite().all():
            assert decoded.isfinite().all()
        else:
            whole = row[: CHUNK if len(row) > CHUNK else None]
            assert decoded[: len(whole)].isnan().all()
            assert decoded[len(whole) :].isfinite().all()
    both = torch.stack([rows[4], -rows[4]])
    assert torch.equal(codec.decode(codec.encode(both), 9000)[0], -codec.decode(codec.encode(both), 9000)[1])


@pytest.mark.parametrize("kept", [0, 6, 4100])
def test_so_many_cannot_be_kept(kept: int) -> None:
    with pytest.raises(ConfigError, match="a multiple of 4"):
        TopK(kept)
