"""Averages of several holder sets that are on their way at once: in one order within each, and nobody waits forever."""

import random
from collections import defaultdict
from collections.abc import Callable
from threading import Condition, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fomoe_pl.federation.flight import Bucket, Flight
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.transport import Pending

LIMIT, SITES, PATIENCE = 100, 6, 30.0
Op = tuple[int, str]


class Wires:
    """What collectives are to sites that are threads: the n-th that a site starts in a group is the others' n-th."""

    def __init__(self) -> None:
        self.started: dict[tuple[Any, int], list[Op]] = defaultdict(list)
        self.on_their_way: dict[int, int] = defaultdict(int)
        self.most: dict[int, int] = defaultdict(int)
        self.changed = Condition()

    def start(self, site: int, sites: tuple[int, ...], op: Op) -> Callable[[], None]:
        with self.changed:
            self.started[sites, site].append(op)
            index = len(self.started[sites, site]) - 1
            self.changed.notify_all()

        def wait() -> None:
            with self.changed:
                there = self.changed.wait_for(
                    lambda: all(len(self.started[sites, other]) > index for other in sites), PATIENCE
                )
                assert there, f"site {site} waits forever for {op} over {sites}"
                assert {self.started[sites, other][index] for other in sites} == {op}, "another order in a group"

        return wait


class OneSite:
    """What `Flight` wants of a transport."""

    bucket_numel = LIMIT

    def __init__(self, wires: Wires, site: int, *, side_by_side: bool = True) -> None:
        self.wires, self.site, self.side_by_side = wires, site, side_by_side

    def average(
        self, kind: str, sites: tuple[int, ...], numel: int, read: Any, left_out: Any, codec: Any, lost: Any, **_: Any
    ) -> Pending:
        wires, number = self.wires, read()
        wires.on_their_way[self.site] += numel
        wires.most[self.site] = max(wires.most[self.site], wires.on_their_way[self.site])
        waits = [wires.start(self.site, sites, (number, "first"))]

        def second(beside: bool) -> None:
            waits.pop()()
            waits.append(wires.start(self.site, sites, (number, "second")))

        def wait() -> torch.Tensor:
            waits.pop()()
            wires.on_their_way[self.site] -= numel
            return torch.empty(0)

        return Pending(wait, None if codec is None else second)


def planned(draw: random.Random) -> list[tuple[int, Bucket]]:
    """Changes, then moments, over all sites and over arcs, in the global order."""
    size = draw.choice((2, 3, 4))
    arcs = [tuple(sorted((i + j) % SITES for j in range(size))) for i in range(SITES)]
    draw.shuffle(arcs)
    found: list[tuple[int, Bucket]] = []
    for kind in ("expert", "moments"):
        for sites in (tuple(range(SITES)), *arcs):
            for codec in (None, SimpleNamespace()):
                for _ in range(draw.choice((0, 1, 1, 2, 4))):
                    number = len(found)
                    bucket: Any = Bucket(
                        kind, sites, draw.choice((1, 5, LIMIT // 2, LIMIT)),  # type: ignore[arg-type]
                        lambda number=number: number, lambda mean: None, codec,  # type: ignore[arg-type, misc]
                    )  # fmt: skip
                    found.append((number, bucket))
    return found


def fly(buckets: list[tuple[int, Bucket]], *, side_by_side: bool = True) -> Wires:
    """All sites average what is theirs; raises what a site raises."""
    wires, errors = Wires(), list[BaseException]()

    def run(site: int) -> None:
        try:
            own = [bucket for _, bucket in buckets if site in bucket.sites]
            transport: Any = OneSite(wires, site, side_by_side=side_by_side)
            Flight(own, transport, LeftOut(), 1).drain()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(site,), daemon=True) for site in range(SITES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    for error in errors:
        raise error
    return wires


@pytest.mark.parametrize("seed", range(20))
def test_groups_keep_one_order_and_nobody_waits_forever(seed: int) -> None:
    wires = fly(planned(random.Random(seed)))
    assert all(most <= 2 * LIMIT for most in wires.most.values())


def test_small_averages_of_several_groups_are_on_their_way_at_once() -> None:
    sets = [(0, 1, 2, 3, 4, 5), (0, 1), (2, 3), (4, 5), (1, 2), (3, 4), (0, 5)]
    buckets = [(i, Bucket("expert", sites, 10, lambda i=i: i, lambda mean: None)) for i, sites in enumerate(sets)]  # type: ignore[misc]
    assert set(fly(buckets).most.values()) == {30}  # that of all, and of both arcs
    assert set(fly(buckets, side_by_side=False).most.values()) == {10}
