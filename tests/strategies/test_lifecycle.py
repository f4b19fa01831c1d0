"""Where a run's steps are counted, where it may end, and what it ends with; the Trainer used from Python."""

import copy
import pickle
import re
import signal
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fomoe_pl.checkpoint.format import newest, read_manifest
from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.data import FoMoEData
from fomoe_pl.errors import ConfigError
from fomoe_pl.module import FoMoEModule
from fomoe_pl.strategies import CountedDDPStrategy, FederatedStrategy, SingleSiteStrategy
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as, make_trainer, parameters, single

SITES, K = 2, 4
FOMOE = {"local_steps": K, "overlap": 1, "inner_moments": "average"}


class Seen(L.Callback):
    """Batches, and the steps at which it was validated."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["inputs"].clone())

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.validated.append(trainer.global_step)


class At(L.Callback):
    """Does something after a micro-batch, counted from the start of `fit`."""

    def __init__(self, micro_batch: int, what: Any) -> None:
        self.micro_batch, self.what, self.count = micro_batch, what, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.count += 1
        if self.count == self.micro_batch:
            self.what(trainer)


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def alone(root: str, folder: Path, **trainer: Any) -> Run:
    return Run(root=root, folder=str(folder), strategy="single", trainer={"max_steps": 8, **trainer})


def saver(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=every, save_top_k=-1)


# -- one count of steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3])
def test_a_signal_between_two_saves_loses_no_step_of_one_site(root: str, tmp_path: Path, micro: int) -> None:
    run = alone(root, tmp_path, max_steps=50, accumulate_grad_batches=micro, enable_checkpointing=True)
    noted = At(6 * micro + micro // 2, lambda trainer: signal.raise_signal(signal.SIGTERM))
    trainer = make_trainer(run, 0, 1, [noted, saver(tmp_path, 4)])
    with pytest.raises(SIGTERMException) as stopped:
        trainer.fit(run.module(), run.datamodule())
    steps = 6 if micro == 1 else 7  # in the middle of a step: that step is finished first
    assert trainer.global_step == steps
    assert read_manifest(Path(stopped.value.args[0]))["optimizer_steps"] == steps


def _from_single(rank: int, root: str, folder: str, checkpoint: str) -> tuple[int, int]:
    with launched_as(rank, SITES, folder):
        run = Run(root=root, folder=folder, settings=FOMOE, trainer={"max_steps": 16})
        trainer = fit(run, rank, SITES, [], checkpoint)
        return trainer.strategy.optimizer_steps, trainer.strategy.rounds_done


def test_rounds_go_on_where_one_site_had_counted_to(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, max_steps=6, enable_checkpointing=True)
    fit(run, 0, 1, [saver(tmp_path, 6)])
    [checkpoint] = (tmp_path / "saved").iterdir()
    assert read_manifest(checkpoint)["optimizer_steps"] == 6
    # After steps 8, 12 and 16.
    assert run_distributed(_from_single, SITES, root, str(tmp_path), str(checkpoint)) == [(16, 3)] * SITES


# -- epochs of an endless stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [4, 6])
def test_sections_of_the_stream_follow_each_other_and_a_resume_goes_on(
    root: str, tmp_path: Path, workers: int, stop_at: int
) -> None:
    def trained(steps: int, limit: Any, path: str | None = None) -> tuple[Seen, dict[str, torch.Tensor]]:
        run = replace(alone(root, tmp_path, max_steps=steps, limit_train_batches=limit), data={"num_workers": workers})
        run.trainer["enable_checkpointing"] = True
        torch.manual_seed(1)
        seen = Seen()
        callback = ModelCheckpoint(tmp_path / f"{limit}", filename="{step}", every_n_train_steps=100)
        trainer = fit(run, 0, 1, [seen, callback], path)
        return seen, parameters(trainer)

    whole, wanted = trained(10, 1.0)
    sections, found = trained(10, 4)
    assert all(map(torch.equal, whole.batches, sections.batches))
    assert len(sections.batches) == 10
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    trained(stop_at, 4)
    part, resumed = trained(10, 4, str(tmp_path / f"4/step={stop_at}.ckpt"))
    assert all(map(torch.equal, whole.batches[stop_at:], part.batches))
    assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"overfit_batches": 3}, "trainer.overfit_batches"),
        ({"limit_train_batches": 2, "accumulate_grad_batches": 4}, "trainer.limit_train_batches"),
        ({"limit_train_batches": 9, "accumulate_grad_batches": 6}, "trainer.limit_train_batches"),
        ({"max_epochs": 2}, "trainer.max_epochs"),
        ({"max_epochs": None, "max_steps": -1}, "trainer.max_epochs"),
        ({"check_val_every_n_epoch": 3}, "trainer.check_val_every_n_epoch"),
        ({"precision": "64-true"}, "trainer.precision"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches"),
    ],
)
def test_what_cannot_be_served_is_refused_without_a_command_line(
    root: str, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        fit(alone(root, tmp_path, **settings), 0, 1)


def test_a_run_by_epochs_validates_and_saves_its_last_step(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, max_steps=-1, max_epochs=2, limit_train_batches=5, limit_val_batches=1)
    run.trainer.update(val_check_interval=4, enable_checkpointing=True)
    seen = Seen()
    fit(run, 0, 1, [seen, saver(tmp_path, 4)])
    assert seen.validated == [4, 8, 10]
    assert read_manifest(newest(tmp_path / "saved")[0])["optimizer_steps"] == 10  # type: ignore[arg-type]


def test_lightnings_observers_and_profiler_see_the_run(root: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    profiler = SimpleProfiler(tmp_path, filename="times")
    measures = find_spec("psutil") is not None  # without it Lightning's monitor refuses a CPU
    callbacks = [LearningRateMonitor("step"), Timer("00:01:00:00")]
    callbacks += [DeviceStatsMonitor(cpu_stats=True)] if measures else []
    done = fit(alone(root, tmp_path, logger=logger, profiler=profiler, max_steps=3), 0, 1, callbacks)
    header, *rows = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    (place,) = (i for i, name in enumerate(header.split(",")) if re.fullmatch(r"lr-\w+/pg1", name))
    rates = [row.split(",")[place] for row in rows]
    assert [float(rate) for rate in rates if rate] == pytest.approx([0.005, 0.01, 0.01])
    assert ("DeviceStatsMonitor.on_train_batch_start/cpu_percent" in header) == measures
    assert "run_training_batch" in (tmp_path / "fit-times.txt").read_text()
    assert done.global_step == 3


@pytest.mark.parametrize("make", [SingleSiteStrategy, FederatedStrategy])
def test_a_module_without_experts_is_refused(make: Any, tmp_path: Path) -> None:
    trainer = L.Trainer(strategy=make(), devices=1, accelerator="cpu", max_steps=2, logger=False,
                        enable_checkpointing=False, default_root_dir=str(tmp_path))  # fmt: skip
    with pytest.raises(ConfigError, match="model = 'BoringModel': has no `config` of a mixture of experts"):
        trainer.fit(BoringModel())


def test_another_accumulation_does_not_cut_a_step_short(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, accumulate_grad_batches=3, max_steps=3, enable_checkpointing=True)
    fit(run, 0, 1, [saver(tmp_path, 3)])
    path = str(tmp_path / "saved/step=3.ckpt")
    with pytest.raises(ConfigError, match="accumulate_grad_batches = 2"):
        fit(alone(root, tmp_path, accumulate_grad_batches=2), 0, 1, [], path)


# -- the end ---------------------------------------------------------------------------------------------------------


def _ended(rank: int, root: str, folder: str, how: str) -> tuple[int, int, list[int], list[tuple[int, int]]]:
    """Rounds of 4 steps; saved every 8, validated every 5 or so."""
    with launched_as(rank, SITES, folder):
        trainer = {"max_steps": 30, "limit_val_batches": 1, "val_check_interval": 5, "enable_checkpointing": True}
        callbacks: list[Any] = [seen := Seen(), saver(Path(folder), 8)]
        if how == "EarlyStopping":
            callbacks.append(EarlyStopping("val/loss", stopping_threshold=1e9, patience=100))
        elif how == "time":
            trainer |= {"max_time": {"seconds": 0}}
        elif how == "one site":
            callbacks += [At(6, stop)] if rank == 1 else []
        elif how == "accumulation":
            callbacks += [At(7, stop)]
            trainer |= {"accumulate_grad_batches": 2}
        else:
            trainer |= {"max_steps": int(how)}
        done = fit(Run(root=root, folder=folder, settings=FOMOE, trainer=trainer), rank, SITES, callbacks)
        paths = Path(folder, "saved").glob("*.ckpt")
        saved = [(m["optimizer_steps"], m["rounds"]) for m in map(read_manifest, paths)]
        return done.global_step, done.strategy.rounds_done, seen.validated, sorted(saved)


@pytest.mark.parametrize(
    ("how", "steps", "rounds"),
    [("EarlyStopping", 8, 2), ("one site", 8, 2), ("time", 4, 1), ("accumulation", 4, 1), ("6", 6, 2), ("18", 18, 5)],
)
def test_a_run_ends_with_its_round_validated_and_saved(
    root: str, tmp_path: Path, how: str, steps: int, rounds: int
) -> None:
    for ended in run_distributed(_ended, SITES, root, str(tmp_path), how):
        assert ended[:2] == (steps, rounds)
        assert ended[2][-1] == steps
        assert ended[3][-1] == (steps, rounds)


def test_a_callback_ends_one_site_behind_a_whole_step(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, accumulate_grad_batches=4, max_steps=9, enable_checkpointing=True)
    trainer = fit(run, 0, 1, [At(6, stop), saver(tmp_path, 100)])
    assert trainer.global_step == 2
    assert read_manifest(tmp_path / "saved/step=2.ckpt")["optimizer_steps"] == 2


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_save_within_a_step_is_one_at_its_end_and_goes_on_bit_for_bit(root: str, tmp_path: Path) -> None:
    def trained(path: str | None, *callbacks: L.Callback) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        seen = Seen()
        run = alone(root, tmp_path, accumulate_grad_batches=4, max_steps=5)
        return seen.batches, parameters(fit(run, 0, 1, [*callbacks, seen], path))

    path = tmp_path / "within.ckpt"
    batches, whole = trained(None, At(6, lambda trainer: trainer.save_checkpoint(path)))
    assert read_manifest(path)["optimizer_steps"] == 2
    rest, resumed = trained(str(path))
    assert all(map(torch.equal, batches[8:], rest))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class CallbackError(Exception):
    """A mistake of somebody's callback."""


def _one_fails(rank: int, root: str, folder: str, kind: str) -> str:
    def fail(trainer: L.Trainer) -> None:
        raise CallbackError("the cause")

    with launched_as(rank, SITES, folder):
        trainer = {"max_steps": 8, "enable_checkpointing": True}
        callback = ModelCheckpoint(Path(folder, "saved"), every_n_train_steps=100, save_on_exception=True)
        callbacks = [callback, *([At(2, fail)] if rank == 1 else [])]
        settings = FOMOE if kind == "federated" else {}
        run = Run(root=root, folder=folder, strategy=kind, settings=settings, trainer=trainer)
        try:
            fit(run, rank, SITES, callbacks)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"


@pytest.mark.parametrize("kind", ["federated", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_error_of_one_rank_is_its_own_and_meets_no_round(root: str, tmp_path: Path, kind: str) -> None:
    other, failed = run_distributed(_one_fails, SITES, root, str(tmp_path), kind)
    assert failed == "CallbackError: the cause"
    assert other.startswith("SiteLostError")
    assert not list((tmp_path).glob("saved/*"))


def test_one_site_saves_when_it_fails(root: str, tmp_path: Path) -> None:
    def fail(trainer: L.Trainer) -> None:
        raise CallbackError("the cause")

    callback = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_on_exception=True)
    with pytest.raises(CallbackError):
        fit(alone(root, tmp_path, enable_checkpointing=True), 0, 1, [callback, At(3, fail)])
    assert read_manifest(tmp_path / "saved/step=3.ckpt")["optimizer_steps"] == 3


# -- the Trainer from Python -----------------------------------------------------------------------------------------


def _used_again(rank: int, root: str, folder: str) -> list[str]:
    found = []
    with launched_as(rank, SITES, folder):
        run = Run(root=root, folder=folder, settings=FOMOE, trainer={"max_steps": 4, "enable_checkpointing": True})
        trainer, module, data = (
            make_trainer(run, rank, SITES, [saver(Path(folder), 100)]),
            run.module(),
            run.datamodule(),
        )
        trainer.fit(module, data)
        found.append(module.trainer.strategy.checkpoints.last_saved.name)
        pickle.dumps(module)
        try:
            trainer.save_checkpoint(Path(folder, "after.ckpt"))
        except ConfigError as error:
            found.append(str(error))
        again = make_trainer(run, rank, SITES)
        try:
            again.fit(module, run.datamodule())
        except RuntimeError as error:
            found.append(str(error))
        more = replace(run, trainer={"max_steps": 8})
        last = make_trainer(more, rank, SITES)
        last.fit(more.module(), data, ckpt_path=f"{folder}/saved/step=4.ckpt", weights_only=False)
        found.append(f"{last.global_step} {last.strategy.rounds_done}")
    return found


def test_sites_that_have_parted_say_so(root: str, tmp_path: Path) -> None:
    for saved, after, again, resumed in run_distributed(_used_again, SITES, root, str(tmp_path)):
        assert saved == "step=4.ckpt"
        assert "have parted" in after
        assert "step=4.ckpt" in after
        assert "has been trained" in again
        assert resumed == "8 2"


def test_a_second_fit_goes_on_from_a_checkpoint_or_not_at_all(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, max_steps=3)
    seen = Seen()
    trainer, module, data = make_trainer(run, 0, 1, [seen]), run.module(), run.datamodule()
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 6
    with pytest.raises(RuntimeError, match="has been trained"):
        trainer.fit(module, data)
    trainer.fit(module, data, ckpt_path=tmp_path / "after.ckpt", weights_only=False)
    whole = Seen()
    fit(alone(root, tmp_path, max_steps=6), 0, 1, [whole])
    assert all(map(torch.equal, seen.batches, whole.batches))
    assert len(seen.batches) == 6


def test_data_begins_again_with_a_new_run(root: str, tmp_path: Path) -> None:
    run, data = alone(root, tmp_path, max_steps=3), None
    seen = [Seen(), Seen()]
    data = run.datamodule()
    for callback in seen:
        make_trainer(run, 0, 1, [callback]).fit(run.module(), data)
    assert all(map(torch.equal, seen[0].batches, seen[1].batches))


def test_a_module_comes_from_a_checkpoint_and_validates_alike(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, max_steps=3, limit_val_batches=None)
    module = run.module()
    trainer = make_trainer(run, 0, 1)
    trainer.fit(module, run.datamodule())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = FoMoEModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.config == module.config
    assert loaded.optimizer_config == module.optimizer_config
    whole = load_global_model(tmp_path / "end.ckpt").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in loaded.transformer.state_dict().items())
    [found] = make_trainer(single(run), 0, 1).validate(loaded, run.datamodule(), verbose=False)
    assert found["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-6)
    copied = pickle.loads(pickle.dumps(loaded))
    assert copied.config == loaded.config
    copy.deepcopy(module)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("kind", [FederatedStrategy, CountedDDPStrategy])
def test_processes_that_hand_back_nothing_are_refused(kind: Any, method: str) -> None:
    with pytest.raises(ConfigError, match=f"start_method = '{method}'"):
        kind(start_method=method)
    kind(start_method="popen") if kind is CountedDDPStrategy else kind()


@pytest.mark.parametrize(
    "name", ["find_unused_parameters", "gradient_as_bucket_view", "ddp_comm_hook", "bucket_cap_mb"]
)
def test_arguments_without_effect_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = .*has no effect"):
        FederatedStrategy(**{name: 1})
    if name == "ddp_comm_hook":
        with pytest.raises(ConfigError, match=f"{name} = .*has no effect"):
            CountedDDPStrategy(**{name: 1})
    else:
        CountedDDPStrategy(**{name: 1})


def test_another_vocabulary_is_refused(root: str, tmp_path: Path) -> None:
    run = replace(alone(root, tmp_path), architecture={"vocab_size": 200})
    with pytest.raises(ConfigError, match=r"vocab_size = 200: must be at least .*\(257\)"):
        fit(run, 0, 1)


def test_somebodys_validation_loader_is_refused(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path, limit_val_batches=1)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    loader = torch.utils.data.DataLoader([{"inputs": tokens, "targets": tokens}] * 4, batch_size=None)
    with pytest.raises(ConfigError, match="val_dataloaders = 'NoneType'"):
        make_trainer(run, 0, 1).fit(run.module(), loader, loader)
    data = L.LightningDataModule()
    data.train_dataloader = data.val_dataloader = lambda: loader
    data.domains = ["text"]
    with pytest.raises(ConfigError, match="a batch has no bytes, domain"):
        make_trainer(run, 0, 1).fit(run.module(), datamodule=data)


def test_two_devices_for_one_site_are_refused(root: str, tmp_path: Path) -> None:
    run = alone(root, tmp_path)
    run.trainer["max_steps"] = 2
    trainer = L.Trainer(strategy="single_site", devices=2, accelerator="cpu", max_steps=2, logger=False)
    with pytest.raises(ConfigError, match=r"trainer.devices = 2"):
        trainer.fit(run.module(), run.datamodule())


@pytest.mark.parametrize(("given", "rule"), [([0], None), ([3], "device: cuda:3"), ([0, 1], "is one process")])
def test_one_site_takes_the_first_of_the_gpus(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[int], rule: str | None
) -> None:
    run = alone(root, tmp_path)
    trainer = L.Trainer(strategy="single_site", devices=1, accelerator="cpu", max_steps=1, logger=False)
    monkeypatch.setattr("fomoe_pl.strategies.single.requested_devices", lambda _: given)  # as Lightning notes GPUs
    with nullcontext() if rule is None else pytest.raises(ConfigError, match=rule):
        trainer.strategy.check_run(trainer, run.module(), run.datamodule(), fitting=False)


def test_batches_of_each_site_are_for_sites_with_rounds(root: str, tmp_path: Path) -> None:
    run = replace(alone(root, tmp_path), strategy="single", settings={}, data={"batch_size": [3]})
    trainer = make_trainer(run, 0, 1)
    with pytest.raises(ConfigError, match=r"data.batch_size = \[3\].*sites with rounds"):
        trainer.fit(run.module(), run.datamodule())


def test_seed_everything_is_the_seed_of_what_has_none(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    run = Run(root=root, folder="")
    assert (run.module().seed, run.datamodule().seed) == (0, 0)
    L.seed_everything(7)
    assert (run.module().seed, run.datamodule().seed) == (7, 7)
    assert (FoMoEModule(run.config, seed=0).seed, FoMoEData(root, seed=3).seed) == (0, 3)
    monkeypatch.delenv("PL_GLOBAL_SEED")
