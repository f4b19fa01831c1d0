"""Faults inside a run: gradients that are no numbers, and disks that cannot be written."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fomoe_pl.checkpoint import format as files
from tests.distributed import run_distributed
from tests.federation.toy import digest
from tests.strategies.observers import EachStep
from tests.training import Run, fit, launched_as, parameters

SITES = 2


class Poison(L.Callback):
    """Makes a gradient of one site infinite in some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        def poisoned(gradient: torch.Tensor) -> torch.Tensor:  # before DDP shares it
            return gradient * float("inf") if trainer.strategy.optimizer_steps in self.steps else gradient

        next(module.parameters()).register_hook(poisoned)


def _look(trainer: L.Trainer) -> tuple[dict[str, torch.Tensor], dict[str, float], list[float]]:
    steps = [float(s["step"]) for s in trainer.optimizers[0].state.values()]
    return parameters(trainer), dict(trainer.strategy.round_stats), steps


def _poisoned(rank: int, root: str, folder: str, limit: int) -> Any:
    with launched_as(rank, SITES, folder):
        found = {}
        for strategy, settings in (("federated", {"local_steps": 2, "overlap": 1}), ("ddp", {})):
            run = Run(root=root, folder=folder, strategy=strategy, settings=settings, trainer={"max_steps": 6},
                      max_skipped_steps=limit)  # fmt: skip
            look = EachStep(_look)
            # On site 1: one step of the second round, and all of the third.
            try:
                trainer = fit(run, rank, SITES, [look, Poison({3, 4, 5} if rank == 1 else set())])
            except RuntimeError as error:
                return str(error)
            found[strategy] = (
                look.seen,
                getattr(trainer.strategy, "federation", None) and digest(trainer.strategy.federation),
            )
        return found


@pytest.fixture(scope="module")
def poisoned(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_distributed(_poisoned, SITES, root, str(tmp_path_factory.mktemp("poisoned")), 100)


def test_a_step_without_numbers_changes_nothing(poisoned: list[Any]) -> None:
    steps = poisoned[1]["federated"][0]
    before, after = steps[4 - 1], steps[5 - 1]  # step 5 is in the middle of a round
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
    assert after[2] == before[2] == [3.0] * len(before[2]), "three of its first four steps were steps"
    assert poisoned[0]["federated"][0][4][2] == [5.0] * len(before[2])


def test_a_site_without_numbers_is_left_out_of_its_round_alone(poisoned: list[Any]) -> None:
    for site in range(SITES):
        stats = [numbers for _, numbers, _ in poisoned[site]["federated"][0]]
        assert [(s["skipped_steps"], s["left_out_sites"]) for s in (stats[1], stats[3], stats[5])] == [
            (0, 0), (1, 0), (2, 1),
        ]  # fmt: skip
        for values, _, _ in poisoned[site]["federated"][0]:
            assert all(value.isfinite().all() for value in values.values())
    assert poisoned[0]["federated"][1] == poisoned[1]["federated"][1]


def test_all_data_parallel_ranks_skip_the_same_step(poisoned: list[Any]) -> None:
    for (ours, _, steps), (theirs, _, others) in zip(poisoned[0]["ddp"][0], poisoned[1]["ddp"][0], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert all(value.isfinite().all() for value in ours.values())
        assert steps == others
    assert set(poisoned[0]["ddp"][0][-1][2]) == {3.0}


def test_too_many_skipped_steps_stop_the_run_and_name_the_site(root: str, tmp_path: Path) -> None:
    for message in run_distributed(_poisoned, SITES, root, str(tmp_path), 2):
        assert "3 optimizer steps had gradients that are not finite (site 1: 3)" in message


def _full_disk(rank: int, root: str, folder: str, async_save: bool) -> tuple[int, int, str | None, str]:
    """Saving after each second step; not all of it can be written from step 4 on."""
    with launched_as(rank, SITES, folder), pytest.MonkeyPatch.context() as patch:
        begin, write, finish = files.begin, files.write, files.finish

        def refused(path: Path) -> None:
            if path.name in ("step=8.ckpt", "step=9.ckpt"):
                raise PermissionError(30, "Read-only file system")
            begin(path)

        def full(path: Path, *args: Any) -> None:
            if rank == 1 and path.name == "step=4.ckpt":
                raise OSError(28, "No space left on device")
            write(path, *args)

        def read_only(path: Path, manifest: dict[str, Any]) -> None:
            if path.name == "step=6.ckpt":
                raise PermissionError(30, "Read-only file system")
            finish(path, manifest)

        told = io.StringIO()
        patch.setattr(sys, "stderr", told)
        patch.setattr(files, "begin", refused)
        patch.setattr(files, "write", full)
        patch.setattr(files, "finish", read_only)
        saver = ModelCheckpoint(f"{folder}/saved", filename="{step}", every_n_train_steps=2, save_top_k=1)
        run = Run(root=root, folder=folder, settings={"local_steps": 2, "async_save": async_save},
                  trainer={"max_steps": 9, "enable_checkpointing": True})  # fmt: skip
        trainer = fit(run, rank, SITES, [saver])
        last = trainer.strategy.checkpoints.last_saved
        return trainer.strategy.checkpoints.saves_failed, trainer.global_step, last and last.name, told.getvalue()


@pytest.mark.parametrize("async_save", [True, False])
def test_training_goes_on_without_a_disk_and_the_old_checkpoint_stays(
    root: str, tmp_path: Path, async_save: bool
) -> None:
    found = run_distributed(_full_disk, SITES, root, str(tmp_path), async_save)
    assert [site[:3] for site in found] == [(4, 9, "step=2.ckpt")] * SITES
    assert re.findall(r"NO CHECKPOINT after step (\d)", found[0][3]) == ["4", "6", "8", "9"]
    assert "NO CHECKPOINT" not in found[1][3]
    assert "site 1 cannot write" in found[1][3]
    assert files.newest(tmp_path / "saved") == (tmp_path / "saved" / "step=2.ckpt", [])
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=2.ckpt"]
