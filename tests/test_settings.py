"""What a command line asks for and cannot have, or has in a way of its own; in this process, without training."""

import csv
import json
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.loggers import CSVLogger, Logger

from fomoe_pl.callbacks import RunReport
from fomoe_pl.callbacks.curves import ResumedRows
from fomoe_pl.callbacks.observed import run_folder
from fomoe_pl.callbacks.supported import REFUSED
from fomoe_pl.checkpoint.resuming import resolve
from fomoe_pl.cli import FoMoECLI, main
from fomoe_pl.compare.runs import Run, check_comparable
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import check_local
from tests.test_cli import QUICKSTART, small
from tests.training import Run as Training
from tests.training import fit

SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fomoe: ")]
    return line


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a command but the training itself."""
    monkeypatch.setattr(L.Trainer, "fit", wraps(L.Trainer.fit)(lambda self, *_, **__: None))


# -- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--trainer.callbacks+", SAVER, "--trainer.callbacks.dirpath", "memory://bucket/run"], "dirpath"),
        (["--trainer.callbacks+", "fomoe_pl.callbacks.RunReport", "--trainer.callbacks.folder", "gs://b/r"], "folder"),
        (["--trainer.logger.init_args.save_dir", "s3://bucket/runs"], "trainer.logger.init_args.save_dir"),
        (["--trainer.logger.init_args.name", "hf://datasets/x"], "trainer.logger.init_args.name"),
        (["--trainer.default_root_dir", "file:///tmp/run"], "trainer.default_root_dir"),
        (["--ckpt_path", "https://host/last.ckpt"], "ckpt_path"),
    ],
)  # fmt: skip
def test_no_url_becomes_a_folder(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], key: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = refused(["fit", *small(root, tmp_path), *words], capsys)
    assert key in line.split(" = ")[0]
    assert "is a URL, and only local paths are served" in line
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize("command", [["compare", "s3://bucket/run"], ["compare", "runs", "--csv", "memory://x/a.csv"]])
def test_no_url_is_compared(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert "is a URL" in refused(command, capsys)


@pytest.mark.parametrize("path", ["runs/a", "/data/a=b", "data:v2", "~/runs", Path("a:b/c"), None, 3, "C"])
def test_local_paths_are_no_urls(path: object) -> None:
    check_local("key", path)


# -- callbacks ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[Any]] = {
    "StochasticWeightAveraging": [1e-2], "ModelPruning": ["l1_unstructured"], "GradientAccumulationScheduler": [{0: 2}],
}  # fmt: skip


def kinds() -> list[type[theirs.Callback]]:
    found = [getattr(theirs, name) for name in theirs.__all__]
    return [kind for kind in found if issubclass(kind, tuple(REFUSED)) and kind is not theirs.BaseFinetuning]


@pytest.mark.parametrize("kind", kinds())
def test_callbacks_that_would_change_the_weights_are_refused(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unstarted: None,
    kind: type[theirs.Callback],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    callback = kind(*ARGUMENTS.get(kind.__name__, []))
    made = FoMoECLI.instantiate_trainer
    monkeypatch.setattr(FoMoECLI, "instantiate_trainer", lambda self, **given: _with(made(self, **given), callback))
    line = refused(["fit", *small(root, tmp_path)], capsys)
    assert f"trainer.callbacks = '{kind.__name__}': " in line


def _with(trainer: L.Trainer, callback: theirs.Callback) -> L.Trainer:
    trainer.callbacks.append(callback)
    return trainer


@pytest.mark.parametrize(
    "words",
    [["--trainer.enable_progress_bar", "false"], ["--trainer.enable_checkpointing", "false"],
     ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]],
)  # fmt: skip
def test_what_is_switched_off_is_left_out(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unstarted: None, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    off = {word.removeprefix("--trainer.enable_") for word in words[::2]}
    command = FoMoECLI(["fit", *QUICKSTART, "--data.root", root, *words])
    names = {type(callback).__name__ for callback in command.trainer.callbacks}
    assert ("FoMoEProgressBar" in names) == ("progress_bar" not in off)
    assert ("ModelCheckpoint" in names) == ("checkpointing" not in off)
    assert {"RoutingStability", "RunReport", "ThroughputMonitor"} <= names


def test_a_time_between_validations_is_refused_where_clocks_differ(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unstarted: None
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(["fit", *small(root, tmp_path), "--trainer.val_check_interval", "00:00:01:30"], capsys)
    assert "trainer.val_check_interval = '90 s': is a time" in line
    FoMoECLI(["fit", *small(root, tmp_path), "--trainer.strategy", "single_site", "--trainer.devices", "1",
              "--trainer.val_check_interval", "00:00:01:30"])  # fmt: skip


# -- where `auto` looks ---------------------------------------------------------------------------------------------


def test_auto_is_refused_where_every_start_has_a_folder_of_its_own(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unstarted: None
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", *small(root, tmp_path), "--ckpt_path", "auto", "--trainer.logger.init_args.version", "null"]
    assert "gives every start a folder of its own" in refused(words, capsys)
    (tmp_path / "dir").mkdir()
    FoMoECLI([*words, "--trainer.callbacks+", SAVER, "--trainer.callbacks.dirpath", str(tmp_path / "dir"),
              "--trainer.logger.init_args.version", "3"])  # fmt: skip


def saved(root: str, folder: Path, name: str, callbacks: list[Any] | None = None) -> None:
    saver = theirs.ModelCheckpoint(folder, filename=name, every_n_train_steps=2, save_top_k=-1)
    trainer = {"max_steps": 4, "enable_checkpointing": True}
    fit(Training(root=root, folder=str(folder), strategy="single", trainer=trainer), 0, 1, [saver, *(callbacks or [])])


def test_auto_finds_the_newest_in_all_folders_and_below(root: str, tmp_path: Path) -> None:
    saved(root, tmp_path / "a", "{step}-{train/loss:.2f}")
    assert not list((tmp_path / "a").glob("*.ckpt")), "a metric's slash makes a folder"
    found = resolve([tmp_path / "none", tmp_path / "a"], "auto")
    assert found is not None
    assert "step=4" in found


def test_scratch_is_scratch_and_loud_beside_others(root: str, tmp_path: Path) -> None:
    assert resolve([tmp_path / "run/v1/checkpoints"], "auto", tmp_path / "run") is None
    saved(root, tmp_path / "run/v0/checkpoints", "last")
    with pytest.warns(UserWarning, match=r"starting from scratch, though .*v0/checkpoints/last.ckpt"):
        assert resolve([tmp_path / "run/v1/checkpoints"], "auto", tmp_path / "run") is None


# -- what runs leave behind -----------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_rows(root: str, tmp_path: Path) -> None:
    def train(steps: int, ckpt_path: str | None) -> None:
        trainer: dict[str, Any] = {"max_steps": steps, "enable_checkpointing": True,
                   "logger": CSVLogger(tmp_path, name="run", version="", flush_logs_every_n_steps=1)}  # fmt: skip
        saver = theirs.ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        run = Training(root=root, folder=str(tmp_path), strategy="single", trainer=trainer)
        fit(run, 0, 1, [ResumedRows([trainer["logger"]]), saver], ckpt_path=ckpt_path)

    def steps() -> list[int]:
        with (tmp_path / "run/metrics.csv").open() as file:
            return sorted({int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]})

    train(5, None)
    assert steps() == [0, 1, 2, 3, 4]
    train(7, str(tmp_path / "saved/step=2.ckpt"))
    assert steps() == [0, 1, 2, 3, 4, 5, 6], "those before the checkpoint stayed, those after it are there once"
    with (tmp_path / "run/metrics.csv").open() as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == 7


class Numbered(Logger):
    """As W&B's, MLflow's and Comet's: one folder for all, and an id for each run."""

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__()
        self._folder, self._run = folder, run

    name = property(lambda self: "project")
    version = property(lambda self: self._run)
    save_dir = property(lambda self: str(self._folder))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Nothing."""

    log_hyperparams = log_metrics


def test_every_run_has_a_report_of_its_own(root: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        trainer = {"max_steps": 2, "logger": Numbered(tmp_path, name)}
        fit(Training(root=root, folder=str(tmp_path), strategy="single", trainer=trainer), 0, 1, [RunReport()])
    found = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("report.json"))
    assert found == [Path("project/first/report.json"), Path("project/second/report.json")]
    assert run_folder(SimpleNamespace(logger=None, default_root_dir="here")) == Path("here")


@pytest.mark.parametrize("part", [{"limit_val_batches": 1}, {"limit_val_batches": 0.5}])
def test_a_part_of_the_validation_is_not_compared_with_all_of_it(root: str, tmp_path: Path, part: Any) -> None:
    runs = []
    for name, limits in (("whole", {"limit_val_batches": None}), ("part", part)):
        trainer = {"max_steps": 2, "val_check_interval": 2, "logger": Numbered(tmp_path, name), **limits}
        fit(Training(root=root, folder=str(tmp_path), strategy="single", trainer=trainer), 0, 1, [RunReport()])
        runs.append(Run(name, json.loads((tmp_path / "project" / name / "report.json").read_text())))
    assert runs[0].report["data"]["validated"] == "all"
    with pytest.raises(ConfigError, match="validated is all and the first"):
        check_comparable(runs)


@pytest.mark.parametrize(("steps", "whole"), [(1, False), (-1, True), (1000, True)])
def test_a_part_before_training_is_not_reported_as_the_whole(
    root: str, tmp_path: Path, steps: int, whole: bool
) -> None:
    trainer = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": None, "num_sanity_val_steps": steps,
               "logger": Numbered(tmp_path, "run")}  # fmt: skip
    fit(Training(root=root, folder=str(tmp_path), strategy="single", trainer=trainer), 0, 1, [RunReport()])
    report = json.loads((tmp_path / "project/run/report.json").read_text())
    assert bool(report["validation_before_training"]) == whole
