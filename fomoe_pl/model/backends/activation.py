"""The nonlinearity between an expert's two matrix products."""

import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.model.config import ExpertKind


def activate(h: Tensor, kind: ExpertKind) -> Tensor:
    """Return silu(h) (...,F), or for `swiglu` silu(gate) * up of h = [gate, up] (...,2F) (arXiv 2002.05202)."""
    if kind == "silu":
        return F.silu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up
