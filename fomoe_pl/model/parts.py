"""Weight-only building blocks. They allocate and do not draw: initial values come from `model/init.py` alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_pl.model.config import ModelConfig


class Linear(nn.Module):
    """Matrix product without bias.

    Args:
        fan_in: Input channels.
        fan_out: Output channels.
        device: Where the weight lives; None is torch's default.
        dtype: Type of the weight; None is torch's default.
    """

    def __init__(
        self, fan_in: int, fan_out: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., fan_in) to (..., fan_out)."""
        return F.linear(x, self.weight)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with a weight and no bias.

    Args:
        size: Channels of the last axis.
        config: Gives the kind and the epsilon.
        device: Where the weight lives; None is torch's default.
        dtype: Type of the weight; None is torch's default.
    """

    def __init__(
        self, size: int, config: ModelConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.kind = config.norm
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x; the shape stays."""
        # The fused kernels want one dtype, and under autocast a bf16 input meets a float32 weight here. The weight's:
        # rounded to bf16, it would stand still while it learns.
        x = x.to(self.weight.dtype)
        if self.kind == "layernorm":
            return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)
        if x.device.type == "cpu":
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass of few operations: torch's, fused on a GPU, takes twice as long on a CPU.

    It keeps what torch's keeps: x, the weight, and one number a row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, scale, weight = ctx.saved_tensors
        normed, d_normed = x * scale, grads[0] * weight
        d_x = (d_normed - normed * (d_normed * normed).mean(dim=-1, keepdim=True)) * scale
        return d_x, (grads[0] * normed).flatten(0, -2).sum(dim=0), None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a matrix product of x runs: autocast's where it is on, else that of x.

    For operations that autocast does not know and whose inputs therefore are cast by hand.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
