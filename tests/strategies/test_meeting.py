"""Processes that do not come are named, and nobody waits for them longer than the timeout."""

import json
import multiprocessing as mp
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fomoe_pl.errors import MeetingError, SiteLostError
from fomoe_pl.federation.topology import Topology
from fomoe_pl.strategies import CountedDDPStrategy, FederatedStrategy
from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.meeting import _ask, _tell, meet
from fomoe_pl.strategies.presence import RunKey
from tests.distributed import start_processes

SITES = 3


Settings = dict[str, Any]


def _comes(rank: int, folder: str, port: int, seconds: float, attempts: int, own: Settings, ready: Any) -> None:
    ready.wait()  # else a busy machine would be late
    start = time.monotonic()
    found = []
    try:
        for attempt in range(attempts):
            if attempts > 1:  # as torchrun, whose agent keeps the store, and counts its own machine's restarts alone
                count = str(attempt if rank == 1 else 0)
                os.environ |= {"TORCHELASTIC_RESTART_COUNT": count, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            meet(Topology(SITES, 1, rank), "127.0.0.1", port, "gloo", timedelta(seconds=seconds), None, own)
            total = torch.ones(1)
            dist.all_reduce(total)
            found.append(float(total))
            dist.destroy_process_group()
    except SiteLostError as error:
        found = [error.sites, error.speaks, str(error)]
    except MeetingError as error:
        found = [str(error)]
    Path(folder, f"{rank}.json").write_text(json.dumps([found, time.monotonic() - start]))


def run(
    ranks: list[int], folder: Path, seconds: float, attempts: int = 1, settings: dict[int, Settings] | None = None
) -> list[list]:
    port = find_free_network_port()
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if attempts > 1 else None
    same, barrier = (str(folder), port, seconds, attempts), mp.get_context("forkserver").Barrier(len(ranks))
    own = {rank: (settings or {}).get(rank, {}) for rank in ranks}
    processes = start_processes(_comes, [(rank, *same, own[rank], barrier) for rank in ranks])
    for process in processes:
        process.join(300)
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


def test_settings_that_differ_are_named_on_all_sites_with_both_values(tmp_path: Path) -> None:
    same = {"trainer.max_steps": 8, "model.optimizer.lr": 0.1}
    settings = {0: same, 1: same, 2: same | {"model.optimizer.lr": 0.2}}
    found = [found for found, _ in run([0, 1, 2], tmp_path, 60.0, settings=settings)]
    told = (
        "configuration: differs between sites: model.optimizer.lr is 0.1 on sites 0, 1, 0.2 on site 2. Give every site"
    )
    assert [one[0][: len(told)] for one in found] == [told] * SITES


KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.mark.parametrize(
    ("keeper", "asker", "told"),
    [
        (None, None, None),
        (KEY, KEY, None),
        (KEY, OTHER, "this process has another run key than site 0"),
        (KEY, None, "the run has a key, and this process has none"),
        (None, KEY, "this process has a run key, and site 0 has none"),
    ],
)
def test_who_does_not_know_the_runs_key_is_refused(
    keeper: str | None, asker: str | None, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    store, refused = dist.HashStore(), set[bytes]()
    with ThreadPoolExecutor(1) as pool:
        number = pool.submit(_ask, store, 1, timedelta(seconds=60), RunKey(asker))
        while not number.done():
            _tell(store, 0, 2, 7, RunKey(keeper), refused)
            time.sleep(0.01)
        if told is None:
            assert number.result() == 7
        else:
            with pytest.raises(MeetingError, match=f"FOMOE_RUN_KEY: {told}"):
                number.result()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(refused) == (told is not None)
    assert all("refused a process that says it is rank 1" in warning for warning in warnings)


@pytest.mark.parametrize(
    "message", [b"", b"{", b"[1]", b"null", b'{"name": 1, "proof": ""}', b'{"name": "n"}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_strangers_write_into_the_store_is_refused_and_the_one_that_comes_is_answered(message: bytes) -> None:
    store, key, refused = dist.HashStore(), RunKey(KEY), set[bytes]()
    store.set("fomoe/asks/1", message)
    _tell(store, 0, 2, 7, key, refused)
    assert refused == {message}
    with ThreadPoolExecutor(1) as pool:
        number = pool.submit(_ask, store, 1, timedelta(seconds=60), key)
        while not number.done():
            _tell(store, 0, 2, 7, key, refused)
        assert number.result() == 7


def test_the_place_of_the_meeting_and_proofs_are_the_keys_own() -> None:
    key, other, none = RunKey(KEY), RunKey(OTHER), RunKey(None)
    assert len({one.sign("place", 1) for one in (key, other, none)}) == 3
    assert key.proves(key.sign("asks", 1, "n"), "asks", 1, "n")
    assert not key.proves(key.sign("asks", 2, "n"), "asks", 1, "n")  # of another rank
    assert not key.proves(key.sign("told", 1, "n"), "asks", 1, "n")  # rank 0 does not sign questions
    assert not key.proves("é", "asks", 1, "n")


def test_a_short_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOMOE_RUN_KEY", "short")
    with pytest.raises(MeetingError, match=r"must have at least 16 characters, and has 5\. Type export .*openssl"):
        RunKey.of_environment()


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
