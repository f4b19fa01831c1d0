"""Processes that do not come are named, and nobody waits for them longer than the timeout."""

import json
import multiprocessing as mp
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fomoe_pl.errors import SiteLostError
from fomoe_pl.federation.topology import Topology
from fomoe_pl.strategies import CountedDDPStrategy, FederatedStrategy
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.meeting import meet

SITES = 3


def _comes(rank: int, folder: str, port: int, seconds: float, attempts: int, ready: Any) -> None:
    ready.wait()  # else a busy machine would be late
    start = time.monotonic()
    found = []
    try:
        for attempt in range(attempts):
            if attempts > 1:  # as torchrun, whose agent keeps the store, and counts its own machine's restarts alone
                count = str(attempt if rank == 1 else 0)
                os.environ |= {"TORCHELASTIC_RESTART_COUNT": count, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            meet(Topology(SITES, 1, rank), "127.0.0.1", port, "gloo", timedelta(seconds=seconds), None)
            total = torch.ones(1)
            dist.all_reduce(total)
            found.append(float(total))
            dist.destroy_process_group()
    except SiteLostError as error:
        found = [error.sites, error.speaks, str(error)]
    Path(folder, f"{rank}.json").write_text(json.dumps([found, time.monotonic() - start]))


def run(ranks: list[int], folder: Path, seconds: float, attempts: int = 1) -> list[list]:
    port = find_free_network_port()
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if attempts > 1 else None
    context = mp.get_context("forkserver")
    same = (str(folder), port, seconds, attempts, context.Barrier(len(ranks)))
    processes = [context.Process(target=_comes, args=(rank, *same)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    del kept
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]


def test_all_meet_and_again_in_another_attempt(tmp_path: Path) -> None:
    assert [found for found, _ in run([0, 1, 2], tmp_path, 60.0, attempts=2)] == [[SITES, SITES]] * SITES


@pytest.mark.parametrize(("missing", "speaker"), [(1, 0), (2, 0), (0, 1)])
def test_who_does_not_come_is_named(tmp_path: Path, missing: int, speaker: int) -> None:
    ranks = [rank for rank in range(SITES) if rank != missing]
    for rank, (found, seconds) in zip(ranks, run(ranks, tmp_path, 4.0), strict=True):
        sites, speaks, told = found
        assert sites == [missing]
        assert speaks == (rank == speaker)
        assert told.startswith(f"site {missing} is gone (not there within 4 seconds)")
        assert seconds < 40


class _ThatFarError(Exception):
    """Nothing further is set up."""


@pytest.mark.parametrize(("strategy", "mode"), [(FederatedStrategy, "2"), (CountedDDPStrategy, None)])
def test_errors_of_nccl_are_ours_where_the_host_waits(
    strategy: type[SiteStrategy], mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallelism waits on the GPU: it would go on with gradients that were not averaged."""

    def stop(*_: object) -> None:
        raise _ThatFarError

    monkeypatch.setattr(strategy, "set_world_ranks", stop)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")  # so that it is as before at the end
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    with pytest.raises(_ThatFarError):
        strategy().setup_distributed()
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == mode
