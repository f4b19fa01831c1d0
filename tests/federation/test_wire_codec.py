"""Averages of codes: what is expected, to the bit the same on all sites, in so many bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.codec import Codec, Groups
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from tests.distributed import run_distributed

NUMEL = 1000


class Short(Groups):
    def nbytes(self, numel: int) -> int:
        return super().nbytes(numel) + 1


def values(rank: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))


def _average(rank: int, sites: tuple[int, ...], codec: Codec, left_out: frozenset[int], kind: Any) -> Any:
    ledger, cpu = Ledger(), torch.device("cpu")
    wire = Transport(Topology(3, 1, rank), [sites], ledger, device=cpu, codec=codec)
    mean = None
    if rank in sites:

        def read() -> list[Tensor]:
            assert rank not in left_out
            return [values(rank)[:400], values(rank)[400:]]

        pending = [wire.average(kind, sites, NUMEL, read, left_out) for _ in range(2)]
        first, mean = (p.wait() for p in pending)
        assert torch.equal(first, mean)
    wire.close()
    return mean, ledger.payload(kind)


def coded(codec: Codec, flat: Tensor) -> Tensor:
    return codec.decode(codec.encode(flat), flat.shape[-1])


@pytest.mark.parametrize(("sites", "left_out"), [((0, 1, 2), []), ((0, 2), []), ((0, 1, 2), [1]), ((1,), [])])
def test_it_is_the_mean_of_decoded_slices_coded_once_more(sites: tuple[int, ...], left_out: list[int]) -> None:
    codec, n = Groups(8), len(sites)
    found = run_distributed(_average, 3, sites, codec, frozenset(left_out), "dense")
    if n == 1:
        assert torch.equal(found[1][0], values(1))
        assert found[1][1] == 0
        return
    length = -(-NUMEL // n)
    slices = {s: torch.nn.functional.pad(values(s), (0, n * length - NUMEL)).view(n, length) for s in sites}
    total = torch.zeros(n, length)
    for site in sites:
        if site not in left_out:
            total += coded(codec, slices[site])
    expected = coded(codec, total / (n - len(left_out))).flatten()[:NUMEL]
    for site in sites:
        assert torch.equal(found[site][0], expected)
        assert found[site][1] == 2 * 2 * (n - 1) * codec.nbytes(length)  # two averages of two shots


def test_moments_are_cast_as_before() -> None:
    found = run_distributed(_average, 3, (0, 1, 2), Groups(2), frozenset(), "moments")
    torch.testing.assert_close(found[0][0], torch.stack([values(rank) for rank in range(3)]).mean(dim=0))


def test_codes_of_another_length_than_declared_are_refused() -> None:
    wire = Transport(Topology(1, 1, 0), [(0,)], Ledger(), device=torch.device("cpu"), codec=Short(8))
    with pytest.raises(ConfigError, match=r"wire_codec = 'Short': encode must give uint8 \(1, 67\)"):
        wire._coded(Short(8), torch.zeros(1, 64))
