"""Averages on their way: buckets that are started in one global order, some ahead of those that are waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe_pl.codec import Codec
from fomoe_pl.federation.ledger import Kind
from fomoe_pl.federation.transport import Pending, Transport


@dataclass(frozen=True)
class Bucket:
    """What is averaged in one collective.

    Attributes:
        kind: Ledger kind.
        sites: Over whom; empty if nobody has anything to give, and then nothing is sent.
        numel: Elements of all values together.
        read: Gives this site's values, float32, when the collective is started.
        write: Takes their mean, one flat float32 tensor.
        codec: Of the values on the wire; None is a cast to the transport's dtype.
        lost: Takes, before `write`, what coding has lost of this site's values, one flat float32 tensor.
    """

    kind: Kind
    sites: tuple[int, ...]
    numel: int
    read: Callable[[], Sequence[Tensor]]
    write: Callable[[Tensor], None]
    codec: Codec | None = None
    lost: Callable[[Tensor], None] | None = None

    @classmethod
    def of_nobody(cls, instead: Callable[[], None]) -> Bucket:
        """In the place of an average that nobody gives anything to."""
        return cls("dense", (), 0, list, lambda _: instead())


class Flight:
    """The averages of a round, of which some have been started.

    Args:
        planned: In the order in which all sites start them.
        transport: Starts them.
        left_out: Sites whose weight is zero.
        ahead: How many are started before the first of them is waited for, within one holder set; None is all of them,
            at once.
        forgotten: The inner optimizer, if it starts afresh when the round has ended.
    """

    def __init__(
        self, planned: Sequence[Bucket], transport: Transport, left_out: frozenset[int], ahead: int | None,
        forgotten: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        self.forgotten = forgotten
        self._planned = deque(planned)
        self._transport, self._left_out, self._ahead = transport, left_out, ahead
        self._started: deque[tuple[Bucket, Pending | None]] = deque()
        self._start_up_to(ahead)

    def drain(self) -> None:
        """Wait for all of them in their order, each written while the next one travels."""
        while self._started or self._planned:
            self._start_up_to(None if self._ahead is None else self._ahead + 1)
            bucket, pending = self._started.popleft()
            bucket.write(torch.empty(0) if pending is None else pending.wait())

    def _start_up_to(self, number: int | None) -> None:
        while self._planned and (number is None or len(self._started) < number):
            bucket = self._planned[0]
            # Of several communicators one is used at a time, unless all are in flight anyway.
            if number is not None and self._started and self._started[0][0].sites != bucket.sites:
                return
            self._planned.popleft()
            pending = None
            if bucket.sites:
                pending = self._transport.average(
                    bucket.kind, bucket.sites, bucket.numel, bucket.read, self._left_out, bucket.codec, bucket.lost
                )
            self._started.append((bucket, pending))


def buckets(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a list of pieces, in order, into buckets of at most `limit` elements (or one larger piece).

    Returns:
        Indices of the pieces of each bucket.
    """
    found: list[list[int]] = []
    filled = 0
    for i, numel in enumerate(numels):
        if not found or filled + numel > limit:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += numel
    return found
