"""Joining the other processes again after torchrun has restarted them all."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_after_restart(backend: str, timeout: timedelta | None, device: torch.device | None) -> bool:
    """Make the process group of a restarted run, if it is one.

    torchrun lets every attempt meet through the same store, in which the addresses of the attempt before still lie:
    processes that take those for their peers' fail to connect, or wait for ever. Here each attempt has keys of its own.

    Args:
        backend: backend of the process group.
        timeout: after which a collective that does not complete raises.
        device: device that the group is bound to, None for none.

    Returns:
        Whether a group was made; without one the usual way is safe.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return False
    wait = timeout or timedelta(minutes=30)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"fomoe/attempt-{attempt}", dist.TCPStore(address, port, is_master=False, timeout=wait))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    return True
