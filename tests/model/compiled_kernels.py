"""Compiles the products' kernels for GPUs that are not here, and prints the shared memory that each takes, as JSON.

A program of its own: where there is no GPU the tests have Triton's interpreter instead of its compiler.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fomoe_pl import codec_kernels
from fomoe_pl.codec import GROUP, Groups
from fomoe_pl.model.backends import triton_kernels as on_device
from fomoe_pl.model.backends.tuning import DESCRIPTORS_FROM, Tiles, tuned

D, F, R, K, ROWS = 1024, 512, 64, 8, 2048  # of the 1.3B preset, whose tiles are the largest
TYPES = {"order_P": "*i32", "offsets_R1": "*i32", "tiles_N4": "*i32", "gates_P": "*fp32", "dgate_parts": "*fp32"}
NUMBERS = ("D", "F", "C", "N", "n_picks", "n_resident", "stride_r", "stride_c", "stride_n")


def shared_bytes(
    kernel: Any, capability: int, tiles: Tiles, names: str = "BM BN BK",
    descriptors: dict[str, list[int]] | None = None, **constants: Any,
) -> int:  # fmt: skip
    """Of one program, with what a launch tells the compiler of its arguments: addresses and sizes divide by 16."""
    constants |= dict(zip(names.split(), tiles[:3], strict=True)) | {"PRECISION": "tf32"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in (descriptors or {}):
            signature[name] = f"tensordesc<bf16{descriptors[name]}>".replace(" ", "")  # type: ignore[index]
        else:
            signature[name] = "i32" if name in NUMBERS else TYPES.get(name, "*bf16")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind == "i32" or kind[0] == "*"
    }
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.registers:
        options["maxnreg"] = tiles.registers
    source = ASTSource(kernel, signature, constants, aligned)
    found: int = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
    return found


def coding(capability: int) -> int:
    """The most shared memory that codecs' kernels take, of all numbers of bits."""
    sizes = {"GROUP": GROUP, "PROGRAM": codec_kernels.PROGRAM}
    numbers = {"n_groups": "i32", "n_numbers": "i32"}
    reading = {"packed": "*u8", "w": "*bf16", **numbers, "stride": "i32"}
    writing = {"values": "*fp32", "coded": "*u8", **numbers, "step": "fp32"}
    most = 0
    for bits in (2, 4, 8):
        levels = {"HIGHEST": Groups(bits).highest, "SMALLEST": codec_kernels.SMALLEST_BITS}
        for kernel, signature, more in (
            (codec_kernels.encode_groups, writing, levels), (codec_kernels.decode_groups, reading, {}),
        ):  # fmt: skip
            constants = {**more, "BITS": bits, **sizes}
            source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
            most = max(most, triton.compile(source, target=GPUTarget("cuda", capability, 32)).metadata.shared)
    return most


def of_kernels(major: int, minor: int, shared: int) -> dict[str, int]:
    """Shared memory of each product's kernel on a GPU of this compute capability."""
    at, tuning = 10 * major + minor, tuned(2, D, F, ROWS, shared_bytes=shared, capability=(major, minor))
    found = {
        "up": shared_bytes(on_device.up, at, tuning.up, SWIGLU=True, WITH_PRE=True, K=K, RP=R),
        "down_backward": shared_bytes(
            on_device.down_backward, at, tuning.down_backward, SWIGLU=True, WITH_H=True, WITH_DPRE=True, K=K, RP=R
        ),
    }
    for name, tiles, transposed, channels, columns in (
        ("down", tuning.down, False, F, D),
        ("up_backward", tuning.up_backward, True, 2 * F, D),
    ):
        if (major, minor) < DESCRIPTORS_FROM:
            stride = {"stride_c": 1} if transposed else {"stride_n": 1}
            found[name] = shared_bytes(on_device.rows_times_weight, at, tiles, RP=R, **stride)
            continue
        weight = [tiles.columns, tiles.depth] if transposed else [tiles.depth, tiles.columns]
        blocks = {"a": [tiles.rows, tiles.depth], "w": weight}
        sizes = {"C": channels, "N": columns, "TRANSPOSED": transposed}
        found[name] = shared_bytes(on_device.rows_times_weight_by_descriptor, at, tiles, descriptors=blocks, **sizes)
    found["coding"] = coding(at)
    for name, a, b, gathered in (("of w_in", D, 2 * F, "a"), ("of w_out", F, D, "b")):
        sizes = {"A": a, "B": b, "K": K, "GATHER_A": gathered == "a", "GATHER_B": gathered == "b"}
        found[name] = shared_bytes(on_device.weight_gradient, at, tuning.weights, "BA BB BK", **sizes)
    return found


if __name__ == "__main__":
    print(json.dumps([of_kernels(*asked) for asked in json.loads(sys.argv[1])]))
