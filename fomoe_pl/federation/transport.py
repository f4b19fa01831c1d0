"""The transport: the only place where bytes cross between sites. Every collective is counted in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_pl.codec import Codec
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.liveness import PATIENCE, sites_watched, wait_watching
from fomoe_pl.federation.settings import WireDtype
from fomoe_pl.federation.topology import Topology


def bucket_numel(bucket_bytes: int, dtype: WireDtype) -> int:
    """Most elements of a bucket."""
    wire: torch.dtype = getattr(torch, dtype)
    return bucket_bytes // wire.itemsize


def slice_numel(numel: int, n_sites: int) -> int:
    """Elements of a slice of coded values, of which each site of a holder set averages one; the last is padded."""
    return -(-numel // n_sites)


class Pending:
    """A collective that has been started.

    Args:
        wait: waits for its end and returns the result.
    """

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait

    def wait(self) -> Tensor:
        """The result; called once.

        Raises:
            SiteLostError: if a site does not answer any more.
        """
        return self._wait()


class Transport:
    """Process groups and counted collectives between sites.

    Args:
        topology: this rank's place.
        holder_sets: every holder set (sorted sites) that a collective may run over; groups are made here, once,
            in sorted order, the same on every rank.
        ledger: where bytes are counted.
        device: where wire buffers live: the CPU for gloo, the rank's device for NCCL.
        dtype: dtype of averaged values on the wire; sums are decoded to float32.
        bucket_bytes: upper bound of one buffer (a single larger piece gets a buffer of its own).
        timeout: after which a collective raises.
        codec: of what is averaged in the kinds dense and expert; None is a cast to `dtype`.
        home: where the values live that are averaged; None is the wire's device. Host buffers for values of a GPU are
            page-locked.
    """

    def __init__(
        self,
        topology: Topology,
        holder_sets: Sequence[tuple[int, ...]],
        ledger: Ledger,
        *,
        device: torch.device,
        dtype: WireDtype = "float32",
        bucket_bytes: int = 64 * 2**20,
        timeout: timedelta | None = None,
        home: torch.device | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.topology = topology
        self.home = device if home is None else home
        self.pinned = self.home.type == "cuda" and device.type == "cpu"
        self.ledger = ledger
        self.device = device
        self.codec = codec
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.bucket_numel = bucket_numel(bucket_bytes, dtype)
        self.patience = PATIENCE if timeout is None else min(PATIENCE, timeout.total_seconds())
        self.everyone = everyone = tuple(range(topology.n_sites))
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for sites in sorted({*holder_sets, everyone}):
            self._groups[sites] = None  # of one site nothing is sent; None is the world
            if len(sites) > 1 and len(sites) < topology.world_size:
                # Ranks of the same place in their sites average with each other; all ranks make all groups.
                for place in range(topology.ranks_per_site):
                    group = dist.new_group(list(topology.peers(sites, place)), timeout=timeout)
                    if place == topology.local_rank:
                        self._groups[sites] = group

    def average(
        self, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: frozenset[int] = frozenset(),
    ) -> Pending:  # fmt: skip
        """Start to average values over the sites of a holder set; every site of it calls this in the same order.

        Args:
            kind: ledger kind.
            sites: the holder set; this rank's site is one of it.
            numel: elements of all values together, equal on all holders.
            read: gives the values, float32, on the tensors' own device; not called where this site is left out.
            left_out: sites whose weight is zero, the same on all sites, but not all of the holder set: the mean is
                over the others.

        Returns:
            What waits for the mean: one flat float32 tensor, on the tensors' own device.
        """
        n_taken = len([site for site in sites if site not in left_out])
        if len(sites) == 1:  # nothing crosses, so nothing is rounded to the wire's dtype either
            alone = torch.cat([value.reshape(-1) for value in read()])
            return Pending(lambda: alone)
        if self.codec is not None and kind != "moments":
            return self._average_coded(self.codec, kind, sites, numel, read, left_out)
        buffer = self._filled(numel, None if self.topology.site in left_out else read)
        wait = self._start_all_reduce(kind, buffer, sites)

        def mean() -> Tensor:
            wait()
            total = buffer.to(self.home, non_blocking=True).float()
            # A tensor: by a number a GPU multiplies with its inverse, and a site on a CPU would get other bits.
            total /= torch.full((), n_taken, dtype=torch.float32, device=self.home)
            return total

        return Pending(mean)

    def _average_coded(
        self, codec: Codec, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: frozenset[int],
    ) -> Pending:  # fmt: skip
        """As `average`, of codes, which cannot be added: each site averages an equal slice, and gives it to all."""
        n, n_taken = len(sites), len([site for site in sites if site not in left_out])
        n_slice = slice_numel(numel, n)
        values = torch.zeros(n * n_slice, dtype=torch.float32, device=self.home)
        if self.topology.site not in left_out:
            flat = [value.reshape(-1) for value in read()]
            torch._foreach_copy_(values[:numel].split([len(value) for value in flat]), flat)
        outgoing = self._coded(codec, values.view(n, n_slice))
        incoming = torch.empty_like(outgoing)
        group, sent = self._groups[sites], (n - 1) * outgoing.shape[1]
        self.ledger.send(kind, sent)
        with sites_watched(self.topology, self.patience):
            shared = dist.all_to_all_single(incoming, outgoing, group=group, async_op=True)

        def mean() -> Tensor:
            with sites_watched(self.topology, self.patience):
                wait_watching(shared, self.topology)
            total = torch.zeros(n_slice, dtype=torch.float32, device=self.home)
            for site, decoded in zip(sites, codec.decode(incoming.to(self.home), n_slice), strict=True):
                if site not in left_out:  # codes of zeros need not be zeros
                    total += decoded
            total /= torch.full((), n_taken, dtype=torch.float32, device=self.home)  # a tensor, as above
            self.ledger.send(kind, sent)
            with sites_watched(self.topology, self.patience):
                agreed = self._coded(codec, total[None])[0]
                work = dist.all_gather(list(incoming.unbind()), agreed, group=group, async_op=True)
                wait_watching(work, self.topology)
            # All decode the same codes, the slice's owner too: the same bits everywhere.
            return codec.decode(incoming.to(self.home), n_slice).reshape(-1)[:numel]

        return Pending(mean)

    def _coded(self, codec: Codec, rows: Tensor) -> Tensor:
        """Rows as bytes on the wire's device.

        Raises:
            ConfigError: if the codec makes other bytes than it says.
        """
        coded = codec.encode(rows)
        size = len(rows), codec.nbytes(rows.shape[1])
        if coded.dtype != torch.uint8 or coded.shape != size:
            rule = (
                f"encode must give uint8 {size} of float32 {tuple(rows.shape)}, not {coded.dtype} {tuple(coded.shape)}"
            )
            raise ConfigError("wire_codec", type(codec).__name__, rule, "see fomoe_pl.codec.Codec")
        return coded.to(self.device).contiguous()

    def _filled(self, numel: int, read: Callable[[], Sequence[Tensor]] | None) -> Tensor:
        buffer = torch.empty(numel, dtype=self.dtype, device=self.device, pin_memory=self.pinned)
        if read is None:
            return buffer.zero_()  # what the site has may be no number, and then zero times it is none either
        there = torch.empty_like(buffer, device=self.home, pin_memory=False) if self.pinned else buffer
        values = [value.reshape(-1) for value in read()]
        torch._foreach_copy_(there.split([len(value) for value in values]), values)
        if self.pinned:
            buffer.copy_(there, non_blocking=True)  # in one piece: the bus has its latencies, too
            torch.cuda.current_stream().synchronize()
        return buffer

    def sum(self, kind: Kind, values: Tensor) -> Tensor:
        """Sum a small tensor over all sites; returns a new tensor on the input's device and in its dtype."""
        if self.topology.n_sites == 1:
            return values.clone()
        buffer = values.to(self.device, copy=True)
        self._start_all_reduce(kind, buffer, self.everyone)()
        return buffer.to(values.device)

    def largest(self, kind: Kind, values: Tensor) -> Tensor:
        """Elementwise maximum of a small tensor over all sites; a new tensor on the input's device."""
        buffer = values.to(self.device, copy=True)
        if self.topology.n_sites > 1:
            self.ledger.all_reduce(kind, buffer.nbytes, self.topology.n_sites)
            with sites_watched(self.topology, self.patience):
                work = dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=self._groups[self.everyone], async_op=True)
                wait_watching(work, self.topology)
        return buffer.to(values.device)

    def _start_all_reduce(self, kind: Kind, buffer: Tensor, sites: tuple[int, ...]) -> Callable[[], None]:
        """Begin to add a buffer over sites in place; returns what waits until it is done."""
        self.ledger.all_reduce(kind, buffer.nbytes, len(sites))
        with sites_watched(self.topology, self.patience):
            work = dist.all_reduce(buffer, group=self._groups[sites], async_op=True)

        def wait() -> None:
            with sites_watched(self.topology, self.patience):
                wait_watching(work, self.topology)

        return wait

    def exchange(
        self,
        kind: Kind,
        outgoing: Sequence[tuple[int, Tensor]],
        incoming: dict[int, int],
        dtype: torch.dtype,
    ) -> dict[int, Tensor]:
        """Send tensors point to point and receive from others; every site must call it.

        Args:
            kind: ledger kind.
            outgoing: (receiver site, tensor) in the order in which the receiver reads them.
            incoming: giver site -> number of elements that come from it.
            dtype: dtype on the wire, the same on all sites.

        Returns:
            Giver site -> flat tensor of what it sent, in the order in which it listed it, on the wire's device.
        """
        sites = self.everyone
        ordered = sorted(outgoing, key=lambda pair: pair[0])  # stable: keeps each receiver's order
        sends = [sum(tensor.numel() for to, tensor in ordered if to == site) for site in sites]
        receives = [incoming.get(site, 0) for site in sites]
        source = torch.empty(sum(sends), dtype=dtype, device=self.device)
        for (_, tensor), part in zip(ordered, source.split([t.numel() for _, t in ordered]), strict=True):
            part.copy_(tensor.reshape(-1))
        target = torch.empty(sum(receives), dtype=dtype, device=self.device)
        self.ledger.send(kind, source.nbytes)
        with sites_watched(self.topology, self.patience):
            group = self._groups[self.everyone]
            work = dist.all_to_all_single(target, source, receives, sends, group=group, async_op=True)
            wait_watching(work, self.topology)
        return {site: part for site, part in zip(sites, target.split(receives), strict=True) if part.numel()}

    def close(self) -> None:
        """Drop the process groups, so that the backend ends cleanly."""
        for group in self._groups.values():
            if group is not None and dist.is_initialized():  # else they went with the world
                dist.destroy_process_group(group)
        self._groups.clear()
