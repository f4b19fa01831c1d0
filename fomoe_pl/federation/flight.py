"""Averages on their way: buckets that are started in one global order, some ahead of those that are waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_pl.codec import Codec
from fomoe_pl.federation.ledger import Kind
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.transport import Pending, Transport


@dataclass(frozen=True)
class Bucket:
    """What is averaged in one collective, or in two of codes.

    Attributes:
        kind: Ledger kind.
        sites: Over whom.
        numel: Elements of all values together.
        read: Gives this site's values, float32, when the collective is started.
        write: Takes their mean, one flat float32 tensor.
        codec: Of the values on the wire; None is a cast to the transport's dtype.
        lost: Takes, before `write`, what coding has lost of this site's values, one flat float32 tensor.
        instead: Called in the place of `write` where none of the sites had anything to give.
        between: Whether it is of no round, and may be sent while one's average is on its way; see `Transport.average`.
    """

    kind: Kind
    sites: tuple[int, ...]
    numel: int
    read: Callable[[], Sequence[Tensor]]
    write: Callable[[Tensor], None]
    codec: Codec | None = None
    lost: Callable[[Tensor], None] | None = None
    instead: Callable[[], None] = lambda: None
    between: bool = False


class Arrived(NamedTuple):
    """What a bucket's collective gave: the mean, and what coding has lost of this site's values if that is kept."""

    mean: Tensor
    lost: Tensor | None


class Flight:
    """The averages of a round, or of a fragment's turn, of which some have been started.

    Args:
        planned: In the order in which all sites start them.
        transport: Starts them.
        left_out: Sites whose weight is zero.
        ahead: How many buckets of full size are started before the first of them is waited for; None is all of them,
            at once, to go on while the site computes.
        names: Of the tensors that it is about.
        forgotten: The inner optimizer, if it starts afresh with these tensors when the averages are applied.
        arrived: What each of the collectives gave, if that is known already.
    """

    def __init__(
        self, planned: Sequence[Bucket], transport: Transport, left_out: LeftOut, ahead: int | None,
        names: frozenset[str] = frozenset(), forgotten: torch.optim.Optimizer | None = None,
        arrived: Sequence[Arrived] | None = None,
    ) -> None:  # fmt: skip
        self.names, self.forgotten = names, forgotten
        self._planned = deque(planned)
        self._transport, self._left_out, self._ahead = transport, left_out, ahead
        self._started: deque[tuple[Bucket, Callable[[], Arrived] | None]] = deque()
        self._halves: dict[int, Pending] = {}  # of started buckets, by identity: those that may need a second half
        self._wait_beside: Callable[[], None] | None = None
        if arrived is not None:
            self._started.extend(zip(planned, map(_given, arrived), strict=True))
            self._planned.clear()
            return
        pending = self._start_up_to(ahead)
        if ahead is None and any(p.has_middle for p in pending):
            self._wait_beside = transport.beside(lambda: _go_on(pending))

    def land(self) -> list[Arrived]:
        """Wait until all of it is here, and apply none of it; only where all has been started.

        Returns:
            Of each bucket what its collective gave.
        """
        self._meet()
        found: list[Arrived] = []
        while len(found) < len(self._started):
            bucket, wait = self._started.popleft()
            found.append(wait() if wait else Arrived(torch.empty(0), None))
            self._started.append((bucket, _given(found[-1])))
        return found

    def drain(self, left_out: frozenset[int] | None = None) -> None:
        """Wait for all of them in their order, each written while the next one travels.

        Args:
            left_out: Sites whose weight was zero, all of which are known now; None: they were when it began.
        """
        self._meet()
        left_out = self._left_out.known if left_out is None else left_out
        while self._started or self._planned:
            self._start_up_to(None if self._ahead is None else self._ahead + 1)
            bucket, wait = self._started.popleft()
            arrived = wait() if wait else None
            self._halves.pop(id(bucket), None)
            if arrived is None or left_out.issuperset(bucket.sites):
                bucket.instead()
                continue
            if bucket.lost is not None and arrived.lost is not None:
                bucket.lost(arrived.lost)
            bucket.write(arrived.mean)
            del arrived  # or it would be there while the next one comes

    def _meet(self) -> None:
        wait, self._wait_beside = self._wait_beside, None
        if wait is not None:
            wait()

    def _start_up_to(self, number: int | None) -> list[Pending]:
        started = []
        while self._planned and (number is None or self._may_start(self._planned[0], number)):
            bucket, wait = self._planned.popleft(), None
            if not self._left_out.known.issuperset(bucket.sites):
                pending, wait = self._start(bucket)
                started.append(pending)
                if pending.has_middle:
                    self._halves[id(bucket)] = pending
            self._started.append((bucket, wait))
        return started

    def _may_start(self, bucket: Bucket, number: int) -> bool:
        """Whether a bucket may be started beside those that have been, before the first of them is waited for.

        Of one holder set there are `number` at a time; of several, as many as are not more than that many full ones.
        All sites wait for buckets in one global order, so that of all that somebody waits for the first one in it has
        been started by everybody: nobody waits forever. But within a holder set all must start in the same order,
        second halves too, whatever else each of them has on its way: a bucket before the second half of its neighbour
        of the same round's changes, or moments, and after those of all others.
        """
        if not self._started:
            return True
        last = self._started[-1][0]
        if self._started[0][0].sites == bucket.sites == last.sites:
            fits = len(self._started) < number
        else:
            numel = bucket.numel + sum(started.numel for started, _ in self._started)
            fits = self._transport.side_by_side and numel <= number * self._transport.bucket_numel
        neighbour = last if last.sites == bucket.sites and _is_of_moments(last) == _is_of_moments(bucket) else None
        return fits and not any(
            started.sites == bucket.sites and started is not neighbour and self._lacks_half(started)
            for started, _ in self._started
        )

    def _lacks_half(self, bucket: Bucket) -> bool:
        pending = self._halves.get(id(bucket))
        return pending is not None and pending.has_middle

    def _start(self, bucket: Bucket) -> tuple[Pending, Callable[[], Arrived]]:
        lost: list[Tensor] = []
        pending = self._transport.average(
            bucket.kind, bucket.sites, bucket.numel, bucket.read, self._left_out, bucket.codec,
            None if bucket.lost is None else lost.append, between=bucket.between,
        )  # fmt: skip

        def wait() -> Arrived:
            mean = pending.wait()
            return Arrived(mean, lost[0] if lost else None)

        return pending, wait


def _is_of_moments(bucket: Bucket) -> bool:
    return bucket.kind == "moments"


def _given(arrived: Arrived) -> Callable[[], Arrived]:
    return lambda: arrived


def _go_on(pending: Sequence[Pending]) -> None:
    for one in pending:
        one.go_on(beside=True)
