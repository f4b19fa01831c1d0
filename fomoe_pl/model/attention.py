"""Causal self-attention with rotary positions, grouped-query heads and optional query/key norms.

Shapes: B batch, S sequence, D model, H query heads, G key/value heads, C channels of one head.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import Linear, Norm


@cache  # a recorded step reads its tables for as long as it is replayed
def rotary_tables(length: int, channels: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary embedding (RoFormer, arXiv 2104.09864), float32, each (length, channels).

    Channel c turns with channel c + channels/2; the sine of the first half of the channels has its sign turned, as
    `rotate` wants it. Plain cached tensors rather than buffers: a module's `.to(bfloat16)` would round buffers, and
    positions above 256 do not survive that.

    Args:
        length: Number of positions S.
        channels: Channels C of one head.
        theta: Base of the frequencies.
        device: Where the tables live.
    """
    # Tables first made during a validation pass must serve training too.
    with torch.inference_mode(False):
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, theta**-exponents)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotate each pair of channels by its position's angle, in float32; same shape, same dtype.

    Args:
        x_BHSC: Queries or keys.
        cos_SC: From `rotary_tables`.
        sin_SC: Likewise, with its signs.
    """
    x = x_BHSC.float()
    return (x * cos_SC + x.roll(x.shape[-1] // 2, dims=-1) * sin_SC).to(x_BHSC.dtype)


class Attention(nn.Module):
    """Multi-head attention of FoMoE's blocks (arXiv 2606.19025, §3), with OLMoE's and Qwen3's variants as options.

    Args:
        config: The architecture.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.theta = config.rope_theta
        self.qk_norm = config.qk_norm
        q_size, kv_size = config.n_heads * config.head_size, config.kv_heads * config.head_size
        self.q = Linear(config.d_model, q_size, device=device, dtype=dtype)
        self.k = Linear(config.d_model, kv_size, device=device, dtype=dtype)
        self.v = Linear(config.d_model, kv_size, device=device, dtype=dtype)
        self.o = Linear(q_size, config.d_model, device=device, dtype=dtype)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = Norm(self.head_size if per_head else q_size, config, device=device, dtype=dtype)
            self.k_norm = Norm(self.head_size if per_head else kv_size, config, device=device, dtype=dtype)

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return this attention's rotary tables for sequences of that length."""
        return rotary_tables(length, self.head_size, self.theta, device)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """Attend causally; (B,S,D) to (B,S,D). The tables are those of `rotary`: a compiled block cannot cache them."""
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSC, k_BGSC, v_BGSC = (t.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q_BHSC, k_BGSC = self.q_norm(q_BHSC), self.k_norm(k_BGSC)
        # Under autocast a norm may give float32, but the fused attention kernels want one dtype.
        q_BHSC = rotate(q_BHSC, cos_SC, sin_SC).to(v.dtype)
        k_BGSC = rotate(k_BGSC, cos_SC, sin_SC).to(v.dtype)
        grouped = q_BHSC.shape[1] != k_BGSC.shape[1]
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=grouped)
        return self.o(y_BHSC.transpose(1, 2).flatten(2))
