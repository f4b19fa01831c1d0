"""One mixture of experts: router, resident experts, copies of absent ones, shared experts.

Shapes: B batch, S sequence, T = B·S tokens, D model, E experts, R resident experts, K picks of a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import AUTO, KEY, backend_of
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.experts import Experts, SharedExperts
from fomoe_pl.model.residency import Routing, Shadow
from fomoe_pl.model.router import Router, RoutingStats, lookup
from fomoe_pl.model.shadow import ShadowExperts


class MoELayer(nn.Module):
    """σ-MoE of FoMoE (arXiv 2606.19025, §3; Csordás et al. 2023), with ghosts (§3.3) and shared experts.

    Args:
        config: The architecture.
        routing: How picks of absent experts are treated.
        resident: Sorted ids of the resident experts.
        shadow: How copies are kept; used with `shadow` routing.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: Routing,
        resident: tuple[int, ...],
        shadow: Shadow,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.router = Router(config, routing, resident, device=device, dtype=dtype)
        self.experts = Experts(config, len(resident), device=device, dtype=dtype)
        copied = routing == "shadow" and len(resident) < config.n_experts
        if copied and config.expert_backend != AUTO and not backend_of(config.expert_backend).computes_copies:
            rule = "computes no copies of absent experts, which shadow routing needs"
            raise ConfigError(KEY, config.expert_backend, rule, "use ghost routing, or auto")
        self.shadow = ShadowExperts(config, shadow, resident, device=device) if copied else None
        self.shared = SharedExperts(config, device=device, dtype=dtype) if config.n_shared_experts else None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStats]:
        """Route (B,S,D) through the experts; returns (B,S,D), zero for a token whose picks are all ghosts."""
        frozen = None if self.shadow is None else self.shadow.frozen(self.router.slot_of_expert)
        x_TD = x_BSD.flatten(0, 1)
        gates_TK, slots_TK, stats = self.router(x_TD)
        y_TD = self.experts(x_TD, gates_TK, slots_TK, frozen)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x_BSD.shape), stats

    def set_resident(self, resident: tuple[int, ...]) -> None:
        """Change in place which experts are resident; their number stays. Copies: see `ShadowExperts.set_resident`."""
        self.router.set_resident(resident)
        if self.shadow is not None:
            self.shadow.set_resident(resident)

    @contextmanager
    def with_all_experts(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Make all E experts live inside the context, with the given tensors; for layer-by-layer evaluation.

        Nothing is copied, and nothing given here is trained.

        Args:
            tensors: Full tensors by their name relative to this module, on this module's device: `experts.w_in`
                (E,D,I), `experts.w_out` (E,F,D), and in partitioned mode `router.weight` (E,D) and, if the balance
                is by bias, `router.balance_bias` (E,).
        """
        ids_E, slots_E = lookup(self.n_experts, tuple(range(self.n_experts)), copied=False)
        device = self.router.weight.device
        swaps = tensors | {"router.resident_ids": ids_E.to(device), "router.slot_of_expert": slots_E.to(device)}
        kept: dict[str, Tensor] = {}
        shadow, self.shadow = self.shadow, None
        try:
            for name, tensor in swaps.items():
                kept[name] = self._swap(name, tensor)
            yield
        finally:
            for name, tensor in kept.items():
                self._swap(name, tensor)
            self.shadow = shadow

    def _swap(self, name: str, tensor: Tensor) -> Tensor:
        """Replace a parameter or buffer by a tensor; return the old one."""
        owner_name, _, attribute = name.rpartition(".")
        owner = self.get_submodule(owner_name)
        old = getattr(owner, attribute)
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, attribute, tensor)
        return old
