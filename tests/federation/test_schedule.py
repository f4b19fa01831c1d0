from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.schedule import RoundSchedule


def ends(local_steps: Any, steps: int, last: int | None = None) -> list[int]:
    schedule = RoundSchedule.parse(local_steps)
    return [step for step in range(1, steps + 1) if schedule.is_round_end(step, last)]


@pytest.mark.parametrize("k", [1, 3, 32])
def test_the_first_round_ends_after_exactly_k_steps(k: int) -> None:
    assert ends(k, 4 * k) == [k, 2 * k, 3 * k, 4 * k]


def test_a_synchronous_start() -> None:
    assert ends({0: 1, 4: 3}, 13) == [1, 2, 3, 4, 7, 10, 13]
    assert ends({6: 4, 0: 2, 14: 1}, 16) == [2, 4, 6, 10, 14, 15, 16]
    assert ends({"0": "1", "2": "2"}, 6) == [1, 2, 4, 6]  # as YAML or the command line may give them


def test_the_last_step_ends_a_round() -> None:
    assert ends(4, 10, last=10) == [4, 8, 10]
    assert ends(4, 8, last=8) == [4, 8]


@pytest.mark.parametrize(("local_steps", "steps", "rounds"), [(4, 10, 3), (4, 8, 2), ({0: 1, 4: 3}, 13, 7), (5, 3, 1)])
def test_rounds_are_the_ends(local_steps: Any, steps: int, rounds: int) -> None:
    assert RoundSchedule.parse(local_steps).rounds(steps) == rounds == len(ends(local_steps, steps, steps))


@pytest.mark.parametrize(
    ("local_steps", "fragments", "turns"),
    [
        (4, 1, {4: 0, 8: 0}),
        (4, 2, {2: 0, 4: 1, 6: 0, 8: 1, 10: 0}),
        (6, 3, {2: 0, 4: 1, 6: 2, 8: 0, 10: 1}),
        ({0: 2, 4: 4}, 2, {1: 0, 2: 1, 3: 0, 4: 1, 6: 0, 8: 1, 10: 0}),
    ],
)
def test_fragments_take_turns(local_steps: Any, fragments: int, turns: dict[int, int]) -> None:
    schedule = RoundSchedule.parse(local_steps, fragments)
    found = {step: turn for step in range(1, 11) if (turn := schedule.turn(step)) is not None}
    assert {step: turn.fragment for step, turn in found.items()} == turns
    assert [step for step, turn in found.items() if turn.ends_round] == [
        step for step in range(1, 11) if schedule.is_round_end(step)
    ]
    assert schedule.turn(9, last_step=9) == (fragments - 1, True)


def test_routers_have_a_period_of_their_own() -> None:
    schedule = RoundSchedule.parse({0: 2, 4: 6}, 2, 0, 3)
    assert [step for step in range(1, 17) if schedule.routers_due(step, 16)] == [7, 10, 13]
    assert not any(RoundSchedule.parse(4).routers_due(step) for step in range(1, 9))


@pytest.mark.parametrize(
    ("local_steps", "every", "message"),
    [
        (8, 0, "at least 1"),
        (8, 3, "must divide the 8 steps .* Type one of 1, 2, 4"),
        ({0: 4, 8: 6}, 4, "must divide the 6 steps"),
        (8, 8, "be below them"),
        (1, 1, "Leave it out"),
    ],
)
def test_periods_of_routers_that_cannot_work(local_steps: Any, every: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        RoundSchedule.parse(local_steps, router_every=every)
    assert error.value.key == "router_every"


@pytest.mark.parametrize(
    ("local_steps", "message"),
    [
        (0, "at least 1"),
        ({0: 4, 8: 0}, "at least 1"),
        ({1: 4}, "starts at step 0"),
        ({}, "starts at step 0"),
        ({0: 4, 10: 8}, r"steps 0\.\.10 must be a whole number of rounds of 4 steps.* 8 or 12 instead of 10"),
    ],
)
def test_schedules_that_cannot_work(local_steps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        RoundSchedule.parse(local_steps)
    assert error.value.key == "local_steps"


def test_in_words() -> None:
    assert str(RoundSchedule.parse(8)) == "8"
    assert str(RoundSchedule.parse({0: 1, 64: 32})) == "1 (from step 64: 32)"
