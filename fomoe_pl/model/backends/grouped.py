"""Grouped backend: picks sorted by expert, all experts in one grouped matrix product (`torch.nn.functional`).

`grouped_mm` neither reads nor writes the rows behind its last offset, where the ghosts' picks lie: in its output, and
in the gradient of its input, they hold whatever the memory held. `0 * NaN` is NaN, so these rows are never
multiplied away but selected away, at the three places where they would meet anything else: the result on its way back
to the tokens, the tokens' gradient, and the gates' gradient.

Shapes: T tokens, D model, R resident experts, N experts that are here or copied, K picks of a token, P = T·K picks, L
the picks that are laid out (all on an accelerator, where their number is not known without a wait; the live ones on a
CPU), I input width of an expert (F, or 2F with swiglu), F expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.model.backends import Backend, kernels
from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.backends.frozen import Frozen, unpack_copies
from fomoe_pl.model.config import ExpertKind, ModelConfig


def unsupported(device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
    """Return why `grouped_mm` does not work here, or None if it does.

    Args:
        device: Where the tokens are.
        dtype: In which type the product runs.
        d_model: Width D.
        d_expert: Width F.
    """
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            return f"on CUDA it is fast for bfloat16 alone, not {dtype}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or above"
    elif device.type == "cpu":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it does not take {dtype}"
    else:
        return f"it does not run on {device.type}"
    unit = 16 // dtype.itemsize
    if d_model % unit or d_expert % unit:
        return f"d_model ({d_model}) and d_expert ({d_expert}) must be multiples of {unit} for {dtype}"
    return None


class _ToExperts(torch.autograd.Function):
    """Lay tokens out by expert. Its backward sums K rows per token in a fixed order, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_L: Tensor, place_TK: Tensor, live_TK1: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_TK, live_TK1)
        return x_TD.index_select(0, order_L // place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        place_TK, live_TK1 = ctx.saved_tensors
        return _gather_sum(grads[0], place_TK, live_TK1), None, None, None


class _ToTokens(torch.autograd.Function):
    """Sum each token's results. The transpose of `_ToExperts`."""

    @staticmethod
    def forward(ctx: Any, y_LD: Tensor, order_L: Tensor, place_TK: Tensor, live_TK1: Tensor | None) -> Tensor:
        ctx.save_for_backward(order_L)
        ctx.top_k = place_TK.shape[1]
        return _gather_sum(y_LD, place_TK, live_TK1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (order_L,) = ctx.saved_tensors
        return grads[0].index_select(0, order_L // ctx.top_k), None, None, None


class _ProductWithCopies(torch.autograd.Function):
    """Rows times weights of which the last are copies: unpacked again in the backward pass, and without gradients.

    With `to_copies` false the rows of copies get no gradients either, and hold whatever the memory held.
    """

    @staticmethod
    def forward(
        ctx: Any, a_LC: Tensor, w_RCM: Tensor, packed: Tensor, ends_N: Tensor, bits: int, to_copies: bool
    ) -> Tensor:
        ctx.save_for_backward(a_LC, w_RCM, packed, ends_N)
        ctx.bits, ctx.to_copies = bits, to_copies
        return F.grouped_mm(a_LC, _weights_with_copies(w_RCM, packed, bits, a_LC.dtype), offs=ends_N)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a_LC, w_RCM, packed, ends_N = ctx.saved_tensors
        dy_LM = grads[0].contiguous()
        w = _weights_with_copies(w_RCM, packed, ctx.bits, a_LC.dtype) if ctx.to_copies else w_RCM.to(a_LC.dtype)
        da_LC = F.grouped_mm(dy_LM, w.transpose(1, 2), offs=ends_N[: len(w)])
        dw_RCM = F.grouped_mm(a_LC.t(), dy_LM, offs=ends_N[: len(w_RCM)]).to(w_RCM.dtype)
        return da_LC, dw_RCM, None, None, None, None


def _product(
    a_LC: Tensor, w_RCM: Tensor, ends_N: Tensor, packed: Tensor | None, bits: int, *, to_copies: bool = True
) -> Tensor:
    if packed is None:
        return F.grouped_mm(a_LC, w_RCM.to(a_LC.dtype), offs=ends_N)
    y_LM: Tensor = _ProductWithCopies.apply(a_LC, w_RCM, packed, ends_N, bits, to_copies)
    return y_LM


def _weights_with_copies(w_RCM: Tensor, packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    in_kernel = kernels.taken(packed.device, dtype)
    return torch.cat((w_RCM.to(dtype), unpack_copies(packed, *w_RCM.shape[1:], bits, dtype, in_kernel)))


def _gather_sum(y_LD: Tensor, place_TK: Tensor, live_TK1: Tensor | None) -> Tensor:
    """Sum over k of the live rows y[place[t,k]], of all if no mask is given; (T,D)."""
    y_TKD = y_LD.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1)
    return (y_TKD if live_TK1 is None else y_TKD.masked_fill_(~live_TK1, 0)).sum(dim=1)


def _rows_to_lay_out(ends_N: Tensor, n_picks: int) -> int:
    if ends_N.device.type != "cpu":
        return n_picks
    # Without a live pick one dead row stays, so that every pick has a row to point at.
    return max(int(ends_N[-1]), 1)


def dispatch(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind,
    frozen: Frozen | None = None,
) -> Tensor:  # fmt: skip
    """Run all resident experts, and the copies, at once; arguments and result as in `loop.dispatch`.

    The gate multiplies before the output matrix, where a row has F channels instead of D.
    """
    n_resident, n_picks = w_in_RDI.shape[0], slots_TK.numel()
    n_here = n_resident + (0 if frozen is None else len(frozen.w_in))
    slots_P, order_P = slots_TK.flatten().sort(stable=True)
    ends_N = torch.searchsorted(slots_P, torch.arange(1, n_here + 1, device=x_TD.device)).int()
    n_laid = _rows_to_lay_out(ends_N, n_picks)
    order_L = order_P[:n_laid]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(n_picks, device=x_TD.device)
    live_TK = slots_TK < n_here
    place_TK = place_P.view_as(slots_TK).clamp(max=n_laid - 1)
    # On a CPU the live picks have been counted: where all are, nothing needs a mask.
    all_live = x_TD.device.type == "cpu" and int(ends_N[-1]) == n_picks
    live_TK1 = None if all_live else live_TK[..., None]
    learning_TK1 = live_TK1 if frozen is None or frozen.input_gradient else (slots_TK < n_resident)[..., None]
    x_LD = _ToExperts.apply(x_TD, order_L, place_TK, learning_TK1)
    gates_L = torch.where(live_TK, gates_TK, 0).flatten().gather(0, order_L)
    packed_in, packed_out, bits, to_copies = (None, None, 0, True) if frozen is None else frozen[:4]
    pre_LI = _product(x_LD, w_in_RDI, ends_N, packed_in, bits, to_copies=to_copies)
    h_LF = activate(pre_LI, kind) * gates_L[:, None].to(x_TD.dtype)
    y_LD = _product(h_LF, w_out_RFD, ends_N, packed_out, bits)
    return _ToTokens.apply(y_LD, order_L, place_TK, live_TK1)


class Grouped(Backend):
    """`dispatch` as a backend. On a CPU it takes shapes from the values in tensors, which compiled code cannot."""

    waits_for_device = False
    compiles_on = frozenset({"cuda"})
    computes_copies = True
    dispatch = staticmethod(dispatch)

    def unsupported(self, device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
        """As the function of this name."""
        return unsupported(device, dtype, d_model, d_expert)

    def kept_bytes(self, config: ModelConfig, itemsize: int, picks: int) -> int:
        """Of each pick two orders, whether it is live, its gate; and its row before and inside of both products."""
        rows = config.d_model + config.expert_in_width + config.d_expert * (3 if config.expert == "swiglu" else 2)
        return picks * (2 * 8 + 1 + itemsize + itemsize * rows)
