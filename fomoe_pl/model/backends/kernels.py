"""Triton backend: tokens gathered, activated, weighted and summed inside or beside grouped products of our own.

Six kernels forward and five backward (by descriptor one more in each, with checkpointing one more backward), all of
static shape: nothing waits for the number of live picks, and so a layer can be compiled. Kept for the backward pass are
the tokens, what is inside the activation (P,I), the places of the picks, and the weights in the type of the products;
the activations are made again. With checkpointing the tokens and places alone are kept: one of the forward pass's two
products is made again, and the other not.

With float32 weights and bfloat16 products (mixed precision) the weights' gradients leave the products' accumulators as
float32, neither rounded nor converted in another pass; or as bfloat16, where there are copies (`copies.py`).

Shapes: T tokens, D model, R resident experts, K picks of a token, P = T·K picks, I input width of an expert (F, or 2F
with swiglu), F expert width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from fomoe_pl.model.backends.tuning import DESCRIPTORS_FROM, Tiles, Tuning, tuned, up_to_power
from fomoe_pl.model.config import ExpertKind

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
    """A layer's weights in the type of the products, which get the gradients; see ``copies.py``.

    Attributes:
        w_in: (R,D,I).
        w_out: (R,F,D).
        has_values: Otherwise products take the weights themselves.
    """

    w_in: Tensor
    w_out: Tensor
    has_values: bool


class _Launch(NamedTuple):
    """What all launches of one call share."""

    n_tokens: int
    d_model: int
    d_expert: int
    n_resident: int
    top_k: int
    swiglu: bool
    tuning: Tuning
    constants: dict[str, Any]

    @classmethod
    def of(cls, x_TD: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor) -> _Launch:
        n_resident, d_expert, d_model = w_out_RFD.shape
        rows_per_expert = max(1, slots_TK.numel() // n_resident)
        tuning = tuned(x_TD.element_size(), d_model, d_expert, rows_per_expert, **_limits(x_TD.device))
        constants = {"PRECISION": _precision(x_TD.dtype), "RP": up_to_power(n_resident, 2)}
        swiglu = w_in_RDI.shape[2] == 2 * d_expert
        return cls(len(x_TD), d_model, d_expert, n_resident, slots_TK.shape[1], swiglu, tuning, constants)

    @property
    def n_picks(self) -> int:
        return self.n_tokens * self.top_k

    def grid(self, tiles: Tiles, columns: int) -> tuple[int]:
        """Programs for all tiles that there could be."""
        return ((triton.cdiv(self.n_picks, tiles.rows) + self.n_resident) * triton.cdiv(columns, tiles.columns),)


def _shape(tiles: Tiles, names: str = "BM BN BK") -> dict[str, int | None]:
    how = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
    return {**dict(zip(names.split(), tiles[:3], strict=True)), **how}


def index_picks(slots_TK: Tensor, n_resident: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the live picks by expert, and by token within an expert.

    Args:
        slots_TK: Row of each pick in the stacked weights, int64 (T,K); R is a ghost.
        n_resident: R, at least 1.

    Returns:
        int32: ``order`` (P,), the pick of each row, of which the first L are written; ``place`` (P,), the row of each
        pick, -1 for a ghost's; ``offsets`` (R+1,), where each expert's rows begin.
    """
    n_picks, slots_P = slots_TK.numel(), slots_TK.reshape(-1)
    n_blocks, padded = triton.cdiv(n_picks, BLOCK), up_to_power(n_resident, 2)
    step = min(BLOCK, max(16, HELD // padded))
    counts_BR = torch.empty(n_blocks, padded, dtype=torch.int32, device=slots_TK.device)
    offsets_R1 = torch.empty(n_resident + 1, dtype=torch.int32, device=slots_TK.device)
    order_P = torch.empty(n_picks, dtype=torch.int32, device=slots_TK.device)
    place_P = torch.empty_like(order_P)
    sizes = {"BLOCK": BLOCK, "STEP": step, "RP": padded}
    on_device.count_picks[(n_blocks,)](slots_P, counts_BR, n_picks, **sizes)
    scan_step = min(up_to_power(n_blocks, 2), max(2, HELD // 2 // padded))
    on_device.scan_counts[(1,)](counts_BR, offsets_R1, n_blocks, n_resident, STEP=scan_step, RP=padded)
    on_device.place_picks[(n_blocks,)](slots_P, counts_BR, order_P, place_P, n_picks, n_resident, **sizes)
    return order_P, place_P, offsets_R1


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
    checkpointing: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the experts; returns y (T,D), and for the backward pass pre (P,I), order, place and offsets.

    ``w_in`` and ``w_out`` have the gradients, ``w_in_RDI`` and ``w_out_RFD`` are what is multiplied: the same weights
    in the type of the products, or with ``checkpointing``, which leaves ``pre`` empty, in any.
    """
    launch = _Launch.of(x_TD, slots_TK, w_in_RDI, w_out_RFD)
    order_P, place_P, offsets_R1 = index_picks(slots_TK, launch.n_resident)
    pre_LI, h_LF = _up(launch, x_TD, gates_TK, w_in_RDI, order_P, offsets_R1, with_pre=not checkpointing)
    y_LD = _product(launch, launch.tuning.down, h_LF, offsets_R1, w_out_RFD.to(x_TD.dtype))
    return _sum_picks(y_LD, place_P, x_TD, launch.top_k), pre_LI, order_P, place_P, offsets_R1


def _up(
    launch: _Launch, x_TD: Tensor, gates_TK: Tensor, w_in_RDI: Tensor, order_P: Tensor, offsets_R1: Tensor,
    *, with_pre: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what is inside the activation (P,I), or nothing (0,I), and gate · activation (P,F)."""
    pre_LI = x_TD.new_empty(launch.n_picks if with_pre else 0, w_in_RDI.shape[2])
    h_LF, tiles = x_TD.new_empty(launch.n_picks, launch.d_expert), launch.tuning.up
    on_device.up[launch.grid(tiles, launch.d_expert)](
        x_TD, order_P, offsets_R1, w_in_RDI.to(x_TD.dtype), gates_TK, pre_LI, h_LF,
        launch.d_model, launch.d_expert, launch.n_resident,
        K=launch.top_k, SWIGLU=launch.swiglu, WITH_PRE=with_pre, **launch.constants, **_shape(tiles),
    )  # fmt: skip
    return pre_LI, h_LF


def _product(
    launch: _Launch, tiles: Tiles, a_LC: Tensor, offsets_R1: Tensor, w_in_memory: Tensor, *, transposed: bool = False
) -> Tensor:
    """Rows times their experts' weights (R,C,N), or with ``transposed`` (R,N,C)."""
    w_RCN = w_in_memory.transpose(1, 2) if transposed else w_in_memory
    n_channels, n_columns = w_RCN.shape[1:]
    y_LN = a_LC.new_empty(len(a_LC), n_columns)
    if _by_descriptor(a_LC, tiles, n_channels, n_columns):
        n_tiles = triton.cdiv(launch.n_picks, tiles.rows) + launch.n_resident
        tiles_N4 = torch.empty(triton.cdiv(n_tiles, 128) * 128, 4, dtype=torch.int32, device=a_LC.device)
        on_device.list_tiles[(len(tiles_N4) // 128,)](
            offsets_R1, tiles_N4, launch.n_resident, BM=tiles.rows, BLOCK=128, RP=launch.constants["RP"]
        )
        block = [tiles.columns, tiles.depth] if transposed else [tiles.depth, tiles.columns]
        n_programs = min(n_tiles * (n_columns // tiles.columns), _programs(a_LC.device))
        on_device.rows_times_weight_by_descriptor[(n_programs,)](
            _described(a_LC, [tiles.rows, tiles.depth]), _described(w_in_memory.flatten(0, 1), block), tiles_N4, y_LN,
            C=n_channels, N=n_columns, TRANSPOSED=transposed, PRECISION=launch.constants["PRECISION"],
            **_shape(tiles),
        )  # fmt: skip
        return y_LN
    on_device.rows_times_weight[launch.grid(tiles, n_columns)](
        a_LC, offsets_R1, w_RCN, y_LN, n_channels, n_columns, *w_RCN.stride(), launch.n_resident,
        **launch.constants, **_shape(tiles),
    )  # fmt: skip
    return y_LN


@skip_experts.register_fake
def _(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, w_in: Tensor, w_out: Tensor,
    checkpointing: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_picks, index = slots_TK.numel(), slots_TK.new_empty
    order_P, place_P = index(n_picks, dtype=torch.int32), index(n_picks, dtype=torch.int32)
    offsets_R1 = index(len(w_in) + 1, dtype=torch.int32)
    pre_LI = x_TD.new_empty(0 if checkpointing else n_picks, w_in_RDI.shape[2])
    return torch.empty_like(x_TD), pre_LI, order_P, place_P, offsets_R1


@torch.library.custom_op("fomoe::skip_experts_backward", mutates_args=())
def skip_experts_backward(
    dy_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, pre_LI: Tensor,
    order_P: Tensor, place_P: Tensor, offsets_R1: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of tokens, gates and both weights, those of the weights in ``dtype``."""
    launch = _Launch.of(x_TD, gates_TK, w_in_RDI, w_out_RFD)
    n_picks, d_model, d_expert = launch.n_picks, launch.d_model, launch.d_expert
    tiles = launch.tuning.down_backward
    w_in_RDI, w_out_RFD = w_in_RDI.to(x_TD.dtype), w_out_RFD.to(x_TD.dtype)
    if len(pre_LI) < n_picks:
        pre_LI, h_LF = _up(launch, x_TD, gates_TK, w_in_RDI, order_P, offsets_R1, with_pre=True)
    else:
        h_LF = x_TD.new_empty(n_picks, d_expert)
    dpre_LI = torch.empty_like(pre_LI)
    parts = gates_TK.new_empty(triton.cdiv(d_expert, tiles.columns), n_picks)
    on_device.down_backward[launch.grid(tiles, d_expert)](
        dy_TD, order_P, offsets_R1, w_out_RFD, gates_TK, pre_LI, dpre_LI, h_LF, parts, d_model, d_expert, n_picks,
        launch.n_resident, K=launch.top_k, SWIGLU=launch.swiglu, **launch.constants, **_shape(tiles),
    )  # fmt: skip
    dw_out_RFD = _weight_gradient(launch, h_LF, dy_TD, "b", order_P, offsets_R1, w_out_RFD, dtype)
    del h_LF  # its memory serves the tokens' gradients
    dw_in_RDI = _weight_gradient(launch, x_TD, dpre_LI, "a", order_P, offsets_R1, w_in_RDI, dtype)
    dx_LD = _product(launch, launch.tuning.up_backward, dpre_LI, offsets_R1, w_in_RDI, transposed=True)
    # A ghost's column of the parts holds whatever the memory held.
    dgates_TK = parts.sum(dim=0).where(place_P >= 0, 0).view_as(gates_TK)
    return _sum_picks(dx_LD, place_P, x_TD, launch.top_k), dgates_TK, dw_in_RDI, dw_out_RFD


def _by_descriptor(a_LC: Tensor, tiles: Tiles, n_channels: int, n_columns: int) -> bool:
    if a_LC.element_size() != 2 or n_channels % tiles.depth or n_columns % tiles.columns:
        return False
    return _capability(a_LC.device) >= DESCRIPTORS_FROM


def _described(matrix: Tensor, block: list[int]) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _weight_gradient(
    launch: _Launch, a: Tensor, b: Tensor, of_tokens: Literal["a", "b"], order_P: Tensor, offsets_R1: Tensor,
    like: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Σ aᵀb of each expert, one of the two with a row for each token, the other with one for each pick."""
    dw_RAB = torch.empty(like.shape, dtype=dtype, device=like.device)
    tiles, (n_a, n_b) = launch.tuning.weights, like.shape[1:]
    grid = (launch.n_resident * triton.cdiv(n_a, tiles.rows) * triton.cdiv(n_b, tiles.columns),)
    on_device.weight_gradient[grid](
        a, b, order_P, offsets_R1, dw_RAB, n_a, n_b,
        K=launch.top_k, GATHER_A=of_tokens == "a", GATHER_B=of_tokens == "b", PRECISION=launch.constants["PRECISION"],
        **_shape(tiles, "BA BB BK"),
    )  # fmt: skip
    return dw_RAB


@skip_experts_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, pre_LI: Tensor,
    order_P: Tensor, place_P: Tensor, offsets_R1: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (torch.empty_like(w_in_RDI, dtype=dtype), torch.empty_like(w_out_RFD, dtype=dtype))
    return torch.empty_like(x_TD), torch.empty_like(gates_TK), *weights


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gates_TK, _, w_in_RDI, w_out_RFD, w_in, *_ = inputs
    ctx.save_for_backward(x_TD, gates_TK, w_in_RDI, w_out_RFD, *output[1:])
    ctx.dtype = w_in.dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dx_TD, dgates_TK, dw_in, dw_out = skip_experts_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.dtype)
    return dx_TD, dgates_TK, None, None, None, dw_in, dw_out, None


skip_experts.register_autograd(_backward, setup_context=_save)


def dispatch(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind,
    copies: Copies | None = None, checkpointing: bool = False,
) -> Tensor:  # fmt: skip
    """Run all resident experts; arguments and result as in ``loop.dispatch``.

    Copies, if there are any, get the gradients in the weights' place, and those with values are multiplied in it; with
    checkpointing less is kept for the backward pass, and weights are cast inside the operation, in both passes.
    """
    if not w_in_RDI.shape[0]:
        return x_TD * 0
    learning = (w_in_RDI, w_out_RFD) if copies is None else copies[:2]
    values = learning if copies is None or copies.has_values else (w_in_RDI, w_out_RFD)
    given = [w.detach() if checkpointing else w.detach().to(x_TD.dtype) for w in values]
    picks = (gates_TK.contiguous(), slots_TK.contiguous())
    y_TD: Tensor = skip_experts(x_TD.contiguous(), *picks, *given, *learning, checkpointing)[0]
    return y_TD
