"""A site's model shared out among its ranks by FSDP2, from outside: the model's own code knows one device.

Experts are cut along an axis that is not the experts': every rank has a slice of each resident, wherever placement puts
it, so that averages, migration and the optimizer's rows work on slices as on whole tensors. All else is cut along its
first axis. The inner optimizer and the rounds see plain tensors, which are the storage of FSDP's sharded parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Routing
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.slices import Slices


def check_shares(config: ModelConfig, routing: Routing, n_ranks: int) -> None:
    """Check that a model's experts can be cut into equal slices.

    Args:
        config: The architecture.
        routing: With `partitioned` rows of routers are cut too.
        n_ranks: Ranks of a site.

    Raises:
        ConfigError: If a width is no multiple of them.
    """
    widths = {"d_model": config.d_model} | ({} if routing == "partitioned" else {"d_expert": config.d_expert})
    if all(width % n_ranks for width in widths.values()):
        valid = [n for n in range(1, config.d_model + 1) if any(width % n == 0 for width in widths.values())]
        near = ", ".join(map(str, [n for n in valid if n < n_ranks][-2:] + [n for n in valid if n > n_ranks][:1]))
        told = " or ".join(f"model.architecture.{name} ({width})" for name, width in widths.items())
        raise ConfigError("ranks_per_site", n_ranks, f"must divide {told} with inside: shard",
                          f"type one of {near}, or inside: replicate")  # fmt: skip


def shard(model: Transformer, mesh: DeviceMesh, place: int, products: torch.dtype | None = None) -> Slices:
    """Share a model out among the ranks of a site: afterwards each keeps its slices.

    Args:
        model: On its device, the same on all ranks.
        mesh: Of the site's ranks.
        place: Of this rank.
        products: Type in which experts' products run, if it is not that of the weights: experts are gathered in it,
            which is what products would cast them to; their gradients are summed in float32.

    Raises:
        RuntimeError: If it has been cut before, by a run whose processes have parted.
    """
    if isinstance(model, FSDPModule):
        raise RuntimeError("this model was cut into slices by an earlier run: give the Trainer a new module")
    n_ranks, stacked = mesh.size(), model.expert_tensors()
    cut = {}
    for name, parameter in model.named_parameters():
        # Of experts the first axis that can be cut evenly: FSDP pads no other than axis 0.
        axes = [i for i in range(1, parameter.dim()) if parameter.shape[i] % n_ranks == 0] if name in stacked else [0]
        cut[name] = axes[0], parameter.shape[axes[0]]
    axis_of = {parameter: cut[name][0] for name, parameter in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        if products is not None:  # all else is small, and routers and norms are used as float32
            fully_shard(block.moe.experts, mesh=mesh, mp_policy=policy,
                        shard_placement_fn=lambda parameter: Shard(axis_of[parameter]))  # fmt: skip
        fully_shard(block, mesh=mesh, shard_placement_fn=lambda parameter: Shard(axis_of[parameter]))
    # The output matrix is used after the forward pass, too, by the loss.
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(axis_of[parameter]),
                reshard_after_forward=False)  # fmt: skip
    _fsdp(model)._get_fsdp_state()._lazy_init()  # else a block that is evaluated first takes itself for the root
    return Slices(n_ranks, place, cut)


def reshard(model: nn.Module) -> None:
    """Forget gathered weights: slices have changed, or will."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_root(model: nn.Module) -> None:
    """Gather what is outside of the blocks, for evaluations that go through them one by one, until `reshard`."""
    _fsdp(model).unshard()


def hold_gathered(block: nn.Module, *, hold: bool) -> None:
    """Gather a block's weights and keep them, or forget them and go on as in training."""
    for module in block.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not hold, recurse=False)
            if hold:
                module.unshard()
            else:
                module.reshard()


def _fsdp(module: nn.Module) -> Any:
    assert isinstance(module, FSDPModule)
    return module
