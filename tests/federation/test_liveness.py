"""Who is gone: all that are left say the same, whoever was talking to the lost site."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation import liveness
from fomoe_pl.federation.liveness import (
    listen,
    listener,
    raise_if_lost,
    sites_watched,
    stop_listening,
    wait_watching,
)
from fomoe_pl.federation.topology import Topology
from tests.distributed import start_processes

SITES, PATIENCE = 4, 2.0


def run_all(site: Any, n: int, *args: Any, killed: int | None = None) -> None:
    """Run a function on some processes, of which one may kill itself."""
    processes = start_processes(site, [(rank, *args) for rank in range(n)])
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [-9 if rank == killed else 0 for rank in range(n)]


def _site(rank: int, lost: int, folder: str, port: int) -> None:
    if port:
        store: Any = dist.TCPStore("127.0.0.1", port, SITES, is_master=rank == 0)
    else:
        store = dist.FileStore(f"{folder}/store", SITES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SITES)
    pairs = {sites: dist.new_group(list(sites)) for sites in ((0, 1), (2, 3))}
    topology = Topology(SITES, 1, rank)
    listen(topology)
    dist.barrier()
    if rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        # Its neighbour talks to the lost one, a second waits for a third that is there, and does not come.
        if rank == lost ^ 1 or rank == (lost + 2) % SITES:
            with sites_watched(topology, PATIENCE):
                dist.all_reduce(torch.ones(1), group=next(g for sites, g in pairs.items() if rank in sites))
        else:
            for _ in range(100):
                time.sleep(0.1)
                raise_if_lost(topology)
        raise AssertionError("nothing broke")
    except SiteLostError as error:
        found = {"sites": error.sites, "speaks": error.speaks, "seconds": time.monotonic() - start}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    stop_listening()
    dist.destroy_process_group()


@pytest.mark.parametrize(("lost", "kept_by_0"), [(1, False), (2, True), (0, True)])
def test_all_that_are_left_name_the_lost_site(tmp_path: Path, lost: int, kept_by_0: bool) -> None:
    port = find_free_network_port() if kept_by_0 else 0
    run_all(_site, SITES, lost, str(tmp_path), port, killed=lost)
    found = {rank: json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SITES) if rank != lost}
    assert {tuple(one["sites"]) for one in found.values()} == {(lost,)}
    assert [rank for rank, one in found.items() if one["speaks"]] == [min(found)]
    assert max(one["seconds"] for one in found.values()) < 2 * PATIENCE + 1


class Endless:
    """A collective as NCCL's is, of which a rank is gone."""

    def is_completed(self) -> bool:
        return False


def _as_with_nccl(rank: int, folder: str, port: int, stopping: bool) -> None:
    liveness.PATIENCE, liveness.BEAT = 1.0, timedelta(seconds=0.2)
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    liveness._by_nccl, liveness._abandon_collectives = lambda: True, lambda: None
    topology = Topology(3, 1, rank)
    listen(topology)
    dist.barrier()
    start = time.monotonic()
    if rank == 0 and stopping:
        listener().ask_to_stop()  # type: ignore[union-attr]
    if rank == 1:
        time.sleep(6)  # all others wait for a slow one, but it lives
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with sites_watched(topology, 1.0):
            wait_watching(Endless(), topology)  # type: ignore[arg-type]
    except SiteLostError as error:
        found = {"sites": error.sites, "speaks": error.speaks, "seconds": time.monotonic() - start}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    stop_listening()


@pytest.mark.parametrize("stopping", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_without_a_sign_of_life_is_named_where_connections_do_not_break(tmp_path: Path, stopping: bool) -> None:
    run_all(_as_with_nccl, 3, str(tmp_path), find_free_network_port(), stopping, killed=1)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 2)]
    assert [one["sites"] for one in found] == [[1], [1]]
    assert [one["speaks"] for one in found] == [True, False]
    assert all(6 < one["seconds"] < 16 for one in found)


def _quiet(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for _ in range(2):  # a second run in the same process listens too
        listen(Topology(2, 1, rank))
        dist.barrier()
        raise_if_lost(Topology(2, 1, rank))
        stop_listening()
    dist.destroy_process_group()


def test_a_run_without_losses_ends_its_thread(tmp_path: Path) -> None:
    run_all(_quiet, 2, str(tmp_path))


def _paced(rank: int, asks: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    listen(Topology(3, 1, rank))
    listens = listener()
    assert listens is not None
    step = 0
    while True:
        step += 1
        time.sleep((0.01, 0.04, 0.1)[rank])
        if step % 5 == 0:  # a round's end: those that are ahead wait here for the others
            dist.all_reduce(torch.ones(1))
        if rank == 1 and step == asks:
            listens.ask_to_stop()
        if listens.stops_after(step):
            break
    store = dist.distributed_c10d._get_default_store()
    Path(folder, f"{rank}.json").write_text(json.dumps([step, *(int(store.get(f"fomoe/stop/{i}")) for i in range(3))]))
    stop_listening()
    dist.destroy_process_group()


@pytest.mark.parametrize("asks", [1, 3, 4, 5, 8])
def test_all_stop_after_the_same_step(tmp_path: Path, asks: int) -> None:
    run_all(_paced, 3, asks, str(tmp_path))
    [(step, *answers)] = {tuple(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(3)}
    assert step == max(answers), "the first that none of them has passed"
    # How soon the listeners wake up is the machine's affair: one that is busy with other tests takes some steps more.
    assert asks <= step <= (asks // 5 + 2) * 5, "in the round in which it was asked for, or in the next"


def test_a_cut_connection_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    listens = liveness.Listener(Topology(2, 1, 1), dist.PrefixStore("run", store))
    first = listens._own

    def cut(self: liveness.Listener, before: bytes) -> bytes:
        monkeypatch.undo()
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(liveness.Listener, "_next_call", cut)
    listens.ask_to_stop()  # wakes it up; the next call fails
    for _ in range(100):
        time.sleep(0.05)
        if listens._own is not first:
            break
    assert listens._own is not first
    assert listens.conclusion is None
    store.set("run/fomoe/called/1", "roll call")
    for _ in range(100):
        time.sleep(0.05)
        if store.check(["run/fomoe/there/1"]):
            break
    assert store.check(["run/fomoe/there/1"])
    store.set("run/fomoe/conclusion", "[[0], 1]")
    listens._thread.join(10)
    assert listens.conclusion == ([0], 1)


def _leaves_late(rank: int, folder: str, port: int) -> None:
    errors = os.open(f"{folder}/{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    listen(Topology(3, 1, rank))
    dist.barrier()
    time.sleep(rank)
    stop_listening(together=True)
    dist.destroy_process_group()


def test_ranks_that_end_one_after_the_other_leave_no_trace_of_it(tmp_path: Path) -> None:
    run_all(_leaves_late, 3, str(tmp_path), find_free_network_port())
    # torch tells of addresses without a name as well.
    assert [rank for rank in range(3) if "TCPStore" in (tmp_path / str(rank)).read_text()] == []
