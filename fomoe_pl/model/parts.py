"""Weight-only building blocks. They allocate and do not draw: initial values come from ``model/init.py`` alone."""

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a matrix product of x runs: autocast's where it is on, else that of x.

    For operations that autocast does not know and whose inputs therefore are cast by hand.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
