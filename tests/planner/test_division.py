"""How sites share a step and a layer's experts."""

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.planner.division import Division, alike, capacities_by_room, divisions, equal_times


def test_divisions_go_down_to_single_sequences() -> None:
    assert divisions(342)[:3] == [(342, 1), (171, 2), (114, 3)]
    assert divisions(342)[-1] == (1, 342)
    assert divisions(52) == [(52, 1), (26, 2), (13, 4), (4, 13), (2, 26), (1, 52)]


def test_rounding_makes_room_for_larger_micro_batches() -> None:
    assert divisions(43) == [(43, 1), (1, 43)]  # a prime number
    rounded = divisions(43, 0.03)
    assert rounded[:2] == [(43, 1), (22, 2)]
    assert (21, 2) in rounded
    assert (14, 3) in rounded
    assert all(abs(batch * number - 43) <= 0.03 * 43 for batch, number in rounded)
    assert dict(rounded)[1] == 43  # of one batch the number that is nearest


def test_devices_of_unlike_sites_have_parts_of_the_same_batch() -> None:
    """1,024 sequences over three sites of 8, 8 and 4: 344 each, what eight devices and four can share."""
    ways = alike(1024, 3, [8, 8, 4])
    assert ways[0] == Division((43, 43, 86), 1)
    assert {way.sequences([8, 8, 4]) for way in ways} == {3 * 344}


def test_unlike_devices_take_as_long() -> None:
    """By hand: one device of 1 second a sequence and two of 3 seconds; 10 sequences are 6 and 2 each."""
    assert equal_times(10, [1, 2], [0, 0], [1, 3]) == (6, 2)
    # A start that costs each of them a second more changes nothing, one of 3 seconds of the first does.
    assert equal_times(10, [1, 2], [1, 1], [1, 3]) == (6, 2)
    assert equal_times(9, [1, 2], [3, 0], [1, 3]) == (5, 2)
    assert equal_times(2, [1, 1], [0, 0], [1, 100]) == (1, 1)  # nobody is left without one


@pytest.mark.parametrize("target", range(20, 200, 7))
def test_no_other_micro_batches_are_sooner_done(target: int) -> None:
    devices, fixed, each = [8, 8, 4], [0.1, 0.3, 0.2], [1.0, 3.2, 6.0]
    found = equal_times(target, devices, fixed, each)

    def slowest(batches: tuple[int, ...]) -> float:
        return max(f + n * e for n, f, e in zip(batches, fixed, each, strict=True))

    total = sum(n * batch for n, batch in zip(devices, found, strict=True))
    assert target <= total < target + max(devices)
    limit = slowest(found) - 1e-9
    most = [max(1, int((limit - f) / e)) for f, e in zip(fixed, each, strict=True)]
    # Whatever takes less long is too little, unless it takes a sequence of each device.
    assert sum(n * batch for n, batch in zip(devices, most, strict=True)) < target or 1 in found


@pytest.mark.parametrize(
    ("rooms", "overlap", "held"),
    [
        ((16, 16, 8), 2, (13, 13, 6)),  # 29 of 32 by rooms of 15, 15 and 7: 11.8, 11.8 and 5.5
        ((16, 16, 16), 1, (6, 5, 5)),
        ((16, 1, 1), 1, (14, 1, 1)),
        ((16, 16, 4), 2, (14, 14, 4)),
        ((16, 12, 4), 2, (16, 12, 4)),  # all that there is
    ],
)
def test_capacities_follow_the_room(rooms: tuple[int, ...], overlap: int, held: tuple[int, ...]) -> None:
    found = capacities_by_room(rooms, "abc", n_experts=16, overlap=overlap)
    assert sum(found) == 16 * overlap
    assert all(1 <= n <= room for n, room in zip(found, rooms, strict=True))
    assert found == held


@pytest.mark.parametrize(
    ("rooms", "overlap", "told"),
    [
        ((16, 8, 4), 2, "room for 28 experts of a layer, and 16 x overlap 2 are 32: room for 4 is missing"),
        ((16, 16, 0), 1, "c would have no room for one expert"),
    ],
)
def test_what_is_missing_is_told(rooms: tuple[int, ...], overlap: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        capacities_by_room(rooms, "abc", n_experts=16, overlap=overlap)
