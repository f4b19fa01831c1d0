"""Frozen low-bit copies of the experts that are not here: routing mode `shadow`.

A pick of an absent expert is computed with the site's copy of it. Gates and tokens get gradients through copies, copies
never: they stay as they are until someone writes new ones. All are bytes, see `codec.py`, in two tensors a layer whose
rows are the absent experts in the order of their ids.

Shapes: A absent experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fomoe_pl.model.backends.frozen import Frozen
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Shadow, absent_ids


class ShadowExperts(nn.Module):
    """One layer's copies: the buffers `w_in` and `w_out`, uint8 (A, bytes of a matrix), not saved with the weights.

    Args:
        config: The architecture.
        shadow: How copies are kept.
        resident: Sorted ids of the layer's experts that need none.
        device: Where they live; None is torch's default.
    """

    w_in: Tensor
    w_out: Tensor

    def __init__(
        self, config: ModelConfig, shadow: Shadow, resident: tuple[int, ...], *, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.bits: int = shadow.bits
        self.input_gradient = shadow.input_gradient
        self.absent = absent_ids(config.n_experts, resident)
        for name, numel in (
            ("w_in", config.d_model * config.expert_in_width),
            ("w_out", config.d_expert * config.d_model),
        ):
            shape = len(self.absent), shadow.codec.nbytes(numel)
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device), persistent=False)

    def frozen(self, slot_of_expert: Tensor) -> Frozen:
        """Return what backends need; with the router's slots (E,)."""
        return Frozen(self.w_in, self.w_out, self.bits, self.input_gradient, slot_of_expert)

    def set_resident(self, resident: tuple[int, ...]) -> None:
        """Change in place which experts have copies; their number stays.

        Copies of those that stay absent are kept. The others are invalid until they are written: what stands
        in their place decodes to NaN, whatever the bits.
        """
        absent = absent_ids(self.n_experts, resident)
        row_of = {expert: row for row, expert in enumerate(self.absent)}
        for packed in (self.w_in, self.w_out):
            old = packed.clone()
            for row, expert in enumerate(absent):
                if expert in row_of:
                    packed[row].copy_(old[row_of[expert]])
                else:
                    packed[row].fill_(0xFF)
        self.absent = absent
