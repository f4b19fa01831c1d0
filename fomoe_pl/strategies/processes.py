"""One process for each rank: devices, ranks and collectives, as Lightning's DDPStrategy without its wrapper."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only


class SiteProcesses(ParallelStrategy):
    """A parallel strategy whose ranks compute by themselves: gradients are no business of its process group."""

    is_distributed = True
    num_nodes = 1

    def init_processes(self, backend: str | None, timeout: timedelta) -> None:
        """Take what the group is made with; called by the constructor."""
        self._process_group_backend, self._timeout = backend, timeout

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks of this machine."""
        return len(self.parallel_devices or ())

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How a sampler shares data out to all ranks."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """Backend as it was given, or as it was chosen by device."""
        return self._process_group_backend

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def set_world_ranks(self) -> None:
        """Number the ranks, machine by machine."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """The accelerator's environment, then the process group."""
        super().setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Draw the random numbers that all ranks start with; the group is there already."""
        reset_seed()
        self._process_group_backend = self._get_process_group_backend()

    def model_to_device(self) -> None:
        """Move the model to this rank's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.root_device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object from one rank to all."""
        objects = [obj]
        if dist.is_initialized():
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor over all ranks."""
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)
