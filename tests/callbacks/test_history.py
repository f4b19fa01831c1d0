"""Bounded histories: of a long run nothing is left out, and a resumed one goes on where it stood."""

import itertools

import pytest
import torch

from fomoe_pl.callbacks import history
from fomoe_pl.callbacks.history import LoadHistory, PickHistory, relative_load

ALL = torch.ones(1, 2, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "COLUMNS", 4)
    monkeypatch.setattr(history, "LOOKS", 4)


def test_columns_are_means_of_all_rounds() -> None:
    kept = LoadHistory(start=10)
    for n in range(1, 8):  # rounds of 3 steps, the n-th with n of 8 picks on expert 0
        kept.add(10 + 3 * n, torch.tensor([[float(n), 8.0 - n]]), ALL)
    loads_RLE, edges = kept.columns()
    assert (kept.rounds_each, edges) == (2, [10, 16, 22, 28, 31])
    assert loads_RLE[:, 0, 0].tolist() == [(1 + 2) / 8, (3 + 4) / 8, (5 + 6) / 8, 7 / 4]


@pytest.mark.parametrize("rounds", [*range(1, 20), 1000])
def test_however_long_the_run_is_it_is_kept_to_its_end(rounds: int) -> None:
    kept = LoadHistory()
    for n in range(1, rounds + 1):
        kept.add(n, torch.tensor([[1.0, 0.0]]), ALL)
    loads_RLE, edges = kept.columns()
    assert len(loads_RLE) == len(edges) - 1 <= 4
    assert (edges[0], edges[-1]) == (0, rounds)
    assert edges == sorted(set(edges))
    assert {b - a for a, b in itertools.pairwise(edges[:-1])} <= {kept.rounds_each}
    assert sum(float(load_LE.sum()) for load_LE, _ in kept.state_dict()["loads"]) == rounds  # no round is left out


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 9])
def test_a_history_goes_on_from_its_state(cut: int) -> None:
    def add(loads: LoadHistory, picks: PickHistory, first: int, last: int) -> None:
        for n in range(first, last):
            loads.add(n, torch.tensor([[float(n), 1.0]]), ALL)
            picks.add(n, torch.tensor([[[n]]]))

    whole = LoadHistory(), PickHistory()
    add(*whole, 1, 14)
    before, after = (LoadHistory(), PickHistory()), (LoadHistory(), PickHistory())
    add(*before, 1, cut)
    states = [kept.state_dict() for kept in before]
    add(*before, cut, 14)  # a state is no window on what still moves
    for kept, state in zip(after, states, strict=True):
        kept.load_state_dict(state)
    add(*after, cut, 14)
    assert after[0].columns()[1] == whole[0].columns()[1]
    assert torch.equal(after[0].columns()[0], whole[0].columns()[0])
    assert [step for step, _ in after[1].looks()] == [step for step, _ in whole[1].looks()]


def test_of_many_looks_the_first_the_last_and_evenly_spaced_ones_stay() -> None:
    picks = PickHistory()
    assert picks.looks() == []
    for n in range(11):
        picks.add(n, torch.full((1, 1, 1), n))
        assert picks.looks()[-1][0] == n
    assert [(step, int(kept)) for step, kept in picks.looks()] == [(0, 0), (4, 4), (8, 8), (10, 10)]


def test_relative_load_is_over_what_could_be_picked() -> None:
    load = relative_load(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert load[0, :2].tolist() == [1.5, 0.5]
    assert load[0, 2].isnan()
