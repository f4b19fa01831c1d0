"""Stock data parallelism with its bytes counted from its real gradient buckets: the synchronous baseline."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.liveness import sites_watched
from fomoe_pl.federation.topology import Topology
from fomoe_pl.lightning_internals import HookedDDP
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.checks import OWN_HOOK, check_arguments


def _counted_all_reduce(ledger: Ledger, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    ledger.all_reduce("dense", bucket.buffer().nbytes, dist.get_world_size())
    return allreduce_hook(cast(dist.ProcessGroup, None), bucket)


class CountedDDPStrategy(SiteStrategy, HookedDDP):
    """Lightning's DDP; a communication hook counts each bucket and then does what DDP would have done.

    All gradients are counted as `dense`: DDP knows no experts.

    Args:
        async_save: Write checkpoints while training goes on, from a copy in host memory.
        **kwargs: As for Lightning's `DDPStrategy`.
    """

    saves_when_stopped = False

    def __init__(self, async_save: bool = True, **kwargs: Any) -> None:
        kwargs = check_arguments(kwargs, OWN_HOOK)
        # All ranks draw the same initial weights and the balance bias is updated from summed loads, so neither
        # parameters nor buffers need DDP's broadcasts.
        super().__init__(init_sync=False, broadcast_buffers=False, **kwargs)
        self.init_site(async_save)

    @property
    def topology(self) -> Topology:
        """Every rank is a site of its own."""
        return Topology(self.world_size, 1, self.global_rank)

    def wrap(self, model: torch.nn.Module) -> DistributedDataParallel:
        """As Lightning's, without torch's warning."""
        with warnings.catch_warnings():
            # Its successor is newer than the oldest torch that is supported, and does something else.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
            return super().wrap(model)

    def register_hook(self, model: DistributedDataParallel) -> None:
        """Have every bucket counted."""
        model.register_comm_hook(self.ledger, _counted_all_reduce)

    def sum_over_sites(self, values: Tensor, kind: str = "evaluation") -> Tensor:
        """Sum over ranks, counted."""
        if self.world_size == 1:
            return values
        total = values.to(self.root_device, copy=True)
        self.ledger.all_reduce(cast(Kind, kind), total.nbytes, self.world_size)
        with sites_watched(self.topology):
            dist.all_reduce(total)
        return total.to(values.device)

    def reduce_loads(self, loads_LE: Tensor) -> Tensor:
        """Loads of all ranks: one model, one bias."""
        return self.sum_over_sites(loads_LE, "dense")

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One synchronous step."""
        with sites_watched(self.topology):  # the backward pass averages the gradients
            return super().optimizer_step(optimizer, closure, model, **kwargs)
