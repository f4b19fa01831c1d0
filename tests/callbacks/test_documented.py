"""docs/metrics.md has every tag that a run writes, with its unit, and no tag that none writes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.watched import RUNS

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
ONLY_ELSEWHERE = (  # a z-loss, a GPU, a save, a user's own
    "train/z_loss", "throughput/mfu_", "memory/activations_and_rest_MiB", "time/save_stall_s", "statistic/",
)  # fmt: skip
PLACES = {
    "kind": "[a-z]+", "domain": "[a-z]+", "ii": r"\d\d", "link": r"[\d.]+Gbps", "name": "[A-Za-z_]+", "statistic": "{}",
}  # fmt: skip


def statistics() -> str:
    section = PAGE.split("## Statistics of routing")[1].split("\n## ")[0]
    names = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall("`(.+?)`", cells(line)[0])
    ]
    return f"(?:(?:live_)?(?:{'|'.join(names)}))"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def documented() -> Iterator[tuple[str, str]]:
    """(pattern, unit) of each tag of the first table."""
    places = {**PLACES, "statistic": statistics()}
    for line in PAGE.split("## ")[0].splitlines():
        if line.startswith("| `"):
            tags, unit, *_ = cells(line)
            for tag in re.findall("`(.+?)`", tags):
                yield (
                    "".join(
                        places[part] if i % 2 else re.escape(part) for i, part in enumerate(re.split("<(.+?)>", tag))
                    ),
                    unit,
                )


@pytest.fixture(scope="module")
def written(watched_runs: Path) -> set[str]:
    return {tag for name in RUNS for tag in EventAccumulator(str(watched_runs / name)).Reload().Tags()["scalars"]}


def test_every_tag_is_documented(written: set[str]) -> None:
    patterns = [pattern for pattern, _ in documented()]
    assert sorted(tag for tag in written if not any(re.fullmatch(p, tag) for p in patterns)) == []


def test_every_documented_tag_is_written_and_has_a_unit(written: set[str]) -> None:
    for pattern, unit in documented():
        assert unit, pattern
        if not pattern.startswith(ONLY_ELSEWHERE):
            assert any(re.fullmatch(pattern, tag) for tag in written), pattern
