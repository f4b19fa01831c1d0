"""Averages of codes: what is expected, the same bits on all sites, in so many bytes; what is lost is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.codec import GROUP, Codec, Groups, Root, TopK
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import moments
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.left_out import LeftOut
from fomoe_pl.federation.state import RESIDUAL
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport, coded_bytes, slice_numel
from tests.distributed import run_distributed
from tests.federation.simulation import Case, Key
from tests.federation.toy import local_step, make, rows

NUMEL = 1000


class Short(Groups):
    def nbytes(self, numel: int) -> int:
        return super().nbytes(numel) + 1


def values(rank: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))


EVEN = (1.0, 1.0, 1.0)


def _average(
    rank: int, sites: tuple[int, ...], codec: Codec, left_out: frozenset[int], weights: tuple[float, ...] = EVEN
) -> Any:
    ledger, cpu = Ledger(), torch.device("cpu")
    wire = Transport(Topology(3, 1, rank), [sites], ledger, device=cpu, weights=weights)
    mean, lost = None, []
    if rank in sites:

        def read() -> list[Tensor]:
            assert rank not in left_out
            return [values(rank)[:400], values(rank)[400:]]

        pending = [wire.average("dense", sites, NUMEL, read, LeftOut(left_out), codec, lost.append) for _ in range(2)]
        first, mean = (p.wait() for p in pending)
        assert torch.equal(first, mean)
        assert torch.equal(*lost)
    wire.close()
    return mean, lost[:1], ledger.payload("dense")


def coded(codec: Codec, flat: Tensor) -> Tensor:
    return codec.decode(codec.encode(flat), flat.shape[-1])


@pytest.mark.parametrize(("left_out", "weights"), [((), EVEN), ((1,), EVEN), ((), (3.0, 0.5, 1.0))])
def test_of_three_it_is_the_mean_of_decoded_slices_coded_once_more(
    left_out: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    codec, sites = Groups(8), (0, 1, 2)
    found = run_distributed(_average, 3, sites, codec, frozenset(left_out), weights)
    length, taken = slice_numel(NUMEL, 3), [site for site in sites if site not in left_out]
    assert length % GROUP == 0
    padded = {s: torch.nn.functional.pad(values(s), (0, 3 * length - NUMEL)).view(3, length) for s in sites}
    total = torch.zeros(3, length)
    for site in taken:
        total += coded(codec, padded[site]) * weights[site]
    expected = coded(codec, total / sum(weights[site] for site in taken)).flatten()[:NUMEL]
    for site in sites:
        assert torch.equal(found[site][0], expected)
        assert found[site][2] == 2 * coded_bytes(codec, NUMEL, 3) == 2 * 2 * 2 * codec.nbytes(length)
    owned = torch.cat([torch.full((length,), site not in left_out) for site in sites])[:NUMEL]
    check_lost(found, taken, expected, owned, weights)
    for site in left_out:
        assert not found[site][1][0].any()


def test_sparse_codes_are_given_to_all_and_not_coded_once_more() -> None:
    codec, sites = TopK(8), (0, 1, 2)
    found = run_distributed(_average, 3, sites, codec, frozenset({1}))
    expected = (coded(codec, values(0)) + coded(codec, values(2))) / 2
    for site in sites:
        assert torch.equal(found[site][0], expected)
        assert found[site][2] == 2 * coded_bytes(codec, NUMEL, 3) == 2 * 2 * codec.nbytes(NUMEL)
    check_lost(found, [0, 2], expected, torch.ones(NUMEL, dtype=torch.bool))
    assert (expected != 0).sum() <= 16


@pytest.mark.parametrize(("codec", "left_out"), [(Groups(4), ()), (Groups(4), (2,)), (Groups(2), ())])
def test_two_give_each_other_all_of_it(codec: Codec, left_out: tuple[int, ...]) -> None:
    found = run_distributed(_average, 3, (0, 2), codec, frozenset(left_out))
    taken = [site for site in (0, 2) if site not in left_out]
    expected = sum(coded(codec, values(site)) for site in taken) / len(taken)
    for site in (0, 2):
        assert torch.equal(found[site][0], expected)
        assert found[site][2] == 2 * coded_bytes(codec, NUMEL, 2) == 2 * codec.nbytes(NUMEL)
    check_lost(found, taken, expected, torch.ones(NUMEL, dtype=torch.bool))


def check_lost(
    found: list[Any], taken: list[int], mean: Tensor, owned: Tensor, weights: tuple[float, ...] = EVEN
) -> None:
    """The mean of what sites had, less what they lost, is the mean that they got, where its owner is not left out."""
    kept = sum((values(site) - found[site][1][0]) * weights[site] for site in taken)
    kept /= sum(weights[site] for site in taken)
    torch.testing.assert_close(kept[owned], mean[owned], rtol=0, atol=1e-6)
    assert all(found[site][1][0].abs().max() > 1e-3 for site in taken)


def test_one_alone_sends_nothing_and_loses_nothing() -> None:
    mean, lost, sent = run_distributed(_average, 3, (1,), Groups(2), frozenset())[1]
    assert torch.equal(mean, values(1))
    assert not lost[0].any()
    assert sent == 0


def test_codes_of_another_length_than_declared_are_refused() -> None:
    wire = Transport(Topology(1, 1, 0), [(0,)], Ledger(), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"wire_codec = 'Short': encode must give uint8 \(1, 67\)"):
        wire._coded(Short(8), torch.zeros(1, 64))


def test_roots_of_small_numbers_are_told_apart_where_the_numbers_are_not() -> None:
    second = torch.tensor([1.0, 1e-3, 3e-4]).repeat(22)[:GROUP]
    assert coded(Groups(8), second)[1] == 0
    torch.testing.assert_close(coded(Root(Groups(8)), second), second, rtol=0.3, atol=0)


# -- rounds -----------------------------------------------------------------------------------------------------------

OUT = frozenset({1})
OPTIONS = {"codec": Groups(4), "moments_codec": Groups(8), "error_feedback": True}


def state_of(federation: Federation, optimizer: Any) -> dict[str, dict[Key, Tensor]]:
    tensors = federation.layout.tensors
    first, second = (
        {n: moments(optimizer, tensors[n])[name] for n in federation.layout.trained if moments(optimizer, tensors[n])}
        for name in ("exp_avg", "exp_avg_sq")
    )
    return {
        "local": rows(federation, dict(tensors)), "anchor": rows(federation, federation.anchors),
        "residual": rows(federation, federation.state.own.get(RESIDUAL, {})),
        "first": rows(federation, first), "second": rows(federation, second),
    }  # fmt: skip


def _rounds(rank: int, case: Case, options: dict[str, Any], left_out: dict[int, frozenset[int]], due: Any) -> Any:
    federation, optimizer = make(case, rank, options=options)
    history = []
    for t in range(case.rounds):
        for step in range(case.local_steps):
            local_step(case, federation, optimizer, t * case.local_steps + step)
        before = state_of(federation, optimizer)
        federation.synchronize(optimizer, left_out.get(t, frozenset()), due=due)
        federation.check_agreement()
        history.append((before, state_of(federation, optimizer)))
        if case.placement == "random":
            federation.adopt(case.place(t + 1), optimizer)
            history[-1] += (federation.placement.residents(rank),)
    federation.transport.close()
    return history


@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        (Case(overlap=2, inner_moments="average"), {}),
        (Case(overlap=4, inner_moments="average", on_host=True), {1: OUT}),
        (Case(overlap=2, inner_moments="average", placement="random"), {1: OUT}),
        (Case(overlap=1, inner_moments="average"), {}),
    ],
    ids=["overlap 2", "replicas, one left out", "moving experts", "overlap 1"],
)
def test_what_coding_loses_of_a_change_is_in_the_next_one(case: Case, left_out: dict[int, frozenset[int]]) -> None:
    found = run_distributed(_rounds, case.n_sites, case, OPTIONS, left_out, (True, True))
    for t in range(case.rounds):
        out = left_out.get(t, frozenset())
        before, after = ([found[site][t][i] for site in range(case.n_sites)] for i in (0, 1))
        for key in {key for state in before for key in state["anchor"]}:
            holders = [s for s in range(case.n_sites) if key in before[s]["anchor"]]
            giving = [s for s in holders if s not in out]
            if not giving:
                continue
            zero = torch.zeros(())
            given = [
                before[s]["anchor"][key] - before[s]["local"][key]
                + before[s]["residual"].get(key, zero) - after[s]["residual"].get(key, zero)
                for s in giving
            ]  # fmt: skip
            moved = before[giving[0]]["anchor"][key] - after[giving[0]]["anchor"][key]
            if not out:
                torch.testing.assert_close(moved, sum(given) / len(given), rtol=1e-5, atol=1e-6)
            for s in holders:
                lost = after[s]["residual"].get(key)
                if lost is not None and (s in out or len(holders) == 1):
                    assert not lost.any()
                for name in ("first", "second") if key in before[s]["first"] else ():
                    assert torch.equal(after[s][name][key], after[giving[0]][name][key])
                    mean = sum(before[g][name][key] for g in giving) / len(giving)
                    torch.testing.assert_close(after[s][name][key], mean, rtol=0.1, atol=float(mean.abs().max()) / 20)
    coded_keys = {key[0].rpartition(".")[2] for key in found[0][0][1]["residual"]}
    assert coded_keys == {"embedding", "w_in", "w_out"}  # not the norm, nor biases
    if case.overlap > 1:
        assert any(found[0][0][1]["residual"][key].any() for key in found[0][0][1]["residual"])


def test_received_experts_have_nothing_to_make_up_for() -> None:
    case = Case(overlap=2, placement="random", rounds=2)
    for site, history in enumerate(
        run_distributed(_rounds, case.n_sites, case, {**OPTIONS, "moments_codec": None}, {}, (True, True))
    ):
        after, residents = history[0][1], history[0][2]
        kept = case.place(0).residents(site)
        later = history[1][0]["residual"]  # before the second round
        for key, lost in later.items():
            if key[1] is not None:
                layer = int(key[0][5])
                assert key[1] in residents[layer]
                expected = after["residual"][key] if key[1] in kept[layer] else torch.zeros_like(lost)
                assert torch.equal(lost, expected)


def test_all_moments_are_due_where_a_site_is_left_out() -> None:
    """Its own may be no numbers, and would make its next step none."""
    case = Case(overlap=4, inner_moments="average", rounds=1)
    found = run_distributed(_rounds, case.n_sites, case, {}, {0: OUT}, (False, False))
    for _, after in (history[0] for history in found):
        for name in ("first", "second"):
            for key, value in after[name].items():
                assert torch.equal(value, found[0][0][1][name][key])


def test_moments_that_are_not_due_stay_the_sites_own() -> None:
    case = Case(overlap=4, inner_moments="average", rounds=1)
    found = run_distributed(_rounds, case.n_sites, case, {}, {}, (False, True))
    for before, after in (history[0] for history in found):
        for key, value in before["first"].items():
            assert torch.equal(after["first"][key], value)
            assert torch.equal(after["second"][key], found[0][0][1]["second"][key])
            assert not torch.equal(after["second"][key], before["second"][key])
