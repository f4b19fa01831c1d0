"""The experts' weights a second time, in the type of matrix products, with gradients of that type.

Mixed precision trains float32 weights and multiplies in bfloat16. Made in each step, the copies cost a pass over all
weights, and gradients that leave the products as float32 twice the memory. Here the copies last, the optimizer writes
those that it updates in a kernel of ours while it has the weights in registers (`federation/adamw.py`), and gradients
are rounded once, where a product's float32 sum leaves it: as autocast rounds those of all other products.

Where activations are recomputed to save memory, so are the copies: nothing lasts, and only gradients are
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fomoe_pl.model.backends.kernels import Copies
from fomoe_pl.model.transformer import Transformer


class ExpertCopies:
    """Copies of all experts' weights, in use from now on until `remove`.

    Whoever changes weights in between writes the copy too, or counts a version (`Tensor._version`): `copy_`, `add_` and
    `torch._foreach_` operations on the parameter under `no_grad` do; writing to its `.data`, and torch's fused
    optimizer steps, do not (`RowAdamW` does it for them).

    Args:
        model: Of float32 weights, on its device.
        dtype: Type of the products.

    Attributes:
        of: The copy of each parameter, for those who write both; empty where copies do not last.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        lasting = model.config.activation_checkpointing == "none"
        self.of: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._experts = [block.moe.experts for block in model.layers if block.moe.experts.w_in.numel()]
        for experts in self._experts:
            w_in, w_out = (self._copy(weight, dtype, lasting) for weight in (experts.w_in, experts.w_out))
            experts.copies = Copies(w_in, w_out, has_values=lasting)

    def _copy(self, weight: nn.Parameter, dtype: torch.dtype, lasting: bool) -> Tensor:
        # Without values it is but a place for a gradient, of no memory.
        copy = torch.empty(weight.shape if lasting else (), dtype=dtype, device=weight.device)
        copy = copy.expand(weight.shape).requires_grad_()
        copy.register_post_accumulate_grad_hook(_hand_over(weight))
        weight.grad_dtype = None  # any
        if lasting:
            self.of[weight] = copy
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights that were changed since the last call; to be called before each pass."""
        for weight, copy in self.of.items():
            if self._versions.get(weight) != weight._version:
                copy.copy_(weight)
                self._versions[weight] = weight._version

    def remove(self) -> None:
        """Free them; gradients are of the weights' type again."""
        for experts in self._experts:
            experts.copies = None
            for weight in (experts.w_in, experts.w_out):
                weight.grad = None
                weight.grad_dtype = weight.dtype
        self._experts = []
        self.of.clear()  # an optimizer has it, too
        self._versions.clear()


def _hand_over(weight: nn.Parameter) -> Callable[[Tensor], None]:
    def hook(copy: Tensor) -> None:
        assert copy.grad is not None
        weight.grad = copy.grad if weight.grad is None else weight.grad + copy.grad
        copy.grad = None

    return hook
