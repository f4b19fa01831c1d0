from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_pl.federation.flight import Bucket, Flight
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.state import buckets
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from tests.distributed import run_distributed
from tests.federation.simulation import SITES, Case
from tests.federation.toy import local_step, make, rows, run_case

NUMELS = [3, 5, 1, 40, 2, 7, 16]  # 40 and 16 x 4 bytes are larger than a bucket of 60 bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (15, [[0, 1, 2], [3], [4, 5], [6]]),
        (1, [[0], [1], [2], [3], [4], [5], [6]]),
        (9, [[0, 1, 2], [3], [4, 5], [6]]),
        (8, [[0, 1], [2], [3], [4], [5], [6]]),
        (74, [[0, 1, 2, 3, 4, 5, 6]]),
        (73, [[0, 1, 2, 3, 4, 5], [6]]),
    ],
)
def testbuckets(limit: int, expected: list[list[int]]) -> None:
    assert buckets(NUMELS, limit) == expected


def test_no_pieces_nobuckets() -> None:
    assert buckets([], 10) == []


def value(rank: int, i: int) -> Tensor:
    return torch.randn(NUMELS[i], generator=torch.Generator().manual_seed(100 * rank + i))


def _average(
    rank: int, sites: tuple[int, ...], dtype: Any, bucket_bytes: int, ahead: int | None
) -> tuple[list[Tensor], Ledger]:
    wire = Transport(Topology(3, 1, rank), [sites], Ledger(), device=torch.device("cpu"), dtype=dtype,
                bucket_bytes=bucket_bytes)  # fmt: skip
    means: dict[int, Tensor] = {}
    planned = []
    for taken in buckets(NUMELS, wire.bucket_numel):

        def write(mean: Tensor, taken: list[int] = taken) -> None:
            means.update(zip(taken, mean.clone().split([NUMELS[i] for i in taken]), strict=True))

        numel = sum(NUMELS[i] for i in taken)
        planned.append(Bucket("expert", sites, numel, lambda taken=taken: [value(rank, i) for i in taken], write))
    if rank in sites:
        Flight(planned, wire, LeftOut(), ahead).drain()
    wire.close()
    return [means[i] for i in sorted(means)], wire.ledger


@pytest.mark.parametrize("ahead", [1, 2, None])
@pytest.mark.parametrize("bucket_bytes", [60, 4, 2**20])
@pytest.mark.parametrize("sites", [(0, 1, 2), (0, 2)])
def test_uneven_and_oversize_pieces_are_averaged_in_buckets(
    sites: tuple[int, ...], bucket_bytes: int, ahead: int | None
) -> None:
    results = run_distributed(_average, 3, sites, "float32", bucket_bytes, ahead)
    calls = {60: 4, 4: 7, 2**20: 1}[bucket_bytes]
    for rank, (means, ledger) in enumerate(results):
        if rank not in sites:
            assert (means, ledger.total_payload) == ([], 0)
            continue
        for i, mean in enumerate(means):
            torch.testing.assert_close(mean, torch.stack([value(site, i) for site in sites]).mean(0))
            assert torch.equal(mean, results[sites[0]][0][i])
        assert ledger.payload("expert") == 4 * sum(NUMELS)
        assert ledger.calls == {"expert": calls}


def test_a_bucket_travels_while_its_neighbours_are_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Work:
        def wait(self) -> None:
            done.append("wait")

    def all_reduce(buffer: Tensor, group: Any, async_op: bool) -> Work:
        assert async_op
        done.append("send")
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    wire = Transport(Topology(2, 1, 0), [(0, 1)], Ledger(), device=torch.device("cpu"), bucket_bytes=4)

    def bucket(i: int) -> Bucket:
        def read() -> list[Tensor]:
            done.append(f"read {i}")
            return [torch.ones(1)]

        return Bucket("dense", (0, 1), 1, read, lambda mean: done.append(f"write {i}"))

    flight = Flight([bucket(i) for i in range(3)], wire, LeftOut(), ahead=1)
    assert done == ["read 0", "send"]
    flight.drain()
    assert done == ["read 0", "send", "read 1", "send", "wait", "write 0", "read 2", "send", "wait", "write 1", "wait",
                    "write 2"]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_on_the_wire(dtype: Any, tolerance: float) -> None:
    results = run_distributed(_average, 3, (0, 1, 2), dtype, 60, 1)
    for means, ledger in results:
        assert ledger.payload("expert") == 2 * sum(NUMELS)
        for i, mean in enumerate(means):
            exact = torch.stack([value(site, i) for site in range(3)]).mean(0)
            assert mean.dtype == torch.float32
            torch.testing.assert_close(mean, exact, rtol=0, atol=tolerance)
            assert torch.equal(mean, results[0][0][i])
    assert any(not torch.equal(m, torch.stack([value(s, i) for s in range(3)]).mean(0)) for i, m in enumerate(means))


def test_a_set_of_one_site_sends_nothing_and_rounds_nothing() -> None:
    means, ledger = run_distributed(_average, 3, (1,), "bfloat16", 60, 1)[1]
    assert ledger.total_payload == 0
    assert all(torch.equal(mean, value(1, i)) for i, mean in enumerate(means))


def _sum_and_largest(rank: int) -> tuple[Tensor, Tensor]:
    wire = Transport(Topology(3, 1, rank), [], Ledger(), device=torch.device("cpu"))
    mine = torch.tensor([rank, 1.5], dtype=torch.float64)
    total = wire.sum("control", mine)
    assert mine.tolist() == [rank, 1.5]
    return total, wire.largest("control", torch.tensor([2**63 - 1 - (rank == 1), -rank, -(2**63)]))


def test_sum_and_largest() -> None:
    for total, largest in run_distributed(_sum_and_largest, 3):
        assert total.tolist() == [3.0, 4.5]
        assert largest.tolist() == [2**63 - 1, 0, -(2**63)]


def _exchange(rank: int, dtype: torch.dtype) -> tuple[dict[int, Tensor], int]:
    wire = Transport(Topology(3, 1, rank), [], Ledger(), device=torch.device("cpu"))
    # Rank 0 sends two tensors to 2 and one to 1, listed in turns; rank 1 one to 2; rank 2 nothing.
    outgoing = {
        0: [(2, torch.full((2, 2), 1.0)), (1, torch.full((3,), 2.0)), (2, torch.full((1,), 3.0))],
        1: [(2, torch.full((2,), 4.0))],
        2: [],
    }[rank]
    incoming = {0: {}, 1: {0: 3}, 2: {0: 5, 1: 2}}[rank]
    return wire.exchange("migration", outgoing, incoming, dtype), wire.ledger.wire("migration")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchange_keeps_each_receivers_order(dtype: torch.dtype) -> None:
    (none, sent0), (one, sent1), (two, sent2) = run_distributed(_exchange, 3, dtype)
    assert none == {}
    assert {giver: part.tolist() for giver, part in one.items()} == {0: [2, 2, 2]}
    assert {giver: part.tolist() for giver, part in two.items()} == {0: [1, 1, 1, 1, 3], 1: [4, 4]}
    assert (sent0, sent1, sent2) == (8 * dtype.itemsize, 2 * dtype.itemsize, 0)


def _bfloat16_rounds(rank: int) -> tuple[list[Any], list[Any], int, int]:
    case = Case(2, "random", rule="nesterov", lr=0.7, inner_moments="average")
    exact, full, _ = run_case(case, rank)
    rounded, half, _ = run_case(case, rank, dtype="bfloat16", bucket_bytes=32)
    kinds = ("dense", "expert", "moments")
    sums = [sum(f.transport.ledger.payload(kind) for kind in kinds) for f in (full, half)]
    return exact, rounded, sums[0], sums[1]


def test_rounds_in_bfloat16_stay_near_and_agree_between_sites() -> None:
    results = run_distributed(_bfloat16_rounds, SITES)
    for exact, rounded, full, half in results:
        assert full == 2 * half
        assert rounded[-1]["digest"] == results[0][1][-1]["digest"] != exact[-1]["digest"]
        for key, found in rounded[-1]["anchor"].items():
            torch.testing.assert_close(found, exact[-1]["anchor"][key], rtol=0, atol=0.1)


def _sites_of_two(rank: int) -> list[tuple[float, ...]]:
    """Three sites of two ranks: a mean of two of the sites, a sum, a maximum, and what site 0 sends to site 2."""
    found = []
    site, place = divmod(rank, 2)
    for slices in (True, False):
        ledger = Ledger()
        sets = [(0, 1), (0, 2), (1, 2)]
        wire = Transport(Topology(3, 2, rank), sets, ledger, device=torch.device("cpu"), slices=slices)
        mean = torch.tensor([-1.0])
        if site < 2:
            mean = wire.average("expert", (0, 1), 1, lambda: [torch.tensor([10.0 * place + site])]).wait()
        values = torch.tensor([100.0 * place + site])
        outgoing = [(2, values + 7)] if site == 0 else []
        got = wire.exchange("migration", outgoing, {0: 1} if site == 2 else {}, torch.float32)
        numbers = float(mean), float(wire.sum("control", values)), float(wire.largest("control", values))
        found.append((*numbers, float(got.get(0, torch.tensor(-1.0))), ledger.total_payload))
        wire.close()
    return found


def test_ranks_with_slices_speak_with_those_of_their_place_and_others_through_the_first() -> None:
    for rank, (sliced, alike) in enumerate(run_distributed(_sites_of_two, 6)):
        site, place = divmod(rank, 2)
        sent = (4 if site < 2 else 0) + 4 + 4 + (4 if site == 0 else 0)
        got = 100 * place + 7 if site == 2 else -1
        assert sliced == (10 * place + 0.5 if site < 2 else -1, 3, 100 * place + 2, got, sent - 4 * (place == 1))
        got = 7 if site == 2 else -1
        assert alike == (0.5 if site < 2 else -1, 3, 102, got, sent if place == 0 else 0)


def _in_flight(rank: int) -> bool:
    """A round that is begun, and finished after more local steps, equals one at once: values are taken at the start."""
    case = Case(2, rule="nesterov", lr=0.7, inner_moments="average")
    found = []
    for ahead in (1, None):
        federation, optimizer = make(case, rank, bucket_bytes=32)
        local_step(case, federation, optimizer, 0)
        flight = federation.begin(optimizer, ahead=ahead)
        if ahead is None:
            local_step(case, federation, optimizer, 1)
        federation.finish(flight)
        federation.check_agreement()
        found.append(rows(federation, federation.anchors) | rows(federation, dict(federation.layout.tensors)))
    return all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_round_may_be_begun_and_finished_later() -> None:
    assert run_distributed(_in_flight, SITES) == [True] * SITES
