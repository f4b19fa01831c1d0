"""Routed experts as stacked matrices, and the shared ones that see every token.

Shapes: T tokens, D model, R resident experts, K picks of a token, I input width of an expert (F, or 2F with swiglu),
F expert width.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import grouped, kernels, loop
from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.backends.frozen import Frozen
from fomoe_pl.model.config import ExpertBackend, ModelConfig
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
        self.checkpointing = config.activation_checkpointing == "experts"
        self.copies: kernels.Copies | None = None  # read by our kernels alone
        shape_in = (n_resident, config.d_model, config.expert_in_width)
        shape_out = (n_resident, config.d_expert, config.d_model)
        self.w_in = nn.Parameter(torch.empty(shape_in, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(shape_out, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, gates_TK: Tensor, slots_TK: Tensor, frozen: Frozen | None = None) -> Tensor:
        """Return Σ_k gate_k · expert_k(x) over the picks of residents and copies; others add nothing.

        Args:
            x_TD: Tokens (T,D).
            gates_TK: Gates, float32 (T,K).
            slots_TK: Row of each pick in the stacked weights, int64 (T,K); from R on, in the copies.
            frozen: Copies of experts that are not resident.

        Returns:
            (T,D) in the compute type.

        Raises:
            ConfigError: If the ``expert_backend`` that is asked for does not work here.
        """
        # By hand: autocast knows neither grouped products nor in-place indexing.
        dtype = compute_dtype(x_TD)
        backend = choose_backend(self.backend, x_TD.device, dtype, *self.w_out.shape[1:])
        x_TD = x_TD.to(dtype)
        picks = (x_TD, gates_TK, slots_TK)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            if backend == "triton":
                # A validation has other experts' weights in their place.
                copies = self.copies if torch.is_grad_enabled() else None
                return kernels.dispatch(*picks, self.w_in, self.w_out, self.kind, frozen, copies, self.checkpointing)
            run = _dispatch_of(backend, x_TD.device.type, self.checkpointing and torch.is_grad_enabled())
            return run(*picks, self.w_in, self.w_out, self.kind, frozen)


def _dispatch_of(backend: str, device_type: str, checkpointing: bool) -> Callable[..., Tensor]:
    in_graphs = backend == "grouped" and device_type == "cuda"
    return (_DISPATCH if in_graphs else _OUTSIDE_OF_GRAPHS)[backend, checkpointing]


def _again(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch(*arguments: Any) -> Tensor:
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)

    return dispatch


_DISPATCH: dict[tuple[str, bool], Callable[..., Tensor]] = {
    ("grouped", False): grouped.dispatch,
    ("grouped", True): _again(grouped.dispatch),
    ("loop", False): loop.dispatch,
    ("loop", True): _again(loop.dispatch),
}
# On a CPU both take shapes from the numbers in the tensors, which compiled code cannot.
_OUTSIDE_OF_GRAPHS = {key: torch.compiler.disable(run) for key, run in _DISPATCH.items()}


@torch.compiler.assume_constant_result
def choose_backend(
    wanted: ExpertBackend, device: torch.device, dtype: torch.dtype, d_expert: int, d_model: int
) -> Literal["triton", "grouped", "loop"]:
    """Return which backend runs the experts; with ``auto`` the first of triton, grouped and loop that works.

    Args:
        wanted: As configured.
        device: Where the tokens are.
        dtype: In which type the products run.
        d_expert: Width F.
        d_model: Width D.

    Raises:
        ConfigError: If the backend that is asked for does not work here.
    """
    if wanted == "loop":
        return "loop"
    reasons = {
        "triton": kernels.unsupported(device, dtype),
        "grouped": grouped.unsupported(device, dtype, d_model, d_expert),
    }
    if wanted != "auto":
        if reasons[wanted] is not None:
            rule, hint = f"does not work here: {reasons[wanted]}", "Use auto or loop, or another precision or size"
            raise ConfigError("model.architecture.expert_backend", wanted, rule, hint)
        return wanted
    # On a CPU nobody expects a GPU's kernels.
    for name in ("triton", "grouped") if device.type == "cuda" else ("grouped",):
        if reasons[name] is None:
            return name
        _tell_fallback(name, reasons[name])
    return "loop"


@lru_cache(maxsize=4)
def _tell_fallback(name: str, reason: str) -> None:
    warnings.warn(f"expert_backend auto does not take {name}: {reason}", stacklevel=2)


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
