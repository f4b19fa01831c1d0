"""A text from each rank to all, counted: what sites tell each other once, when they have met."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fomoe_pl.federation.ledger import Ledger


def gather_texts(text: str, device: torch.device, ledger: Ledger) -> list[str]:
    """Every rank's text, in the order of ranks; all ranks call it together.

    Two collectives: lengths, then the texts, filled up to the longest. Nothing that arrives is unpickled.

    Args:
        text: Of this rank.
        device: Where collectives of the process group work: the CPU with gloo.
        ledger: Counts what is sent, as `control`.
    """
    world = dist.get_world_size()
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device))
    sizes = [int(length) for length in lengths]
    filled = torch.zeros(max(sizes), dtype=torch.uint8)
    filled[: own.numel()] = own
    parts = [torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(world)]
    if max(sizes):
        dist.all_gather(parts, filled.to(device))
    ledger.send("control", (world - 1) * (8 + max(sizes)))
    return [part[:size].cpu().numpy().tobytes().decode() for part, size in zip(parts, sizes, strict=True)]
