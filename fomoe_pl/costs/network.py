"""Seconds of collectives over slow links, with the latency that the paper leaves out (arXiv 2606.19025, §3.4)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fomoe_pl.costs.rounds import Collective
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError, check_choice

FRAME_HEADER, PACKET_HEADERS = 14, 52
"""Bytes of an Ethernet header as interfaces count it, and of IPv4's and TCP's with time stamps."""
SEGMENTS_PER_ACKNOWLEDGEMENT = 2
LARGEST_SEGMENT = 2**20
"""Bytes of the pieces in which gloo's ring sends a buffer; of two it sends the second before the first is there."""
LATENCIES_OF_A_SEGMENT = 2
"""The receiver says that it is ready, then the segment comes."""
NCCL_WINDOW = 5 * 2**20
"""Bytes that NCCL has on the way at once, from a site to the next: they are acknowledged a round trip later."""

Backend = Literal["gloo", "nccl"]


def framed(payload: float, *, received: float = 0.0, mtu: int = 1500) -> float:
    """Bytes that an interface sends for a TCP payload: full frames, and an acknowledgement for two frames received.

    Args:
        payload: Bytes sent.
        received: Bytes received meanwhile, which are acknowledged.
        mtu: Largest packet of the link, bytes.

    Raises:
        ConfigError: For an MTU that no packet fits.
    """
    segment = mtu - PACKET_HEADERS
    if segment < 1:
        raise ConfigError("mtu", mtu, "must be larger than a packet's headers", "1500 is usual")
    acknowledgements = received / segment / SEGMENTS_PER_ACKNOWLEDGEMENT
    return payload / segment * (mtu + FRAME_HEADER) + acknowledgements * (PACKET_HEADERS + FRAME_HEADER)


@dataclass(frozen=True)
class Links:
    """How the sites of a federation are joined.

    Attributes:
        places: The sites' hardware, one entry for each place.
        place_of: For each site of the federation the index of its place. Where several sites are at one place (each
            accelerator a site of its own) they share its link.
        copy_seconds_per_byte: What a wire byte costs before and after its collective (differences, copies, the outer
            step), from one measured run.
        transport_seconds_per_byte: What the host's transport takes for it while the link sends: the slower of the two
            counts. From the same run.
        host_seconds_per_byte: What the host takes for it while the link waits, with gloo.
        coding_seconds_per_byte: What coding and decoding takes for a byte of float32; like copies.
        backend: What carries the averages: gloo waits for each pair of segments, NCCL for its window.
        round_overhead_seconds: Overhead of every round: control messages, waiting for the slowest. Measured.
        bucket_bytes: Size of one buffer.
        mtu: Largest packet of the links, bytes.
    """

    places: tuple[Site, ...]
    place_of: tuple[int, ...]
    copy_seconds_per_byte: float = 0.0
    transport_seconds_per_byte: float = 0.0
    host_seconds_per_byte: float = 0.0
    coding_seconds_per_byte: float = 0.0
    backend: Backend = "gloo"
    round_overhead_seconds: float = 0.0
    bucket_bytes: int = 64 * 2**20
    mtu: int = 1500

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: For negative costs, buckets without bytes, or places that do not exist.
        """
        check_choice("backend", self.backend, Backend)
        for name in ("copy_seconds_per_byte", "transport_seconds_per_byte", "host_seconds_per_byte",
                     "coding_seconds_per_byte", "round_overhead_seconds"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "must be a number of seconds, not negative",
                                  "give 0, or what was measured")  # fmt: skip
        if self.bucket_bytes < 1:
            raise ConfigError("bucket_bytes", self.bucket_bytes, "must be at least 1", "64 MiB is the default")
        framed(0.0, mtu=self.mtu)
        if not self.place_of or not all(0 <= place < len(self.places) for place in self.place_of):
            raise ConfigError("place_of", self.place_of, "must name a place for each site",
                              f"use 0 to {len(self.places) - 1}")  # fmt: skip

    @classmethod
    def between(cls, places: Sequence[Site], **kwargs: Any) -> Links:
        """One site of the federation at each place."""
        return cls(tuple(places), tuple(range(len(places))), **kwargs)

    def seconds(self, call: Collective) -> float:
        """Seconds of one ring all-reduce, if nothing else uses the links.

        Each of g sites sends 2(g-1)/g of the payload. The ring goes through the sites in order, so that it leaves each
        place once; the slowest link is the ring's. Buffers are pipelined: each is copied while another one
        travels, so the slower of the two counts, plus the copy of the first and of the last. Codes are timed as a ring
        of as many bytes, and are copied, and coded once and decoded, as the values that they stand for.
        """
        g = len(call.sites)
        if g < 2:
            return 0.0
        bucket = max(1, round(self.bucket_bytes * call.share))
        whole, rest = divmod(call.payload, bucket)
        places = [self.places[i] for i in sorted({self.place_of[site] for site in call.sites})]
        copied = 2 * (g - 1) / g * self.copy_seconds_per_byte / call.share
        if call.share != 1:
            copied += self.coding_seconds_per_byte / call.share
        ring = whole * self._ring_seconds(bucket, g, places)
        ring += self._ring_seconds(rest, g, places) if rest else 0.0
        alone = min(call.payload, bucket) * copied
        return alone + max(ring, call.payload * copied - alone)

    def _ring_seconds(self, payload: int, g: int, places: Sequence[Site]) -> float:
        """Seconds of a ring with one buffer; `tools/network/shaped_links.py --latencies` measures gloo's.

        Of NCCL a site sends as much as the link takes, or a window in each round trip, and each of the 2(g-1) steps of
        a buffer adds a latency. Of gloo the buffer is cut into segments, at least two for each site. Both halves of the
        ring send (g-1)/g of them to the next site, two at a time: a pair takes as long as the link needs for it, or as
        its first segment needs to get there. So 4(g-1) latencies are the least.
        """
        if len(places) == 1:
            rate, wait = places[0].inner_bandwidth_mbit, 0.0
        else:
            rate = min(place.bandwidth_mbit for place in places)
            wait = max(place.latency_ms for place in places) / 1e3
        if self.backend == "nccl":
            sent = 2 * (g - 1) / g * payload
            link = framed(sent, received=sent, mtu=self.mtu) * 8 / (rate * 1e6)
            return max(link, sent * self.transport_seconds_per_byte, sent / NCCL_WINDOW * 2 * wait) + 2 * (g - 1) * wait
        per_site = max(2, -(-payload // (LARGEST_SEGMENT * g)))
        segment = payload / (g * per_site)
        link = framed(segment, received=segment, mtu=self.mtu) * 8 / (rate * 1e6)
        sending = max(segment * self.transport_seconds_per_byte, link + segment * self.host_seconds_per_byte)
        return (g - 1) * per_site * max(2 * sending, LATENCIES_OF_A_SEGMENT * wait + sending)

    def round_seconds(self, calls: Sequence[Collective]) -> float:
        """Seconds of a round's collectives, each site starting its own in the given order.

        Over gloo a site has several on their way, as many as are not more than two buckets: they share its link and its
        host, and wait for latencies together. Over NCCL it has one at a time. Those of disjoint sites run side by side,
        and share links where they leave the same place.
        """
        host = [0.0] * len(self.place_of)  # when it has done what it was given so far
        link = [0.0] * len(self.places)
        on_their_way: list[deque[tuple[float, float]]] = [deque() for _ in self.place_of]
        near = replace(self, places=tuple(replace(place, latency_ms=0.0) for place in self.places))
        for call in calls:
            here = {self.place_of[site] for site in call.sites}
            crossed = here if len(here) > 1 else set()
            held = min(2 * self.bucket_bytes, call.payload / call.share)
            start = max(self._room(on_their_way[site], held) for site in call.sites)
            busy, done = near.seconds(call), max([host[site] for site in call.sites] + [link[i] for i in crossed])
            end = max(start + self.seconds(call), done + busy)
            for site in call.sites:
                host[site] = max(host[site], start) + busy
                on_their_way[site].append((held, end))
            for i in crossed:
                link[i] = max(link[i], start) + busy
        return max((end for site in on_their_way for _, end in site), default=0.0) + self.round_overhead_seconds

    def _room(self, on_their_way: deque[tuple[float, float]], held: float) -> float:
        """When a site that has these (bytes, end) on their way may start so many bytes more; forgets what it ends."""
        start = 0.0
        while on_their_way and (
            self.backend == "nccl" or held + sum(other for other, _ in on_their_way) > 2 * self.bucket_bytes
        ):
            start = max(start, on_their_way.popleft()[1])
        return start

    def leaving(self, sent: float) -> list[float]:
        """Bytes that leave each place if every site sends `sent` bytes, spread evenly over the other sites."""
        m = len(self.place_of)
        here = [self.place_of.count(i) for i in range(len(self.places))]
        return [n * sent * (m - n) / (m - 1) if m > 1 else 0.0 for n in here]

    def exchange_seconds(self, sent: float, messages: int) -> float:
        """Seconds for every site to send this many bytes to the others, in exchanges one after the other.

        Args:
            sent: Bytes of a site, in all.
            messages: Number of exchanges.
        """
        out = self.leaving(sent)
        if not sent or not any(out):
            return 0.0
        seconds = max(
            max(framed(left, received=left, mtu=self.mtu) * 8 / (place.bandwidth_mbit * 1e6),
                left * self.transport_seconds_per_byte)
            for left, place in zip(out, self.places, strict=True)
        )  # fmt: skip
        latencies = LATENCIES_OF_A_SEGMENT if self.backend == "gloo" else 1
        wait = latencies * max(place.latency_ms for place in self.places) / 1e3
        return seconds + sent * self.copy_seconds_per_byte + messages * wait

    def uploaded(self, sent: float) -> list[float]:
        """Bytes that leave each place if every site sends `sent` bytes to somewhere else."""
        return [self.place_of.count(i) * sent for i in range(len(self.places))]

    def upload_seconds(self, sent: float) -> float:
        """Seconds for every site to send this many bytes to somewhere that is as fast as any of them."""
        return max(
            framed(out, mtu=self.mtu) * 8 / (place.bandwidth_mbit * 1e6)
            for out, place in zip(self.uploaded(sent), self.places, strict=True)
        )

    def sent_by_place(self, calls: Sequence[Collective]) -> list[float]:
        """Bytes that leave each place in the given collectives: what rings send, without frames."""
        sent = [0.0] * len(self.places)
        for call in calls:
            here = {self.place_of[site] for site in call.sites}
            g = len(call.sites)
            for i in here if len(here) > 1 else ():
                sent[i] += 2 * (g - 1) / g * call.payload
        return sent
