"""Routed experts as stacked matrices, and the shared ones that see every token.

Shapes: T tokens, D model, R resident experts, K picks of a token, I input width of an expert (F, or 2F with swiglu),
F expert width.
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import grouped, loop
from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import compute_dtype


class Experts(nn.Module):
    """The resident experts of one layer: ``w_in`` (R,D,I) and ``w_out`` (R,F,D).

    Args:
        config: The architecture.
        n_resident: How many experts R are here.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_resident: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = config.expert
        self.backend = config.expert_backend
        shape_in = (n_resident, config.d_model, config.expert_in_width)
        shape_out = (n_resident, config.d_expert, config.d_model)
        self.w_in = nn.Parameter(torch.empty(shape_in, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(shape_out, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor) -> Tensor:
        """Return Σ_k gate_k · expert_k(x) over the resident picks; a slot of R is a ghost and adds nothing.

        Args:
            x_TD: Tokens (T,D).
            gates_TK: Gates, float32 (T,K).
            slots_TK: Row of each pick in the stacked weights, int64 (T,K).

        Returns:
            (T,D) in the compute type.

        Raises:
            ConfigError: If ``expert_backend`` is ``grouped`` and the grouped product does not work here.
        """
        # By hand: autocast knows neither the grouped product nor in-place indexing.
        dtype = compute_dtype(x_TD)
        x_TD, w_in_RDI, w_out_RFD = x_TD.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        run = grouped.dispatch if self._use_grouped(x_TD) else loop.dispatch
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            return run(x_TD, gates_TK, slots_TK, w_in_RDI, w_out_RFD, self.kind)

    def _use_grouped(self, x_TD: Tensor) -> bool:
        if self.backend == "loop":
            return False
        reason = grouped.unsupported(x_TD.device, x_TD.dtype, self.w_in.shape[1], self.w_out.shape[1])
        if reason is None:
            return True
        if self.backend == "grouped":
            hint = "Use expert_backend auto or loop, or another precision or size"
            raise ConfigError(
                "model.architecture.expert_backend", "grouped", f"the grouped product does not work: {reason}", hint
            )
        _tell_fallback(reason)
        return False


@lru_cache(maxsize=1)
def _tell_fallback(reason: str) -> None:
    warnings.warn(f"experts run one by one (expert_backend loop) instead of grouped: {reason}", stacklevel=2)


class SharedExperts(nn.Module):
    """Experts that are always on, side by side as one dense expert of width n_shared_experts·F, without gates.

    Args:
        config: The architecture.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.kind = config.expert
        n_shared = config.n_shared_experts
        self.w_in = nn.Parameter(
            torch.empty(config.d_model, n_shared * config.expert_in_width, device=device, dtype=dtype)
        )
        self.w_out = nn.Parameter(torch.empty(n_shared * config.d_expert, config.d_model, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map (T,D) to (T,D)."""
        return activate(x_TD @ self.w_in, self.kind) @ self.w_out
