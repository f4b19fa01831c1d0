"""Rounds on real processes equal a simulation of M sites in one process, value by value."""

from typing import Any

import pytest
import torch

from fomoe_pl.federation.agreement import fingerprints
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import moments
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.placement import Placement, place
from fomoe_pl.federation.state import Piece, cut, joined
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from tests.distributed import run_distributed
from tests.federation.simulation import EXPERTS, LAYERS, LR, SITES, Case, initial, keys, simulate
from tests.federation.toy import local_step, make, rows, run_case

NESTEROV = {"rule": "nesterov", "lr": 0.7, "momentum": 0.9}
CASES = [
    *(Case(o, p, **r) for o in range(1, SITES + 1) for p in ("fixed", "random") for r in ({}, NESTEROV)),
    *(Case(o, p, inner_moments="average") for o in range(1, SITES + 1) for p in ("fixed", "random")),
    *(Case(o, "random", inner_moments="reset", **NESTEROV) for o in (2, 4)),
    Case(2, "random", reshuffle_rounds=2, rounds=4, warmup=0, **NESTEROV),
    Case(2, "fixed", untouched=1, inner_moments="reset", **NESTEROV),
    Case(2, "random", on_host=True),
    Case(2, "random", capacities=(4, 2, 1, 1), inner_moments="average", **NESTEROV),
    Case(3, capacities=(1, 4, 3, 4)),
    Case(2, weights=(4, 1, 2, 1), inner_moments="average"),
    Case(3, "random", weights=(1, 1, 5, 1), **NESTEROV),
    Case(2, "random", on_host=True, untouched=1, inner_moments="average", **NESTEROV),
]


def _run_all(rank: int) -> list[list[dict[str, Any]]]:
    # In every other case tensors are cut, and buckets hold some of an expert's neighbours.
    return [run_case(case, rank, bucket_bytes=40 if i % 2 else 2**20)[0] for i, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def histories() -> list[list[list[dict[str, Any]]]]:
    """[rank][case][round]: one start of the processes for all cases."""
    return run_distributed(_run_all, SITES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[repr(case) for case in CASES])
def test_rounds_equal_the_simulation(histories: list[Any], index: int) -> None:
    case = CASES[index]
    for t, expected in enumerate(simulate(case)):
        for site, values in enumerate(expected["sites"]):
            found = histories[site][index][t]
            assert found["local"].keys() == values.keys()
            for key, (p, m, v) in values.items():
                message = f"round {t}, site {site}, {key}"
                close(found["local"][key], p, message)
                close(found["anchor"][key], expected["anchor"][key], message)
                if key in found["momentum"]:
                    close(found["momentum"][key], expected["momentum"][key], f"momentum, {message}")
                if key in found["m"]:
                    close(found["m"][key], m, f"first moment, {message}")
                    close(found["v"][key], v, f"second moment, {message}")


def close(found: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6, msg=lambda m: f"{message}: {m}")


@pytest.mark.parametrize("index", range(len(CASES)), ids=[repr(case) for case in CASES])
def test_all_sites_have_the_same_bits(histories: list[Any], index: int) -> None:
    for t in range(CASES[index].rounds):
        per_rank = [history[index][t] for history in histories]
        assert len({found["digest"] for found in per_rank}) == 1
        for key in set().union(*(found["anchor"] for found in per_rank)):
            first, *others = (found["anchor"][key] for found in per_rank if key in found["anchor"])
            assert all(torch.equal(first, other) for other in others), key


def test_random_cases_do_move_experts() -> None:
    case = Case(2, "random")
    assert len({case.place(epoch) for epoch in range(case.rounds)}) == case.rounds
    assert any(set(keys(case.place(0), s)) != set(keys(case.place(1), s)) for s in range(SITES))


def test_rows_that_follow_each_other_are_one_piece() -> None:
    pieces = [Piece("a", None), Piece("b", (0, 1)), Piece("b", (1, 2)), Piece("b", (3, 4)), Piece("c", (4, 5))]
    assert joined(pieces) == [Piece("a", None), Piece("b", (0, 2)), *pieces[3:]]
    assert joined([Piece("a", None), Piece("a", None)]) == [Piece("a", None)] * 2
    assert joined([]) == []


def test_tensors_are_cut_between_rows() -> None:
    matrix = torch.zeros(5, 3)
    assert cut("a", matrix, 15) == [Piece("a", None)]
    assert cut("a", matrix, 8) == [Piece("a", (0, 2)), Piece("a", (2, 4)), Piece("a", (4, 5))]
    assert cut("a", matrix, 2) == [Piece("a", (row, row + 1)) for row in range(5)]
    assert cut("a", torch.zeros(()), 1) == [Piece("a", None)]
    assert torch.cat([piece.of(matrix) for piece in cut("a", matrix, 8)]).shape == matrix.shape


def test_outer_steps_of_dense_tensors_are_torchs_sgd(histories: list[Any]) -> None:
    index = CASES.index(Case(4, "fixed", **NESTEROV))
    key = ("embedding", None)
    parameter = initial(key).clone().requires_grad_()
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    # The pseudo-gradients that were used are recovered from the outer momentum: d_t = m_t - 0.9 m_(t-1).
    before = torch.zeros_like(parameter)
    for found in histories[0][index]:
        parameter.grad = found["momentum"][key] - 0.9 * before
        before = found["momentum"][key]
        sgd.step()
        torch.testing.assert_close(found["anchor"][key], parameter.detach())


def test_an_expert_nobody_trained_does_not_coast_on_outer_momentum(histories: list[Any]) -> None:
    index = next(i for i, case in enumerate(CASES) if case.untouched is not None)
    expert = CASES[index].untouched
    for history in histories:
        for key in [k for k in history[index][0]["momentum"] if k[1] == expert]:
            after = [found["anchor"][key] for found in history[index]]
            assert history[index][0]["momentum"][key].abs().max() > 0
            assert not torch.equal(after[0], initial(key))
            assert all(torch.equal(after[0], later) for later in after[1:])


def _one_site(rank: int) -> tuple[dict[Any, torch.Tensor], dict[str, torch.Tensor], int]:
    case = Case(1, n_sites=1)
    history, federation, _ = run_case(case, rank)
    plain, adamw = make(case, rank)
    adamw.__class__ = torch.optim.AdamW
    for step in range(case.rounds * case.local_steps):
        local_step(case, plain, adamw, step)
    return history[-1]["local"], rows(plain, dict(plain.layout.tensors)), federation.transport.ledger.total_payload


def test_one_site_with_averaging_is_plain_adamw_and_sends_nothing() -> None:
    [(federated, plain, sent)] = run_distributed(_one_site, 1)
    assert sent == 0
    assert (plain["norm", None] - initial(("norm", None))).abs().max() > LR
    for key, value in plain.items():
        torch.testing.assert_close(federated[key], value, rtol=0, atol=1e-6)


def _full_overlap(rank: int) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    case = Case(SITES, **NESTEROV)
    sparse, _, _ = run_case(case, rank)
    federation, optimizer = make(case, rank)
    # The same tensors, all called dense, in a federation that knows no experts.
    object.__setattr__(federation.layout, "expert_layer", {})
    dense = Placement((), SITES)
    for step in range(case.rounds * case.local_steps):
        federation.layout.expert_layer.update({n: int(n[5]) for n in federation.layout.tensors if n[:5] == "layer"})
        local_step(case, federation, optimizer, step)
        if (step + 1) % case.local_steps == 0:
            federation.layout.expert_layer.clear()
            whole, federation.placement = federation.placement, dense
            federation.synchronize(optimizer)
            federation.placement = whole
    federation.layout.expert_layer.update({n: int(n[5]) for n in federation.layout.tensors if n[:5] == "layer"})
    return sparse[-1]["local"], rows(federation, dict(federation.layout.tensors))


def test_overlap_of_all_sites_equals_everything_dense() -> None:
    for sparse, dense in run_distributed(_full_overlap, SITES):
        assert len(sparse) == 3 + LAYERS * EXPERTS * 3
        for key, value in dense.items():
            torch.testing.assert_close(sparse[key], value, rtol=0, atol=1e-6)


PLANTED = {
    "norm (sites 0, 1, 3 / 2)": lambda federation: federation.anchors["norm"][:1],
    "layer1.w_in, expert 3 (sites ": lambda federation: federation.anchors["layer1.w_in"][row_of(federation, 3)],
    "outer momentum of layer0.w_in, expert 0": lambda federation: federation.state.slots["momentum"]["layer0.w_in"][
        row_of(federation, 0, 0)
    ],
}


def row_of(federation: Federation, expert: int, layer: int = 1) -> int:
    return federation.placement.residents(federation.site)[layer].index(expert)


def _planted(rank: int) -> dict[str, list[str]]:
    """Flip one bit after another of one value on one site that holds it; each must be told by all sites."""
    told: dict[str, list[str]] = {}
    for name, find in PLANTED.items():
        federation, _ = make(Case(2, **NESTEROV), rank)
        federation.check_agreement()
        sites = (
            range(SITES)
            if name[:4] == "norm"
            else federation.placement.holders[int("layer1" in name)][3 if "expert 3" in name else 0]
        )
        told[name] = []
        for bit in (0, 1, 13, 30, 31):
            bits = find(federation).view(torch.int32) if rank == sorted(sites)[len(sites) // 2] else None
            if bits is not None:
                bits.flatten()[-1:] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            try:
                federation.check_agreement()
            except RuntimeError as error:
                told[name].append(str(error))
            if bits is not None:
                bits.flatten()[-1:] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    return told


def test_a_flipped_bit_is_told_with_tensor_and_sites_on_every_site() -> None:
    for told in run_distributed(_planted, SITES):
        assert told.keys() == PLANTED.keys()
        for name, messages in told.items():
            assert len(messages) == 5
            assert all(f"sites differ after a round in {name}" in message for message in messages), messages


def test_a_hash_sees_one_bit_and_two_values_that_change_places() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = torch.randn(3, 50, dtype=dtype)
        before = fingerprints(tensor, rows=True)
        assert len({*before.tolist()}) == 3
        assert torch.equal(before[1:2], fingerprints(tensor[1], rows=False))
        tensor[1, [4, 7]] = tensor[1, [7, 4]]
        assert (fingerprints(tensor, rows=True) != before).tolist() == [False, True, False]


def test_a_hash_does_not_depend_on_how_much_a_device_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3, 50)
    before = [fingerprints(tensor, rows=rows) for rows in (True, False)]
    monkeypatch.setattr("fomoe_pl.federation.agreement._CHUNK_CPU", 21)
    assert all(torch.equal(fingerprints(tensor, rows=rows), before[not rows]) for rows in (True, False))


def _left_out(rank: int, inner_moments: str, everyone: bool) -> tuple[dict[Any, torch.Tensor], ...]:
    """One round in which site 1 has no numbers; returns start, own values, agreed ones and first moments."""
    case = Case(2, inner_moments=inner_moments)
    federation, optimizer = make(case, rank)
    out = frozenset(range(SITES) if everyone else [1])
    before = rows(federation, federation.anchors)
    if rank not in out:
        local_step(case, federation, optimizer, 0)
    else:
        with torch.no_grad():
            for tensor in federation.layout.tensors.values():
                tensor.fill_(float("nan"))
    own = rows(federation, dict(federation.layout.tensors))
    trained = {name: federation.layout.tensors[name] for name in federation.layout.trained}
    own_m = rows(
        federation, {n: next(iter(moments(optimizer, p).values())) for n, p in trained.items() if moments(optimizer, p)}
    )
    federation.synchronize(optimizer, out)
    federation.check_agreement()
    m = rows(
        federation, {n: next(iter(moments(optimizer, p).values())) for n, p in trained.items() if moments(optimizer, p)}
    )
    return before, own, rows(federation, dict(federation.layout.tensors)), own_m, m


@pytest.mark.parametrize("inner_moments", ["keep", "average"])
def test_a_site_without_numbers_weighs_nothing(inner_moments: str) -> None:
    found = run_distributed(_left_out, SITES, inner_moments, False)
    for site, (before, _, agreed, _, m) in enumerate(found):
        for key, value in agreed.items():
            givers = [s for s in range(SITES) if s != 1 and key in found[s][1]]
            assert givers or len(before), key
            mean = torch.stack([found[s][1][key] for s in givers]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-6)
            if inner_moments == "average" and key in m:
                mean = torch.stack([found[s][3][key] for s in givers]).mean(0)
                torch.testing.assert_close(m[key], mean, rtol=1e-6, atol=1e-6)
        assert bool(m) == (inner_moments == "average" or site != 1), (
            "a kept site keeps, one that is left out starts anew"
        )


def test_what_all_holders_lack_stays_as_it_was() -> None:
    for before, _, agreed, _, _ in run_distributed(_left_out, SITES, "keep", True):
        assert all(torch.equal(value, before[key]) for key, value in agreed.items())


def _gather(rank: int) -> bool:
    equal = True
    for overlap in range(1, SITES + 1):
        federation, _ = make(Case(overlap, "random"), rank)
        for layer in range(LAYERS):
            for name, full in federation.gather(layer).items():
                equal &= torch.equal(full, torch.stack([initial((name, e)) for e in range(EXPERTS)]))
    return equal


def test_gather_gives_every_site_the_whole_layer() -> None:
    assert run_distributed(_gather, SITES) == [True] * SITES


def _enter_leave(rank: int) -> tuple[bool, bool]:
    case = Case(2)
    federation, optimizer = make(case, rank)
    local_step(case, federation, optimizer, 0)
    moved = rows(federation, dict(federation.layout.tensors))
    federation.enter_global()
    agreed = all(torch.equal(v, initial(k)) for k, v in rows(federation, dict(federation.layout.tensors)).items())
    federation.leave_global()
    back = all(torch.equal(v, moved[k]) for k, v in rows(federation, dict(federation.layout.tensors)).items())
    return agreed, back


def test_the_global_model_is_entered_and_left_in_mid_round() -> None:
    assert run_distributed(_enter_leave, SITES) == [(True, True)] * SITES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max  # of which a sum would be infinite
    tensors = {"dense": torch.full((3,), largest, dtype=dtype), "layer0.w": torch.full((2, 3), -largest, dtype=dtype)}
    placement = place("fixed", n_layers=1, n_experts=2, n_sites=1, overlap=1)
    wire = Transport(Topology(1, 1, 0), [], Ledger(), device=torch.device("cpu"))
    layout = ParameterLayout(tensors | {"none": torch.empty(0, dtype=dtype)}, {"layer0.w": 0}, frozenset(tensors))
    federation = Federation(layout, placement, wire, outer=Average())
    assert federation.is_finite()
    for tensor in tensors.values():
        for value in (torch.nan, torch.inf, -torch.inf):
            kept = tensor.clone()
            tensor.flatten()[-1] = value
            assert not federation.is_finite()
            tensor.copy_(kept)
    assert federation.is_finite()


def test_what_bfloat16_rounds_off_an_anchor_is_no_change() -> None:
    placement = place("fixed", n_layers=1, n_experts=2, n_sites=1, overlap=1)
    exact = {"dense": torch.full((3,), 1 + 2**-12), "layer0.w": torch.full((2, 3), 1 + 2**-12)}
    tensors = {name: t.bfloat16().requires_grad_() for name, t in exact.items()}
    layout = ParameterLayout(tensors, {"layer0.w": 0}, frozenset(tensors))
    wire = Transport(Topology(1, 1, 0), [], Ledger(), device=torch.device("cpu"))
    federation = Federation(layout, placement, wire, outer=Nesterov(0.7, 0.9))
    for name, anchor in federation.anchors.items():
        anchor.copy_(exact[name])
    optimizer = torch.optim.SGD(tensors.values(), lr=1.0)
    for _ in range(3):  # nobody trains
        federation.synchronize(optimizer)
    for name, anchor in federation.anchors.items():
        assert torch.equal(anchor, exact[name])
    with torch.no_grad():
        tensors["dense"] -= 0.5
    federation.synchronize(optimizer)
    torch.testing.assert_close(federation.anchors["dense"], exact["dense"] - 0.7 * 1.9 * 0.5)


@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_each_tensor_is_in_one_fragment_and_layers_are_dealt_out(fragments: int) -> None:
    names = [
        "embedding",
        "norm",
        *(f"layers.{i}.{name}" for i in range(3) for name in ("attention.w", "moe.experts.w")),
    ]
    layers = {name: int(name[7]) for name in names if "experts" in name}
    layout = ParameterLayout({name: torch.zeros(1) for name in names}, layers, frozenset(names))
    parts = [layout.fragment(i, fragments) for i in range(fragments)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert [sorted({layout.layer(name) for name in part}, key=str) for part in parts] == {
        1: [[0, 1, 2, None]], 2: [[None], [0, 1, 2]], 3: [[None], [0, 2], [1]], 4: [[None], [0], [1], [2]]
    }[fragments]  # fmt: skip


def _restored(rank: int) -> bool:
    federation, optimizer = make(Case(2), rank)
    local_step(Case(2), federation, optimizer, 0)
    with torch.no_grad():
        federation.layout.tensors["norm"].fill_(float("nan"))
    federation.restore(optimizer)
    agreed = all(torch.equal(v, initial(k)) for k, v in rows(federation, dict(federation.layout.tensors)).items())
    return agreed and not optimizer.state


def test_values_that_are_no_numbers_go_back_to_the_agreed_ones() -> None:
    assert run_distributed(_restored, SITES) == [True] * SITES
