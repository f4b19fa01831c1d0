"""Run a function on several gloo processes of this machine and collect what each rank returns."""

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as tmp

TIMEOUT = timedelta(seconds=300)
PR_SET_PDEATHSIG = 1  # prctl(2)
# A fork server that has the large packages loaded starts a process in milliseconds, and unlike plain fork without the
# threads that the tests before this one may have left in the parent. It ends with the parent, and they with it.
PRELOADED = ["torch", "torch.distributed", "lightning.pytorch", "fomoe_pl.cli", "tests.fork_server"]


def end_with_parent() -> None:
    """Let this process end when the one that started it does, whatever ends that: a time limit, or a signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_processes(target: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[BaseProcess]:
    """Start a process for each tuple of arguments; they end with this process."""
    mp.set_forkserver_preload(PRELOADED)
    processes = [mp.get_context("forkserver").Process(target=_bound, args=(target, own)) for own in arguments]
    for process in processes:
        process.start()
    return processes


def _bound(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    target(*arguments)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` gloo processes.

    Args:
        fn: a function at the top level of a module.
        world_size: number of processes.
        *args: further arguments, which are pickled.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the first error of any rank, with its traceback.
    """
    mp.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        tmp.start_processes(_rank, (world_size, folder, fn, args), nprocs=world_size, start_method="forkserver")
        paths = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]


def _rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    torch.save(fn(rank, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
