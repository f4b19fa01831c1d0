"""What callbacks tell of a run that was interrupted is what they tell of one that was not."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fomoe_pl.callbacks import RoutingStability, RunPictures
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

SITES, STEPS = 2, 16
SAVED_AT = (6, 8)  # in mid-round, and at a round's end between two looks
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ghost": ("federated", {"local_steps": 4, "overlap": 1}),
    "random": ("federated", {"local_steps": 4, "overlap": 1, "placement": "random", "reshuffle_rounds": 1}),
    "ddp": ("ddp", {}),
}
OTHER = "ghost with more experts"


class Notes(L.Callback):
    """Every view, by step; saves on the way."""

    def __init__(self, stability: RoutingStability, path: str | None = None) -> None:
        self.stability, self.path = stability, path
        self.views: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        step = trainer.global_step
        if self.stability.view is not None:
            self.views.setdefault(step, dict(self.stability.view.values))
        if self.path and step in SAVED_AT:
            trainer.save_checkpoint(f"{self.path}-{step}.ckpt")


def _watch(rank: int, root: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, SITES, folder):
        for name, (strategy, settings) in {**RUNS, OTHER: RUNS["ghost"]}.items():
            for start in (0, *SAVED_AT) if name in RUNS else SAVED_AT:
                settings = settings | {"overlap": 2} if name == OTHER else settings
                stability, pictures = RoutingStability(2, 3, 6, 7), RunPictures(every_n_steps=3)
                notes = Notes(stability, None if start else f"{folder}/{name}")
                logger = TensorBoardLogger(folder, name=f"{name}_{start}", version="", default_hp_metric=False)
                run = Run(root=root, folder=folder, strategy=strategy, settings=settings,
                          trainer={"max_steps": STEPS, "logger": logger})  # fmt: skip
                torch.manual_seed(1)
                path = f"{folder}/{name.split()[0]}-{start}.ckpt" if start else None
                fit(run, rank, SITES, [stability, pictures, notes], path)
                loads = pictures._loads.columns() if rank == 0 else None
                found[f"{name}_{start}"] = notes.views, dict(stability.latest), loads
    return found


@pytest.fixture(scope="module")
def watched(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run_distributed(_watch, SITES, root, str(folder))


def same(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found.keys() == expected.keys() and all(
        value == expected[key] or (math.isnan(value) and math.isnan(expected[key])) for key, value in found.items()
    )


@pytest.mark.parametrize("start", SAVED_AT)
@pytest.mark.parametrize("name", RUNS)
def test_every_round_and_the_end_are_those_of_the_whole_run(watched: Any, name: str, start: int) -> None:
    for site in watched[1][: 1 if name == "ddp" else SITES]:  # without rounds a view is rank zero's, who saves
        views, latest, _ = site[f"{name}_0"]
        part, part_latest, _ = site[f"{name}_{start}"]
        ends = [step for step in part if step > start]
        assert len(ends) >= 3
        assert any("routing/churn/mean" in part[step] for step in ends)
        for step in ends:
            assert same(part[step], views[step]), f"step {step}"
        assert same(part_latest, latest)


@pytest.mark.parametrize("start", SAVED_AT)
@pytest.mark.parametrize("name", RUNS)
def test_timeline_and_saturation_begin_with_the_run(watched: Any, name: str, start: int) -> None:
    folder, sites = watched
    (whole, edges), (part, part_edges) = (sites[0][f"{name}_{n}"][2] for n in (0, start))
    assert part_edges == edges
    assert edges[0] == 0
    assert torch.equal(part, whole)

    def saturation(n: int) -> list[tuple[int, float]]:
        events = EventAccumulator(str(folder / f"{name}_{n}")).Reload()
        return [(point.step, point.value) for point in events.Scalars("routing/saturation/mean")]

    assert saturation(start) == saturation(0)
    assert saturation(0)[0][0] < start < saturation(0)[-1][0]


@pytest.mark.parametrize("start", SAVED_AT)
def test_where_a_site_has_other_experts_picks_are_not_compared_with_the_old_ones(watched: Any, start: int) -> None:
    views, _, (_, edges) = watched[1][0][f"{OTHER}_{start}"]
    assert "routing/churn/mean" in watched[1][0]["ghost_0"][0][12]
    assert "routing/churn/mean" not in views[12]
    assert "routing/churn/mean" in views[16]
    assert edges[0] == 0  # loads are all sites' in any case
