"""How the processes of a run meet, and who is named if one of them does not come."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.liveness import wait_until_set
from fomoe_pl.federation.topology import Topology
from fomoe_pl.strategies.presence import Plain, RunKey, check_equal, digest, parse, read_settings

_HERE, _MISSING, _SEEN = "fomoe/here/", "fomoe/missing", "fomoe/seen/"
_SETTINGS = "fomoe/settings/"
_MEETINGS, _ASKS, _TOLD = "fomoe/meetings", "fomoe/asks/", "fomoe/told/"
_log = logging.getLogger(__name__)


def meet(
    topology: Topology, address: str, port: int, backend: str, timeout: timedelta, device: torch.device | None,
    settings: Mapping[str, Plain] | None = None,
) -> None:  # fmt: skip
    """Make the process group, if there is none yet.

    As `torch.distributed` does it from the environment, but for two things: each process says that it is there before
    they connect to each other, so that those that are not can be named; and each meeting has keys of its own.
    torchrun lets all attempts meet through the same store, in which the addresses of the attempt before still lie:
    processes that take those for their peers' fail to connect, or wait for ever. Its count of restarts does not tell
    attempts apart: it is each machine's own, and one whose processes were ended because of another's does not count.
    So rank 0 numbers the meetings, and tells each process that asks and proves that it knows the run's key, if there is
    one (`RunKey`). Once all are there, their settings are compared.

    Args:
        topology: This rank's place.
        address: Where the store is kept: by rank 0, unless a launcher keeps it.
        port: Of the store.
        backend: Backend of the process group.
        timeout: In which all have to come, and after which a collective that does not complete raises.
        device: Device that the group is bound to, None for none.
        settings: What must be equal on all sites, from `shared_settings`; None compares nothing.

    Raises:
        SiteLostError: Naming the sites that did not come.
        MeetingError: If this process does not know the run's key, or settings differ.
    """
    if dist.is_initialized():
        return
    rank, size, key = topology.rank, topology.world_size, RunKey.of_environment()
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
        number = server.add(_MEETINGS, 1) if rank == 0 else _ask(server, rank, timeout, key)
        # Whoever does not know the key does not find the place.
        store = dist.PrefixStore(f"fomoe/meeting-{number}{key.sign('place', number)}", server)
        own = {} if settings is None else dict(settings)
        store.set(f"{_SETTINGS}{rank}", json.dumps(own))
        store.set(f"{_HERE}{rank}", digest(own))
        refused: set[bytes] = set()
        missing = _wait_for(store, rank, size, timeout, lambda: _tell(server, rank, size, number, key, refused))
        if not missing:
            _compare(store, topology)
    except dist.DistError as error:  # the store went with its keeper
        raise SiteLostError([0], _late(timeout), speaks=rank == 1) from error
    if missing:
        sites = sorted({topology.site_of(other) for other in missing})
        raise SiteLostError(sites, _late(timeout), speaks=rank == min({*range(size)} - {*missing}))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)


def _ask(server: dist.Store, rank: int, timeout: timedelta, key: RunKey) -> int:
    """Ask rank 0 which meeting it is, under a name that no process before has had.

    Raises:
        MeetingError: If this process and rank 0 do not have the same run key.
    """
    name = uuid.uuid4().hex
    server.set(f"{_ASKS}{rank}", json.dumps({"name": name, "proof": key.sign("asks", rank, name)}))
    server.wait([f"{_TOLD}{name}"], timeout)
    told = parse(server.get(f"{_TOLD}{name}"), {"number": int, "proof": str})
    if told is None or not key.proves(told["proof"], "told", name, told["number"]):
        raise key.refused("" if told is None else told["proof"])
    return int(told["number"])


def _tell(server: dist.Store, rank: int, size: int, number: int, key: RunKey, refused: set[bytes]) -> None:
    """Answer all that have asked, on rank 0; one of an earlier attempt does not hear it any more.

    A wrong proof is answered too, so that a process with the wrong key by mistake ends at once; the answer's number is
    of no use without the key.
    """
    for other in range(1, size) if rank == 0 else ():
        if not server.check([f"{_ASKS}{other}"]):
            continue
        message = server.get(f"{_ASKS}{other}")
        asks = parse(message, {"name": str, "proof": str})
        known = asks is not None and key.proves(asks["proof"], "asks", other, asks["name"])
        if not known and message not in refused:
            refused.add(message)
            _log.warning("refused a process that says it is rank %d: it does not know the run's key", other)
        if asks is not None:
            proof = key.sign("told", asks["name"], number)
            answer = {"number": number, "proof": proof if known or not proof else "refused"}
            server.set(f"{_TOLD}{asks['name']}", json.dumps(answer))


def _compare(store: dist.Store, topology: Topology) -> None:
    """Compare the sites' settings; where all are equal, only their digests are read.

    Raises:
        MeetingError: Naming the settings that differ.
    """
    ranks = range(topology.world_size)
    if len({store.get(f"{_HERE}{rank}") for rank in ranks}) == 1:
        return
    settings = [store.get(f"{_SETTINGS}{of_site.start}") for of_site in topology.ranks]
    store.set(f"{_SEEN}{topology.rank}", "1")
    if topology.rank == 0:  # the store goes with its keeper
        wait_until_set(store, [f"{_SEEN}{rank}" for rank in ranks])
    check_equal(read_settings(settings))


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
            if rank == 0:  # the store goes with its keeper
                wait_until_set(store, others)
            return absent
        time.sleep(0.1)
    return []


def _late(timeout: timedelta) -> str:
    return f"not there within {timeout.total_seconds():.0f} seconds"
