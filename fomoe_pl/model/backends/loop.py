"""Reference backend: one expert after the other, with plain matrix products. Works everywhere.

Shapes: T tokens, D model, R resident experts, K picks of a token, P = T·K picks, I input width of an expert (F, or 2F
with swiglu), F expert width.
"""

import torch
from torch import Tensor

from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.config import ExpertKind


def dispatch(
    x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, w_in_RDI: Tensor, w_out_RFD: Tensor, kind: ExpertKind
) -> Tensor:
    """Run each resident expert on the tokens that picked it and sum the results.

    Args:
        x_TD: Tokens (T,D).
        gates_TK: Gates, float32 (T,K).
        slots_TK: Row of each pick in the stacked weights, int64 (T,K); R is a ghost and adds nothing.
        w_in_RDI: Input matrices.
        w_out_RFD: Output matrices.
        kind: The expert's activation.

    Returns:
        The sum over a token's picks (T,D), of the dtype of x.
    """
    w_in_RDI, w_out_RFD = w_in_RDI.to(x_TD.dtype), w_out_RFD.to(x_TD.dtype)
    n_tokens, top_k = slots_TK.shape
    slots_P, gates_P = slots_TK.flatten(), gates_TK.flatten()
    rows, outputs = [], []
    # unbind instead of w[r]: its backward stacks once, where R selections would add R full-size gradients.
    for slot, (w_in_DI, w_out_FD) in enumerate(zip(w_in_RDI.unbind(), w_out_RFD.unbind(), strict=True)):
        row_N = (slots_P == slot).nonzero().squeeze(1)
        h_NF = activate(x_TD[row_N // top_k] @ w_in_DI, kind) * gates_P[row_N, None].to(x_TD.dtype)
        rows.append(row_N)
        outputs.append(h_NF @ w_out_FD)
    y_PD = x_TD.new_zeros(n_tokens * top_k, x_TD.shape[1]).index_copy(0, torch.cat(rows), torch.cat(outputs))
    return y_PD.view(n_tokens, top_k, -1).sum(dim=1)
