"""The transport: the only place where bytes cross between sites. Every collective is counted in the ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_pl.codec import GROUP, Codec
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.inside import Inside
from fomoe_pl.federation.ledger import Kind, Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.liveness import PATIENCE, raise_if_lost, sites_watched, wait_watching
from fomoe_pl.federation.settings import WireDtype
from fomoe_pl.federation.topology import Topology


def bucket_numel(bucket_bytes: int, dtype: WireDtype) -> int:
    """Most elements of a bucket."""
    wire: torch.dtype = getattr(torch, dtype)
    return bucket_bytes // wire.itemsize


def slice_numel(numel: int, n_sites: int) -> int:
    """Elements of a slice of coded values, of which each site of a holder set averages one: whole groups, padded."""
    return -(-numel // (n_sites * GROUP)) * GROUP


def coded_bytes(codec: Codec, numel: int, n_sites: int) -> int:
    """Bytes that a site sends in an average of coded values over a holder set of several sites.

    Two sites, and more where the codec is sparse, give each other all values. Else they give each other site its slice,
    and the mean of their own one.
    """
    if are_gathered(codec, n_sites):
        return (n_sites - 1) * codec.nbytes(numel)
    return 2 * (n_sites - 1) * codec.nbytes(slice_numel(numel, n_sites))


def are_gathered(codec: Codec, n_sites: int) -> bool:
    """Whether each site gets the codes of all others, in one collective."""
    return n_sites == 2 or bool(getattr(codec, "is_sparse", False))


class Pending:
    """A collective that has been started.

    Args:
        wait: Waits for its end and returns the result.
        middle: Of one that needs a second collective: waits for the first and starts that. Its argument is whether it
            runs beside the site's computation, see `Transport.beside`.
    """

    def __init__(self, wait: Callable[[], Tensor], middle: Callable[[bool], None] | None = None) -> None:
        self._wait, self._middle = wait, middle

    @property
    def has_middle(self) -> bool:
        """Whether `go_on` has something to do."""
        return self._middle is not None

    def go_on(self, *, beside: bool = False) -> None:
        """Start the second collective, if there is one and it has not been started."""
        middle, self._middle = self._middle, None
        if middle is not None:
            middle(beside)

    def wait(self) -> Tensor:
        """The result; called once.

        Raises:
            SiteLostError: If a site does not answer any more.
        """
        self.go_on()
        return self._wait()


class Thread:
    """Work that a thread does; what it raises is raised where it is waited for.

    Args:
        work: What is done.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._error = work, list[Exception]()
        self._thread = threading.Thread(target=self._run, daemon=True, name="averages")  # it may wait without end
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error.append(error)

    def join(self, meanwhile: Callable[[], None]) -> None:
        """Wait for its end; `meanwhile` is called each second."""
        while self._thread.is_alive():
            self._thread.join(1.0)
            meanwhile()
        if self._error:
            raise self._error.pop()


class Transport:
    """Process groups and counted collectives between sites.

    Args:
        topology: This rank's place.
        holder_sets: Every holder set (sorted sites) that a collective may run over; groups are made here, once,
            in sorted order, the same on every rank.
        ledger: Where bytes are counted.
        device: Where wire buffers live: the CPU for gloo, the rank's device for NCCL.
        dtype: dtype of averaged values on the wire; sums are decoded to float32.
        bucket_bytes: Upper bound of one buffer (a single larger piece gets a buffer of its own).
        timeout: After which a collective raises.
        home: Where the values live that are averaged; None is the wire's device. Host buffers for values of a GPU are
            page-locked.
        inside: The ranks of this site; None makes their group.
        slices: Whether each of them has slices of its own of all values: then ranks of the same place in their sites
            average with each other. Else they all have the same: the first one speaks for the site, and gives the
            others what it gets.
        weights: Of each site in averages, or None for even ones.
        overlapped: Whether averages travel while the site computes: then those over all sites have a group of their
            own, for what a thread sends in it must not get between the messages of others.
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
        inside: Inside | None = None,
        slices: bool = False,
        weights: Sequence[float] | None = None,
        overlapped: bool = False,
    ) -> None:
        self.topology = topology
        self.speaks = slices or topology.leads
        self._alone = slices or topology.n_ranks == 1  # in what it does between sites
        self.inside = Inside(topology, device) if inside is None else inside
        self.home = device if home is None else home
        self.pinned = self.home.type == "cuda" and device.type == "cpu"
        self.ledger = ledger
        self.weights = None if weights is None or len(set(weights)) == 1 else tuple(weights)
        self.device = device
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.bucket_numel = bucket_numel(bucket_bytes, dtype)
        self.patience = PATIENCE if timeout is None else min(PATIENCE, timeout.total_seconds())
        self.everyone = everyone = tuple(range(topology.n_sites))
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for sites in sorted({*holder_sets, everyone}):
            self._groups[sites] = None  # of one site nothing is sent; None is the world
            if len(sites) > 1 and len(sites) < topology.world_size:
                self._groups[sites] = self._new_group(sites, slices, timeout)

        self._averages = dict(self._groups)
        if overlapped and topology.n_sites > 1:
            self._averages[everyone] = self._new_group(everyone, slices, timeout)
        self._queue: torch.cuda.Stream | None = None

    @property
    def side_by_side(self) -> bool:
        """Whether averages of several holder sets may be on their way at once while the site waits for them.

        Over NCCL not: a device that synchronises waits for all that has been queued, among it what another site starts
        only after a second half that this one would have to start.
        """
        return self.device.type == "cpu"

    def _new_group(self, sites: tuple[int, ...], slices: bool, timeout: timedelta | None) -> dist.ProcessGroup | None:
        """The group of this rank's place in the sites; None where the first ranks alone have one."""
        own = None
        for place in range(self.topology.n_ranks if slices else 1):  # all ranks make all groups
            group = dist.new_group(list(self.topology.peers(sites, place)), timeout=timeout)
            own = group if place == self.topology.place else own
        return own

    def average(
        self, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: LeftOut = LeftOut(), codec: Codec | None = None,  # noqa: B008  never changed
        lost: Callable[[Tensor], None] | None = None, *, between: bool = False,
    ) -> Pending:  # fmt: skip
        """Start to average values over the sites of a holder set; every site of it calls this in the same order.

        Args:
            kind: Ledger kind.
            sites: The holder set; this rank's site is one of it.
            numel: Elements of all values together, equal on all holders.
            read: Gives the values, float32, on the tensors' own device; not called where this site is left out.
            left_out: Sites whose weight is zero, the same on all sites. The mean is over the others, and none of
                numbers where there is no other.
            codec: Of the values on the wire; None is a cast to the transport's dtype.
            lost: Takes, before the mean is there, what coding has lost of this site's values, flat float32. The mean
                over the sites of values less what was lost is the mean that all get; a site that is left out has
                lost nothing, nor is anybody told what coding the mean of its slice has lost.
            between: Keep out of the groups in which averages travel beside the site's computation; for values that are
                not coded, and are waited for at once.

        Returns:
            What waits for the mean: one flat float32 tensor, on the tensors' own device.
        """
        if len(sites) == 1:  # nothing crosses, so nothing is rounded to the wire's dtype either
            alone = torch.cat([value.reshape(-1) for value in read()])
            if lost is not None:
                lost(torch.zeros_like(alone))
            return Pending(lambda: alone)
        if self._alone:
            return self._start_average(kind, sites, numel, read, left_out, codec, lost, between=between)
        kept: list[Tensor] = []
        note = None if lost is None else kept.append
        started = None
        if self.speaks:
            started = self._start_average(kind, sites, numel, read, left_out, codec, note, between=between)

        def mean() -> Tensor:
            told = torch.empty(numel, dtype=torch.float32, device=self.home) if started is None else started.wait()
            self._told(told)
            if lost is not None:
                lost(self._told(kept[0] if kept else torch.empty_like(told)))
            return told

        if started is None or not started.has_middle:
            return Pending(mean)
        return Pending(mean, lambda beside: started.go_on(beside=beside))

    def _start_average(
        self, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: LeftOut, codec: Codec | None, lost: Callable[[Tensor], None] | None, *, between: bool,
    ) -> Pending:  # fmt: skip
        """As `average`, of several sites, on the rank that speaks for its site."""
        if codec is not None:
            average = self._average_gathered if are_gathered(codec, len(sites)) else self._average_coded
            return average(codec, kind, sites, numel, read, left_out, lost)
        buffer = self._filled(numel, None if self.topology.site in left_out.known else self._weighted(read))
        wait = self._start_all_reduce(kind, buffer, sites, between=between)

        def mean() -> Tensor:
            wait()
            total = buffer.to(self.home, non_blocking=True).float()
            total /= left_out.number(sites, self.home, self.weights)
            return total

        return Pending(mean)

    def _weighted(self, read: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """Values times this site's weight."""
        if self.weights is None:
            return read
        weight = self.weights[self.topology.site]
        return lambda: torch._foreach_mul(list(read()), weight)

    def _coded_values(
        self, codec: Codec, numel: int, shape: tuple[int, int], read: Callable[[], Sequence[Tensor]] | None,
        *, feeds_back: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What a site gives to an average of codes.

        Args:
            codec: Of the values.
            numel: Of the values.
            shape: Of the rows that they are coded in, zeros behind them.
            read: Gives the values; None codes zeros.
            feeds_back: Whether somebody wants to know what is lost.

        Returns:
            The codes, a row for each, on the wire's device; what coding has lost of the values, in the rows' shape.
        """
        values = torch.zeros(shape, dtype=torch.float32, device=self.home)
        if read is not None:
            flat = [value.reshape(-1) for value in read()]
            torch._foreach_copy_(list(values.view(-1)[:numel].split([len(value) for value in flat])), flat)
            del flat  # as large as the bucket, and coding needs room
        codes = self._coded(codec, values)
        if not feeds_back:
            return codes, None
        return codes, torch.zeros_like(values) if read is None else values - codec.decode(codes.to(self.home), shape[1])

    def _average_gathered(
        self, codec: Codec, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: LeftOut, lost: Callable[[Tensor], None] | None,
    ) -> Pending:  # fmt: skip
        """As `average`, of codes: all give each other theirs, and add in the order of the sites."""
        own = None if self.topology.site in left_out.known else read
        [outgoing], kept = self._coded_values(codec, numel, (1, numel), own, feeds_back=lost is not None)
        g = len(sites)
        incoming = torch.empty(g, len(outgoing), dtype=torch.uint8, device=self.device)
        self.ledger.send(kind, (g - 1) * len(outgoing))
        with sites_watched(self.topology, self.patience):
            work = dist.all_gather(list(incoming.unbind()), outgoing, group=self._averages[sites], async_op=True)

        def mean() -> Tensor:
            self._wait(work)
            if lost is not None and kept is not None:
                lost(kept[0])
            arrived = incoming.to(self.home)
            # Of a pair both at once; of more one at a time, as there may be many.
            rows = codec.decode(arrived, numel) if g == 2 else (codec.decode(row, numel) for row in arrived)
            return self._mean_of(rows, sites, left_out)

        return Pending(mean)

    def _average_coded(
        self, codec: Codec, kind: Kind, sites: tuple[int, ...], numel: int, read: Callable[[], Sequence[Tensor]],
        left_out: LeftOut, lost: Callable[[Tensor], None] | None,
    ) -> Pending:  # fmt: skip
        """As `average`, of codes, which cannot be added: each site averages an equal slice, and gives it to all."""
        n, site = len(sites), self.topology.site
        n_slice, own, out = slice_numel(numel, n), sites.index(site), site in left_out.known
        outgoing, kept = self._coded_values(
            codec, numel, (n, n_slice), None if out else read, feeds_back=lost is not None
        )
        incoming = torch.empty_like(outgoing)
        group, sent = self._averages[sites], (n - 1) * outgoing.shape[1]
        self.ledger.send(kind, sent)
        self.ledger.send(kind, sent)  # here too, for a ledger is no matter of threads
        with sites_watched(self.topology, self.patience):
            shared = dist.all_to_all_single(incoming, outgoing, group=group, async_op=True)
        second: list[tuple[Tensor, dist.Work]] = []

        def share_mean(beside: bool) -> None:
            if beside:
                shared.wait()
            else:
                self._wait(shared)
            there = incoming.to(self.device if beside else self.home)
            total = self._mean_of(codec.decode(there, n_slice), sites, left_out)
            agreed = self._coded(codec, total[None])[0]
            second.append((total, dist.all_gather(list(incoming.unbind()), agreed, group=group, async_op=True)))

        def mean() -> Tensor:
            total, work = second.pop()
            self._wait(work)
            # All decode the same codes, the slice's owner too: the same bits everywhere.
            decoded = codec.decode(incoming.to(self.home), n_slice)
            if lost is not None and kept is not None:
                if not out:  # of the mean of its slice, which is of all of them: the owner makes up for it
                    share = 1.0 if self.weights is None else self.weights[site]
                    total_weight = left_out.number(sites, self.home, self.weights)
                    kept[own] += (total.to(self.home) - decoded[own]) * (total_weight / share)
                lost(kept.view(-1)[:numel])
            return decoded.reshape(-1)[:numel]

        return Pending(mean, share_mean)

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do something beside the site's computation; returns what waits until it is done.

        Over gloo a thread does it. Over NCCL it is only queued, on a stream of its own: the host waits for nothing.

        Args:
            work: Touches no ledger. Over gloo it may use the wire's device alone.
        """
        if self.device.type == "cuda":
            queue = self._queue = self._queue or torch.cuda.Stream(self.device)
            with torch.cuda.stream(queue):
                work()
            return lambda: torch.cuda.current_stream().wait_stream(queue)
        thread = Thread(work)

        def wait() -> None:
            with sites_watched(self.topology, self.patience):
                thread.join(lambda: raise_if_lost(self.topology))

        return wait

    def _mean_of(self, decoded: Iterable[Tensor], sites: tuple[int, ...], left_out: LeftOut) -> Tensor:
        """The mean of the sites' rows, added in the order of the sites; codes of zeros need not be zeros."""
        total = left_out.sum(decoded, sites, self.weights)
        total /= left_out.number(sites, total.device, self.weights)
        return total

    def _coded(self, codec: Codec, rows: Tensor) -> Tensor:
        """Rows as bytes on the wire's device.

        Raises:
            ConfigError: If the codec makes other bytes than it says.
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

    def sum(self, kind: Kind, values: Tensor, *, of_slices: bool = False) -> Tensor:
        """Sum a small tensor over all sites.

        Args:
            kind: Ledger kind.
            values: Of a site's ranks the first one's count.
            of_slices: Whether they are about slices, where ranks have some: then each rank's count at its place.

        Returns:
            A new tensor on the input's device and in its dtype, the same on all ranks, or of slices at each place.
        """
        if self.topology.n_sites == 1:
            return values.clone()
        return self.start_sum(kind, values, of_slices=of_slices)[1]()

    def start_sum(
        self, kind: Kind, values: Tensor, *, of_slices: bool = False
    ) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """As `sum`, of which the site does not wait.

        Returns:
            What gives the sum on the wire's device, also beside the site's computation (see `beside`); and what gives
            it on the input's device, and tells which sites are gone if it does not come.
        """
        buffer = values.to(self.device, copy=True)
        if self.topology.n_sites == 1:
            return lambda: buffer, lambda: buffer.to(values.device)
        work: dist.Work | None = None
        each = of_slices and self._alone
        if each or self.topology.leads:
            self.ledger.all_reduce(kind, buffer.nbytes, self.topology.n_sites)
            with sites_watched(self.topology, self.patience):
                work = dist.all_reduce(buffer, group=self._groups[self.everyone], async_op=True)

        def there() -> Tensor:
            assert work is not None, "only the rank that speaks for its site has the sum by itself"
            work.wait()
            return buffer

        def wait() -> Tensor:
            if work is not None:
                self._wait(work)
            return (buffer if each else self.inside.share_(buffer)).to(values.device)

        return there, wait

    def _told(self, values: Tensor) -> Tensor:
        """Values that the rank which speaks for its site has got, on all ranks that have nothing of their own."""
        return values if self._alone else self.inside.share_(values)

    def largest(self, kind: Kind, values: Tensor) -> Tensor:
        """Elementwise maximum of a small tensor over all ranks; a new tensor on the input's device."""
        buffer = (values.clone() if self._alone else self.inside.largest(values)).to(self.device)
        if self.topology.n_sites > 1 and self.speaks:
            self.ledger.all_reduce(kind, buffer.nbytes, self.topology.n_sites)
            with sites_watched(self.topology, self.patience):
                work = dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=self._groups[self.everyone], async_op=True)
                wait_watching(work, self.topology)
        return self._told(buffer).to(values.device)

    def anywhere(self, found: list[str]) -> list[str]:
        """What a rank has found in its slices, or that another rank of the site has found something in its own."""
        if not self.inside.largest(torch.tensor([len(found)])):
            return []
        return found or ["slices of other ranks"]

    def _start_all_reduce(
        self, kind: Kind, buffer: Tensor, sites: tuple[int, ...], *, between: bool = False
    ) -> Callable[[], None]:
        """Begin to add a buffer over sites in place; returns what waits until it is done."""
        self.ledger.all_reduce(kind, buffer.nbytes, len(sites))
        with sites_watched(self.topology, self.patience):
            group = (self._groups if between else self._averages)[sites]
            work = dist.all_reduce(buffer, group=group, async_op=True)

        return lambda: self._wait(work)

    def _wait(self, work: dist.Work) -> None:
        """Wait for a collective as long as its sites answer."""
        with sites_watched(self.topology, self.patience):
            wait_watching(work, self.topology)

    def exchange(
        self,
        kind: Kind,
        outgoing: Sequence[tuple[int, Tensor]],
        incoming: dict[int, int],
        dtype: torch.dtype,
    ) -> dict[int, Tensor]:
        """Send tensors point to point and receive from others; every site must call it.

        Args:
            kind: Ledger kind.
            outgoing: (receiver site, tensor) in the order in which the receiver reads them.
            incoming: Giver site -> number of elements that come from it.
            dtype: dtype on the wire, the same on all sites.

        Returns:
            Giver site -> flat tensor of what it sent, in the order in which it listed it, on the wire's device.
        """
        return self.start_exchange(kind, outgoing, incoming, dtype)()

    def start_exchange(
        self, kind: Kind, outgoing: Sequence[tuple[int, Tensor]], incoming: dict[int, int], dtype: torch.dtype
    ) -> Callable[[], dict[int, Tensor]]:
        """As `exchange`, of which the site does not wait; returns what does."""
        sites = self.everyone
        receives = [incoming.get(site, 0) for site in sites]
        target = torch.empty(sum(receives), dtype=dtype, device=self.device)
        work = self._send_parts(kind, outgoing, receives, target) if self.speaks else None

        def arrived() -> dict[int, Tensor]:
            if work is not None:
                self._wait(work)
            self._told(target)
            return {site: part for site, part in zip(sites, target.split(receives), strict=True) if part.numel()}

        return arrived

    def _send_parts(
        self, kind: Kind, outgoing: Sequence[tuple[int, Tensor]], receives: list[int], target: Tensor
    ) -> dist.Work:
        """As `exchange`, on the rank that speaks for its site."""
        sites, dtype = self.everyone, target.dtype
        ordered = sorted(outgoing, key=lambda pair: pair[0])  # stable: keeps each receiver's order
        sends = [sum(tensor.numel() for to, tensor in ordered if to == site) for site in sites]
        source = torch.empty(sum(sends), dtype=dtype, device=self.device)
        for (_, tensor), part in zip(ordered, source.split([t.numel() for _, t in ordered]), strict=True):
            part.copy_(tensor.reshape(-1))
        self.ledger.send(kind, source.nbytes)
        with sites_watched(self.topology, self.patience):
            group = self._groups[self.everyone]
            work = dist.all_to_all_single(target, source, receives, sends, group=group, async_op=True)
        return work

    def close(self) -> None:
        """Drop the process groups, so that the backend ends cleanly."""
        for group in {*self._groups.values(), *self._averages.values()}:
            if group is not None and dist.is_initialized():  # else they went with the world
                dist.destroy_process_group(group)
        self._groups.clear()
        self.inside.close()
        self._averages.clear()
