"""When a site is gone: one error that says which, instead of a broken connection's words on every rank."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.topology import Topology

PATIENCE = 10.0  # seconds in which the others answer, once a connection has broken
_BROKEN = re.compile(r"gloo|nccl|connection|timed out|timeout|broken pipe|socket", re.IGNORECASE)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error of a collective comes from the other side of it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


@contextmanager
def sites_watched(topology: Topology, patience: float = PATIENCE) -> Iterator[None]:
    """Turn the error of a collective that does not complete into one that names the sites which are gone.

    Args:
        topology: this rank's place.
        patience: seconds in which the others are waited for.

    Raises:
        SiteLostError: if the connection to another site is broken.
    """
    try:
        yield
    except SiteLostError:
        raise
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        silent, speaker = roll_call(topology, patience)
        raise SiteLostError(silent, str(error).splitlines()[0], speaks=speaker == topology.rank) from error


def roll_call(topology: Topology, patience: float) -> tuple[list[int], int]:
    """Which sites do not answer, and which rank speaks for those that do.

    Every rank that finds its connection broken writes its name into the store that the processes met through. With the
    store went the process that kept it: site 0, unless a launcher keeps it.

    Returns:
        Sites without a rank that answered in time, sorted; the lowest rank that answered.
    """
    ranks = set(range(topology.world_size))
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"fomoe/there/{topology.rank}", "1")
        end = time.monotonic() + patience
        silent = ranks - {topology.rank}
        while silent and time.monotonic() < end:
            silent = {rank for rank in silent if not store.check([f"fomoe/there/{rank}"])}
            time.sleep(0.05)
        # Those that answered last have to see that all others did, before the process with the store ends.
        time.sleep(0.5)
    except RuntimeError:
        return [0], min(ranks - {0})
    answered = sorted(ranks - silent)
    return sorted({rank // topology.ranks_per_site for rank in silent}), answered[0]
