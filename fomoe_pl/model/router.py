"""The router: which experts a token goes to, and with which gates.

Shapes: T tokens, D model, E experts of the layer, R resident experts, N scored experts (R in partitioned mode, else E),
K experts chosen for each token.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_pl.model.backends import kernels, rows
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing, absent_ids

LOWEST = -60.0
"""Largest logit of a token that a sigmoid router tells from smaller ones."""


class RoutingStats(NamedTuple):
    """What one layer's router did with one batch. Only `importance_E` and `z` carry gradients.

    Attributes:
        load_E: float32 (E,), picks of each expert, ghosts included; zero for experts that were not scored.
        live: int64 (), picks of resident experts. The others are not executed, or in shadow mode by copies.
        picks: All picks, T·K.
        importance_E: float32 (E,), mean over tokens of the scores normalised to sum 1; zero where not scored.
        z: float32 (), mean over tokens of logsumexp(logits)² (ST-MoE, arXiv 2202.08906).
        gate_entropy: float32 (), mean over tokens of the entropy of the normalised scores, divided by log N; None if
            the router does not measure it.
        picks_TK: int64, picks of each token as rows of the router: in partitioned mode see `resident_ids`, else
            expert ids.
        gates_TK: float32, gates of these picks, without gradient.
    """

    load_E: Tensor
    live: Tensor
    picks: int
    importance_E: Tensor
    z: Tensor
    gate_entropy: Tensor | None
    picks_TK: Tensor
    gates_TK: Tensor


class Router(nn.Module):
    """Scores experts and picks top-k, in float32 whatever the precision of the rest.

    The lookup buffers `resident_ids` (R,) and `slot_of_expert` (E,), see `lookup`, are rebuilt from the residency
    and not saved. `balance_bias` is saved, and stays float32 when the module is cast.

    Args:
        config: The architecture.
        routing: `partitioned` holds the residents' rows, the others all E rows.
        resident: Sorted ids of the resident experts.
        device: Where the weights live; None is torch's default.
        dtype: Type of the weights; None is torch's default.

    Attributes:
        measures_entropy: Whether the statistics have the gates' entropy, which costs several passes over the scores.
    """

    resident_ids: Tensor
    slot_of_expert: Tensor
    balance_bias: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        routing: Routing,
        resident: tuple[int, ...],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_experts = config.n_experts
        self.top_k = config.top_k
        self.gate = config.gate
        self.normalize_gates = config.normalize_gates
        self.routing = routing
        n_scored = len(resident) if routing == "partitioned" else config.n_experts
        self.weight = nn.Parameter(torch.empty(n_scored, config.d_model, device=device, dtype=dtype))
        ids_R, slots_E = lookup(config.n_experts, resident, copied=routing == "shadow")
        self.register_buffer("resident_ids", ids_R.to(self.weight.device), persistent=False)
        self.register_buffer("slot_of_expert", slots_E.to(self.weight.device), persistent=False)
        bias = torch.zeros(n_scored, device=device, dtype=torch.float32) if config.balance == "bias" else None
        self.register_buffer("balance_bias", bias)
        self.measures_entropy = True
        self._random: torch.Generator | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bias = self.balance_bias
        super()._apply(fn, recurse)
        # A step of 1e-3 vanishes in a bfloat16 bias, and `.to(bfloat16)` casts buffers like weights.
        if bias is not None and self.balance_bias is not None and self.balance_bias.dtype != torch.float32:
            self.balance_bias = bias.to(self.balance_bias.device)
        return self

    def set_resident(self, resident: tuple[int, ...]) -> None:
        """Change in place which experts are resident; their number stays."""
        ids_R, slots_E = lookup(self.n_experts, resident, copied=self.routing == "shadow")
        self.resident_ids.copy_(ids_R)
        self.slot_of_expert.copy_(slots_E)

    @contextmanager
    def at_random(self, generator: torch.Generator) -> Iterator[None]:
        """Inside the context, give each token's gates to experts drawn uniformly without replacement: a baseline.

        Args:
            generator: Of the router's device.
        """
        self._random = generator
        try:
            yield
        finally:
            self._random = None

    @property
    def is_random(self) -> bool:
        """Whether experts are drawn at random now."""
        return self._random is not None

    def expert_ids(self, picks_TK: Tensor) -> Tensor:
        """Turn rows of this router, as in `RoutingStats.picks_TK`, into expert ids."""
        # While all experts are live for a validation, a partitioned router has E rows, of which row e is expert e.
        return self.resident_ids[picks_TK] if self.routing == "partitioned" else picks_TK

    def is_live(self, picks_TK: Tensor) -> Tensor:
        """Whether the experts of picks, as in `RoutingStats.picks_TK`, are resident."""
        return self.slot_of_expert[self.expert_ids(picks_TK)] < self.resident_ids.numel()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, RoutingStats]:
        """Pick experts for each token.

        Args:
            x_TD: Tokens (T,D).

        Returns:
            `gates_TK` float32, `slots_TK` int64 (the row of the expert in the stacked tensors, from R on without
            one, see `lookup`) and the statistics.
        """
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            logits_TN = F.linear(x_TD.float(), self.weight.float())
            scores_TN = _sigmoid(logits_TN) if self.gate == "sigmoid" else logits_TN.softmax(dim=-1)
            n_scored = scores_TN.shape[1]
            # The bias is for choosing only; the gate stays the score (arXiv 2408.15664, §3).
            choose_TN = scores_TN if self.balance_bias is None else scores_TN.detach() + self.balance_bias
            chosen_TK, load_N = _choose(choose_TN.detach(), min(self.top_k, n_scored))
            gates_TK = scores_TN.gather(1, chosen_TK)
            if self.normalize_gates:
                # As a softmax: with a bias all chosen scores may be 0 in float32, and 0/0 is not a gate.
                chosen_logits_TK = logits_TN.gather(1, chosen_TK)
                log_scores_TK = -F.softplus(-chosen_logits_TK) if self.gate == "sigmoid" else chosen_logits_TK
                gates_TK = log_scores_TK.softmax(dim=-1)
            if self._random is not None:
                order_TN = torch.rand(scores_TN.shape, generator=self._random, device=scores_TN.device)
                chosen_TK, load_N = _choose(order_TN, chosen_TK.shape[1])
            slots_TK = chosen_TK if self.routing == "partitioned" else self.slot_of_expert[chosen_TK]
            shares_TN = scores_TN
            if self.gate == "sigmoid":
                shares_TN = scores_TN / scores_TN.sum(dim=-1, keepdim=True)
            z = logits_TN.logsumexp(dim=-1).square().mean()
            stats = self._stats(chosen_TK, load_N, slots_TK, shares_TN, z, gates_TK)
        return gates_TK, slots_TK, stats

    def _stats(
        self, chosen_TK: Tensor, load_N: Tensor, slots_TK: Tensor, shares_TN: Tensor, z: Tensor, gates_TK: Tensor
    ) -> RoutingStats:
        importance_N = shares_TN.mean(dim=0)
        if self.routing == "partitioned":
            zeros_E = importance_N.new_zeros(self.n_experts)
            load_E = zeros_E.index_copy(0, self.resident_ids, load_N)
            importance_E = zeros_E.index_copy(0, self.resident_ids, importance_N)
        else:
            load_E, importance_E = load_N, importance_N
        live = (slots_TK < self.resident_ids.numel()).sum()
        gate_entropy = _entropy(shares_TN.detach()) if self.measures_entropy else None
        return RoutingStats(
            load_E, live, chosen_TK.numel(), importance_E, z, gate_entropy, chosen_TK, gates_TK.detach()
        )

    @torch.no_grad()
    def update_balance_bias(self, load_E: Tensor, rate: float) -> None:
        """Move the bias of each scored expert by `rate` towards the mean load (arXiv 2408.15664, algorithm 1).

        Args:
            load_E: Picks of each expert (E,) since the last update; over more than one batch, summed.
            rate: Size of the step.
        """
        if self.balance_bias is None:
            return
        load_N = load_E[self.resident_ids] if self.routing == "partitioned" else load_E
        self.balance_bias += rate * torch.sign(load_N.mean() - load_N)


def _sigmoid(logits_TN: Tensor) -> Tensor:
    """Sigmoid scores, never all 0 for a token: they are divided by their sum.

    float32 has no sigmoid below a logit of about -103. There it is an exponential, whose shares do not change when all
    of a token's logits are moved up until the largest is `LOWEST`.
    """
    below_T1 = (logits_TN.detach().amax(dim=-1, keepdim=True) - LOWEST).clamp(max=0)
    return (logits_TN - below_T1).sigmoid()


def _choose(scores_TN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the places of each token's K largest scores (T,K), and how often each is among them, float32 (N,)."""
    if kernels.taken(scores_TN.device, scores_TN.dtype):
        # torch's selection, sorting and counting take ten times as long (docs/benchmarks).
        chosen_TK, counts_BN = rows.choose_experts(scores_TN, top_k)
        return chosen_TK, counts_BN.sum(dim=0).float()
    chosen_TK = scores_TN.topk(top_k, dim=-1).indices
    # float32 is explicit: in Lightning's bf16-true steps the default type is bfloat16, which counts to 256.
    zeros = partial(torch.zeros, device=scores_TN.device, dtype=torch.float32)
    return chosen_TK, zeros(scores_TN.shape[1]).scatter_add_(0, chosen_TK.flatten(), zeros(chosen_TK.numel()) + 1)


def _entropy(shares_TN: Tensor) -> Tensor:
    n_tokens, n_scored = shares_TN.shape
    # One scored expert leaves no choice: the entropy is 0, and so is its bound.
    bound = math.log(n_scored) if n_scored > 1 else 1.0
    return torch.special.entr(shares_TN).sum() / (n_tokens * bound)


def lookup(n_experts: int, resident: tuple[int, ...], *, copied: bool) -> tuple[Tensor, Tensor]:
    """Return `resident_ids` (R,) and `slot_of_expert` (E,) on the CPU, int64.

    The r-th resident has slot r. All others have slot R, or if they are copied, the a-th of them slot R + a.
    """
    ids_R = torch.tensor(resident, dtype=torch.int64, device="cpu")
    slots_E = torch.full((n_experts,), len(resident), dtype=torch.int64, device="cpu")
    slots_E[ids_R] = torch.arange(len(resident), device="cpu")
    if copied:
        slots_E[list(absent_ids(n_experts, resident))] = torch.arange(len(resident), n_experts, device="cpu")
    return ids_R, slots_E
