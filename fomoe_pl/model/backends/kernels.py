"""Triton backend: tokens gathered, activated, weighted and summed inside or next to grouped products of our own.

Six kernels forward and five backward (by descriptor one more in each, with checkpointing one more backward), all of
static shape: nothing waits for the number of live picks, and so a layer can be compiled. Kept for the backward pass are
the tokens, what is inside the activation (P,I), the places of the picks, and the weights in the type of the products;
the activations are recomputed. With checkpointing only tokens and places are kept: one of the forward pass's two
products is recomputed, the other is not.

Copies of absent experts (`frozen.py`) are a second set of weights, unpacked before each product that needs them. Picks
are sorted by slot, so the rows of residents come first and those of copies behind them: each product is launched once
for either set, on its part of the offsets, and writes its part of the same rows. The weights' gradients are of the
first set alone.

With float32 weights and bfloat16 products (mixed precision) the weights' gradients leave the products' accumulators as
float32, neither rounded nor converted in another pass; or as bfloat16, where there are copies (`copies.py`).

Shapes: T tokens, D model, R resident experts, A copies of absent ones, N = R + A, K picks of a token, P = T·K picks, I
input width of an expert (F, or 2F with swiglu), F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from fomoe_pl.model.backends import Backend
from fomoe_pl.model.backends.frozen import Frozen, unpack
from fomoe_pl.model.backends.tuning import DESCRIPTORS_FROM, Tiles, Tuning, tuned, up_to_power
from fomoe_pl.model.config import ExpertKind, ModelConfig

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fomoe_pl.model.backends import triton_kernels as on_device

    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests
except ImportError:
    triton = None
    INTERPRETED = False

BLOCK = 512  # picks that one program counts and places
HELD = 8192  # numbers of a table of picks by experts that it holds at a time; of blocks by experts half as many


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


@lru_cache
def _programs(device: torch.device) -> int:
    """Programs of a kernel that goes through many tiles: one a multiprocessor."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _limits(device: torch.device) -> dict[str, Any]:
    """What tiles have to fit."""
    of_device = None if INTERPRETED else cast(Any, torch.cuda.get_device_properties(device))
    shared_bytes = of_device.shared_memory_per_block_optin if of_device else 227 * 1024
    return {"shared_bytes": shared_bytes, "capability": _capability(device)}


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not work here, or None if they do.

    Args:
        device: Where the tokens are.
        dtype: In which type the products run.
    """
    if triton is None:
        return "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there are no kernels for {dtype}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"triton does not run on {device.type}"
    if torch.version.hip is not None:
        return "they were written for NVIDIA's GPUs"
    if _capability(device) < (8, 0):
        return "they need compute capability 8.0 or above"
    return None


@torch.compiler.assume_constant_result
def taken(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels that no setting asks for run here: on GPUs that have them; the interpreter is for tests.

    Args:
        device: Where the tokens are.
        dtype: In which type the products run.
    """
    return device.type == "cuda" and unsupported(device, dtype) is None


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied; numbers of two bytes are not asked."""
    return "tf32" if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest" else "ieee"


class Copies(NamedTuple):
    """A layer's weights in the type of the products, which get the gradients; see `copies.py`.

    Attributes:
        w_in: (R,D,I).
        w_out: (R,F,D).
        has_values: Otherwise products take the weights themselves.
    """

    w_in: Tensor
    w_out: Tensor
    has_values: bool


class _Set(NamedTuple):
    """A set of experts with stacked weights and consecutive rows.

    Attributes:
        offsets: Where the rows of each begin, and where the last's end.
        n_experts: How many.
        w_in: Gives (·,D,I) in the type of the products.
        w_out: Gives (·,F,D) in the type of the products.
        learns: Whether the weights get gradients.
        input_gradient: Whether tokens get gradients through them.
    """

    offsets: Tensor
    n_experts: int
    w_in: Callable[[], Tensor]
    w_out: Callable[[], Tensor]
    learns: bool
    input_gradient: bool


def _sets(
    dtype: torch.dtype, offsets_N1: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, packed_in: Tensor | None,
    packed_out: Tensor | None, bits: int, input_gradient: bool,
) -> list[_Set]:  # fmt: skip
    """Return the residents and the copies, without empty sets."""
    n_resident = len(w_in_RDI)

    def residents(w: Tensor) -> Callable[[], Tensor]:
        return lambda: w.to(dtype)

    def copies(packed: Tensor, like: Tensor) -> Callable[[], Tensor]:
        return lambda: unpack(packed, like.shape[1:], bits, dtype, in_kernel=True)

    found = [_Set(offsets_N1[: n_resident + 1], n_resident, residents(w_in_RDI), residents(w_out_RFD), True, True)]
    if packed_in is not None and packed_out is not None:
        weights = copies(packed_in, w_in_RDI), copies(packed_out, w_out_RFD)
        found.append(_Set(offsets_N1[n_resident:], len(packed_in), *weights, False, input_gradient))
    return [of for of in found if of.n_experts]


class _Launch(NamedTuple):
    """Arguments that all launches of one call share."""

    n_tokens: int
    d_model: int
    d_expert: int
    top_k: int
    swiglu: bool
    tuning: Tuning
    precision: str

    @classmethod
    def of(cls, x_TD: Tensor, picks_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, packed: Tensor | None) -> _Launch:
        d_expert, d_model = w_out_RFD.shape[1:]
        rows_per_expert = max(1, picks_TK.numel() // _n_experts(w_in_RDI, packed))
        tuning = tuned(x_TD.element_size(), d_model, d_expert, rows_per_expert, **_limits(x_TD.device))
        swiglu = w_in_RDI.shape[2] == 2 * d_expert
        return cls(len(x_TD), d_model, d_expert, picks_TK.shape[1], swiglu, tuning, _precision(x_TD.dtype))

    @property
    def n_picks(self) -> int:
        return self.n_tokens * self.top_k

    def grid(self, of: _Set, tiles: Tiles, columns: int) -> tuple[int]:
        """Programs for all tiles that there could be."""
        return ((triton.cdiv(self.n_picks, tiles.rows) + of.n_experts) * triton.cdiv(columns, tiles.columns),)

    def constants(self, of: _Set) -> dict[str, Any]:
        """Compile-time arguments besides sizes and tiles."""
        return {"PRECISION": self.precision, "RP": up_to_power(of.n_experts, 2)}


def _n_experts(w_in_RDI: Tensor, packed: Tensor | None) -> int:
    return len(w_in_RDI) + (0 if packed is None else len(packed))


def _shape(tiles: Tiles, names: str = "BM BN BK") -> dict[str, int | None]:
    how = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
    return {**dict(zip(names.split(), tiles[:3], strict=True)), **how}


def index_picks(slots_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the live picks by expert, and by token within an expert.

    Args:
        slots_TK: Row of each pick in the stacked weights, int64 (T,K); N is a ghost.
        n_experts: N, at least 1.

    Returns:
        int32: `order` (P,), the pick of each row, of which the first L are written; `place` (P,), the row of each
        pick, -1 for a ghost's; `offsets` (N+1,), where each expert's rows begin.
    """
    n_picks, slots_P = slots_TK.numel(), slots_TK.reshape(-1)
    n_blocks, padded = triton.cdiv(n_picks, BLOCK), up_to_power(n_experts, 2)
    step = min(BLOCK, max(16, HELD // padded))
    counts_BR = torch.empty(n_blocks, padded, dtype=torch.int32, device=slots_TK.device)
    offsets_N1 = torch.empty(n_experts + 1, dtype=torch.int32, device=slots_TK.device)
    order_P = torch.empty(n_picks, dtype=torch.int32, device=slots_TK.device)
    place_P = torch.empty_like(order_P)
    sizes = {"BLOCK": BLOCK, "STEP": step, "RP": padded}
    on_device.count_picks[(n_blocks,)](slots_P, counts_BR, n_picks, **sizes)
    scan_step = min(up_to_power(n_blocks, 2), max(2, HELD // 2 // padded))
    on_device.scan_counts[(1,)](counts_BR, offsets_N1, n_blocks, n_experts, STEP=scan_step, RP=padded)
    on_device.place_picks[(n_blocks,)](slots_P, counts_BR, order_P, place_P, n_picks, n_experts, **sizes)
    return order_P, place_P, offsets_N1


def _sum_picks(y_LD: Tensor, place_P: Tensor, like_TD: Tensor, top_k: int) -> Tensor:
    y_TD = torch.empty_like(like_TD)
    d_model = like_TD.shape[1]
    block = min(up_to_power(d_model), 1024)
    grid = (len(like_TD), triton.cdiv(d_model, block))
    on_device.sum_picks[grid](y_LD, place_P, y_TD, d_model, K=top_k, BLOCK=block, num_warps=max(1, block // 256))
    return y_TD


@torch.library.custom_op("fomoe::skip_experts", mutates_args=())
def skip_experts(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, w_in: Tensor, w_out: Tensor,
    packed_in: Tensor | None, packed_out: Tensor | None, bits: int, input_gradient: bool, checkpointing: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the experts; returns y (T,D), and for the backward pass pre (P,I), order, place and offsets (N+1,).

    `w_in` and `w_out` have the gradients, `w_in_RDI` and `w_out_RFD` are what is multiplied: the same weights
    in the type of the products, or with `checkpointing`, which leaves `pre` empty, in any. The others are those of
    `Frozen`.
    """
    launch = _Launch.of(x_TD, slots_TK, w_in_RDI, w_out_RFD, packed_in)
    order_P, place_P, offsets_N1 = index_picks(slots_TK, _n_experts(w_in_RDI, packed_in))
    sets = _sets(x_TD.dtype, offsets_N1, w_in_RDI, w_out_RFD, packed_in, packed_out, bits, input_gradient)
    pre_LI, h_LF = _up(launch, sets, x_TD, gates_TK, order_P, with_pre=not checkpointing)
    y_LD = torch.empty(launch.n_picks, launch.d_model, dtype=x_TD.dtype, device=x_TD.device)
    for of in sets:
        _product(launch, launch.tuning.down, h_LF, of, of.w_out(), y_LD)
    return _sum_picks(y_LD, place_P, x_TD, launch.top_k), pre_LI, order_P, place_P, offsets_N1


def _up(
    launch: _Launch, sets: list[_Set], x_TD: Tensor, gates_TK: Tensor, order_P: Tensor, *, with_pre: bool
) -> tuple[Tensor, Tensor]:
    """Return what is inside the activation (P,I), or nothing (0,I), and gate · activation (P,F)."""
    width = launch.d_expert * (2 if launch.swiglu else 1)
    pre_LI = x_TD.new_empty(launch.n_picks if with_pre else 0, width)
    h_LF, tiles = x_TD.new_empty(launch.n_picks, launch.d_expert), launch.tuning.up
    for of in sets:
        on_device.up[launch.grid(of, tiles, launch.d_expert)](
            x_TD, order_P, of.offsets, of.w_in(), gates_TK, pre_LI, h_LF,
            launch.d_model, launch.d_expert, of.n_experts,
            K=launch.top_k, SWIGLU=launch.swiglu, WITH_PRE=with_pre, **launch.constants(of), **_shape(tiles),
        )  # fmt: skip
    return pre_LI, h_LF


def _product(
    launch: _Launch, tiles: Tiles, a_LC: Tensor, of: _Set, w_in_memory: Tensor, y_LN: Tensor, *,
    transposed: bool = False,
) -> None:  # fmt: skip
    """Write rows times their experts' weights (·,C,N), or with `transposed` (·,N,C)."""
    w_RCN = w_in_memory.transpose(1, 2) if transposed else w_in_memory
    n_channels, n_columns = w_RCN.shape[1:]
    if _by_descriptor(a_LC, tiles, n_channels, n_columns):
        n_tiles = triton.cdiv(launch.n_picks, tiles.rows) + of.n_experts
        tiles_N4 = torch.empty(triton.cdiv(n_tiles, 128) * 128, 4, dtype=torch.int32, device=a_LC.device)
        on_device.list_tiles[(len(tiles_N4) // 128,)](
            of.offsets, tiles_N4, of.n_experts, BM=tiles.rows, BLOCK=128, RP=launch.constants(of)["RP"]
        )
        block = [tiles.columns, tiles.depth] if transposed else [tiles.depth, tiles.columns]
        n_programs = min(n_tiles * (n_columns // tiles.columns), _programs(a_LC.device))
        on_device.rows_times_weight_by_descriptor[(n_programs,)](
            _described(a_LC, [tiles.rows, tiles.depth]), _described(w_in_memory.flatten(0, 1), block), tiles_N4, y_LN,
            C=n_channels, N=n_columns, TRANSPOSED=transposed, PRECISION=launch.precision, **_shape(tiles),
        )  # fmt: skip
        return
    on_device.rows_times_weight[launch.grid(of, tiles, n_columns)](
        a_LC, of.offsets, w_RCN, y_LN, n_channels, n_columns, *w_RCN.stride(), of.n_experts,
        **launch.constants(of), **_shape(tiles),
    )  # fmt: skip


@skip_experts.register_fake
def _(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, w_in: Tensor, w_out: Tensor,
    packed_in: Tensor | None, packed_out: Tensor | None, bits: int, input_gradient: bool, checkpointing: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_picks, index = slots_TK.numel(), slots_TK.new_empty
    order_P, place_P = index(n_picks, dtype=torch.int32), index(n_picks, dtype=torch.int32)
    offsets_N1 = index(_n_experts(w_in, packed_in) + 1, dtype=torch.int32)
    pre_LI = x_TD.new_empty(0 if checkpointing else n_picks, w_in_RDI.shape[2])
    return torch.empty_like(x_TD), pre_LI, order_P, place_P, offsets_N1


@torch.library.custom_op("fomoe::skip_experts_backward", mutates_args=())
def skip_experts_backward(
    dy_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, packed_in: Tensor | None,
    packed_out: Tensor | None, pre_LI: Tensor, order_P: Tensor, place_P: Tensor, offsets_N1: Tensor, bits: int,
    input_gradient: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of tokens, gates and both weights, those of the weights in `dtype`."""
    launch = _Launch.of(x_TD, gates_TK, w_in_RDI, w_out_RFD, packed_in)
    n_picks, d_model, d_expert = launch.n_picks, launch.d_model, launch.d_expert
    tiles = launch.tuning.down_backward
    w_in_RDI, w_out_RFD = w_in_RDI.to(x_TD.dtype), w_out_RFD.to(x_TD.dtype)
    sets = _sets(x_TD.dtype, offsets_N1, w_in_RDI, w_out_RFD, packed_in, packed_out, bits, input_gradient)
    if len(pre_LI) < n_picks:
        pre_LI, h_LF = _up(launch, sets, x_TD, gates_TK, order_P, with_pre=True)
    else:
        h_LF = x_TD.new_empty(n_picks, d_expert)
    dpre_LI = torch.empty_like(pre_LI)
    parts = gates_TK.new_empty(triton.cdiv(d_expert, tiles.columns), n_picks)
    for of in sets:
        on_device.down_backward[launch.grid(of, tiles, d_expert)](
            dy_TD, order_P, of.offsets, of.w_out(), gates_TK, pre_LI, dpre_LI, h_LF, parts, d_model, d_expert, n_picks,
            of.n_experts, K=launch.top_k, SWIGLU=launch.swiglu, WITH_H=of.learns, WITH_DPRE=of.input_gradient,
            **launch.constants(of), **_shape(tiles),
        )  # fmt: skip
    dw_out_RFD = _weight_gradient(launch, h_LF, dy_TD, "b", order_P, offsets_N1, w_out_RFD, dtype)
    del h_LF  # its memory serves the tokens' gradients
    dw_in_RDI = _weight_gradient(launch, x_TD, dpre_LI, "a", order_P, offsets_N1, w_in_RDI, dtype)
    dx_LD = torch.empty(n_picks, d_model, dtype=x_TD.dtype, device=x_TD.device)
    for of in sets:
        if of.input_gradient:
            _product(launch, launch.tuning.up_backward, dpre_LI, of, of.w_in(), dx_LD, transposed=True)
    # A ghost's column of the parts holds whatever the memory held.
    dgates_TK = parts.sum(dim=0).where(place_P >= 0, 0).view_as(gates_TK)
    if packed_in is not None and not input_gradient:
        place_P = place_P.where(place_P < offsets_N1[len(w_in_RDI)], -1)
    return _sum_picks(dx_LD, place_P, x_TD, launch.top_k), dgates_TK, dw_in_RDI, dw_out_RFD


def _by_descriptor(a_LC: Tensor, tiles: Tiles, n_channels: int, n_columns: int) -> bool:
    if a_LC.element_size() != 2 or n_channels % tiles.depth or n_columns % tiles.columns:
        return False
    return _capability(a_LC.device) >= DESCRIPTORS_FROM


def _described(matrix: Tensor, block: list[int]) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _weight_gradient(
    launch: _Launch, a: Tensor, b: Tensor, of_tokens: Literal["a", "b"], order_P: Tensor, offsets_N1: Tensor,
    like: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Σ aᵀb of each resident, one of the two with a row for each token, the other with one for each pick."""
    dw_RAB = torch.empty(like.shape, dtype=dtype, device=like.device)
    tiles, (n_resident, n_a, n_b) = launch.tuning.weights, like.shape
    grid = (n_resident * triton.cdiv(n_a, tiles.rows) * triton.cdiv(n_b, tiles.columns),)
    if n_resident:
        on_device.weight_gradient[grid](
            a, b, order_P, offsets_N1, dw_RAB, n_a, n_b,
            K=launch.top_k, GATHER_A=of_tokens == "a", GATHER_B=of_tokens == "b", PRECISION=launch.precision,
            **_shape(tiles, "BA BB BK"),
        )  # fmt: skip
    return dw_RAB


@skip_experts_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, packed_in: Tensor | None,
    packed_out: Tensor | None, pre_LI: Tensor, order_P: Tensor, place_P: Tensor, offsets_N1: Tensor, bits: int,
    input_gradient: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (torch.empty_like(w_in_RDI, dtype=dtype), torch.empty_like(w_out_RFD, dtype=dtype))
    return torch.empty_like(x_TD), torch.empty_like(gates_TK), *weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gates_TK, _, w_in_RDI, w_out_RFD, w_in, _, packed_in, packed_out, bits, input_gradient, _ = inputs
    ctx.save_for_backward(x_TD, gates_TK, w_in_RDI, w_out_RFD, packed_in, packed_out, *output[1:])
    ctx.constants = bits, input_gradient, w_in.dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dx_TD, dgates_TK, dw_in, dw_out = skip_experts_backward(grads[0].contiguous(), *ctx.saved_tensors, *ctx.constants)
    return dx_TD, dgates_TK, None, None, None, dw_in, dw_out, *[None] * 5


skip_experts.register_autograd(_backward, setup_context=_save)


def dispatch(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind,
    frozen: Frozen | None = None, copies: Copies | None = None, checkpointing: bool = False,
) -> Tensor:  # fmt: skip
    """Run all resident experts and frozen copies; arguments and result as in `loop.dispatch`.

    `copies` of the residents, if there are any, get the gradients in the weights' place, and those with values are
    multiplied in it; with checkpointing less is kept for the backward pass, and weights are cast inside the operation,
    in both passes.
    """
    packed_in, packed_out, bits, input_gradient = (None, None, 0, True) if frozen is None else frozen[:4]
    if not _n_experts(w_in_RDI, packed_in):
        return x_TD * 0
    learning = (w_in_RDI, w_out_RFD) if copies is None else copies[:2]
    values = learning if copies is None or copies.has_values else (w_in_RDI, w_out_RFD)
    given = [w.detach() if checkpointing else w.detach().to(x_TD.dtype) for w in values]
    picks = (gates_TK.contiguous(), slots_TK.contiguous())
    weights = (*given, *learning, packed_in, packed_out, bits, input_gradient)
    y_TD: Tensor = skip_experts(x_TD.contiguous(), *picks, *weights, checkpointing)[0]
    return y_TD


class Triton(Backend):
    """`dispatch` as a backend."""

    waits_for_device = False
    compiles_on = frozenset({"cuda", "cpu"})
    computes_copies = True
    fused = True
    dispatch = staticmethod(dispatch)

    def unsupported(self, device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
        """As the function of this name; sizes do not matter."""
        return unsupported(device, dtype)

    def kept_bytes(self, config: ModelConfig, itemsize: int, picks: int) -> int:
        """Of each pick what is inside the activation."""
        return picks * itemsize * config.expert_in_width
