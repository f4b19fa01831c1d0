"""Seconds of collectives over slow links, with the latency that the paper leaves out (arXiv 2606.19025, §3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_pl.costs.rounds import Collective
from fomoe_pl.costs.sites import Site
from fomoe_pl.errors import ConfigError

SEGMENT, FRAME, ACKNOWLEDGEMENT = 1448, 1514, 66
"""Bytes of TCP data in a full Ethernet frame (MTU 1500, time stamps), of the whole frame, of a bare acknowledgement."""
SEGMENTS_PER_ACKNOWLEDGEMENT = 2


def framed(payload: float, *, received: float = 0.0) -> float:
    """Bytes that an interface sends for a TCP payload: full frames, and an acknowledgement for two frames received.

    Args:
        payload: bytes sent.
        received: bytes received meanwhile, which are acknowledged.
    """
    frames = payload / SEGMENT * FRAME
    return frames + received / SEGMENT / SEGMENTS_PER_ACKNOWLEDGEMENT * ACKNOWLEDGEMENT


@dataclass(frozen=True)
class Links:
    """How the sites of a federation are joined.

    Attributes:
        places: the sites' hardware, one entry for each place.
        place_of: for each site of the federation the index of its place. Where several sites are at one place (each
            accelerator a site of its own) they share its link.
        host_seconds_per_byte: what a wire byte costs beside the link (copies, kernels, sums), from one measured run.
        bucket_bytes: size of one buffer; each pays the latency.
    """

    places: tuple[Site, ...]
    place_of: tuple[int, ...]
    host_seconds_per_byte: float = 0.0
    bucket_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        """Refuse what is no federation.

        Raises:
            ConfigError: for negative costs, buckets without bytes, or places that do not exist.
        """
        if self.host_seconds_per_byte < 0:
            raise ConfigError("host_seconds_per_byte", self.host_seconds_per_byte, "must not be negative", "give 0")
        if self.bucket_bytes < 1:
            raise ConfigError("bucket_bytes", self.bucket_bytes, "must be at least 1", "64 MiB is the default")
        if not self.place_of or not all(0 <= place < len(self.places) for place in self.place_of):
            raise ConfigError("place_of", self.place_of, "must name a place for each site",
                              f"use 0 to {len(self.places) - 1}")  # fmt: skip

    @classmethod
    def between(cls, places: Sequence[Site], **kwargs: float) -> Links:
        """One site of the federation at each place."""
        return cls(tuple(places), tuple(range(len(places))), **kwargs)  # type: ignore[arg-type]

    def seconds(self, call: Collective) -> float:
        """Seconds of one ring all-reduce, if nothing else uses the links.

        Each of g sites sends 2(g-1)/g of the payload, in 2(g-1) messages that wait for each other. The ring goes
        through the sites in order, so that it leaves each place once; the slowest link is the ring's.
        """
        g = len(call.sites)
        if g < 2:
            return 0.0
        sent = 2 * (g - 1) / g * call.payload
        here = {self.place_of[site] for site in call.sites}
        places = [self.places[i] for i in here]
        host = sent * self.host_seconds_per_byte
        if len(places) == 1:
            return host + framed(sent) * 8 / (places[0].inner_bandwidth_mbit * 1e6)
        slowest = min(place.bandwidth_mbit for place in places)
        wait = max(place.latency_ms for place in places) / 1e3
        buckets = max(1, math.ceil(call.payload / self.bucket_bytes))
        return host + framed(sent, received=sent) * 8 / (slowest * 1e6) + buckets * 2 * (g - 1) * wait

    def round_seconds(self, calls: Sequence[Collective]) -> float:
        """Seconds of a round's collectives, each site calling its own in the given order and waiting for its partners.

        Collectives of disjoint sites run side by side, unless they leave the same place.
        """
        free_site = [0.0] * len(self.place_of)
        free_link = [0.0] * len(self.places)
        for call in calls:
            here = {self.place_of[site] for site in call.sites}
            crossed = here if len(here) > 1 else set()
            start = max([free_site[site] for site in call.sites] + [free_link[i] for i in crossed])
            end = start + self.seconds(call)
            for site in call.sites:
                free_site[site] = end
            for i in crossed:
                free_link[i] = end
        return max(free_site)

    def sent_by_place(self, calls: Sequence[Collective]) -> list[float]:
        """Payload bytes that leave each place in the given collectives."""
        sent = [0.0] * len(self.places)
        for call in calls:
            here = {self.place_of[site] for site in call.sites}
            g = len(call.sites)
            for i in here if len(here) > 1 else ():
                sent[i] += 2 * (g - 1) / g * call.payload
        return sent
