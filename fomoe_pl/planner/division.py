"""How sites share a step's sequences and a layer's experts: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fomoe_pl.errors import ConfigError


class Division(NamedTuple):
    """How the sequences of a step are shared out.

    Attributes:
        batches: Sequences of a micro-batch of one device of each place.
        accumulate: Micro-batches of a step, the same at all places.
    """

    batches: tuple[int, ...]
    accumulate: int

    def sequences(self, devices: Sequence[int]) -> int:
        """Of a step, all places together, which have so many devices at work."""
        return self.accumulate * sum(n * batch for n, batch in zip(devices, self.batches, strict=True))


def divisions(sequences: int, rounding: float = 0.0) -> list[tuple[int, int]]:
    """(micro-batch, number of them) for a device's sequences of a step; largest batch first.

    Args:
        sequences: That are asked for.
        rounding: Share by which there may be more or fewer.
    """
    found: dict[int, int] = {}
    for accumulate in range(1, math.floor(sequences * (1 + rounding)) + 1):
        for batch in {sequences // accumulate, -(-sequences // accumulate)} - {0}:
            miss = abs(batch * accumulate - sequences)
            nearer = batch not in found or miss < abs(batch * found[batch] - sequences)
            if miss <= rounding * sequences and nearer:
                found[batch] = accumulate
    return sorted(found.items(), reverse=True)


def alike(sequences: int, sites: int, ranks: Sequence[int], rounding: float = 0.0) -> list[Division]:
    """Equal shares for all sites, rounded up to whole sequences of each device; largest batches first.

    Args:
        sequences: Of a step, all sites together.
        sites: Number of sites.
        ranks: Devices of a site at each place, which share its batch.
        rounding: Share by which there may be more or fewer.
    """
    unit = math.lcm(*ranks)  # the least batch that devices of every site can share
    own = -(-sequences // (sites * unit))
    return [Division(tuple(batch * unit // n for n in ranks), number) for batch, number in divisions(own, rounding)]


def equal_times(
    target: int, devices: Sequence[int], fixed: Sequence[float], each: Sequence[float]
) -> tuple[int, ...]:  # fmt: skip
    """Micro-batches with which the slowest device is soonest done, at least `target` sequences in all.

    Args:
        target: Sequences of a micro-batch, all devices together.
        devices: At work at each place.
        fixed: Seconds that a device of each place takes for any micro-batch.
        each: Seconds that it takes more for each sequence.

    Returns:
        Sequences of a device of each place, at least one.
    """
    places = range(len(devices))
    at = (target + sum(n * f / e for n, f, e in zip(devices, fixed, each, strict=True))) / sum(
        n / e for n, e in zip(devices, each, strict=True)
    )
    batches = [max(1, math.floor((at - f) / e)) for f, e in zip(fixed, each, strict=True)]

    def total() -> int:
        return sum(n * batch for n, batch in zip(devices, batches, strict=True))

    def seconds(place: int, batch: int) -> float:
        return fixed[place] + batch * each[place]

    while total() < target:
        batches[min(places, key=lambda i: seconds(i, batches[i] + 1))] += 1
    # The last one may have been of a place of many devices: what is not needed is taken off the slowest.
    for i in sorted(places, key=lambda i: -seconds(i, batches[i])):
        batches[i] -= min(batches[i] - 1, (total() - target) // devices[i])
    return tuple(batches)


def capacities_by_room(
    rooms: Sequence[int], names: Sequence[str], *, n_experts: int, overlap: int
) -> tuple[int, ...]:  # fmt: skip
    """Experts of a layer that each site holds: one, and of all others a share as large as its room.

    Args:
        rooms: Experts that each site has room for, at most those of a layer.
        names: Of the sites.
        n_experts: Experts of a layer, E.
        overlap: Sites that hold each expert.

    Returns:
        One number for each site, E x overlap together, none above its room.

    Raises:
        ConfigError: If the rooms do not do, with what is missing.
    """
    total, told = n_experts * overlap, list(rooms)
    if min(rooms) < 1:
        without = " and ".join(dict.fromkeys(name for name, room in zip(names, rooms, strict=True) if room < 1))
        rule = f"{without} would have no room for one expert of a layer"
        raise ConfigError("capacities", told, rule, "leave it out, or give its devices more memory")
    if (missing := total - sum(rooms)) > 0:
        rule = f"sites have room for {sum(rooms)} experts of a layer, and {n_experts} x overlap {overlap} are {total}"
        raise ConfigError("capacities", told, f"{rule}: room for {missing} is missing", "take a smaller overlap")
    if total < len(rooms):
        rule = f"{n_experts} experts x overlap {overlap} leave some of the {len(rooms)} sites without one"
        raise ConfigError("capacities", told, rule, f"take overlap {-(-len(rooms) // n_experts)} or more")
    more, left = sum(rooms) - len(rooms), total - len(rooms)
    shares = [left * (room - 1) / more if more else 0.0 for room in rooms]
    held = [1 + math.floor(share) for share in shares]
    order = sorted(range(len(rooms)), key=lambda i: (held[i] - 1 - shares[i], i))
    for i in order[: total - sum(held)]:
        held[i] += 1
    return tuple(held)
