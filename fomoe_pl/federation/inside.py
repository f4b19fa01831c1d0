"""What ranks of one site do together, over its own fast links: nothing crosses between sites, nothing is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_pl.federation.liveness import PATIENCE, sites_watched, wait_watching
from fomoe_pl.federation.state import buckets
from fomoe_pl.federation.topology import Topology


class Inside:
    """The process group of this rank's site. With one rank a site there is none, and all is as it is.

    Args:
        topology: This rank's place.
        device: Where buffers of collectives live: the rank's own GPU with NCCL, the CPU with gloo.
        backend: Of the group; None is that of the world.
        timeout: After which a collective raises.
    """

    def __init__(
        self, topology: Topology, device: torch.device, backend: str | None = None, timeout: timedelta | None = None
    ) -> None:
        self.topology, self.device = topology, device
        self._patience = PATIENCE if timeout is None else min(PATIENCE, timeout.total_seconds())
        self._group: dist.ProcessGroup | None = None
        self._last: dist.Work | None = None
        for site, ranks in enumerate(topology.ranks) if topology.world_size > topology.n_sites else ():
            group = dist.new_group(list(ranks), backend=backend, timeout=timeout)  # all ranks make all groups
            if site == topology.site and len(ranks) > 1:
                self._group = group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of this site; None if it has one."""
        return self._group

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the site's ranks, a new tensor on the input's device and in its dtype."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the site's ranks, likewise."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self._group is None:
            return values.clone()
        buffer = values.to(self.device, copy=True)
        self._wait(lambda: dist.all_reduce(buffer, op, group=self._group, async_op=True))
        return buffer.to(values.device)

    def share_(self, values: Tensor) -> Tensor:
        """Give all ranks of the site what the first one has, in place.

        Args:
            values: Contiguous, of one shape and dtype on all ranks; on others than the first any numbers.

        Returns:
            The values.
        """
        if self._group is not None:
            first = self.topology.ranks[self.topology.site].start
            buffer = values.to(self.device)
            self._wait(lambda: dist.broadcast(buffer, first, group=self._group, async_op=True))
            if buffer is not values:
                values.copy_(buffer)
        return values

    def joined(self, values: Tensor, axis: int, length: int) -> Tensor:
        """Join the slices that the site's ranks have of a tensor.

        Args:
            values: This rank's slice.
            axis: Along which the tensor is cut into equal chunks, the last ones shorter or empty.
            length: Of the whole tensor along it.

        Returns:
            The whole tensor, on all of them, on the input's device.
        """
        if self._group is None:
            return values
        shape = list(values.shape)
        shape[axis] = -(-length // self.topology.n_ranks)
        own = torch.zeros(shape, dtype=values.dtype, device=self.device)
        own.narrow(axis, 0, values.shape[axis]).copy_(values)
        parts = [torch.empty_like(own) for _ in range(self.topology.n_ranks)]
        self._wait(lambda: dist.all_gather(parts, own, group=self._group, async_op=True))
        return torch.cat(parts, axis).narrow(axis, 0, length).to(values.device)

    @torch.no_grad()
    def average_(self, values: Sequence[Tensor], numel: int = 2**26) -> None:
        """Replace tensors by their means over the site's ranks.

        Args:
            values: On one device, of the same shapes and dtypes on all ranks.
            numel: Most elements that are sent together.
        """
        if self._group is None:
            return
        if self._last is not None:
            last = self._last
            self._wait(lambda: last)  # done long ago, or its site has lost a rank
        for dtype in sorted({value.dtype for value in values}, key=str):
            alike = [value for value in values if value.dtype == dtype]
            for indices in buckets([value.numel() for value in alike], numel):
                self._average_together([alike[i] for i in indices])

    def _average_together(self, values: Sequence[Tensor]) -> None:
        direct = len(values) == 1 and values[0].is_contiguous() and values[0].device == self.device
        buffer = values[0] if direct else torch.cat([value.reshape(-1) for value in values]).to(self.device)
        with sites_watched(self.topology, self._patience):
            self._last = dist.all_reduce(buffer, group=self._group, async_op=True)
            self._last.wait()  # with NCCL the GPU waits, and the host goes on
        buffer /= self.topology.n_ranks
        if not direct:
            sizes = [value.numel() for value in values]
            parts = [part.view_as(value) for part, value in zip(buffer.split(sizes), values, strict=True)]
            torch._foreach_copy_(list(values), parts)

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        with sites_watched(self.topology, self._patience):
            wait_watching(start(), self.topology)

    def close(self) -> None:
        """Drop the group, so that the backend ends cleanly."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
