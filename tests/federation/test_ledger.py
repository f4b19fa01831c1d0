import json
from pathlib import Path

import pytest

from fomoe_pl.federation.ledger import KINDS, Ledger, ring_all_reduce_bytes


@pytest.mark.parametrize(
    ("payload", "group", "wire"), [(100, 1, 0), (100, 2, 100), (100, 4, 150), (10, 3, 13), (0, 8, 0), (2**62, 2, 2**62)]
)
def test_ring(payload: int, group: int, wire: int) -> None:
    assert ring_all_reduce_bytes(payload, group) == wire


def filled() -> Ledger:
    ledger = Ledger()
    ledger.all_reduce("dense", 100, 4)
    ledger.all_reduce("dense", 60, 4)
    ledger.all_reduce("expert", 50, 2)
    ledger.all_reduce("expert", 30, 3)
    ledger.send("migration", 7)
    ledger.send("evaluation", 5)
    ledger.all_reduce("evaluation", 8, 4)
    return ledger


def check(ledger: Ledger) -> None:
    payload = {"dense": 160, "expert": 80, "migration": 7, "evaluation": 13}
    wire = {"dense": 240, "expert": 50 + 40, "migration": 7, "evaluation": 5 + 12}
    assert {kind: ledger.payload(kind) for kind in KINDS} == dict.fromkeys(KINDS, 0) | payload
    assert {kind: ledger.wire(kind) for kind in KINDS} == dict.fromkeys(KINDS, 0) | wire
    assert (ledger.total_payload, ledger.total_wire) == (260, 354)
    assert ledger.calls == {"dense": 2, "expert": 2, "migration": 1, "evaluation": 2}


def test_sums_by_kind() -> None:
    check(filled())


def test_wire_bytes_do_not_depend_on_the_cuts() -> None:
    whole, cut = Ledger(), Ledger()
    whole.all_reduce("dense", 100, 3)
    for _ in range(10):
        cut.all_reduce("dense", 10, 3)
    assert whole.wire("dense") == cut.wire("dense") == 133


def test_state_goes_through_json_and_counting_goes_on() -> None:
    resumed = Ledger()
    resumed.load_state_dict(json.loads(json.dumps(filled().state_dict())))
    check(resumed)
    resumed.all_reduce("dense", 1, 4)
    resumed.send("migration", 1)
    assert (resumed.payload("dense"), resumed.payload("migration")) == (161, 8)


def test_every_kind_is_counted_by_somebody() -> None:
    """A kind that nothing is counted under would be a curve that is always 0."""
    package = Path(__file__).parents[2] / "fomoe_pl"
    counting = [path for part in ("federation", "strategies", "checkpoint") for path in (package / part).rglob("*.py")]
    source = "".join(path.read_text() for path in counting if path.name != "ledger.py")
    assert [kind for kind in KINDS if f'"{kind}"' not in source] == []
