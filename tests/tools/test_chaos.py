"""A dozen faults at moments drawn from a seed: runs always come back, with what they would have had without."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.tools import load

SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_come_back_from_a_dozen_faults(root: str, tmp_path: Path) -> None:
    load("chaos_site")
    run, chaos = load("chaos_run"), load("chaos")
    # Two sites each, and few strategies: the long campaign has all.
    worlds = (run.World("fomoe_overlap1", "vanished"), run.World("fomoe_random", None, ((1, 5),)), run.World("diloco"))
    campaign = chaos.Campaign(tmp_path / "chaos", SEED, 2, 4, 3, 60.0, Path(root), worlds)
    found = campaign.go(kills=6, others=3, torchrun=0, minutes=4)
    assert found.problems == []
    assert found.counts == {"hangs": 0, "corrupted": 0, "divergences": 0}
    assert all(made["ended"] for made in found.runs)
    kinds = [fault["kind"] for fault in found.faults]
    assert len(kinds) >= 12
    assert kinds.count("SIGKILL") >= 6
    page = chaos.page(campaign, "the test", 1.0)
    assert f"| runs completed | {len(found.runs)} of {len(found.runs)}, 0 of them under torchrun |" in page


def test_faults_are_those_of_the_seed() -> None:
    draw_attempts = load("chaos_run").draw_attempts

    def drawn(seed: int, kills_only: bool = False) -> list[dict[str, Any]]:
        return draw_attempts(random.Random(seed), 200, 4, kills_only)

    assert drawn(1) == drawn(1) != drawn(2)
    kinds = {fault["kind"] for attempt in drawn(1) for fault in attempt["faults"]}
    assert kinds == {
        "SIGKILL", "SIGTERM", "SIGINT", "bit flip", "full disk", "read-only folder", "shard away for a moment",
    }  # fmt: skip
    assert {attempt["damage"] for attempt in drawn(1)} == {
        None, "bit of a checkpoint flipped", "checkpoint cut", "checkpoint without manifest",
    }  # fmt: skip
    assert {fault["kind"] for attempt in drawn(1, True) for fault in attempt["faults"]} == {"SIGKILL"}
