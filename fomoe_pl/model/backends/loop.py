"""Reference backend: one expert after the other, with plain matrix products. Works everywhere.

Shapes: T tokens, D model, R resident experts, K picks of a token, P = T·K picks, I input width of an expert (F, or 2F
with swiglu), F expert width.
"""

from typing import Any

import torch
from torch import Tensor

from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.backends.frozen import Frozen, unpack
from fomoe_pl.model.backends.grouped import Grouped
from fomoe_pl.model.config import ExpertKind


class _FrozenProduct(torch.autograd.Function):
    """Rows times one copy, which is unpacked again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a_NC: Tensor, packed: Tensor, shape: torch.Size, bits: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.bits = shape, bits
        return a_NC @ unpack(packed, shape, bits, a_NC.dtype, in_kernel=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (packed,) = ctx.saved_tensors
        return grads[0] @ unpack(packed, ctx.shape, ctx.bits, grads[0].dtype, in_kernel=False).t(), None, None, None


def dispatch(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind,
    frozen: Frozen | None = None,
) -> Tensor:  # fmt: skip
    """Run each expert that is here, or its copy, on the tokens that picked it and sum the results.

    Args:
        x_TD: Tokens (T,D).
        gates_TK: Gates, float32 (T,K).
        slots_TK: Row of each pick in the stacked weights, int64 (T,K). Slots from R on are rows of the copies; without
            these R is a ghost and adds nothing.
        w_in_RDI: Input matrices.
        w_out_RFD: Output matrices.
        kind: The expert's activation.
        frozen: Copies of experts that are not resident.

    Returns:
        The sum over a token's picks (T,D), of the dtype of x.
    """
    w_in_RDI, w_out_RFD = w_in_RDI.to(x_TD.dtype), w_out_RFD.to(x_TD.dtype)
    n_tokens, top_k = slots_TK.shape
    slots_P, gates_P = slots_TK.flatten(), gates_TK.flatten()
    rows, outputs = [], []
    # unbind instead of w[r]: its backward stacks once, where R selections would add R full-size gradients.
    weights = list(zip(w_in_RDI.unbind(), w_out_RFD.unbind(), strict=True))
    # In the order of experts, in which a model that has them all adds up the tokens' gradients.
    for slot in range(len(weights)) if frozen is None else frozen.slot_of_expert.tolist():
        row_N = (slots_P == slot).nonzero().squeeze(1)
        gates_N1 = gates_P[row_N, None].to(x_TD.dtype)
        if slot < len(weights):
            w_in_DI, w_out_FD = weights[slot]
            y_ND = (activate(x_TD[row_N // top_k] @ w_in_DI, kind) * gates_N1) @ w_out_FD
        else:
            assert frozen is not None
            of, bits = slot - len(weights), frozen.bits
            x_ND = (x_TD if frozen.input_gradient else x_TD.detach())[row_N // top_k]
            pre_NI = _FrozenProduct.apply(x_ND, frozen.w_in[of], w_in_RDI.shape[1:], bits)
            y_ND = _FrozenProduct.apply(activate(pre_NI, kind) * gates_N1, frozen.w_out[of], w_out_RFD.shape[1:], bits)
        rows.append(row_N)
        outputs.append(y_ND)
    y_PD = x_TD.new_zeros(n_tokens * top_k, x_TD.shape[1]).index_copy(0, torch.cat(rows), torch.cat(outputs))
    return y_PD.view(n_tokens, top_k, -1).sum(dim=1)


class Loop(Grouped):
    """`dispatch` as a backend; it keeps no more than `grouped` does."""

    waits_for_device = True
    compiles_on = frozenset()
    dispatch = staticmethod(dispatch)

    def unsupported(self, device: torch.device, dtype: torch.dtype, d_model: int, d_expert: int) -> str | None:
        """Nothing: it works everywhere."""
        return None
