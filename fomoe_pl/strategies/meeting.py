"""How the processes of a run meet, and who is named if one of them does not come."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.loss import PATIENCE
from fomoe_pl.federation.topology import Topology

_HERE, _MISSING, _SEEN = "fomoe/here/", "fomoe/missing", "fomoe/seen/"
_MEETINGS, _ASKS, _TOLD = "fomoe/meetings", "fomoe/asks/", "fomoe/told/"


def meet(
    topology: Topology, address: str, port: int, backend: str, timeout: timedelta, device: torch.device | None
) -> None:
    """Make the process group, if there is none yet.

    As `torch.distributed` does it from the environment, but for two things: each process says that it is there before
    they connect to each other, so that those that are not can be named; and each meeting has keys of its own.
    torchrun lets all attempts meet through the same store, in which the addresses of the attempt before still lie:
    processes that take those for their peers' fail to connect, or wait for ever. Its count of restarts does not tell
    attempts apart: it is each machine's own, and one whose processes were ended because of another's does not count.
    So rank 0 numbers the meetings, and tells each process that asks.

    Args:
        topology: this rank's place.
        address: where the store is kept: by rank 0, unless a launcher keeps it.
        port: of the store.
        backend: backend of the process group.
        timeout: in which all have to come, and after which a collective that does not complete raises.
        device: device that the group is bound to, None for none.

    Raises:
        SiteLostError: naming the sites that did not come.
    """
    if dist.is_initialized():
        return
    rank, size = topology.rank, topology.world_size
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank_zero_info(f"waiting for {size} processes at {address}:{port}")
    try:
        server = dist.TCPStore(
            address, port, size, is_master=rank == 0 and not kept_by_launcher, timeout=timeout, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except dist.DistNetworkError as error:
        if rank == 0:  # it keeps the store itself: the port may be taken
            raise
        raise SiteLostError([0], _late(timeout), speaks=rank == 1) from error
    try:
        number = server.add(_MEETINGS, 1) if rank == 0 else _ask(server, rank, timeout)
        store = dist.PrefixStore(f"fomoe/meeting-{number}", server)
        store.set(f"{_HERE}{rank}", "1")
        missing = _wait_for(store, rank, size, timeout, lambda: _tell(server, rank, size, number))
    except dist.DistError as error:  # the store went with its keeper
        raise SiteLostError([0], _late(timeout), speaks=rank == 1) from error
    if missing:
        sites = sorted({other // topology.ranks_per_site for other in missing})
        raise SiteLostError(sites, _late(timeout), speaks=rank == min({*range(size)} - {*missing}))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)


def _ask(server: dist.Store, rank: int, timeout: timedelta) -> int:
    """Ask rank 0 which meeting it is, under a name that no process before has had."""
    name = uuid.uuid4().hex
    server.set(f"{_ASKS}{rank}", name)
    server.wait([f"{_TOLD}{name}"], timeout)
    return int(server.get(f"{_TOLD}{name}"))


def _tell(server: dist.Store, rank: int, size: int, number: int) -> None:
    """Answer all that have asked, on rank 0; one of an earlier attempt does not hear it any more."""
    for other in range(1, size) if rank == 0 else ():
        if server.check([f"{_ASKS}{other}"]):
            server.set(f"{_TOLD}{server.get(f'{_ASKS}{other}').decode()}", str(number))


def _wait_for(store: dist.Store, rank: int, size: int, timeout: timedelta, tell: Callable[[], None]) -> list[int]:
    """Wait until all ranks are there; returns those that the first to lose its patience misses, the same for all."""
    keys = [f"{_HERE}{other}" for other in range(size)]
    end = time.monotonic() + timeout.total_seconds()
    while not store.check(keys):
        tell()
        if time.monotonic() > end:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            store.compare_set(_MISSING, "", json.dumps(missing))
        if store.check([_MISSING]):
            absent: list[int] = json.loads(store.get(_MISSING))
            store.set(f"{_SEEN}{rank}", "1")
            others = [f"{_SEEN}{other}" for other in range(size) if other not in absent]
            until = time.monotonic() + PATIENCE
            while rank == 0 and not store.check(others) and time.monotonic() < until:
                time.sleep(0.1)  # the store goes with its keeper
            return absent
        time.sleep(0.1)
    return []


def _late(timeout: timedelta) -> str:
    return f"not there within {timeout.total_seconds():.0f} seconds"
