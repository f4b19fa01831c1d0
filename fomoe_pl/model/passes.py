"""One forward pass of training: the loss, and statistics.

Shapes: B batch, S sequence, L layers, E experts, T tokens, N statistics.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.losses import auxiliary_loss
from fomoe_pl.model.router import RoutingStats
from fomoe_pl.model.statistic import Statistic
from fomoe_pl.model.transformer import Transformer


class TrainingPass(NamedTuple):
    """Result of a forward pass. Only `total` has a gradient.

    Attributes:
        total: What is minimised, float32 (): cross entropy and the router's weighted losses.
        loss: Mean cross entropy, nats a token, float32 ().
        balance: Mean over layers of the load-balance loss, unweighted, float32 ().
        z: Mean over layers of the router z-loss, unweighted, float32 ().
        load_LE: Picks of each expert, ghosts included, float32.
        live_L: Picks of each layer that were executed, int64.
        gate_entropy_L: Mean entropy of the gates over its bound, float32; None if the routers do not measure it.
        picks: All picks of one layer, T·K.
        sums_NL: Sum over tokens of each requested statistic, by layer, float64; None without.
    """

    total: Tensor
    loss: Tensor
    balance: Tensor
    z: Tensor
    load_LE: Tensor
    live_L: Tensor
    gate_entropy_L: Tensor | None
    picks: int
    sums_NL: Tensor | None = None


def training_pass(
    model: Transformer, inputs_BS: Tensor, targets_BS: Tensor, statistics: Sequence[Statistic] = (),
    sum_loads: Callable[[Tensor], Tensor] | None = None,
) -> TrainingPass:  # fmt: skip
    """Run a model forward on one micro-batch.

    Args:
        model: The transformer.
        inputs_BS: Token ids, int64.
        targets_BS: Next tokens, int64; -100 does not count.
        statistics: Summed over the tokens.
        sum_loads: Adds numbers over all micro-batches that are one batch to the balance loss; None if it is this one.
    """
    hidden_BSD, stats = model(inputs_BS)
    loss = model.loss(hidden_BSD, targets_BS)
    load_LE = torch.stack([layer.load_E for layer in stats])
    shares_LE = None
    if sum_loads is not None:
        with torch.no_grad():
            summed_LE = sum_loads(load_LE)
            shares_LE = summed_LE / summed_LE.sum(1, keepdim=True)
    auxiliary = auxiliary_loss(stats, model.config, model.residency, shares_LE)
    entropies = [layer.gate_entropy for layer in stats if layer.gate_entropy is not None]
    return TrainingPass(
        total=loss + auxiliary.total,
        loss=loss.detach(),
        balance=auxiliary.balance.detach(),
        z=auxiliary.z.detach(),
        load_LE=load_LE,
        live_L=torch.stack([layer.live for layer in stats]),
        gate_entropy_L=torch.stack(entropies) if entropies else None,
        picks=stats[0].picks,
        sums_NL=_sums(statistics, model, stats) if statistics else None,
    )


@torch.no_grad()
def _sums(statistics: Sequence[Statistic], model: Transformer, stats: Sequence[RoutingStats]) -> Tensor:
    sums: list[list[Tensor]] = [[] for _ in statistics]
    for block, layer in zip(model.layers, stats, strict=True):
        router = block.moe.router
        routed = router.expert_ids(layer.picks_TK), layer.gates_TK, router.is_live(layer.picks_TK)
        for statistic, of_layers in zip(statistics, sums, strict=True):
            value_T = statistic.of_tokens(*routed)
            if value_T.shape != layer.picks_TK.shape[:1]:
                rule = f"of_tokens must give a number of each token, shape ({len(layer.picks_TK)},)"
                raise ConfigError(f"RoutingStability.statistics.{statistic.name}", tuple(value_T.shape), rule,
                                  "sum or average over the picks, dimension 1")  # fmt: skip
            of_layers.append(value_T.double().sum())
    return torch.stack([torch.stack(of_layers) for of_layers in sums])
