"""Saving while training goes on: what is in the checkpoint, when it counts, what is sent, and how a run ends."""

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint.format import read_manifest
from fomoe_pl.federation.federation import Federation
from tests.distributed import run_distributed
from tests.strategies.observers import EachStep, Traffic
from tests.strategies.test_checkpoint import differences
from tests.training import Run, fit, launched_as, make_trainer

SITES, K, EVERY, STEPS = 2, 2, 4, 14
FEDERATED = {"local_steps": K, "overlap": 1, "inner_moments": "average"}
HELD, RELEASED_AT = "step=8.ckpt", 11  # in the middle of a round


class Release(L.Callback):
    """Lets the held write go on, and waits until it is done."""

    def __init__(self, folder: Path, released: threading.Event) -> None:
        self.folder, self.released = folder, released

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == RELEASED_AT:
            self.released.set()
            while not files.is_complete(self.folder / HELD, 8) or (self.folder / "step=4.ckpt").exists():
                time.sleep(0.01)


def make_run(root: str, folder: str, strategy: str, steps: int, **settings: Any) -> Run:
    own = {**FEDERATED, **settings} if strategy == "federated" else settings
    return Run(root=root, folder=folder, strategy=strategy, settings=own,
               trainer={"max_steps": steps, "enable_checkpointing": True})  # fmt: skip


def _held(rank: int, root: str, folder: str, strategy: str) -> Any:
    """Site 1 (of data-parallel ranks, 0) cannot write its checkpoint of step 8 before step 11."""
    released, write = threading.Event(), files.write
    writer = 1 if strategy == "federated" else 0

    def held(path: Path, *args: Any) -> None:
        if rank == writer and path.name == HELD:
            assert released.wait(60)
        write(path, *args)

    def look(trainer: L.Trainer) -> tuple[str, list[str]]:
        last = trainer.strategy.checkpoints.last_saved
        return last.name if last else "", sorted(p.name for p in saved.glob("*.ckpt"))

    with launched_as(rank, SITES, folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", held)
        saved, seen, traffic = Path(folder, "saved"), EachStep(look), Traffic()
        saver = ModelCheckpoint(saved, filename="{step}", every_n_train_steps=EVERY)
        run = make_run(root, folder, strategy, STEPS)
        trainer = fit(run, rank, SITES, [Release(saved, released), seen, traffic, saver])
    dist.barrier()  # until then the first rank may be removing what has been replaced
    return seen.seen, traffic.record.calls, look(trainer)


@pytest.fixture(scope="module")
def held(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_distributed(_held, SITES, root, str(tmp_path_factory.mktemp("held")), "federated")


def test_the_old_checkpoint_counts_and_stays_until_the_new_one_is_complete(held: list[Any]) -> None:
    for seen, _, end in held:
        at = dict(enumerate(seen, 1))
        for step in (8, 9, 10):
            assert at[step] == ("step=4.ckpt", ["step=4.ckpt"])
        # In the middle of a round it is complete, which sites tell each other at the round's end.
        assert at[RELEASED_AT] == ("step=4.ckpt", [HELD])
        assert at[12] == (HELD, [HELD])
        assert end == ("step=14.ckpt", ["step=14.ckpt"])


def test_sites_tell_how_a_save_ended_in_no_message_of_its_own(held: list[Any]) -> None:
    for _, calls, _ in held:
        of_batch = {batch: [(c.name, c.nbytes) for c in calls if c.batch == batch] for batch in range(1, STEPS + 1)}
        assert of_batch[2] == of_batch[6] == of_batch[10]
        assert of_batch[2]
        assert not of_batch[9]
        assert not of_batch[RELEASED_AT]


def test_data_parallel_ranks_save_while_they_train(root: str, tmp_path: Path) -> None:
    for seen, _, end in run_distributed(_held, SITES, root, str(tmp_path), "ddp"):
        at = dict(enumerate(seen, 1))
        assert at[10] == ("step=4.ckpt", ["step=4.ckpt"])
        assert at[RELEASED_AT][1] == [HELD]
        assert end == ("step=14.ckpt", ["step=14.ckpt"])


def _both_ways(rank: int, root: str, folder: str) -> list[Any]:
    write, ledgers = files.write, []

    def slow(path: Path, *args: Any) -> None:
        time.sleep(0.2)  # training changes everything meanwhile
        write(path, *args)

    with launched_as(rank, SITES, folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", slow)
        for async_save in (True, False):
            torch.manual_seed(7)
            saver = ModelCheckpoint(f"{folder}/{async_save:d}", filename="{step}", every_n_train_steps=3, save_top_k=-1)
            run = make_run(root, folder, "federated", 7, async_save=async_save, placement="random")
            ledgers.append(fit(run, rank, SITES, [saver]).strategy.ledger.state_dict())
    return ledgers


def test_what_is_written_is_what_there_was_when_it_was_saved(root: str, tmp_path: Path) -> None:
    for background, at_once in run_distributed(_both_ways, SITES, root, str(tmp_path)):
        assert background == at_once, "bytes do not depend on when a save is settled"
    for step in (3, 6):  # in the middle of a round, and at the end of one
        ours, theirs = (tmp_path / kind / f"step={step}.ckpt" for kind in ("1", "0"))
        names = sorted(read_manifest(ours)["files"])
        assert names == sorted(read_manifest(theirs)["files"])
        for name in names:
            if name.endswith(".safetensors"):
                assert differences(load_file(ours / name), load_file(theirs / name)) == [], name
        for name in ("site-00000.pt", "site-00001.pt", "trainer.pt"):
            own, other = (torch.load(path / name, weights_only=False) for path in (ours, theirs))
            for part in {*own} - {"strategy", "callbacks", "rng"}:
                assert differences({part: own[part]}, {part: other[part]}) == [], f"{name}: {part}"
            if "strategy" in own:
                assert differences(own["strategy"]["federation"], other["strategy"]["federation"]) == []
                assert differences(own["rng"]["torch"], other["rng"]["torch"]) == []


class SaveTwice(L.Callback):
    """Saves two times in a row after step 2, and ends as told after the second."""

    def __init__(self, folder: str, error: BaseException | None) -> None:
        self.folder, self.error = folder, error
        self.stalls: list[float] = []
        self.last: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != K:
            return
        strategy: Any = trainer.strategy
        for name in ("a", "b"):
            before = strategy.save_seconds
            trainer.save_checkpoint(f"{self.folder}/{name}.ckpt")
            self.stalls.append(strategy.save_seconds - before)
            self.last.append(strategy.checkpoints.last_saved.name if strategy.checkpoints.last_saved else "")
        if self.error:
            raise self.error


WRITING, COMPARING = 2.0, 0.1  # seconds of each save on site 1, and of the comparison of sites before it


def _twice(rank: int, root: str, folder: str, error: BaseException | None) -> Any:
    seal, compare = files.seal, Federation.check_agreement

    def slow(*args: Any) -> None:
        time.sleep(WRITING * rank)
        seal(*args)

    def slowly_compared(federation: Federation) -> None:
        time.sleep(COMPARING)
        compare(federation)

    with launched_as(rank, SITES, folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "seal", slow)
        patch.setattr(Federation, "check_agreement", slowly_compared)
        twice, run = SaveTwice(folder, error), make_run(root, folder, "federated", 4)
        trainer = make_trainer(run, rank, SITES, [twice])
        try:
            trainer.fit(run.module(), run.datamodule())
        except (SIGTERMException, ValueError) as raised:
            error = raised
        return twice.stalls, twice.last, trainer.strategy.checkpoints.last_saved, error and error.args


@pytest.mark.parametrize("error", [None, ValueError("a mistake"), SIGTERMException()])
def test_a_save_waits_for_the_one_before_and_a_run_for_its_last(
    root: str, tmp_path: Path, error: BaseException | None
) -> None:
    for stalls, last, at_end, args in run_distributed(_twice, SITES, root, str(tmp_path), error):
        assert COMPARING < stalls[0] < WRITING  # the second one waits, as `last` tells
        assert last == ["", "a.ckpt"]
        # A run that is not stopped ends with a checkpoint of its last step, that of Lightning's own callback.
        assert at_end == tmp_path / ("b.ckpt" if error else "checkpoints/epoch=1-step=4.ckpt")
        if isinstance(error, SIGTERMException):
            assert args[0] == str(tmp_path / "b.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt*")) == ["a.ckpt", "b.ckpt"]  # no third when stopped
    assert not list(tmp_path.rglob("stopped*"))
