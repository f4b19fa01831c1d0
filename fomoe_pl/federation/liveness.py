"""When a site is gone: one error that says which, instead of a broken connection's words on every rank.

Only ranks that were talking to the lost site find their connection broken. Others may wait in a collective whose
members are all there, or be in the middle of their local steps: a thread of each rank listens, so that they answer
too. It waits for one key in the store through which the processes met, and sends nothing until a connection breaks, or
until a rank that was sent a signal asks all to stop before their round ends.

NCCL does not always notice that a site is gone: between GPUs of one machine a collective waits for ever. There the
thread also counts every few seconds that it lives, and who waits for long looks at the counts of the others.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.topology import Topology

PATIENCE = 10.0  # seconds in which the others answer, once a connection has broken
BEAT = timedelta(seconds=PATIENCE / 4)  # between two signs of life, with NCCL
SILENT_LOOKS = 2  # with so many patiences between them; Python's lock may be held for a while
_BROKEN = re.compile(r"gloo|nccl|connection|timed out|timeout|broken pipe|socket", re.IGNORECASE)
_FOR_LONG = timedelta(days=20)  # in milliseconds it has to fit 32 bits
_CALLED, _THERE, _CONCLUSION, _STOP = "fomoe/called/", "fomoe/there/", "fomoe/conclusion", "fomoe/stop/"
_BEATS, _LEFT = "fomoe/beats/", "fomoe/left/"
_ROLL_CALL, _PLEASE_STOP, _OVER = b"roll call", b"please stop", b"over"  # what a rank is called for; the last by itself


class Conclusion(NamedTuple):
    """What ranks agree on after a connection has broken.

    Attributes:
        silent: Sites without an answer in time, sorted; empty if all answered.
        speaker: The lowest rank that answered.
    """

    silent: list[int]
    speaker: int


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error of a collective comes from the other side of it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def wait_until_set(store: dist.Store, keys: list[str]) -> None:
    """Wait until others have set all keys, but no longer than `PATIENCE`: for whoever takes the store along."""
    until = time.monotonic() + PATIENCE
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(0.05)


class Listener:
    """Answers for this rank when others ask, whatever its main thread is doing.

    Args:
        topology: This rank's place.
        store: The store through which the processes met; a connection of its own to it is made.
        beats: Whether it counts that it lives.

    Attributes:
        conclusion: What the ranks agree on once somebody has asked who is there; None before.
    """

    def __init__(self, topology: Topology, store: dist.Store, *, beats: bool = False) -> None:
        self.topology, self._beats = topology, beats
        self.conclusion: Conclusion | None = None
        self._store, self._own, self._over = store, store.clone(), False  # type: ignore[attr-defined]
        self._lock, self._asked_to_stop, self._next_stop = threading.Lock(), False, 0
        self._next_beat = 0.0
        self._thread = threading.Thread(target=self._listen, name="fomoe-listener", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over:
            try:
                self._answer()
                return
            except RuntimeError:
                if not self._over and not _answers(self._store):
                    self.conclusion = _keeper_is_gone(self.topology)
                    return
            time.sleep(1)
            with suppress(RuntimeError):  # something on the way cut an idle connection, and may still do
                self._own = self._store.clone()  # type: ignore[attr-defined]

    def _answer(self) -> None:
        called = self._next_call(b"")
        if called == _PLEASE_STOP:
            with self._lock:
                self._asked_to_stop = True
                self._own.set(f"{_STOP}{self.topology.rank}", str(self._next_stop))
            called = self._next_call(_PLEASE_STOP)
        if called == _ROLL_CALL:
            self._own.set(f"{_THERE}{self.topology.rank}", "1")
            with suppress(dist.DistStoreError):  # those that asked did not come to a conclusion
                self._own.wait([_CONCLUSION], timedelta(seconds=6 * PATIENCE))
                self.conclusion = Conclusion(*json.loads(self._own.get(_CONCLUSION)))

    def _next_call(self, before: bytes) -> bytes:
        """Wait until this rank is called for something else."""
        call = f"{_CALLED}{self.topology.rank}"
        while (called := self._own.get(call) if self._own.check([call]) else b"") == before:
            if self._beats and time.monotonic() > self._next_beat:
                self._own.add(f"{_BEATS}{self.topology.rank}", 1)
                self._next_beat = time.monotonic() + BEAT.total_seconds()
            if self._beats or before:  # waits in the store that time out are told in two lines each
                time.sleep(BEAT.total_seconds() / 5)
                continue
            with suppress(dist.DistStoreError):  # a long time is over
                self._own.wait([call], _FOR_LONG)
        return bytes(called)

    def ask_to_stop(self) -> None:
        """Ask all ranks to stop after the same local step, the first that none of them has passed."""
        for rank in range(self.topology.world_size):
            self._store.compare_set(f"{_CALLED}{rank}", "", _PLEASE_STOP.decode())

    def stops_after(self, step: int) -> bool:
        """Whether all ranks stop after this local step; each asks after each of its steps, before it goes on.

        Raises:
            RuntimeError: If a rank does not answer.
        """
        with self._lock:
            if not self._asked_to_stop:
                self._next_stop = step + 1
                return False
        keys = [f"{_STOP}{rank}" for rank in range(self.topology.world_size)]
        self._store.wait(keys, timedelta(seconds=PATIENCE))
        return step >= max(int(self._store.get(key)) for key in keys)

    def stop(self, *, together: bool) -> None:
        """End the thread; the last thing before the connections are closed.

        Args:
            together: Whether all ranks end now. The store goes with rank 0, which then waits until no other listens: a
                connection that breaks under a waiting thread makes torch print a page of C++.
        """
        self._over = True
        with suppress(RuntimeError):  # the store may be gone
            self._store.set(f"{_CALLED}{self.topology.rank}", _OVER.decode())
        self._thread.join(PATIENCE)
        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}{self.topology.rank}", "1")
            if together and self.topology.rank == 0:
                wait_until_set(self._store, [f"{_LEFT}{rank}" for rank in range(self.topology.world_size)])


_listener: Listener | None = None  # as there is one default process group in a process


def listen(topology: Topology, *, beats: bool | None = None) -> None:
    """Answer for this rank from now on; the processes must have met.

    Args:
        topology: This rank's place.
        beats: Give signs of life, for those that wait for this rank with NCCL; None is where there is an NCCL group.
    """
    global _listener
    stop_listening()
    if dist.is_initialized() and topology.world_size > 1:
        store = dist.distributed_c10d._get_default_store()
        _listener = Listener(topology, store, beats=_by_nccl() if beats is None else beats)


def stop_listening(*, together: bool = False) -> None:
    """Answer no more: this rank ends.

    Args:
        together: Whether all ranks end now, as far as this one knows.
    """
    global _listener
    if _listener is not None:
        _listener.stop(together=together and _listener.conclusion is None)
    _listener = None


def listener() -> Listener | None:
    """This rank's listener; None in a process without others."""
    return _listener


def raise_if_lost(topology: Topology) -> None:
    """End this rank if others have found sites gone, without waiting for its own connections to break.

    Raises:
        SiteLostError: Naming the sites.
    """
    if _listener is not None and _listener.conclusion is not None:
        silent, speaker = _listener.conclusion
        _abandon_collectives()
        raise SiteLostError(silent, "told by the other sites", speaks=speaker == topology.rank)


@contextmanager
def sites_watched(topology: Topology, patience: float = PATIENCE) -> Iterator[None]:
    """Turn the error of a collective that does not complete into one that names the sites which are gone.

    Args:
        topology: This rank's place.
        patience: Seconds in which the others are waited for.

    Raises:
        SiteLostError: If the connection to another site is broken.
    """
    try:
        yield
    except SiteLostError:
        raise
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        silent, speaker = roll_call(topology, patience)
        _abandon_collectives()
        raise SiteLostError(silent, str(error).splitlines()[0], speaks=speaker == topology.rank) from error


def wait_watching(work: dist.Work, topology: Topology) -> None:
    """Wait until a collective is done; with NCCL on the host, and no longer than all sites live.

    Args:
        work: The collective, begun asynchronously.
        topology: This rank's place.

    Raises:
        RuntimeError: If it failed, or a rank gives no sign of life.
        SiteLostError: If others have found sites gone.
    """
    if _by_nccl():
        began, signs = time.monotonic(), _SignsOfLife(topology)
        while not work.is_completed():
            raise_if_lost(topology)
            signs.look()
            if time.monotonic() - began > 0.002:  # until then it may be a bucket between GPUs of one machine
                time.sleep(0.001)
    work.wait()


class _SignsOfLife:
    """What a rank that waits knows of the others' counts."""

    def __init__(self, topology: Topology) -> None:
        self._others = [rank for rank in range(topology.world_size) if rank != topology.rank]
        self._looked, self._beats, self._silent = time.monotonic(), dict[int, int](), Counter[int]()

    def look(self) -> None:
        """Look at them, if it is time to.

        Raises:
            RuntimeError: If a rank has not counted for long, or the store is gone.
        """
        if time.monotonic() - self._looked <= PATIENCE:
            return
        store = dist.distributed_c10d._get_default_store()
        before, self._beats = self._beats, {rank: store.add(f"{_BEATS}{rank}", 0) for rank in self._others}
        now = time.monotonic()
        # A store that stalls, or this process, has kept others' counts back as well.
        again = before if now - self._looked < 1.5 * PATIENCE else {}
        self._silent = Counter({rank: self._silent[rank] + 1 for rank in again if self._beats[rank] == before[rank]})
        for rank, looks in self._silent.items():
            if looks == SILENT_LOOKS:
                raise RuntimeError(f"NCCL waits for rank {rank}, which gives no sign of life")
        self._looked = now


def all_here(topology: Topology) -> None:
    """With NCCL wait until all ranks are here, before a collective that others wait for: see `wait_watching`."""
    if _by_nccl():
        wait_watching(dist.barrier(async_op=True), topology)


def _by_nccl() -> bool:
    """Whether any group is of NCCL: of the world, or of the ranks of a site."""
    world = dist.distributed_c10d._world
    return dist.is_initialized() and any("nccl" in str(backend) for backend, _ in world.pg_map.values())


def _abandon_collectives() -> None:
    """Take NCCL's unfinished work off the GPU: whoever waits for the device next would wait for ever."""
    if not _by_nccl():
        return
    if "nccl" in dist.get_backend():
        dist.distributed_c10d._abort_process_group()
        return
    for group, (backend, _) in dist.distributed_c10d._world.pg_map.items():  # of the ranks of a site alone
        if "nccl" in str(backend):
            group.abort()


def roll_call(topology: Topology, patience: float) -> Conclusion:
    """Which sites do not answer, and which rank speaks for those that do; all that ask come to the same conclusion.

    With the store goes the process that kept it: site 0, unless a launcher keeps it.

    Args:
        topology: This rank's place.
        patience: Seconds in which the others are waited for, by the first that asks.
    """
    if _listener is not None and _listener.conclusion is not None:
        return _listener.conclusion
    ranks = set(range(topology.world_size))
    try:
        store = dist.distributed_c10d._get_default_store()
        for rank in sorted(ranks):
            store.set(f"{_CALLED}{rank}", _ROLL_CALL.decode())
        store.set(f"{_THERE}{topology.rank}", "1")
        end = time.monotonic() + patience
        silent = ranks - {topology.rank}
        while silent and time.monotonic() < end and not store.check([_CONCLUSION]):
            silent = {rank for rank in silent if not store.check([f"{_THERE}{rank}"])}
            time.sleep(0.05)
        own = Conclusion(sorted({topology.site_of(rank) for rank in silent}), min(ranks - silent))
        agreed = Conclusion(*json.loads(store.compare_set(_CONCLUSION, "", json.dumps(own))))
        # The others have to read it before the process with the store ends.
        time.sleep(0.5)
        return agreed
    except RuntimeError:
        return _keeper_is_gone(topology)


def _answers(store: Any) -> bool:
    """Whether the process that keeps the store takes connections."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    try:
        socket.create_connection((store.host, store.port), timeout=PATIENCE / 2).close()
    except (AttributeError, OSError):  # a store in a file, or nobody
        return False
    return True


def _keeper_is_gone(topology: Topology) -> Conclusion:
    return Conclusion([0], min({*range(topology.world_size)} - {0}))
