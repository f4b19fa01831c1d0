"""Whether sites have the same bits: a hash of each thing that must be equal, compared in one small message."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.placement import Placement
from fomoe_pl.federation.transport import Transport

# Elements that are hashed together: on a CPU so few that what is calculated stays in the cache, in memory that is used
# again; more cost ten times the time.
_CHUNK_CPU, _CHUNK_GPU = 2**18, 2**22
_LOWEST = torch.iinfo(torch.int64).min
_SMALL = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensor: Tensor, rows: bool) -> Tensor:
    """A 64-bit hash of a tensor's bits, or of each of its rows, computed where it lies.

    The sum of all elements, as integers, each times an odd number of its place, modulo 2^64. An odd factor loses
    nothing, so a change of one element is always found; of changes of several one in about 2^64 is not.

    Args:
        tensor: Any dtype, any shape.
        rows: Hash the rows of the first dimension one by one.

    Returns:
        int64, (rows,) or (1,).
    """
    bits = tensor.detach().contiguous().view(_SMALL[tensor.element_size()]).reshape(len(tensor) if rows else 1, -1)
    total = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    chunk = max(1, (_CHUNK_CPU if bits.device.type == "cpu" else _CHUNK_GPU) // len(bits))
    for start in range(0, bits.shape[1], chunk):
        part = bits[:, start : start + chunk].long()
        place = torch.arange(start, start + part.shape[1], device=bits.device)
        total += (part * ((place * 0x9E3779B97F4A7C15 % 2**63) | 1)).sum(1)
    return total


def disagreements(
    transport: Transport, layout: ParameterLayout, placement: Placement, values: Mapping[str, Tensor]
) -> list[str]:
    """Compare the dense tensors of all sites and each expert's of its holders; every site must call it.

    Sends 16 bytes for each dense tensor and for each expert of each stacked one, and more only where sites differ.

    Args:
        transport: Counted collectives.
        layout: Which tensor is dense, and which rows of which are which expert.
        placement: Who holds which expert.
        values: What is compared, by the layout's names (not all of them need be there).

    Returns:
        What differs, the same list on all sites: the tensor, the expert, and the sites with each of the values.
    """
    n_sites, site = transport.topology.n_sites, transport.topology.site
    if n_sites == 1:
        return []
    residents = placement.residents(site)
    items: list[tuple[str, int | None]] = []
    own, held = [], []
    for name in (name for name in layout.tensors if name in values):
        layer = layout.expert_layer.get(name)
        if layer is None:
            items.append((name, None))
            own.append(fingerprints(values[name], rows=False))
            held.append(torch.ones(1, dtype=torch.bool))
            continue
        n_experts = len(placement.holders[layer])
        items += [(name, expert) for expert in range(n_experts)]
        ids = torch.tensor(residents[layer])
        hashes = torch.zeros(n_experts, dtype=torch.int64)
        hashes[ids] = fingerprints(values[name], rows=True).cpu()
        own.append(hashes)
        held.append(torch.zeros(n_experts, dtype=torch.bool).index_fill(0, ids, True))
    hash_N, held_N = torch.cat([h.cpu() for h in own]), torch.cat(held)
    # ~h turns the order round without overflow, so that one maximum finds the largest and the smallest.
    extremes = torch.where(held_N, torch.stack([hash_N, ~hash_N]), _LOWEST)
    largest_N, smallest_N = transport.largest("control", extremes)
    differing = (largest_N != ~smallest_N).nonzero().flatten().tolist()
    if not differing:
        return []
    table_MN = torch.zeros(2, n_sites, len(differing), dtype=torch.int64)
    table_MN[0, site], table_MN[1, site] = hash_N[differing], held_N[differing].long()
    hashes_MN, holds_MN = transport.sum("control", table_MN, of_slices=True)
    found = []
    for column, index in enumerate(differing):
        name, expert = items[index]
        sites_of: dict[int, list[int]] = {}
        for holder in holds_MN[:, column].nonzero().flatten().tolist():
            sites_of.setdefault(int(hashes_MN[holder, column]), []).append(holder)
        groups = " / ".join(", ".join(map(str, sites)) for sites in sorted(sites_of.values()))
        found.append(f"{name}{'' if expert is None else f', expert {expert}'} (sites {groups})")
    return found
