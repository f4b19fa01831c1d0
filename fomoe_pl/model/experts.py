"""Routed experts as stacked matrices, and the shared ones that see every token.

Shapes: T tokens, D model, R resident experts, K picks of a token, I input width of an expert (F, or 2F with swiglu),
F expert width.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import AUTO, KEY, SHIPPED, backend_of, kernels
from fomoe_pl.model.backends.activation import activate
from fomoe_pl.model.backends.frozen import Frozen
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import compute_dtype


class Experts(nn.Module):
    """The resident experts of one layer: `w_in` (R,D,I) and `w_out` (R,F,D).

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
        for name in SHIPPED if self.backend == AUTO else (self.backend,):
            _prepare(name)
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
            ConfigError: If the `expert_backend` that is asked for does not work here.
        """
        # By hand: autocast knows neither grouped products nor in-place indexing.
        dtype = compute_dtype(x_TD)
        backend = choose_backend(self.backend, x_TD.device, dtype, *self.w_out.shape[1:])
        x_TD = x_TD.to(dtype)
        picks = (x_TD, gates_TK, slots_TK)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            run, fused = _RUNS[backend, x_TD.is_cuda, self.checkpointing and torch.is_grad_enabled()]
            given = (*picks, self.w_in, self.w_out, self.kind, frozen)
            if fused:
                # A validation has other experts' weights in their place.
                return run(*given, self.copies if torch.is_grad_enabled() else None, self.checkpointing)
            return run(*given)


_RUNS: dict[tuple[str, bool, bool], tuple[Callable[..., Tensor], bool]] = {}
"""(backend, on CUDA, checkpointing) -> what runs the experts, and whether it is fused. Compiled code reads it."""


def _prepare(name: str) -> None:
    backend = backend_of(name)
    for on_cuda, checkpointing in product((False, True), repeat=2):
        run = _again(backend.dispatch) if checkpointing and not backend.fused else backend.dispatch
        if ("cuda" if on_cuda else "cpu") not in backend.compiles_on:
            run = torch.compiler.disable(run)
        _RUNS.setdefault((name, on_cuda, checkpointing), (run, backend.fused))


def _again(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch(*arguments: Any) -> Tensor:
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)

    return dispatch


@torch.compiler.assume_constant_result
def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, d_expert: int, d_model: int) -> str:
    """Return which backend runs the experts; with `auto` the first of triton, grouped and loop that works.

    Args:
        wanted: As configured.
        device: Where the tokens are.
        dtype: In which type the products run.
        d_expert: Width F.
        d_model: Width D.

    Raises:
        ConfigError: If the backend that is asked for does not work here.
    """
    if wanted != AUTO:
        reason = backend_of(wanted).unsupported(device, dtype, d_model, d_expert)
        if reason is not None:
            hint = "Use auto or loop, or another precision or size"
            raise ConfigError(KEY, wanted, f"does not work here: {reason}", hint)
        return wanted
    for name in SHIPPED:
        if name == "triton" and device.type != "cuda":
            continue  # on a CPU a GPU's kernels are not expected
        reason = backend_of(name).unsupported(device, dtype, d_model, d_expert)
        if reason is None:
            return name
        _tell_fallback(name, reason)
    raise AssertionError("loop works everywhere")


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
